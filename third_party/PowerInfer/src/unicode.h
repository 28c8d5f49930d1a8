// UTF-8, classes of code points, and NFC: what the tokenizers need of Unicode. tools/make_unicode_tables.py says of which
// version.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace powerinfer {

// Bits of a code point's class; 0 for anything else, and for bytes that are no UTF-8.
enum CodePointClass : uint8_t {
  kLetter = 1,            // \p{L}
  kNumber = 2,            // \p{N}
  kSpace = 4,             // \s
  kDigitSplit = 8,        // what Hugging Face's Digits pre-tokenizer takes for a digit
  kPunctuationSplit = 16  // and its Punctuation pre-tokenizer for punctuation
};

struct CodePoint {
  uint32_t value;  // of a byte that is no UTF-8: kInvalid
  uint32_t bytes;  // 1 to 4
};
constexpr uint32_t kInvalid = 0xFFFFFFFF;

// The code point at `position`, which must lie inside the text. Overlong forms, surrogates and what is cut off are invalid:
// their first byte alone is one kInvalid.
CodePoint decode_utf8(std::string_view text, size_t position);
void append_utf8(std::string& text, uint32_t code_point);

uint8_t code_point_class(uint32_t code_point);

// Unicode's normal form C; bytes that are no UTF-8 stay as they are.
std::string nfc(std::string_view text);

// Bytes that are no UTF-8 become U+FFFD: one for each beginning of a character that is cut off, one for each other byte.
std::string replace_invalid_utf8(std::string_view text);

}  // namespace powerinfer
