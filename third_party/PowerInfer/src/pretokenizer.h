// Cuts a text into the pieces that byte-level BPE merges within: scanners in place of the regular expressions that
// Hugging Face's tokenizer.json has for the same models.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace powerinfer {

enum class PreTokenizer {
  kGpt2,    // ByteLevel's own: contractions, words, numbers, others, each with a space in front
  kSmollm,  // Digits one by one, then as GPT-2
  kLlama3,  // one expression: words take any character in front, up to three digits, line ends apart
  kQwen2,   // the same with single digits; the text is in NFC
  kFalcon,  // Punctuation apart, as GPT-2, numbers apart, then three digits at a time
};

// End of each piece, in bytes, ascending; the last one is the text's size. An empty text has none.
std::vector<uint32_t> split_pieces(PreTokenizer kind, std::string_view text);

}  // namespace powerinfer
