#include <algorithm>
#include <array>
#include <functional>
#include <optional>

#include "errors.h"
#include "pretokenizer.h"
#include "unicode.h"
#include "vocabulary.h"

namespace powerinfer {

namespace {

struct PreTokenizerName {
  std::string_view name;
  PreTokenizer kind;
};

constexpr PreTokenizerName kPreTokenizers[] = {
    {"gpt-2", PreTokenizer::kGpt2},      {"gpt2", PreTokenizer::kGpt2},        {"default", PreTokenizer::kGpt2},
    {"smollm", PreTokenizer::kSmollm},   {"llama-bpe", PreTokenizer::kLlama3}, {"llama3", PreTokenizer::kLlama3},
    {"llama-v3", PreTokenizer::kLlama3}, {"qwen2", PreTokenizer::kQwen2},      {"falcon", PreTokenizer::kFalcon},
};

PreTokenizer pre_tokenizer(const GgufFile& file) {
  // files from before the key existed are Falcon's or split as GPT-2 does
  const std::string_view architecture = file.get_string("general.architecture", "");
  const std::string_view name = file.get_string("tokenizer.ggml.pre", architecture == "falcon" ? "falcon" : "gpt-2");
  std::string allowed;
  for (const PreTokenizerName& known : kPreTokenizers) {
    if (known.name == name) return known.kind;
    allowed += (allowed.empty() ? "" : ", ") + std::string(known.name);
  }
  throw model_error(file.name() + " has tokenizer.ggml.pre \"" + std::string(name.substr(0, 80)) + "\"; known are " +
                    allowed);
}

// Byte-level BPE writes each byte as one printable character: itself where it is one in Latin-1, or U+0100 and following.
constexpr uint32_t kByteCharacters = 256 + 68;

bool printable(uint32_t byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
}

// The byte that each such character stands for, -1 for other characters.
std::array<int16_t, kByteCharacters> byte_of_character() {
  std::array<int16_t, kByteCharacters> bytes;
  bytes.fill(-1);
  uint32_t next = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) bytes[printable(byte) ? byte : next++] = static_cast<int16_t>(byte);
  return bytes;
}

// The bytes that a token's characters stand for; nullopt where it has other characters.
std::optional<std::string> bytes_of_text(std::string_view text) {
  static const auto bytes = byte_of_character();
  std::string result;
  for (size_t at = 0; at < text.size();) {
    const CodePoint point = decode_utf8(text, at);
    if (point.value >= kByteCharacters || bytes[point.value] < 0) return std::nullopt;
    result += static_cast<char>(bytes[point.value]);
    at += point.bytes;
  }
  return result;
}

struct Merge {
  int32_t rank;  // the lowest goes first
  int32_t token;
};

// (left, right) -> Merge: a hash table with open addressing.
class MergeTable {
 public:
  void reserve(size_t count) {
    size_t capacity = 16;
    while (capacity < 2 * count) capacity *= 2;
    slots_.assign(capacity, Slot{});
  }
  void set(int32_t left, int32_t right, Merge merge) { slots_[slot(key(left, right))] = {key(left, right), merge}; }
  // nullptr where the two do not merge.
  const Merge* find(int32_t left, int32_t right) const {
    const Slot& found = slots_[slot(key(left, right))];
    return found.key == kEmpty ? nullptr : &found.merge;
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  struct Slot {
    uint64_t key = kEmpty;
    Merge merge{};
  };
  static uint64_t key(int32_t left, int32_t right) {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  }
  // Of the key, or the free one where it would be.
  size_t slot(uint64_t key) const {
    uint64_t hash = key * 0x9E3779B97F4A7C15;
    hash ^= hash >> 32;
    size_t at = hash & (slots_.size() - 1);
    while (slots_[at].key != key && slots_[at].key != kEmpty) at = (at + 1) & (slots_.size() - 1);
    return at;
  }
  std::vector<Slot> slots_;
};

using Ids = std::unordered_map<std::string_view, int32_t>;

class BpeTokenizer : public VocabularyTokenizer {
 public:
  BpeTokenizer(const GgufFile& file, PreTokenizer pre_tokenizer)
      : VocabularyTokenizer(file, pre_tokenizer == PreTokenizer::kLlama3), pre_tokenizer_(pre_tokenizer) {
    const bool llama3 = pre_tokenizer_ == PreTokenizer::kLlama3;
    Ids ids;
    ids.reserve(vocabulary_.texts.size());
    for (int32_t id = 0; id < vocabulary_.size(); ++id) ids.emplace(vocabulary_.texts[id], id);
    read_byte_tokens(file, ids);
    read_merges(file, ids);
    bytes_.reserve(vocabulary_.texts.size());
    for (int32_t id = 0; id < vocabulary_.size(); ++id) {
      const std::string_view text = vocabulary_.texts[id];
      const TokenKind kind = vocabulary_.kinds[id];
      const auto bytes = bytes_of_text(text);
      bytes_.push_back(bytes ? *bytes : std::string(text));
      if (kind == TokenKind::kControl || kind == TokenKind::kUnknown || kind == TokenKind::kUserDefined)
        special_.add(text, id);
      if (llama3 && kind == TokenKind::kNormal && bytes) words_.emplace(bytes_.back(), id);
    }
  }

  std::string token_bytes(int32_t token, bool with_special) const override {
    return shown(token, with_special) ? bytes_[token] : std::string();
  }

  std::string decode(const std::vector<int32_t>& tokens, bool with_special) const override {
    std::string text;
    for (const int32_t token : tokens) {
      if (shown(token, with_special)) text += bytes_[token];
    }
    return replace_invalid_utf8(text);
  }

  bool leading_space() const override { return false; }

 protected:
  void encode_text(std::string_view text, bool, std::vector<int32_t>& ids) const override {
    std::string normalized;
    if (pre_tokenizer_ == PreTokenizer::kQwen2) text = normalized = nfc(text);
    Work work;
    uint32_t begin = 0;
    for (const uint32_t end : split_pieces(pre_tokenizer_, text)) {
      encode_piece(text.substr(begin, end - begin), work, ids);
      begin = end;
    }
  }

 private:
  struct Symbol {
    int32_t token;  // -1: merged into the one before
    int32_t previous, next;
  };
  // A pair that may be merged: of the symbol at `left` and the one after it.
  struct Candidate {
    int32_t rank, left, token;
    bool operator>(const Candidate& other) const { return rank != other.rank ? rank > other.rank : left > other.left; }
  };
  // Kept from piece to piece, to save allocations.
  struct Work {
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;  // the smallest on top
  };

  void encode_piece(std::string_view piece, Work& work, std::vector<int32_t>& ids) const {
    if (const auto whole = words_.find(piece); whole != words_.end()) {
      ids.push_back(whole->second);
      return;
    }
    auto& symbols = work.symbols;
    auto& heap = work.heap;
    symbols.clear();
    heap.clear();
    for (const char c : piece) {
      // a byte that the vocabulary lacks is left out, as tokenizers does for a model without an unknown token
      const int32_t token = byte_tokens_[static_cast<uint8_t>(c)];
      const auto at = static_cast<int32_t>(symbols.size());
      if (token >= 0) symbols.push_back({token, at - 1, at + 1});
    }
    if (symbols.empty()) return;
    symbols.back().next = -1;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const Merge* merge = merges_.find(symbols[i].token, symbols[i + 1].token);
      if (merge) heap.push_back({merge->rank, static_cast<int32_t>(i), merge->token});
    }
    std::make_heap(heap.begin(), heap.end(), std::greater<>());
    const auto add = [&](int32_t left) {
      const int32_t right = left < 0 ? -1 : symbols[left].next;
      const Merge* merge = right < 0 ? nullptr : merges_.find(symbols[left].token, symbols[right].token);
      if (!merge) return;
      heap.push_back({merge->rank, left, merge->token});
      std::push_heap(heap.begin(), heap.end(), std::greater<>());
    };
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end(), std::greater<>());
      const Candidate top = heap.back();
      heap.pop_back();
      Symbol& left = symbols[top.left];
      if (left.token < 0 || left.next < 0) continue;
      Symbol& right = symbols[left.next];
      // one of the two may have been merged with another since
      const Merge* merge = merges_.find(left.token, right.token);
      if (!merge || merge->token != top.token) continue;
      left.token = top.token;
      left.next = right.next;
      right.token = -1;
      if (left.next >= 0) symbols[left.next].previous = top.left;
      add(left.previous);
      add(top.left);
    }
    for (const Symbol& symbol : symbols) {
      if (symbol.token >= 0) ids.push_back(symbol.token);
    }
  }

  void read_byte_tokens(const GgufFile& file, const Ids& ids) {
    byte_tokens_.fill(-1);
    const auto bytes = byte_of_character();
    bool any = false;
    for (uint32_t character = 0; character < kByteCharacters; ++character) {
      std::string text;
      append_utf8(text, character);
      const auto found = bytes[character] < 0 ? ids.end() : ids.find(text);
      if (found == ids.end()) continue;
      byte_tokens_[bytes[character]] = found->second;
      any = true;
    }
    if (!any) throw model_error(file.name() + " has no token of a single byte in its vocabulary");
  }

  void read_merges(const GgufFile& file, const Ids& ids) {
    const auto& merges = file.get_strings("tokenizer.ggml.merges");
    merges_.reserve(merges.size());
    std::string joined;
    for (size_t rank = 0; rank < merges.size(); ++rank) {
      const std::string_view merge = merges[rank];
      const size_t space = merge.find(' ');
      const auto fail = [&](const std::string& what) {
        return model_error(file.name() + " has tokenizer.ggml.merges entry " + std::to_string(rank) + ", which " + what);
      };
      if (space == std::string_view::npos) throw fail("is not two tokens with a space between them");
      const std::string_view left = merge.substr(0, space), right = merge.substr(space + 1);
      joined.assign(left).append(right);
      const auto left_id = ids.find(left), right_id = ids.find(right), joined_id = ids.find(joined);
      if (left_id == ids.end() || right_id == ids.end() || joined_id == ids.end()) {
        throw fail("names or makes a token that is not in the vocabulary");
      }
      merges_.set(left_id->second, right_id->second, {static_cast<int32_t>(rank), joined_id->second});
    }
  }

  PreTokenizer pre_tokenizer_;
  std::array<int32_t, 256> byte_tokens_;  // -1: not in the vocabulary
  MergeTable merges_;
  std::vector<std::string> bytes_;                       // of each token
  std::unordered_map<std::string_view, int32_t> words_;  // llama3: pieces that are one token whatever the merges say
};

}  // namespace

std::unique_ptr<Tokenizer> load_bpe_tokenizer(const GgufFile& file) {
  return std::make_unique<BpeTokenizer>(file, pre_tokenizer(file));
}

}  // namespace powerinfer
