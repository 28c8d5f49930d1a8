"""What a model file says of itself: magic and metadata of GGUF and PWRI, read with the standard library alone.

The engine checks a file for real; this reads as much as is needed to pick a server and to render a chat template.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import PowerQuantConfigError

FORMATS = {b"GGUF": "GGUF", b"PWRI": "PWRI"}
VERSIONS = (2, 3)
# what a gpuidx file (sparse/split.py) calls its architecture
PLAN = "generic.gpu_index"
# architectures that the engine runs
ARCHITECTURES = ("llama", "bamboo", "falcon", "opt")

_STRING, _ARRAY = 8, 9
# struct's letter by GGUF's value type
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_ENTRIES, _MAX_BYTES, _MAX_DIMENSIONS = 1 << 16, 1 << 28, 4
# of tensors' starts, where general.alignment does not say it
_ALIGNMENT = 32


def file_format(path: Path) -> str | None:
    """ "GGUF", "PWRI" (sparse), or None for a file of another kind. Raises PowerQuantConfigError if it can't be read."""
    try:
        with path.open("rb") as file:
            return FORMATS.get(file.read(4))
    except OSError as error:
        raise PowerQuantConfigError(f"cannot read {path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Header:
    """The metadata that is no array, and single strings of arrays on demand."""

    path: Path
    format: str
    entries: dict[str, Any]
    string_arrays: dict[str, int]  # key -> where its elements begin

    @property
    def architecture(self) -> str:
        return str(self.entries.get("general.architecture", ""))

    @property
    def chat_template(self) -> str | None:
        template = self.entries.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def token(self, name: str) -> str:
        """Text of the vocabulary's entry that tokenizer.ggml.{name}_token_id names; "" where there is none."""
        number = self.entries.get(f"tokenizer.ggml.{name}_token_id")
        start = self.string_arrays.get("tokenizer.ggml.tokens")
        if not isinstance(number, int) or start is None:
            return ""
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                (count,) = _unpack(file, "Q")
                if not 0 <= number < count:
                    return ""
                for _ in range(number):
                    file.seek(_unpack(file, "Q")[0], 1)
                return _string(file)
        except (OSError, ValueError, struct.error) as error:
            raise PowerQuantConfigError(f"{self.path} is damaged: {error}") from error


@dataclass(frozen=True)
class Tensor:
    """Where a file keeps a tensor."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first
    kind: int  # GGML's number of its type
    start: int  # byte of the file


def read_header(path: Path) -> Header:
    """Raises: PowerQuantConfigError for a file that can't be read, is of another kind or malformed."""
    return _read(path, with_tensors=False)[0]


def read_tensors(path: Path) -> tuple[Header, list[Tensor]]:
    """Header and tensors, in the file's order. Raises: PowerQuantConfigError as read_header."""
    return _read(path, with_tensors=True)


def _read(path: Path, with_tensors: bool) -> tuple[Header, list[Tensor]]:
    kind = file_format(path)
    if kind is None:
        raise PowerQuantConfigError(f"{path} is no model file: it begins with neither GGUF nor PWRI")
    entries: dict[str, Any] = {}
    arrays: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            file.seek(4)
            (version,) = _unpack(file, "I")
            if version not in VERSIONS:
                raise ValueError(f"version {version} where {' and '.join(map(str, VERSIONS))} are known")
            num_tensors, count = _unpack(file, "QQ")
            if max(num_tensors, count) > _MAX_ENTRIES:
                raise ValueError(f"{num_tensors} tensors and {count} metadata entries")
            for _ in range(count):
                key = _string(file)
                (kind_of_value,) = _unpack(file, "I")
                if kind_of_value == _STRING:
                    entries[key] = _string(file)
                elif kind_of_value == _ARRAY:
                    start = file.tell()
                    if _skip_array(file) == _STRING:
                        arrays[key] = start + 4
                else:
                    entries[key] = _unpack(file, _letter(kind_of_value))[0]
            tensors = [_tensor(file) for _ in range(num_tensors if with_tensors else 0)]
            alignment = entries.get("general.alignment", _ALIGNMENT)
            if not isinstance(alignment, int) or alignment < 1:
                raise ValueError(f"an alignment of {alignment!r}")
            data = -(-file.tell() // alignment) * alignment
    except (OSError, ValueError, struct.error) as error:
        raise PowerQuantConfigError(f"{path} is damaged: {error}") from error
    header = Header(path, kind, entries, arrays)
    return header, [replace(tensor, start=data + tensor.start) for tensor in tensors]


def _tensor(file: BinaryIO) -> Tensor:
    """Its start is counted from the first tensor's."""
    name = _string(file)
    (dimensions,) = _unpack(file, "I")
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {dimensions} dimensions")
    shape = _unpack(file, "Q" * dimensions)[::-1]
    kind, start = _unpack(file, "IQ")
    return Tensor(name, shape, kind, start)


def _skip_array(file: BinaryIO) -> int:
    """The type of its elements."""
    kind, count = _unpack(file, "IQ")
    if kind == _STRING:
        for _ in range(count):
            _skip(file, _unpack(file, "Q")[0])
    else:
        _skip(file, count * struct.calcsize(_letter(kind)))
    return kind


def _skip(file: BinaryIO, size: int) -> None:
    if size > _MAX_BYTES:
        raise ValueError(f"an entry of {size} bytes")
    file.seek(size, 1)


def _letter(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"an entry of type {kind}")
    return _SCALARS[kind]


def _string(file: BinaryIO) -> str:
    (size,) = _unpack(file, "Q")
    if size > _MAX_BYTES:
        raise ValueError(f"a string of {size} bytes")
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it ends too early")
    return data.decode("utf-8", errors="replace")


def _unpack(file: BinaryIO, letters: str) -> tuple[Any, ...]:
    size = struct.calcsize(f"<{letters}")
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it ends too early")
    return struct.unpack(f"<{letters}", data)
