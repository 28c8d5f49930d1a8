// OpenAI's completions protocol: request bodies to what the engine is asked, and its tokens to response bodies. No network.
#pragma once

#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "chat.h"
#include "engine.h"
#include "tokenizer.h"

namespace powerinfer {

// What a client gets in place of an answer.
class ApiError : public std::runtime_error {
 public:
  ApiError(int status, const std::string& message, std::string param = "", std::string code = "")
      : std::runtime_error(message), status_(status), param_(std::move(param)), code_(std::move(code)) {}
  int status() const { return status_; }
  std::string body() const;  // {"error": {"message", "type", "param", "code"}}

 private:
  int status_;
  std::string param_, code_;
};

struct ApiLimits {
  std::string model;  // the name that requests may give; "" accepts every name
  int vocabulary = 0;
  int context = 0;
  int max_choices = 1;  // answers to one request: prompts times n
};

struct Prompt {
  std::string text;
  std::vector<int32_t> tokens;
  bool is_text = true;
};

struct ApiRequest {
  bool chat = false;
  std::vector<Prompt> prompts;    // completions
  std::vector<Message> messages;  // chat
  bool add_generation_prompt = true;
  bool add_special_tokens = true;
  bool skip_special_tokens = true;
  int n = 1;
  bool echo = false;
  bool stream = false;
  bool include_usage = false;  // a last chunk with the usage
  bool has_max_tokens = false;
  bool return_token_ids = false;  // vLLM's extension: ids beside texts
  bool tokens_as_ids = false;     // vLLM's extension: logprobs name tokens "token_id:7"
  std::vector<std::string> stop;
  Generation generation;  // what all prompts and choices share; without prompt and callbacks

  int choices() const { return n * (chat ? 1 : static_cast<int>(prompts.size())); }
};

// Throw ApiError for a body that is no JSON object, for fields of a wrong type or value, and for fields that ask for what
// this engine does not do. Fields that change nothing in the answer are ignored.
ApiRequest parse_completion(std::string_view body, const ApiLimits& limits);
ApiRequest parse_chat(std::string_view body, const ApiLimits& limits);
ApiRequest parse_tokenize(std::string_view body, const ApiLimits& limits);  // one prompt, or messages
std::vector<int32_t> parse_detokenize(std::string_view body, const ApiLimits& limits);

// A seed for the i-th choice of a request: the first one keeps the request's.
uint64_t choice_seed(uint64_t seed, int choice);

struct Usage {
  uint64_t prompt_tokens = 0, completion_tokens = 0;
};

// A part of the answer of one choice.
struct Piece {
  int choice = 0;
  std::string text;           // valid UTF-8
  std::vector<Token> tokens;  // where logprobs or ids were asked for
  Finish finish = Finish::kNone;
  std::string error;  // of Finish::kError and kCancelled
};

// Writes the bodies of one request's response. Not for several threads.
class ResponseWriter {
 public:
  ResponseWriter(const ApiRequest& request, const Tokenizer& tokenizer, std::string model, std::string id, int64_t created);

  // The prompts' tokens, in their order: shown where the request asks for ids, found in the text where it asks for an echo.
  void set_prompts(std::vector<std::vector<int32_t>> prompts) { prompts_ = std::move(prompts); }

  // Chunks of a stream, without "data: ".
  std::string first_chunk(int choice);  // chat: the role; "" for completions
  std::string chunk(const Piece& piece);
  std::string usage_chunk(const Usage& usage);
  // The whole response; each choice's pieces joined to one.
  std::string whole(const std::vector<Piece>& choices, const Usage& usage);

 private:
  const Tokenizer& tokenizer_;
  const std::string model_, id_;
  const int64_t created_;
  const bool chat_, echo_, include_usage_, logprobs_, token_ids_, tokens_as_ids_, skip_special_;
  const size_t n_;
  std::vector<std::vector<int32_t>> prompts_;
  std::vector<bool> prompt_shown_;  // by choice, in a stream
  std::vector<size_t> offsets_;     // characters of each choice's tokens so far
  std::vector<bool> placed_;        // by choice: its first tokens have their offsets

  struct Json;  // keeps the JSON library out of this header
  friend struct Json;
};

std::string models_body(const std::string& model, int context, int64_t created);
std::string tokenize_body(const std::vector<int32_t>& tokens, int context);
std::string detokenize_body(const std::string& text);
// A token's bytes as text: as they are, or "bytes:\xe2\x80" where they are no whole characters.
std::string token_text(const std::string& bytes);

}  // namespace powerinfer
