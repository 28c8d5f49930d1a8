"""Writes src/unicode_tables.cpp: what the tokenizers need to know about each code point.

    pip install unicodedata2==16.0.0 tokenizers==0.23.3
    python tools/make_unicode_tables.py > src/unicode_tables.cpp

Ids must equal those of Hugging Face's `tokenizers`, which joins data of several Unicode versions: 16 in its regular
expressions (checked here for every code point), 17 in its Digits pre-tokenizer, and older ones in its Punctuation
pre-tokenizer and its normalizers. unicodedata2 gives the first; where tokenizers differs, it is asked code point by code
point.
"""

import sys
from collections.abc import Callable, Iterator

import unicodedata2
from tokenizers import Regex, normalizers, pre_tokenizers

UNICODE_VERSION = "16.0.0"
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
# Classes, as in unicode.h
LETTER, NUMBER, SPACE, DIGIT_SPLIT, PUNCTUATION_SPLIT = 1, 2, 4, 8, 16
HANGUL = range(0xAC00, 0xD7A4)  # composed by arithmetic
# A character between marks of class 232 and 1 shows its own class by where canonical ordering puts it.
MARK_232, MARK_1, MARK_240 = "\u0315", "\u0334", "\u0345"


def split_alone(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Callable[[int], bool]:
    """Whether the pre-tokenizer parts a code point from the control characters around it."""
    return lambda c: len(pre_tokenizer.pre_tokenize_str(f"\x01{chr(c)}\x01")) > 1


def classes() -> dict[int, int]:
    regex_classes = {"L": LETTER, "N": NUMBER}
    matches = {
        pattern: split_alone(pre_tokenizers.Split(Regex(pattern), "isolated")) for pattern in (r"\p{L}", r"\p{N}", r"\s")
    }
    is_digit = split_alone(pre_tokenizers.Digits(individual_digits=True))
    is_punctuation = split_alone(pre_tokenizers.Punctuation("isolated"))
    table = {}
    for c in CODE_POINTS:
        value = regex_classes.get(unicodedata2.category(chr(c))[0], 0)
        assert bool(value & LETTER) == matches[r"\p{L}"](c), hex(c)
        assert bool(value & NUMBER) == matches[r"\p{N}"](c), hex(c)
        value |= SPACE if matches[r"\s"](c) else 0
        value |= DIGIT_SPLIT if is_digit(c) else 0
        value |= PUNCTUATION_SPLIT if is_punctuation(c) else 0
        table[c] = value
    return table


def normalization() -> tuple[dict[int, int], list[tuple[int, int, int, bool]]]:
    """Canonical combining classes, and decompositions (code, first, second or 0, whether NFC composes it)."""
    nfd, nfc = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
    combining, decompositions = {}, []
    for c in CODE_POINTS:
        text = chr(c)
        value = unicodedata2.combining(text)
        probe = f"a{MARK_232}{text}{MARK_1}{MARK_240}"
        if value and nfd(probe) == unicodedata2.normalize("NFD", probe):
            combining[c] = value
        mapping = unicodedata2.decomposition(text)
        if not mapping or mapping.startswith("<") or c in HANGUL or nfd(text) == text:
            continue
        first, second = (int(part, 16) for part in f"{mapping} 0".split()[:2])
        decompositions.append((c, first, second, second != 0 and nfc(text) == text))
    return combining, decompositions


def runs(table: dict[int, int]) -> Iterator[tuple[int, int]]:
    """(first code point, value) of each run of equal values; surrogates and gaps are 0."""
    previous = None
    for c in range(0x110000):
        value = table.get(c, 0)
        if value != previous:
            yield c, value
        previous = value


def print_rows(rows: list[str]) -> None:
    line = " "
    for row in rows:
        if len(line) + len(row) + 2 > 125:
            print(line)
            line = " "
        line += f" {row},"
    print(line)


def main() -> None:
    if unicodedata2.unidata_version != UNICODE_VERSION:
        sys.exit(f"error: needs unicodedata2=={UNICODE_VERSION}, got {unicodedata2.unidata_version}")
    combining, decompositions = normalization()
    class_runs, combining_runs = list(runs(classes())), list(runs(combining))
    print(f"// Made by tools/make_unicode_tables.py from Unicode {UNICODE_VERSION}: do not edit.")
    print("// clang-format off")
    print('#include "unicode_tables.h"\n\nnamespace powerinfer {\n')
    for name, table in (("kClassRuns", class_runs), ("kCombiningRuns", combining_runs)):
        print(f"const std::array<CodePointRun, {len(table)}> {name} = {{{{")
        print_rows([f"{{0x{c:x}, {value}}}" for c, value in table])
        print("}};\n")
    print(f"const std::array<Decomposition, {len(decompositions)}> kDecompositions = {{{{")
    print_rows([f"{{0x{c:x}, 0x{a:x}, 0x{b:x}, {str(composes).lower()}}}" for c, a, b, composes in decompositions])
    print("}};\n\n}  // namespace powerinfer")
    print(f"{len(class_runs)} {len(combining_runs)} {len(decompositions)}", file=sys.stderr)


if __name__ == "__main__":
    main()
