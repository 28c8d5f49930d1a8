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

NUM_LINES = 10_000
NUM_LINES_OTHER = 3_000  # for splitting rules that no vocabulary at hand belongs to
TEXTS = Path(model.__file__).parent / "texts"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

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
    "e\u0301 a\u0308\u0323 n\u0303 \u1e9b\u0323 o\u0302\u0301\u0323 \u0344 \u0958 Z\u0351\u036b\u0343a\u0363l\u0368g\u0321o\u0322 \u212b \uf900",
    "I'm, you're, we've, they'll, he'd, it's, can't; I'M YOU'RE WE'VE THEY'LL HE'D IT'S 'Sup 'ſo ''s 'x' rock'n'roll l'État",
    "½ ⅓ ² ³ x² + y³ = z¹ Ⅻ ① ㊿ 1234567890 12 345 6789 0x1F 3.14e-10 v1.2.3 2024-01-01T00:00:00Z 1٢३ 𝟘𝟙 𐄇 \U00011de0\U00011de5",
    "def f(x: int) -> dict[str, int]:\n\treturn {\"a\": x ** 2, 'b': ~x & 0xFF}  # comment\n\n\n    if x != 1:\r\n        pass\r\n",
    "#include <vector>\ntemplate <typename T> auto&& f(T&&... a) { return std::forward<T>(a)...; }  // ==>\n",
    "<html><body class=\"x\"><table><tr><td>&nbsp;</td></tr></table>\n<!-- --></body></html> $x^2 + \\frac{a}{b}$ `a|b` ~~~ <=>",
    "\u00a0nbsp\u2003em\u2009thin\u3000ideographic\u2028line\u2029para\u0085nel\u1680ogham\u200bzero\ufeffbom\u180e\u202f \t \v\f\r\n \r \n\n \n",
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
    [0x61, 0x65, 0x41B, 0x4E00, 0xAC00, 0x1100, 0x1161, 0x11A8, *range(0x300, 0x362), 0x1DC0, 0x20D0, 0x3099, 0x9BE, 0x1133E],
]


def mixed_lines(count: int, special: list[str], seed: int = 0) -> list[str]:
    """Lines of languages, code, odd characters and special tokens; the same for the same seed."""
    rng = random.Random(seed)
    corpus = [line for name in ("code.txt", "docs.txt", "prose.txt") for line in (TEXTS / name).read_text().split("\n") if line]

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


def hf_reference(fields: dict) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(model._hf_tokenizer(fields)))


def test_smollm2_equals_tokenizers(engine_build, smollm2_fields):
    reference = hf_reference(smollm2_fields)
    special = [t for t, kind in zip(smollm2_fields["tokenizer.ggml.tokens"], smollm2_fields["tokenizer.ggml.token_type"]) if kind == 3]
    lines = mixed_lines(NUM_LINES, special)
    path = model.find_gguf("smollm2")
    assert_same(engine_build, path, lines, lambda line: reference.encode(line).ids, reference.decode)
    reference.encode_special_tokens = True
    lines = lines[:NUM_LINES_OTHER]
    assert_same(engine_build, path, lines, lambda line: reference.encode(line).ids, reference.decode, parse_special=False)
