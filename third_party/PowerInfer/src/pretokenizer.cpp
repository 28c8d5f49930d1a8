#include "pretokenizer.h"

#include "unicode.h"

namespace powerinfer {

namespace {

constexpr uint32_t kLongS = 0x17F;  // equals "s" where case is ignored

// A text by code points: positions below are code points, not bytes.
class Scanner {
 public:
  explicit Scanner(std::string_view text) {
    values_.reserve(text.size());
    classes_.reserve(text.size());
    offsets_.reserve(text.size() + 1);
    for (size_t at = 0; at < text.size();) {
      const CodePoint point = decode_utf8(text, at);
      values_.push_back(point.value);
      classes_.push_back(code_point_class(point.value));
      offsets_.push_back(static_cast<uint32_t>(at));
      at += point.bytes;
    }
    offsets_.push_back(static_cast<uint32_t>(text.size()));
  }

  size_t size() const { return values_.size(); }
  uint32_t byte_offset(size_t i) const { return offsets_[i]; }
  bool is(size_t i, uint8_t mask) const { return classes_[i] & mask; }
  // First position from i on, at most `end`, that lacks or has any bit of the mask.
  size_t skip(size_t i, size_t end, uint8_t mask) const {
    while (i < end && is(i, mask)) ++i;
    return i;
  }
  size_t find(size_t i, size_t end, uint8_t mask) const {
    while (i < end && !is(i, mask)) ++i;
    return i;
  }

  // End of the piece at i, as if the text ended at `end`.
  // 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  size_t gpt2_piece(size_t i, size_t end) const {
    if (const size_t length = contraction(i, end, false)) return i + length;
    const size_t word = i + (values_[i] == ' ' && i + 1 < end);
    if (is(word, kLetter)) return skip(word, end, kLetter);
    if (is(word, kNumber)) return skip(word, end, kNumber);
    if (!is(word, kSpace)) return find(word, end, kSpace | kLetter | kNumber);
    return space_piece(i, skip(i, end, kSpace), end);
  }

  // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
  size_t llama3_piece(size_t i, size_t end, size_t digits) const {
    if (const size_t length = contraction(i, end, true)) return i + length;
    if (is(i, kLetter)) return skip(i, end, kLetter);
    if (is(i, kNumber)) return skip(i, i + digits < end ? i + digits : end, kNumber);
    if (!newline(i) && i + 1 < end && is(i + 1, kLetter)) return skip(i + 1, end, kLetter);
    const size_t other = i + (values_[i] == ' ' && i + 1 < end);
    if (!is(other, kSpace | kLetter | kNumber)) {
      size_t stop = find(other, end, kSpace | kLetter | kNumber);
      while (stop < end && newline(stop)) ++stop;
      return stop;
    }
    const size_t stop = skip(i, end, kSpace);
    for (size_t last = stop; last > i; --last) {
      if (newline(last - 1)) return last;
    }
    return space_piece(i, stop, end);
  }

 private:
  bool newline(size_t i) const { return values_[i] == '\r' || values_[i] == '\n'; }

  // \s+(?!\S)|\s+ on the white space [i, stop): the last one is left to what follows, if it is not alone.
  static size_t space_piece(size_t i, size_t stop, size_t end) { return stop < end && stop - i > 1 ? stop - 1 : stop; }

  // Code points of 's, 't, 're, 've, 'm, 'll or 'd at i; 0 where there is none.
  size_t contraction(size_t i, size_t end, bool any_case) const {
    if (values_[i] != '\'') return 0;
    const auto letter = [&](size_t at) -> uint32_t {
      if (at >= end) return 0;
      const uint32_t value = values_[at];
      if (!any_case) return value;
      if (value == kLongS) return 's';
      return value >= 'A' && value <= 'Z' ? value + 'a' - 'A' : value;
    };
    const uint32_t first = letter(i + 1), second = letter(i + 2);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    if ((first == 'r' || first == 'v') && second == 'e') return 3;
    return first == 'l' && second == 'l' ? 3 : 0;
  }

  std::vector<uint32_t> values_;
  std::vector<uint8_t> classes_;
  std::vector<uint32_t> offsets_;  // in bytes, one more than there are code points
};

bool ascii_digit(char c) { return c >= '0' && c <= '9'; }

// Falcon's last two steps look at bytes as ByteLevel writes them, where these bytes are the characters ²³¹¼½¾.
bool byte_level_numeric(char c) {
  const auto byte = static_cast<uint8_t>(c);
  return ascii_digit(c) || byte == 0xB2 || byte == 0xB3 || byte == 0xB9 || (byte >= 0xBC && byte <= 0xBE);
}

// Parts numbers from the rest of the piece [begin, end), and takes three digits at a time out of numbers.
void falcon_numbers(std::string_view text, uint32_t begin, uint32_t end, std::vector<uint32_t>& ends) {
  for (uint32_t at = begin, stop; at < end; at = stop) {
    const bool numeric = byte_level_numeric(text[at]);
    for (stop = at + 1; stop < end && byte_level_numeric(text[stop]) == numeric;) ++stop;
    uint32_t cut = at;
    for (uint32_t digit = at; numeric && digit + 3 <= stop;) {
      if (!ascii_digit(text[digit]) || !ascii_digit(text[digit + 1]) || !ascii_digit(text[digit + 2])) {
        ++digit;
        continue;
      }
      if (cut < digit) ends.push_back(digit);
      cut = digit += 3;
      ends.push_back(cut);
    }
    if (cut < stop) ends.push_back(stop);
  }
}

}  // namespace

std::vector<uint32_t> split_pieces(PreTokenizer kind, std::string_view text) {
  const Scanner scanner(text);
  std::vector<uint32_t> ends;
  ends.reserve(text.size() / 4);
  const size_t size = scanner.size();
  switch (kind) {
    case PreTokenizer::kGpt2:
      for (size_t i = 0; i < size;) ends.push_back(scanner.byte_offset(i = scanner.gpt2_piece(i, size)));
      break;
    case PreTokenizer::kSmollm:
      for (size_t i = 0; i < size;) {
        const size_t end = scanner.is(i, kDigitSplit) ? i + 1 : scanner.find(i, size, kDigitSplit);
        while (i < end) ends.push_back(scanner.byte_offset(i = scanner.gpt2_piece(i, end)));
      }
      break;
    case PreTokenizer::kLlama3:
      for (size_t i = 0; i < size;) ends.push_back(scanner.byte_offset(i = scanner.llama3_piece(i, size, 3)));
      break;
    case PreTokenizer::kQwen2:
      for (size_t i = 0; i < size;) ends.push_back(scanner.byte_offset(i = scanner.llama3_piece(i, size, 1)));
      break;
    case PreTokenizer::kFalcon:
      for (size_t i = 0; i < size;) {
        const bool punctuation = scanner.is(i, kPunctuationSplit);
        const size_t end = punctuation ? scanner.skip(i, size, kPunctuationSplit) : scanner.find(i, size, kPunctuationSplit);
        while (i < end) {
          const size_t next = scanner.gpt2_piece(i, end);
          falcon_numbers(text, scanner.byte_offset(i), scanner.byte_offset(next), ends);
          i = next;
        }
      }
      break;
  }
  return ends;
}

}  // namespace powerinfer
