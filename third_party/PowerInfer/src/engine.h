// Continuous batching: requests come and go while one thread runs forward passes over all that are under way.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "model.h"

namespace powerinfer {

struct SamplingParams {
  float temperature = 1.0f;  // 0: the likeliest token
  int top_k = 0;             // 0: all
  float top_p = 1.0f;
  float min_p = 0.0f;
  float presence_penalty = 0.0f;  // over generated tokens, as OpenAI defines the two
  float frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;  // over prompt and generated tokens
  std::optional<uint64_t> seed;     // none: a random one
  std::unordered_map<int32_t, float> logit_bias;
  int logprobs = -1;  // alternatives to report with each token; -1: no logprobs at all
};

enum class Finish { kNone, kStop, kLength, kCancelled, kError };

struct Token {
  int32_t id = -1;
  float logprob = 0.0f;                        // of the unmodified distribution
  std::vector<std::pair<int32_t, float>> top;  // the likeliest tokens and their logprobs
  Finish finish = Finish::kNone;               // set on the last one; id is -1 where it carries no token
  std::string error;                           // of Finish::kError
};

struct Generation {
  std::vector<int32_t> prompt;
  int max_tokens = 16;
  bool ignore_eos = false;
  std::vector<int32_t> stop_tokens;  // beside those that end the model's generation
  int prompt_logprobs = -1;          // >= 0: logprobs of the prompt's tokens are reported through on_prompt
  SamplingParams sampling;

  // Called on the engine's thread, in order; returns false to stop the request (a stop string, a client that left): it is
  // not called again then.
  std::function<bool(const Token&)> on_token;
  // All the prompt's tokens at once, before the first on_token. The first one has no logprob (NaN).
  std::function<void(const std::vector<Token>&)> on_prompt;
};

struct EngineOptions {
  int queue = 128;             // requests that may wait beside those that run
  int batch = 512;             // tokens of one forward pass, ModelOptions::batch; more than there are slots
  int prompt_beside = 128;     // most prompt tokens in a pass that other requests wait for with a decode token
  bool reuse_prefixes = true;  // a free slot keeps the tokens that it has in common with the next prompt
};

struct EngineStats {
  int running = 0, waiting = 0;
  uint64_t requests = 0, prompt_tokens = 0, cached_prompt_tokens = 0, generated_tokens = 0;
  double prompt_seconds = 0, decode_seconds = 0;  // of forward passes with and without prompt tokens
  uint64_t forward_passes = 0;
  Model::Activity activity;  // the model's, after the last pass
  uint64_t kv_bytes = 0;
};

class Engine {
 public:
  // ends_generation(token): the tokenizer's. The model must outlive the engine.
  Engine(Model& model, std::function<bool(int32_t)> ends_generation, const EngineOptions& options);
  ~Engine();  // cancels what runs

  // Queues a request and returns its number; nullopt where the queue is full. Throws Error(kRequest) for an empty prompt,
  // one that leaves no room in the context (max_tokens is cut to what is left of it), bad tokens or sampling parameters, and
  // while draining.
  std::optional<uint64_t> submit(Generation generation);
  // What submit() throws for a prompt, before anything is built for it.
  void check_prompt(const std::vector<int32_t>& prompt, int max_tokens) const;
  void cancel(uint64_t request);  // on_token gets Finish::kCancelled; unknown numbers are ignored
  // Takes no more requests (submit throws) and returns true once those under way have ended, false after `limit`.
  bool drain(std::chrono::seconds limit = std::chrono::hours(24 * 365));
  void cancel_all();
  EngineStats stats() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace powerinfer
