#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "errors.h"
#include "sampler.h"

using namespace powerinfer;

namespace {

SamplingParams with_seed(uint64_t seed) {
  SamplingParams params;
  params.seed = seed;
  return params;
}

// How often each token is drawn from fixed logits, by requests of many seeds.
std::map<int32_t, int> draws(SamplingParams params, const std::vector<float>& logits, int count) {
  std::map<int32_t, int> times;
  for (int i = 0; i < count; ++i) {
    params.seed = static_cast<uint64_t>(i);
    ++times[Sampler(params, static_cast<int>(logits.size()), {}).next(logits.data()).id];
  }
  return times;
}

}  // namespace

TEST_CASE("temperature 0 takes the largest logit, the lowest id of equal ones") {
  SamplingParams params;
  params.temperature = 0;
  Sampler sampler(params, 5, {});
  CHECK(sampler.next(std::vector<float>{1, 3, 2, 3, 0}.data()).id == 1);
  CHECK(sampler.next(std::vector<float>{0, 0, 0, 0, 0}.data()).id == 0);
  CHECK(sampler.next(std::vector<float>{-5, -4, -3, -2, -1}.data()).id == 4);
}

TEST_CASE("draws follow the softmax at the temperature") {
  const std::vector<float> logits = {0, std::log(2.0f), std::log(5.0f)};
  SamplingParams params;
  const int n = 40000;
  auto times = draws(params, logits, n);
  // five standard deviations of a share
  for (const auto& [token, share] : std::map<int32_t, double>{{0, 1 / 8.0}, {1, 2 / 8.0}, {2, 5 / 8.0}}) {
    CHECK(std::abs(times[token] / double(n) - share) < 5 * std::sqrt(share * (1 - share) / n));
  }
  params.temperature = 0.5f;  // squares the weights
  times = draws(params, logits, n);
  for (const auto& [token, share] : std::map<int32_t, double>{{0, 1 / 30.0}, {1, 4 / 30.0}, {2, 25 / 30.0}}) {
    CHECK(std::abs(times[token] / double(n) - share) < 5 * std::sqrt(share * (1 - share) / n));
  }
}

TEST_CASE("top_k, top_p and min_p keep exactly the tokens that they should") {
  std::vector<float> logits;
  for (int i = 0; i < 200; ++i) logits.push_back(std::log(static_cast<float>(1 + i % 100)));  // pairs of equal weight
  const auto kept = [&](const SamplingParams& params) {
    std::set<int32_t> tokens;
    for (const auto& [token, times] : draws(params, logits, 20000)) tokens.insert(token);
    return tokens;
  };
  SamplingParams params;
  params.top_k = 3;  // weights 100, 100, 99 (the lower id of two)
  CHECK(kept(params) == std::set<int32_t>{99, 199, 98});
  params.top_k = 0;
  params.min_p = 0.985f;
  CHECK(kept(params) == std::set<int32_t>{99, 199, 98, 198});
  params.min_p = 0;
  params.top_p = 250.0f / 10100;  // of a sum of 10100: 100 + 100 reach 200, the third is needed
  CHECK(kept(params) == std::set<int32_t>{99, 199, 98});
  params.top_p = 1e-9f;
  CHECK(kept(params) == std::set<int32_t>{99});
  params.top_p = 0.5f;               // more than a batch of the partial sort
  CHECK(kept(params).size() == 59);  // largest pairs: 100+100+99+...; 29 pairs make 4988, 59 tokens 5059
}

TEST_CASE("a seed gives the same tokens whatever else is sampled") {
  std::vector<float> logits(1000);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = std::sin(static_cast<float>(i));
  const auto run = [&](uint64_t seed, int others) {
    Sampler sampler(with_seed(seed), 1000, {}), other(with_seed(seed + 1), 1000, {});
    std::vector<int32_t> tokens;
    for (int i = 0; i < 20; ++i) {
      for (int k = 0; k < others; ++k) other.next(logits.data());
      tokens.push_back(sampler.next(logits.data()).id);
    }
    return tokens;
  };
  CHECK(run(7, 0) == run(7, 3));
  CHECK(run(7, 0) != run(8, 0));
  // fixed by the definition of the generator, on every compiler and library
  CHECK(run(7, 0)[0] == run(7, 1)[0]);
}

TEST_CASE("penalties and bias as OpenAI and vLLM define them") {
  SamplingParams params;
  params.temperature = 0;
  const std::vector<float> logits = {1.0f, 0.9f, 0.5f, -1.0f};
  SUBCASE("presence: once, whatever the count") {
    params.presence_penalty = 0.2f;
    Sampler sampler(params, 4, std::vector<int32_t>{0});  // the prompt does not count
    CHECK(sampler.next(logits.data()).id == 0);
    CHECK(sampler.next(logits.data()).id == 1);  // 0: 0.8
    CHECK(sampler.next(logits.data()).id == 0);  // 0: 0.8, 1: 0.7
    CHECK(sampler.next(logits.data()).id == 0);  // still 0.8
  }
  SUBCASE("frequency: times the count") {
    params.frequency_penalty = 0.2f;
    Sampler sampler(params, 4, {});
    std::vector<int32_t> tokens;
    for (int i = 0; i < 5; ++i) tokens.push_back(sampler.next(logits.data()).id);
    CHECK(tokens == std::vector<int32_t>{0, 1, 0, 1, 0});
  }
  SUBCASE("repetition: prompt tokens too; negative logits are multiplied") {
    params.repetition_penalty = 2.0f;
    Sampler sampler(params, 4, std::vector<int32_t>{0, 0, 3});
    CHECK(sampler.next(logits.data()).id == 1);  // 0: 0.5
    CHECK(sampler.next(logits.data()).id == 0);  // 0: 0.5 (lower id), 1: 0.45, 2: 0.5
    SamplingParams negative = params;
    const std::vector<float> all_negative = {-1.0f, -1.5f};
    CHECK(Sampler(negative, 2, std::vector<int32_t>{0}).next(all_negative.data()).id == 1);
  }
  SUBCASE("bias") {
    params.logit_bias = {{2, 100.0f}};
    CHECK(Sampler(params, 4, {}).next(logits.data()).id == 2);
    params.logit_bias = {{0, -100.0f}};
    CHECK(Sampler(params, 4, {}).next(logits.data()).id == 1);
    params.logit_bias = {{4, 1.0f}};
    CHECK_THROWS_AS(Sampler(params, 4, {}), Error);
  }
}

TEST_CASE("logprobs are those of the raw logits") {
  SamplingParams params;
  params.temperature = 0;
  params.logit_bias = {{2, 100.0f}};
  params.logprobs = 3;
  const std::vector<float> logits = {std::log(1.0f), std::log(4.0f), std::log(2.0f), std::log(1.0f)};
  const Token token = Sampler(params, 4, {}).next(logits.data());
  CHECK(token.id == 2);
  CHECK(token.logprob == doctest::Approx(std::log(2 / 8.0)));
  REQUIRE(token.top.size() == 3);
  CHECK(token.top[0].first == 1);
  CHECK(token.top[0].second == doctest::Approx(std::log(4 / 8.0)));
  CHECK(token.top[1].first == 2);
  CHECK(token.top[2].first == 0);  // of two equal ones
  CHECK(score(logits.data(), 4, 3, 9).top.size() == 4);
  // no overflow for large logits
  const std::vector<float> large = {3e38f, 3e38f};
  CHECK(score(large.data(), 2, 0, 0).logprob == doctest::Approx(std::log(0.5)));
}

TEST_CASE("logits that are not finite are refused by name of the token") {
  Sampler sampler(with_seed(1), 3, {});
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity()}) {
    const std::vector<float> logits = {0, 1, bad};
    CHECK_THROWS_WITH_AS(sampler.next(logits.data()), doctest::Contains("token 2"), Error);
  }
  CHECK_NOTHROW(sampler.next(std::vector<float>{3e38f, -3e38f, 0}.data()));
}

TEST_CASE("the best token is taken where penalties overflow") {
  SamplingParams params = with_seed(1);
  params.repetition_penalty = 0.01f;
  const std::vector<float> large = {1.0f, 1e37f, 2.0f};  // 1e37 / 0.01 is infinite
  CHECK(Sampler(params, 3, std::vector<int32_t>{1}).next(large.data()).id == 1);
  const std::vector<float> two = {3e38f, 1e37f, 2e38f};
  CHECK(Sampler(params, 3, std::vector<int32_t>{0, 1, 2}).next(two.data()).id == 0);
  params.repetition_penalty = 100.0f;
  const std::vector<float> negative = {-1e37f, -2e37f};
  CHECK(Sampler(params, 2, std::vector<int32_t>{0, 1}).next(negative.data()).id == 0);
  params.temperature = 1e-4f;
  CHECK(Sampler(params, 2, std::vector<int32_t>{1}).next(negative.data()).id == 0);
}

TEST_CASE("parameters out of range are refused") {
  const auto refused = [](auto change) {
    SamplingParams params;
    change(params);
    CHECK_THROWS_AS(check_sampling(params, 10), Error);
  };
  refused([](SamplingParams& p) { p.temperature = -1; });
  refused([](SamplingParams& p) { p.temperature = NAN; });
  refused([](SamplingParams& p) { p.top_p = 1.5f; });
  refused([](SamplingParams& p) { p.top_k = -1; });
  refused([](SamplingParams& p) { p.min_p = NAN; });
  refused([](SamplingParams& p) { p.presence_penalty = 3; });
  for (const float penalty : {0.0f, 1e-45f, 0.009f, 100.5f, -1.0f, INFINITY, NAN}) {
    refused([&](SamplingParams& p) { p.repetition_penalty = penalty; });
  }
  for (const float penalty : {0.01f, 100.0f}) {
    SamplingParams params;
    params.repetition_penalty = penalty;
    CHECK_NOTHROW(check_sampling(params, 10));
  }
  refused([](SamplingParams& p) { p.logit_bias = {{-1, 0.0f}}; });
  refused([](SamplingParams& p) { p.logit_bias = {{1, INFINITY}}; });
}
