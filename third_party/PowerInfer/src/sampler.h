// From the logits of one position to the next token.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "engine.h"

namespace powerinfer {

// Throws Error(kRequest) for a parameter out of its range or a biased token outside the vocabulary.
void check_sampling(const SamplingParams& params, int vocabulary);

// `token` with its logprob and the `alternatives` likeliest tokens, from the log-softmax of raw logits [vocabulary].
// Throws Error(kFailed) where a logit is not finite.
Token score(const float* logits, int vocabulary, int32_t token, int alternatives);

// Chooses the tokens of one request. The choice depends on the logits, the parameters, the seed and the request's own tokens
// only: the random number of each token is a hash of the seed and the token's index.
class Sampler {
 public:
  Sampler(const SamplingParams& params, int vocabulary, std::span<const int32_t> prompt);

  // The next token after logits [vocabulary], which are left as they are; counted for the penalties. Of equal logits the
  // lowest id is taken first. Throws Error(kFailed) where a logit is not finite.
  Token next(const float* logits);

 private:
  int32_t choose(std::span<const float> logits);
  std::span<const float> adjusted(const float* logits);

  SamplingParams params_;
  int vocabulary_;
  uint64_t seed_;
  uint64_t index_ = 0;                          // tokens chosen
  std::unordered_map<int32_t, int> generated_;  // token -> times chosen
  std::unordered_set<int32_t> prompt_;          // kept for the repetition penalty only
  std::vector<float> logits_;                   // after bias and penalties
  std::vector<float> weights_;                  // exp((logit - largest) / temperature), by token
  std::vector<int32_t> candidates_;
};

}  // namespace powerinfer
