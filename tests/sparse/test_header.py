"""The header reader against the gguf library, and malformed files."""

import random
import struct

import pytest

from vllm_powerquant.errors import PowerQuantConfigError
from vllm_powerquant.sparse.header import file_format, read_header

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A GGUF with an entry of each type, as (path, entries)."""
    path = tmp_path_factory.mktemp("header") / "model.bin"
    writer = gguf.GGUFWriter(path, "llama")
    entries = {"general.architecture": "llama", "a.text": "é\n😀", "a.yes": True, "a.float": 0.5}
    writer.add_string("a.text", entries["a.text"])
    writer.add_bool("a.yes", True)
    writer.add_float32("a.float", 0.5)
    writer.add_float64("a.double", 0.1)
    for name, value in (("uint8", 7), ("int8", -7), ("uint16", 700), ("int16", -700), ("uint32", 1 << 31), ("int32", -7)):
        getattr(writer, f"add_{name}")(f"a.{name}", value)
        entries[f"a.{name}"] = value
    writer.add_uint64("a.uint64", 1 << 63)
    writer.add_int64("a.int64", -(1 << 62))
    entries |= {"a.double": 0.1, "a.uint64": 1 << 63, "a.int64": -(1 << 62)}
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_token_list(["<s>", "</s>", "ü", ""])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(9)
    writer.add_chat_template("{{ messages }}")
    entries |= {f"tokenizer.ggml.{name}_token_id": value for name, value in (("bos", 0), ("eos", 2), ("padding", 9))}
    entries["tokenizer.chat_template"] = "{{ messages }}"
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, entries


def test_entries_and_tokens(model):
    path, entries = model
    header = read_header(path)
    assert header.entries == entries
    assert header.architecture == "llama" and header.format == "GGUF" and header.chat_template == "{{ messages }}"
    assert [header.token(name) for name in ("bos", "eos", "padding", "unknown")] == ["<s>", "ü", "", ""]


def test_format_is_read_from_the_file_whatever_its_name(model, tmp_path):
    path, _ = model
    sparse = tmp_path / "model.safetensors"
    sparse.write_bytes(b"PWRI" + path.read_bytes()[4:])
    assert (file_format(path), file_format(sparse)) == ("GGUF", "PWRI")
    assert read_header(sparse).entries == read_header(path).entries
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04")
    assert file_format(other) is None


def test_malformed_headers_are_one_error(model, tmp_path):
    data = model[0].read_bytes()
    generator = random.Random(0)
    bad = tmp_path / "bad.gguf"
    for length in range(4, data.index(b"{{ messages }}"), 7):
        bad.write_bytes(data[:length])
        with pytest.raises(PowerQuantConfigError, match=f"{bad} is damaged"):
            read_header(bad)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(3):
            changed[generator.randrange(4, len(data))] = generator.randrange(256)
        bad.write_bytes(changed)
        try:
            header = read_header(bad)
            _ = header.token("bos"), header.token("eos"), header.architecture, header.chat_template
        except PowerQuantConfigError:
            pass
    for counts in ((0, 1 << 40), (0, 1 << 63)):
        bad.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(64))
        with pytest.raises(PowerQuantConfigError, match="metadata entries"):
            read_header(bad)
