#include "tokenizer.h"

#include <limits>

#include "errors.h"
#include "vocabulary.h"

namespace powerinfer {

namespace {

// Texts of control tokens that end a turn or a text in the models of the common families.
constexpr std::string_view kEndTexts[] = {
    "</s>",    "<eos>",         "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>",
    "<|end|>", "<end_of_turn>", "<|eot|>",       "<EOT>",           "<|return|>", "<|call|>",   "<｜end▁of▁sentence｜>",
};

int32_t special_id(const GgufFile& file, const char* key, size_t vocabulary_size) {
  if (!file.has(key)) return -1;
  const uint32_t id = file.get_uint(key);
  if (id >= vocabulary_size) {
    throw model_error(file.name() + " has " + key + " " + std::to_string(id) + ", but a vocabulary of " +
                      std::to_string(vocabulary_size) + " tokens");
  }
  return static_cast<int32_t>(id);
}

}  // namespace

Vocabulary::Vocabulary(const GgufFile& file, bool add_bos_by_default) {
  const auto& tokens = file.get_strings("tokenizer.ggml.tokens");
  const auto types = file.get_ints("tokenizer.ggml.token_type");
  if (tokens.empty() || tokens.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw model_error(file.name() + " has a vocabulary of " + std::to_string(tokens.size()) + " tokens");
  }
  if (types.size() != tokens.size()) {
    throw model_error(file.name() + " has " + std::to_string(tokens.size()) + " tokens, but " +
                      std::to_string(types.size()) + " entries in tokenizer.ggml.token_type");
  }
  size_t bytes = 0;
  for (const std::string_view token : tokens) bytes += token.size();
  storage.reserve(bytes);
  for (const std::string_view token : tokens) storage += token;
  const std::string_view all = storage;
  size_t at = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    // 0 is "undefined" in ggml's enumeration and is treated as a normal token there
    if (types[i] < 0 || types[i] > static_cast<int32_t>(TokenKind::kByte)) {
      throw model_error(file.name() + " has token " + std::to_string(i) + " of type " + std::to_string(types[i]) +
                        "; types 0 to 6 are known");
    }
    kinds.push_back(types[i] == 0 ? TokenKind::kNormal : static_cast<TokenKind>(types[i]));
    texts.push_back(all.substr(at, tokens[i].size()));
    at += tokens[i].size();
  }

  bos = special_id(file, "tokenizer.ggml.bos_token_id", texts.size());
  eos = special_id(file, "tokenizer.ggml.eos_token_id", texts.size());
  unknown = special_id(file, "tokenizer.ggml.unknown_token_id", texts.size());
  add_bos = file.get_bool("tokenizer.ggml.add_bos_token", add_bos_by_default && bos >= 0);
  add_eos = file.get_bool("tokenizer.ggml.add_eos_token", false);
  if ((add_bos && bos < 0) || (add_eos && eos < 0)) {
    throw model_error(file.name() + " asks for a token at the beginning or end of texts, but does not say which");
  }

  ends.resize(texts.size());
  if (eos >= 0) ends[eos] = true;
  for (const char* key : {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}) {
    if (const int32_t id = special_id(file, key, texts.size()); id >= 0) ends[id] = true;
  }
  for (size_t i = 0; i < texts.size(); ++i) {
    if (kinds[i] != TokenKind::kControl && kinds[i] != TokenKind::kUserDefined) continue;
    for (const std::string_view text : kEndTexts) {
      if (texts[i] == text) ends[i] = true;
    }
  }
}

void TokenTrie::add(std::string_view text, int32_t token) {
  if (text.empty()) return;
  const auto new_node = [&] {
    tokens_.push_back(-1);
    return static_cast<uint32_t>(tokens_.size() - 1);
  };
  uint32_t& root = roots_[static_cast<uint8_t>(text[0])];
  if (!root) root = new_node();
  uint32_t node = root;
  for (const char c : text.substr(1)) {
    uint32_t& next = edges_[uint64_t{node} << 8 | static_cast<uint8_t>(c)];
    if (!next) next = new_node();
    node = next;
  }
  if (tokens_[node] < 0) tokens_[node] = token;
}

TokenTrie::Match TokenTrie::longest(std::string_view text, size_t position) const {
  Match best{-1, 0};
  uint32_t node = roots_[static_cast<uint8_t>(text[position])];
  for (size_t at = position + 1; node; ++at) {
    if (tokens_[node] >= 0) best = {tokens_[node], at - position};
    if (at == text.size()) break;
    const auto next = edges_.find(uint64_t{node} << 8 | static_cast<uint8_t>(text[at]));
    node = next == edges_.end() ? 0 : next->second;
  }
  return best;
}

std::vector<int32_t> VocabularyTokenizer::encode(std::string_view text, bool add_special, bool parse_special) const {
  if (text.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()) / 4) {
    throw request_error("a text of " + std::to_string(text.size()) + " bytes is too long to be split into tokens");
  }
  std::vector<int32_t> ids;
  if (add_special && vocabulary_.add_bos) ids.push_back(vocabulary_.bos);
  size_t start = 0;  // of the text that is not encoded yet
  bool first = true;
  for (size_t at = 0; at < text.size();) {
    const TokenTrie::Match match = special_.longest(text, at);
    const bool user_defined = match.token >= 0 && vocabulary_.kinds[match.token] == TokenKind::kUserDefined;
    if (match.token >= 0 && (parse_special || user_defined)) {
      if (start < at) encode_text(text.substr(start, at - start), first, ids);
      ids.push_back(match.token);
      first = true;
      start = at + match.bytes;
    }
    at += match.token < 0 ? 1 : match.bytes;
  }
  if (start < text.size()) encode_text(text.substr(start), first, ids);
  if (add_special && vocabulary_.add_eos) ids.push_back(vocabulary_.eos);
  return ids;
}

bool VocabularyTokenizer::shown(int32_t token, bool with_special) const {
  if (!vocabulary_.holds(token)) return false;
  const TokenKind kind = vocabulary_.kinds[token];
  return with_special || (kind != TokenKind::kControl && kind != TokenKind::kUnknown);
}

std::unique_ptr<Tokenizer> Tokenizer::load(const GgufFile& file) {
  const std::string_view model = file.get_string("tokenizer.ggml.model");
  if (model == "gpt2") return load_bpe_tokenizer(file);
  if (model == "llama") return load_spm_tokenizer(file);
  throw model_error(file.name() + " has the tokenizer \"" + std::string(model.substr(0, 80)) +
                    "\"; \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece BPE) can be used");
}

}  // namespace powerinfer
