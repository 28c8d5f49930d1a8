// What the tokenizers share: the vocabulary of a GGUF file, special tokens in a text, and which tokens end a generation.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer.h"

namespace powerinfer {

// Values of `tokenizer.ggml.token_type`.
enum class TokenKind : uint8_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

struct Vocabulary {
  // Reads and checks tokenizer.ggml.tokens, token_type, the ids of special tokens and the flags. Throws Error(kModel).
  Vocabulary(const GgufFile& file, bool add_bos_by_default);
  Vocabulary(const Vocabulary&) = delete;  // `texts` point into `storage`
  Vocabulary& operator=(const Vocabulary&) = delete;

  int32_t size() const { return static_cast<int32_t>(texts.size()); }
  bool holds(int32_t token) const { return token >= 0 && token < size(); }

  std::string storage;                  // all texts, one after the other
  std::vector<std::string_view> texts;  // as the file has them
  std::vector<TokenKind> kinds;
  int32_t bos, eos, unknown;  // -1: none
  bool add_bos, add_eos;
  std::vector<bool> ends;  // of each token: whether it ends a generation
};

// Texts of some tokens, found in a text in time that does not depend on their number.
class TokenTrie {
 public:
  void add(std::string_view text, int32_t token);  // the first of equal texts stays
  struct Match {
    int32_t token;  // -1: none
    size_t bytes;
  };
  // The longest one that the text has at `position`.
  Match longest(std::string_view text, size_t position) const;

 private:
  std::array<uint32_t, 256> roots_{};             // node of each first byte, 0: none
  std::unordered_map<uint64_t, uint32_t> edges_;  // (node << 8 | byte) -> node
  std::vector<int32_t> tokens_{-1};               // of each node, -1: none ends there; node 0 is no node
};

// Splits a text at special tokens, puts bos and eos around it, and leaves what is between to encode_text.
class VocabularyTokenizer : public Tokenizer {
 public:
  std::vector<int32_t> encode(std::string_view text, bool add_special, bool parse_special) const override;
  int32_t vocabulary_size() const override { return vocabulary_.size(); }
  int32_t bos() const override { return vocabulary_.bos; }
  int32_t eos() const override { return vocabulary_.eos; }
  bool ends_generation(int32_t token) const override { return vocabulary_.holds(token) && vocabulary_.ends[token]; }

 protected:
  VocabularyTokenizer(const GgufFile& file, bool add_bos_by_default) : vocabulary_(file, add_bos_by_default) {}
  // Appends the ids of a text without special tokens. `first`: at the beginning or after a control token.
  virtual void encode_text(std::string_view text, bool first, std::vector<int32_t>& ids) const = 0;
  // Whether a token adds bytes to a decoded text.
  bool shown(int32_t token, bool with_special) const;

  Vocabulary vocabulary_;
  TokenTrie special_;  // control, unknown and, for byte-level BPE, user-defined tokens; the last are always taken as tokens
};

std::unique_ptr<Tokenizer> load_bpe_tokenizer(const GgufFile& file);
std::unique_ptr<Tokenizer> load_spm_tokenizer(const GgufFile& file);

}  // namespace powerinfer
