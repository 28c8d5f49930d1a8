#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <random>
#include <string>

#include "errors.h"

namespace powerinfer {
namespace {

// SplitMix64's output function: every input bit changes about half of the output's bits.
uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9ULL;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// In [0, 1), 53 bits.
double uniform(uint64_t seed, uint64_t index) {
  const uint64_t bits = mix(mix(seed + 0x9e3779b97f4a7c15ULL) + (index + 1) * 0x9e3779b97f4a7c15ULL);
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

uint64_t random_seed() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

void check_finite(const float* logits, int count) {
  uint32_t bad = 0;
  for (int i = 0; i < count; ++i) bad |= (std::bit_cast<uint32_t>(logits[i]) & 0x7f800000u) == 0x7f800000u;
  if (!bad) return;
  const auto* first = std::find_if(logits, logits + count, [](float x) { return !std::isfinite(x); });
  throw Error(ErrorKind::kFailed, "the model's output is not finite (token " + std::to_string(first - logits) + ": " +
                                      std::to_string(*first) + "): the model file may be damaged");
}

int32_t largest(std::span<const float> x) { return static_cast<int32_t>(std::max_element(x.begin(), x.end()) - x.begin()); }

// Orders tokens by falling value, equal ones by rising id.
struct Before {
  const float* values;
  bool operator()(int32_t a, int32_t b) const { return values[a] != values[b] ? values[a] > values[b] : a < b; }
};

}  // namespace

void check_sampling(const SamplingParams& p, int vocabulary) {
  const auto check = [](bool holds, const std::string& what, float got) {
    if (!holds) throw request_error(what + ", got " + std::to_string(got));
  };
  check(std::isfinite(p.temperature) && p.temperature >= 0, "temperature must be 0 or more", p.temperature);
  check(p.top_k >= 0, "top_k must be 0 (all tokens) or more", static_cast<float>(p.top_k));
  check(p.top_p >= 0 && p.top_p <= 1, "top_p must be between 0 and 1", p.top_p);
  check(p.min_p >= 0 && p.min_p <= 1, "min_p must be between 0 and 1", p.min_p);
  check(std::abs(p.presence_penalty) <= 2, "presence_penalty must be between -2 and 2", p.presence_penalty);
  check(std::abs(p.frequency_penalty) <= 2, "frequency_penalty must be between -2 and 2", p.frequency_penalty);
  check(p.repetition_penalty >= 0.01f && p.repetition_penalty <= 100, "repetition_penalty must be between 0.01 and 100",
        p.repetition_penalty);
  for (const auto& [token, bias] : p.logit_bias) {
    if (token < 0 || token >= vocabulary) {
      throw request_error("logit_bias: token " + std::to_string(token) + " is outside the vocabulary of " +
                          std::to_string(vocabulary));
    }
    check(std::abs(bias) <= 100, "logit_bias values must be between -100 and 100", bias);
  }
}

Token score(const float* logits, int vocabulary, int32_t token, int alternatives) {
  check_finite(logits, vocabulary);
  const std::span<const float> all(logits, static_cast<size_t>(vocabulary));
  const double most = all[static_cast<size_t>(largest(all))];
  double sum = 0;
  for (const float x : all) sum += std::exp(static_cast<double>(x) - most);
  const double log_sum = std::log(sum);
  const auto logprob = [&](int32_t id) { return static_cast<float>(logits[id] - most - log_sum); };

  Token result;
  result.id = token;
  result.logprob = logprob(token);
  const size_t count = static_cast<size_t>(std::clamp(alternatives, 0, vocabulary));
  if (count > 0) {
    std::vector<int32_t> ids(all.size());
    std::iota(ids.begin(), ids.end(), 0);
    const auto end = ids.begin() + static_cast<ptrdiff_t>(count);
    if (end != ids.end()) std::nth_element(ids.begin(), end, ids.end(), Before{logits});
    std::sort(ids.begin(), end, Before{logits});
    for (auto id = ids.begin(); id != end; ++id) result.top.emplace_back(*id, logprob(*id));
  }
  return result;
}

Sampler::Sampler(const SamplingParams& params, int vocabulary, std::span<const int32_t> prompt)
    : params_(params), vocabulary_(vocabulary), seed_(params.seed ? *params.seed : random_seed()) {
  check_sampling(params, vocabulary);
  if (params_.repetition_penalty != 1.0f) prompt_.insert(prompt.begin(), prompt.end());
}

Token Sampler::next(const float* logits) {
  check_finite(logits, vocabulary_);  // before a choice is made and counted
  const int32_t token = choose(adjusted(logits));
  ++index_;
  ++generated_[token];
  if (params_.logprobs >= 0) return score(logits, vocabulary_, token, params_.logprobs);
  Token result;
  result.id = token;
  return result;
}

// Logit bias first, then the repetition penalty, then frequency and presence, as vLLM applies them.
std::span<const float> Sampler::adjusted(const float* logits) {
  const std::span<const float> raw(logits, static_cast<size_t>(vocabulary_));
  const bool penalties =
      params_.repetition_penalty != 1.0f || params_.frequency_penalty != 0.0f || params_.presence_penalty != 0.0f;
  if (params_.logit_bias.empty() && !penalties) return raw;

  logits_.assign(raw.begin(), raw.end());
  for (const auto& [token, bias] : params_.logit_bias) logits_[static_cast<size_t>(token)] += bias;
  if (params_.repetition_penalty != 1.0f) {
    const auto repeat = [&](int32_t token) {
      float& x = logits_[static_cast<size_t>(token)];
      x = x > 0 ? x / params_.repetition_penalty : x * params_.repetition_penalty;
    };
    for (const int32_t token : prompt_) repeat(token);
    for (const auto& [token, count] : generated_) {
      if (!prompt_.contains(token)) repeat(token);
    }
  }
  for (const auto& [token, count] : generated_) {
    logits_[static_cast<size_t>(token)] -= params_.frequency_penalty * static_cast<float>(count) + params_.presence_penalty;
  }
  return logits_;
}

int32_t Sampler::choose(std::span<const float> logits) {
  const int32_t best = largest(logits);
  // below this the division overflows or the others' weights vanish
  if (params_.temperature < 1e-5f || params_.top_k == 1 || params_.top_p == 0.0f) return best;

  weights_.resize(logits.size());
  candidates_.clear();
  const float most = logits[static_cast<size_t>(best)];
  if (!std::isfinite(most)) return best;  // penalties overflowed: there are no weights
  for (size_t i = 0; i < logits.size(); ++i) {
    weights_[i] = std::exp((logits[i] - most) / params_.temperature);
    if (weights_[i] >= params_.min_p && weights_[i] > 0) candidates_.push_back(static_cast<int32_t>(i));
  }
  if (candidates_.empty()) return best;
  // equal weights of unequal logits are ordered by id: they are equally likely
  const Before before{weights_.data()};
  const auto weight = [&](int32_t token) { return static_cast<double>(weights_[static_cast<size_t>(token)]); };
  if (params_.top_k > 0 && static_cast<size_t>(params_.top_k) < candidates_.size()) {
    const auto end = candidates_.begin() + params_.top_k;
    std::nth_element(candidates_.begin(), end, candidates_.end(), before);
    candidates_.erase(end, candidates_.end());
    std::sort(candidates_.begin(), candidates_.end());  // one order on every library
  }
  double total = 0;
  for (const int32_t token : candidates_) total += weight(token);
  if (params_.top_p < 1.0f) {
    // sorts no more than the most likely tokens that reach top_p, a batch at a time
    const double wanted = static_cast<double>(params_.top_p) * total;
    double sum = 0;
    size_t kept = 0, sorted = 0, batch = 64;
    while (kept < candidates_.size() && (kept == 0 || sum < wanted)) {
      if (kept == sorted) {
        const auto from = candidates_.begin() + static_cast<ptrdiff_t>(sorted);
        sorted = std::min(sorted + batch, candidates_.size());
        batch *= 4;
        const auto to = candidates_.begin() + static_cast<ptrdiff_t>(sorted);
        if (to != candidates_.end()) std::nth_element(from, to, candidates_.end(), before);
        std::sort(from, to, before);
      }
      sum += weight(candidates_[kept++]);
    }
    candidates_.resize(kept);
    total = sum;
  }
  const double point = uniform(seed_, index_) * total;
  double sum = 0;
  for (const int32_t token : candidates_) {
    sum += weight(token);
    if (point < sum) return token;
  }
  return candidates_.back();
}

}  // namespace powerinfer
