#include <algorithm>
#include <array>
#include <cmath>

#include "errors.h"
#include "unicode.h"
#include "vocabulary.h"

namespace powerinfer {

namespace {

constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581, a space inside pieces
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  result.reserve(text.size());
  for (size_t at = 0;;) {
    const size_t found = text.find(from, at);
    result += text.substr(at, found - at);
    if (found == std::string_view::npos) return result;
    result += to;
    at = found + from.size();
  }
}

// The value of "<0x0A>", -1 for any other text.
int byte_value(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return -1;
  int value = 0;
  for (const char c : text.substr(3, 2)) {
    const size_t digit = std::string_view("0123456789ABCDEF").find(c >= 'a' && c <= 'f' ? static_cast<char>(c - 32) : c);
    if (digit == std::string_view::npos) return -1;
    value = value * 16 + static_cast<int>(digit);
  }
  return value;
}

// SentencePiece's BPE: the pair whose joined piece has the highest score is merged first.
class SpmTokenizer : public VocabularyTokenizer {
 public:
  explicit SpmTokenizer(const GgufFile& file) : VocabularyTokenizer(file, true) {
    space_prefix_ = file.get_bool("tokenizer.ggml.add_space_prefix", true);
    if (file.get_bool("tokenizer.ggml.remove_extra_whitespaces", false)) {
      throw model_error(file.name() + " asks for tokenizer.ggml.remove_extra_whitespaces, which is not supported");
    }
    scores_ = file.get_floats("tokenizer.ggml.scores");
    if (scores_.size() != vocabulary_.texts.size()) {
      throw model_error(file.name() + " has " + std::to_string(vocabulary_.texts.size()) + " tokens, but " +
                        std::to_string(scores_.size()) + " entries in tokenizer.ggml.scores");
    }
    byte_tokens_.fill(-1);
    pieces_.resize(vocabulary_.texts.size());
    ids_.reserve(vocabulary_.texts.size());
    for (int32_t id = 0; id < vocabulary_.size(); ++id) add_token(file, id);
    const auto bytes = std::count_if(byte_tokens_.begin(), byte_tokens_.end(), [](int32_t id) { return id >= 0; });
    byte_fallback_ = bytes == 256;
    if (bytes != 0 && bytes != 256) {
      throw model_error(file.name() + " has tokens for " + std::to_string(bytes) + " of the 256 bytes");
    }
    if (!byte_fallback_ && vocabulary_.unknown < 0) {
      throw model_error(file.name() + " has neither byte tokens nor an unknown token");
    }
  }

  std::string token_bytes(int32_t token, bool with_special) const override {
    if (!shown(token, with_special)) return {};
    if (vocabulary_.kinds[token] == TokenKind::kByte) return {static_cast<char>(byte_value(vocabulary_.texts[token]))};
    return replace_all(vocabulary_.texts[token], kSpaceMark, " ");
  }

  std::string decode(const std::vector<int32_t>& tokens, bool with_special) const override {
    std::string text, bytes;
    bool strip = space_prefix_;
    for (const int32_t token : tokens) {
      const bool is_byte = vocabulary_.holds(token) && vocabulary_.kinds[token] == TokenKind::kByte;
      std::string added = token_bytes(token, with_special);
      if (is_byte) {
        bytes += added;
        continue;
      }
      append_bytes(text, bytes);
      if (added.empty()) continue;
      if (strip && text.empty() && added[0] == ' ') added.erase(0, 1);
      strip = false;
      text += added;
    }
    append_bytes(text, bytes);
    return text;
  }

  bool leading_space() const override { return space_prefix_; }

 protected:
  void encode_text(std::string_view text, bool first, std::vector<int32_t>& ids) const override {
    std::string marked = first && space_prefix_ ? std::string(kSpaceMark) : std::string();
    marked += replace_all(text, " ", kSpaceMark);
    std::vector<Symbol> symbols = characters(marked);
    std::unordered_map<int32_t, uint32_t> unused_cuts;
    merge(marked, symbols, unused_cuts);
    for (const Symbol& symbol : symbols) {
      if (symbol.bytes) emit(std::string_view(marked).substr(symbol.begin, symbol.bytes), unused_cuts, ids);
    }
  }

 private:
  // A part of the text; bytes is 0 once it is merged into the one before.
  struct Symbol {
    uint32_t begin, bytes;
    int32_t previous, next;
    bool fixed;  // a user-defined token, which merges with nothing
  };
  struct Candidate {
    float score;
    int32_t left, right;
    uint32_t bytes;
    // the best one is on top of the heap: the highest score, then the leftmost
    bool operator<(const Candidate& other) const { return score != other.score ? score < other.score : left > other.left; }
  };

  void add_token(const GgufFile& file, int32_t id) {
    const std::string_view text = vocabulary_.texts[id];
    if (!std::isfinite(scores_[id]))
      throw model_error(file.name() + " has a score that is no number, of token " + std::to_string(id));
    switch (vocabulary_.kinds[id]) {
      case TokenKind::kNormal:
      case TokenKind::kUnused:
      case TokenKind::kUserDefined:
        // files may write spaces in user-defined tokens as they are
        pieces_[id] =
            vocabulary_.kinds[id] == TokenKind::kUserDefined ? replace_all(text, " ", kSpaceMark) : std::string(text);
        ids_.emplace(pieces_[id], id);
        longest_ = std::max(longest_, pieces_[id].size());
        if (vocabulary_.kinds[id] == TokenKind::kUserDefined) user_defined_.add(pieces_[id], id);
        break;
      case TokenKind::kUnknown:
        if (vocabulary_.unknown < 0) vocabulary_.unknown = id;
        special_.add(text, id);
        break;
      case TokenKind::kControl:
        special_.add(text, id);
        break;
      case TokenKind::kByte: {
        const int value = byte_value(text);
        if (value < 0) {
          throw model_error(file.name() + " has byte token " + std::to_string(id) + ", whose text is not like <0x0A>");
        }
        byte_tokens_[value] = id;
        break;
      }
    }
  }

  std::vector<Symbol> characters(std::string_view text) const {
    std::vector<Symbol> symbols;
    symbols.reserve(text.size());
    for (size_t at = 0; at < text.size();) {
      const TokenTrie::Match match = user_defined_.longest(text, at);
      const size_t bytes = match.token >= 0 ? match.bytes : decode_utf8(text, at).bytes;
      const auto index = static_cast<int32_t>(symbols.size());
      symbols.push_back({static_cast<uint32_t>(at), static_cast<uint32_t>(bytes), index - 1, index + 1, match.token >= 0});
      at += bytes;
    }
    if (!symbols.empty()) symbols.back().next = -1;
    return symbols;
  }

  // unused_cuts: of unused tokens that were considered, the bytes of their left part.
  void merge(std::string_view text, std::vector<Symbol>& symbols, std::unordered_map<int32_t, uint32_t>& unused_cuts) const {
    std::vector<Candidate> heap;
    heap.reserve(symbols.size());
    const auto add = [&](int32_t left, int32_t right) {
      if (left < 0 || right < 0 || symbols[left].fixed || symbols[right].fixed) return;
      const uint32_t bytes = symbols[left].bytes + symbols[right].bytes;
      if (bytes > longest_) return;
      const auto found = ids_.find(text.substr(symbols[left].begin, bytes));
      if (found == ids_.end()) return;
      heap.push_back({scores_[found->second], left, right, bytes});
      std::push_heap(heap.begin(), heap.end());
      if (vocabulary_.kinds[found->second] == TokenKind::kUnused) unused_cuts[found->second] = symbols[left].bytes;
    };
    for (size_t i = 1; i < symbols.size(); ++i) add(static_cast<int32_t>(i) - 1, static_cast<int32_t>(i));
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end());
      const Candidate top = heap.back();
      heap.pop_back();
      Symbol& left = symbols[top.left];
      Symbol& right = symbols[top.right];
      // one of the two may have been merged with another since
      if (!left.bytes || !right.bytes || left.bytes + right.bytes != top.bytes) continue;
      left.bytes = top.bytes;
      left.next = right.next;
      right.bytes = 0;
      if (left.next >= 0) symbols[left.next].previous = top.left;
      add(left.previous, top.left);
      add(top.left, left.next);
    }
  }

  // Ids of one merged piece: its own, those of the parts of an unused one, or bytes, or the unknown token.
  void emit(std::string_view piece, const std::unordered_map<int32_t, uint32_t>& unused_cuts,
            std::vector<int32_t>& ids) const {
    const auto found = ids_.find(piece);
    if (found == ids_.end()) {
      if (byte_fallback_) {
        for (const char c : piece) ids.push_back(byte_tokens_[static_cast<uint8_t>(c)]);
      } else if (ids.empty() || ids.back() != vocabulary_.unknown) {
        ids.push_back(vocabulary_.unknown);  // once for a run of unknown characters
      }
      return;
    }
    const auto cut = unused_cuts.find(found->second);
    if (vocabulary_.kinds[found->second] != TokenKind::kUnused || cut == unused_cuts.end()) {
      ids.push_back(found->second);
      return;
    }
    emit(piece.substr(0, cut->second), unused_cuts, ids);
    emit(piece.substr(cut->second), unused_cuts, ids);
  }

  // Moves the bytes of byte tokens to the text; each one that is no UTF-8 becomes U+FFFD.
  static void append_bytes(std::string& text, std::string& bytes) {
    for (size_t at = 0; at < bytes.size();) {
      const CodePoint point = decode_utf8(bytes, at);
      text += point.value == kInvalid ? kReplacement : std::string_view(bytes).substr(at, point.bytes);
      at += point.bytes;
    }
    bytes.clear();
  }

  bool space_prefix_, byte_fallback_;
  std::vector<float> scores_;
  std::vector<std::string> pieces_;                    // as they stand in a marked text; empty for other tokens
  std::unordered_map<std::string_view, int32_t> ids_;  // of pieces_
  size_t longest_ = 0;                                 // bytes of the longest piece
  TokenTrie user_defined_;
  std::array<int32_t, 256> byte_tokens_;  // -1: none
};

}  // namespace

std::unique_ptr<Tokenizer> load_spm_tokenizer(const GgufFile& file) { return std::make_unique<SpmTokenizer>(file); }

}  // namespace powerinfer
