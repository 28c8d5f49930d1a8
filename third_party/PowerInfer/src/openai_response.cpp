#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "openai.h"
#include "text_stream.h"

namespace powerinfer {
namespace {

using nlohmann::json;
using ordered = nlohmann::ordered_json;

std::string dump(const ordered& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace); }

// Bytes of the first characters of valid UTF-8, of all where there are fewer.
size_t bytes_of(std::string_view text, size_t characters) {
  size_t at = 0;
  for (; at < text.size(); ++at) {
    if ((static_cast<uint8_t>(text[at]) & 0xc0) != 0x80 && characters-- == 0) break;
  }
  return at;
}

}  // namespace

std::string ApiError::body() const {
  const char* type = "invalid_request_error";
  if (status_ == 401) type = "authentication_error";
  if (status_ == 404) type = "not_found_error";
  if (status_ == 429) type = "rate_limit_error";
  if (status_ >= 500) type = status_ == 503 ? "service_unavailable_error" : "server_error";
  ordered error;
  error["message"] = what();
  error["type"] = type;
  error["param"] = param_.empty() ? ordered(nullptr) : ordered(param_);
  error["code"] = code_.empty() ? ordered(nullptr) : ordered(code_);
  return dump(ordered{{"error", error}});
}

std::string token_text(const std::string& bytes) {
  if (is_valid_utf8(bytes)) return bytes;
  std::string text = "bytes:";
  for (const char c : bytes) {
    char hex[8];
    std::snprintf(hex, sizeof hex, "\\x%02x", static_cast<unsigned>(static_cast<uint8_t>(c)));
    text += hex;
  }
  return text;
}

// The JSON values that bodies are made of.
struct ResponseWriter::Json {
  ResponseWriter& writer;

  std::string bytes(int32_t token) const { return writer.tokenizer_.token_bytes(token, true); }

  std::string name(int32_t token) const {
    return writer.tokens_as_ids_ ? "token_id:" + std::to_string(token) : token_text(bytes(token));
  }

  const std::vector<int32_t>& prompt(int choice) const {
    static const std::vector<int32_t> kNone;
    const size_t number = static_cast<size_t>(choice) / writer.n_;
    return number < writer.prompts_.size() ? writer.prompts_[number] : kNone;
  }

  static ordered ids(const Piece& piece) {
    ordered list = ordered::array();
    for (const Token& token : piece.tokens) list.push_back(token.id);
    return list;
  }

  static ordered logprob(float x) { return std::isfinite(x) ? ordered(x) : ordered(nullptr); }

  ordered head(const char* object) const {
    return ordered{{"id", writer.id_}, {"object", object}, {"created", writer.created_}, {"model", writer.model_}};
  }

  static ordered finish(Finish finish) {
    if (finish == Finish::kStop) return "stop";
    if (finish == Finish::kLength) return "length";
    return nullptr;
  }

  static ordered usage(const Usage& usage) {
    return ordered{{"prompt_tokens", usage.prompt_tokens},
                   {"completion_tokens", usage.completion_tokens},
                   {"total_tokens", usage.prompt_tokens + usage.completion_tokens}};
  }

  // Characters of the echoed prompt's tokens. Its text holds special tokens where the client wrote them, not those that the
  // tokenizer added, nor the space that SentencePiece puts in front of a text or a part of it.
  std::vector<size_t> echoed_lengths(const Piece& piece) const {
    std::vector<size_t> lengths;
    std::string_view rest = piece.text;
    bool begins = writer.tokenizer_.leading_space();
    for (const int32_t token : prompt(piece.choice)) {
      const std::string plain = writer.tokenizer_.token_bytes(token), whole = bytes(token);
      std::string_view text = whole;
      if (begins && text.starts_with(' ') && rest.starts_with(text.substr(1))) text.remove_prefix(1);
      // else: a token that the tokenizer added, or bytes that are no UTF-8 and stand as U+FFFD
      if (!rest.starts_with(text)) text = plain;
      lengths.push_back(utf8_length(text));
      rest.remove_prefix(bytes_of(rest, lengths.back()));
      begins = writer.tokenizer_.leading_space() && plain.empty();
    }
    return lengths;
  }

  ordered chat_token(int32_t token, float value) const {
    const std::string text = bytes(token);
    ordered list = ordered::array();
    for (const char c : text) list.push_back(static_cast<uint8_t>(c));
    return ordered{{"token", name(token)}, {"logprob", logprob(value)}, {"bytes", list}};
  }

  ordered logprobs(const Piece& piece) {
    if (!writer.logprobs_) return nullptr;
    if (writer.chat_) {
      ordered content = ordered::array();
      for (const Token& token : piece.tokens) {
        ordered entry = chat_token(token.id, token.logprob);
        ordered top = ordered::array();
        for (const auto& [id, value] : token.top) top.push_back(chat_token(id, value));
        entry["top_logprobs"] = top;
        content.push_back(entry);
      }
      return ordered{{"content", content}, {"refusal", nullptr}};
    }
    ordered tokens = ordered::array(), values = ordered::array(), tops = ordered::array(), offsets = ordered::array();
    const auto choice = static_cast<size_t>(piece.choice);
    const std::vector<size_t> echoed =
        writer.echo_ && !writer.placed_[choice] ? echoed_lengths(piece) : std::vector<size_t>();
    writer.placed_[choice] = true;
    size_t& offset = writer.offsets_[choice];
    for (size_t i = 0; i < piece.tokens.size(); ++i) {
      const Token& token = piece.tokens[i];
      tokens.push_back(name(token.id));
      values.push_back(logprob(token.logprob));
      if (std::isfinite(token.logprob)) {
        ordered top = ordered::object();
        for (const auto& [id, value] : token.top) top[name(id)] = logprob(value);
        top[name(token.id)] = logprob(token.logprob);  // the token itself always, as OpenAI has it
        tops.push_back(top);
      } else {
        tops.push_back(nullptr);  // the first token of a prompt
      }
      offsets.push_back(offset);
      offset += i < echoed.size() ? echoed[i] : utf8_length(writer.tokenizer_.token_bytes(token.id, !writer.skip_special_));
    }
    return ordered{{"tokens", tokens}, {"token_logprobs", values}, {"top_logprobs", tops}, {"text_offset", offsets}};
  }
};

ResponseWriter::ResponseWriter(const ApiRequest& request, const Tokenizer& tokenizer, std::string model, std::string id,
                               int64_t created)
    : tokenizer_(tokenizer),
      model_(std::move(model)),
      id_(std::move(id)),
      created_(created),
      chat_(request.chat),
      echo_(request.echo),
      include_usage_(request.include_usage),
      logprobs_(request.generation.sampling.logprobs >= 0),
      token_ids_(request.return_token_ids),
      tokens_as_ids_(request.tokens_as_ids),
      skip_special_(request.skip_special_tokens),
      n_(static_cast<size_t>(request.n)),
      prompt_shown_(static_cast<size_t>(request.choices())),
      offsets_(static_cast<size_t>(request.choices())),
      placed_(static_cast<size_t>(request.choices())) {}

std::string ResponseWriter::first_chunk(int choice) {
  if (!chat_) return "";
  ordered chunk = Json{*this}.head("chat.completion.chunk");
  chunk["choices"] = ordered::array({ordered{{"index", choice},
                                             {"delta", ordered{{"role", "assistant"}, {"content", ""}}},
                                             {"logprobs", nullptr},
                                             {"finish_reason", nullptr}}});
  if (token_ids_) chunk["prompt_token_ids"] = Json{*this}.prompt(choice);
  if (include_usage_) chunk["usage"] = nullptr;
  return dump(chunk);
}

std::string ResponseWriter::chunk(const Piece& piece) {
  Json make{*this};
  ordered choice{{"index", piece.choice}};
  if (chat_) {
    ordered delta = ordered::object();
    if (!piece.text.empty() || piece.finish == Finish::kNone) delta["content"] = piece.text;
    choice["delta"] = delta;
  } else {
    choice["text"] = piece.text;
  }
  choice["logprobs"] = piece.tokens.empty() ? ordered(nullptr) : make.logprobs(piece);
  choice["finish_reason"] = Json::finish(piece.finish);
  if (token_ids_) {
    const size_t number = static_cast<size_t>(piece.choice);
    choice["token_ids"] = Json::ids(piece);
    if (!chat_ && !prompt_shown_[number]) choice["prompt_token_ids"] = make.prompt(piece.choice);
    prompt_shown_[number] = true;
  }
  ordered chunk = make.head(chat_ ? "chat.completion.chunk" : "text_completion");
  chunk["choices"] = ordered::array({choice});
  if (include_usage_) chunk["usage"] = nullptr;
  return dump(chunk);
}

std::string ResponseWriter::usage_chunk(const Usage& usage) {
  ordered chunk = Json{*this}.head(chat_ ? "chat.completion.chunk" : "text_completion");
  chunk["choices"] = ordered::array();
  chunk["usage"] = Json::usage(usage);
  return dump(chunk);
}

std::string ResponseWriter::whole(const std::vector<Piece>& choices, const Usage& usage) {
  Json make{*this};
  ordered list = ordered::array();
  for (const Piece& piece : choices) {
    ordered choice{{"index", piece.choice}};
    if (chat_) {
      choice["message"] = ordered{{"role", "assistant"}, {"content", piece.text}, {"refusal", nullptr}};
    } else {
      choice["text"] = piece.text;
    }
    choice["logprobs"] = make.logprobs(piece);
    choice["finish_reason"] = Json::finish(piece.finish);
    if (token_ids_) {
      choice["token_ids"] = Json::ids(piece);
      if (!chat_) choice["prompt_token_ids"] = make.prompt(piece.choice);
    }
    list.push_back(choice);
  }
  ordered body = make.head(chat_ ? "chat.completion" : "text_completion");
  body["choices"] = list;
  if (token_ids_ && chat_) body["prompt_token_ids"] = make.prompt(0);
  body["usage"] = Json::usage(usage);
  return dump(body);
}

std::string models_body(const std::string& model, int context, int64_t created) {
  const ordered entry{
      {"id", model}, {"object", "model"}, {"created", created}, {"owned_by", "powerinfer"}, {"max_model_len", context}};
  return dump(ordered{{"object", "list"}, {"data", ordered::array({entry})}});
}

std::string tokenize_body(const std::vector<int32_t>& tokens, int context) {
  return dump(ordered{{"count", tokens.size()}, {"max_model_len", context}, {"tokens", tokens}});
}

std::string detokenize_body(const std::string& text) { return dump(ordered{{"prompt", text}}); }

}  // namespace powerinfer
