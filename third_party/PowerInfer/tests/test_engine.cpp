#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <future>
#include <mutex>
#include <set>
#include <thread>

#include "allocations.h"
#include "engine.h"
#include "errors.h"
#include "sampler.h"
#include "toy_model.h"

using namespace powerinfer;

namespace {

constexpr int kVocabulary = 61;

bool no_end(int32_t) { return false; }

// The tokens of one request, waited for.
struct Answer {
  std::vector<Token> tokens;
  std::vector<Token> prompt;
  std::promise<void> done;
  std::function<void(const Token&)> on_each;

  void ask(Engine& engine, Generation generation, uint64_t* number = nullptr) {
    generation.on_token = [this](const Token& token) {
      tokens.push_back(token);
      if (on_each) on_each(token);
      if (token.finish != Finish::kNone) done.set_value();
      return true;
    };
    generation.on_prompt = [this](const std::vector<Token>& all) { prompt = all; };
    const auto id = engine.submit(std::move(generation));
    REQUIRE(id);
    if (number) *number = *id;
  }
  Answer& wait() {
    REQUIRE(done.get_future().wait_for(std::chrono::seconds(60)) == std::future_status::ready);
    return *this;
  }
  std::vector<int32_t> ids() const {
    std::vector<int32_t> result;
    for (const Token& token : tokens) {
      if (token.id >= 0) result.push_back(token.id);
    }
    return result;
  }
  Finish finish() const { return tokens.back().finish; }
};

Generation greedy(std::vector<int32_t> prompt, int max_tokens) {
  Generation generation;
  generation.prompt = std::move(prompt);
  generation.max_tokens = max_tokens;
  generation.sampling.temperature = 0;
  return generation;
}

std::vector<int32_t> sequence(int length, int start = 1) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < length; ++i) tokens.push_back((start + i * 7) % kVocabulary);
  return tokens;
}

EngineOptions options(int batch, int queue = 100) {
  EngineOptions result;
  result.batch = batch;
  result.queue = queue;
  return result;
}

// Lets forward passes begin only when told to.
class Gate {
 public:
  explicit Gate(ToyModel& model) {
    model.on_forward = [this](const std::vector<Step>&) {
      std::unique_lock lock(mutex_);
      ++waiting_;
      changed_.notify_all();
      changed_.wait(lock, [this] { return open_; });
      --waiting_;
    };
  }
  void wait_for_pass() {
    std::unique_lock lock(mutex_);
    REQUIRE(changed_.wait_for(lock, std::chrono::seconds(30), [this] { return waiting_ > 0; }));
  }
  void open() {
    std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
  bool open_ = false;
};

}  // namespace

TEST_CASE("one request: greedy tokens, cut at max_tokens") {
  ToyModel model(kVocabulary, 100, 2, 16);
  Engine engine(model, no_end, options(16));
  Answer answer;
  answer.ask(engine, greedy(sequence(40), 12));  // a prompt of three passes
  CHECK(answer.wait().ids() == model.greedy(sequence(40), 12));
  CHECK(answer.finish() == Finish::kLength);
  CHECK(answer.tokens.size() == 12);
  engine.drain();
  CHECK(engine.stats().prompt_tokens == 40);
  CHECK(engine.stats().generated_tokens == 12);
  CHECK(engine.stats().running == 0);
}

TEST_CASE("many requests at once get the tokens that each gets alone") {
  ToyModel model(kVocabulary, 200, 4, 9);
  EngineOptions how = options(9);
  how.prompt_beside = 3;
  Engine engine(model, no_end, how);
  std::vector<std::unique_ptr<Answer>> answers;
  for (int i = 0; i < 30; ++i) {
    answers.push_back(std::make_unique<Answer>());
    Generation generation = greedy(sequence(1 + i * 5 % 37, i), 1 + i * 3 % 20);
    if (i % 3 == 1) {
      generation.sampling.temperature = 0.8f;
      generation.sampling.top_p = 0.9f;
      generation.sampling.seed = static_cast<uint64_t>(i);
    }
    answers.back()->ask(engine, generation);
  }
  for (int i = 0; i < 30; ++i) {
    const std::vector<int32_t> prompt = sequence(1 + i * 5 % 37, i);
    const int count = 1 + i * 3 % 20;
    const std::vector<int32_t> got = answers[static_cast<size_t>(i)]->wait().ids();
    if (i % 3 != 1) {
      CHECK(got == model.greedy(prompt, count));
      continue;
    }
    SamplingParams params;
    params.temperature = 0.8f;
    params.top_p = 0.9f;
    params.seed = static_cast<uint64_t>(i);
    Sampler sampler(params, kVocabulary, prompt);
    std::vector<int32_t> all = prompt, expected;
    for (int k = 0; k < count; ++k) {
      expected.push_back(sampler.next(model.logits(all, prompt.size()).data()).id);
      all.push_back(expected.back());
    }
    CHECK(got == expected);
  }
  engine.drain();
  CHECK(model.decoded_beside_prompt > 0);
  CHECK(model.largest_prompt_beside <= 3);
}

TEST_CASE("a long prompt does not hold up a request that is being answered") {
  ToyModel model(kVocabulary, 4000, 2, 64);
  EngineOptions how = options(64);
  how.prompt_beside = 8;
  Engine engine(model, no_end, how);
  Answer first, second;
  std::atomic<int> tokens_before_second = 0;
  std::atomic<bool> second_started = false, asked = false;
  first.on_each = [&](const Token&) {
    if (!asked.exchange(true)) second.ask(engine, greedy(sequence(2000), 1));
    if (!second_started) ++tokens_before_second;
  };
  second.on_each = [&](const Token&) { second_started = true; };
  first.ask(engine, greedy({1}, 1000));
  first.wait();
  second.wait();
  CHECK(tokens_before_second >= 200);  // 2000 prompt tokens in steps of 8
}

TEST_CASE("prefixes are reused only as far as they were computed as prompt") {
  ToyModel model(kVocabulary, 200, 1, 64);
  Engine engine(model, no_end, options(64));
  Answer first;
  first.ask(engine, greedy(sequence(30), 10));
  const std::vector<int32_t> generated = first.wait().ids();

  // the next turn of a conversation: prompt, answer, and something new
  std::vector<int32_t> next = sequence(30);
  next.insert(next.end(), generated.begin(), generated.end());
  next.push_back(5);
  Answer second;
  second.ask(engine, greedy(next, 10));
  CHECK(second.wait().ids() == model.greedy(next, 10));
  engine.drain();
  CHECK(engine.stats().cached_prompt_tokens == 30);
  CHECK(engine.stats().prompt_tokens == 30 + 11);
}

TEST_CASE("the same prompt again computes its last token; a scored prompt is computed whole") {
  ToyModel model(kVocabulary, 200, 2, 64);
  Engine engine(model, no_end, options(64));
  for (int i = 0; i < 3; ++i) {
    Answer answer;
    answer.ask(engine, greedy(sequence(30), 3));
    CHECK(answer.wait().ids() == model.greedy(sequence(30), 3));
  }
  Answer scored;
  Generation generation = greedy(sequence(30), 3);
  generation.prompt_logprobs = 0;
  scored.ask(engine, generation);
  CHECK(scored.wait().ids() == model.greedy(sequence(30), 3));
  CHECK(engine.stats().cached_prompt_tokens == 29 + 29);
}

TEST_CASE("a cache that cannot keep the prefix computes it again") {
  ToyModel model(kVocabulary, 200, 1, 64);
  model.loses_all = true;
  Engine engine(model, no_end, options(64));
  for (int i = 0; i < 2; ++i) {
    Answer answer;
    answer.ask(engine, greedy(sequence(30), 3));
    CHECK(answer.wait().ids() == model.greedy(sequence(30), 3));
  }
  CHECK(engine.stats().cached_prompt_tokens == 0);
}

TEST_CASE("the slot with the longest common prefix is taken, else the one longest unused") {
  ToyModel model(kVocabulary, 200, 3, 64);
  std::vector<int> taken;
  model.on_forward = [&](const std::vector<Step>& steps) {
    if (steps[0].prompt) taken.push_back(steps[0].slot);
  };
  Engine engine(model, no_end, options(64));
  const auto run = [&](std::vector<int32_t> prompt) {
    Answer answer;
    answer.ask(engine, greedy(std::move(prompt), 2));
    answer.wait();
    return taken.back();
  };
  const int a = run(sequence(20, 1)), b = run(sequence(20, 2)), c = run(sequence(20, 3));
  CHECK(std::set<int>{a, b, c}.size() == 3);
  CHECK(run(sequence(25, 2)) == b);
  CHECK(run(sequence(20, 4)) == a);  // unused for longest
  CHECK(run(sequence(20, 5)) == c);
}

TEST_CASE("end tokens, stop tokens and ignore_eos") {
  ToyModel model(kVocabulary, 200, 1, 64);
  const std::vector<int32_t> expected = model.greedy({1, 2, 3}, 10);
  const int32_t end = expected[4];
  const auto index_of = [&](int32_t token) { return std::find(expected.begin(), expected.end(), token) - expected.begin(); };
  Engine engine(
      model, [&](int32_t token) { return token == end; }, options(64));
  Answer plain;
  plain.ask(engine, greedy({1, 2, 3}, 10));
  CHECK(plain.wait().finish() == Finish::kStop);
  CHECK(static_cast<ptrdiff_t>(plain.tokens.size()) == index_of(end) + 1);
  CHECK(plain.tokens.back().id == end);

  Answer ignoring;
  Generation generation = greedy({1, 2, 3}, 10);
  generation.ignore_eos = true;
  ignoring.ask(engine, generation);
  CHECK(ignoring.wait().ids() == expected);
  CHECK(ignoring.finish() == Finish::kLength);

  Answer stopping;
  generation.stop_tokens = {expected[7]};
  stopping.ask(engine, generation);
  CHECK(stopping.wait().finish() == Finish::kStop);
  CHECK(static_cast<ptrdiff_t>(stopping.tokens.size()) == index_of(expected[7]) + 1);
}

TEST_CASE("the context ends an answer; a prompt that leaves no room is refused with both numbers") {
  ToyModel model(kVocabulary, 20, 1, 8);
  Engine engine(model, no_end, options(8));
  Answer answer;
  answer.ask(engine, greedy(sequence(15), 100));
  CHECK(answer.wait().finish() == Finish::kLength);
  CHECK(answer.ids() == model.greedy(sequence(15), 5));
  Answer last;
  last.ask(engine, greedy(sequence(19), 100));
  CHECK(last.wait().ids().size() == 1);
  CHECK_THROWS_WITH_AS(engine.submit(greedy(sequence(20), 1)), doctest::Contains("20"), Error);
  CHECK_THROWS_WITH_AS(engine.submit(greedy(sequence(31), 1)), doctest::Contains("31 tokens, more than the context of 20"),
                       Error);
  CHECK_THROWS_AS(engine.submit(greedy({}, 1)), Error);
  CHECK_THROWS_AS(engine.submit(greedy({kVocabulary}, 1)), Error);
  CHECK_THROWS_AS(engine.submit(greedy({-1}, 1)), Error);
}

TEST_CASE("scores of the prompt, also across passes, and without an answer") {
  ToyModel model(kVocabulary, 100, 2, 8);
  Engine engine(model, no_end, options(8));
  const std::vector<int32_t> prompt = sequence(21);
  Generation generation = greedy(prompt, 0);
  generation.prompt_logprobs = 2;
  Answer answer;
  answer.ask(engine, generation);
  CHECK(answer.wait().finish() == Finish::kLength);
  CHECK(answer.ids().empty());
  REQUIRE(answer.prompt.size() == prompt.size());
  CHECK(std::isnan(answer.prompt[0].logprob));
  for (size_t i = 1; i < prompt.size(); ++i) {
    const std::vector<float> row = model.logits({prompt.begin(), prompt.begin() + static_cast<ptrdiff_t>(i)}, i);
    const Token expected = score(row.data(), kVocabulary, prompt[i], 2);
    CHECK(answer.prompt[i].id == prompt[i]);
    CHECK(answer.prompt[i].logprob == expected.logprob);
    CHECK(answer.prompt[i].top == expected.top);
  }
}

TEST_CASE("queue: first come, first served, up to its limit") {
  ToyModel model(kVocabulary, 100, 1, 8);
  Gate gate(model);
  Engine engine(model, no_end, options(8, 2));
  std::vector<int> order;
  Answer answers[3];
  for (int i = 0; i < 3; ++i) {
    answers[i].on_each = [&order, i](const Token& token) {
      if (token.finish != Finish::kNone) order.push_back(i);
    };
    answers[i].ask(engine, greedy(sequence(5, i), 2));
    if (i == 0) gate.wait_for_pass();
  }
  CHECK(engine.stats().waiting == 2);
  CHECK(engine.stats().running == 1);
  CHECK(!engine.submit(greedy({1}, 1)));
  gate.open();
  for (Answer& answer : answers) answer.wait();
  CHECK(order == std::vector<int>{0, 1, 2});
}

TEST_CASE("cancelling: running, waiting, unknown") {
  ToyModel model(kVocabulary, 2000, 1, 8);
  Gate gate(model);
  Engine engine(model, no_end, options(8));
  Answer running, waiting, after;
  uint64_t running_id = 0, waiting_id = 0;
  running.ask(engine, greedy(sequence(5), 1900), &running_id);
  gate.wait_for_pass();
  waiting.ask(engine, greedy(sequence(5), 5), &waiting_id);
  after.ask(engine, greedy(sequence(6), 5));
  engine.cancel(waiting_id);
  engine.cancel(running_id);
  engine.cancel(12345);
  CHECK(engine.stats().waiting == 1);
  gate.open();
  CHECK(running.wait().finish() == Finish::kCancelled);
  CHECK(waiting.wait().finish() == Finish::kCancelled);
  CHECK(waiting.ids().empty());
  CHECK(after.wait().ids() == model.greedy(sequence(6), 5));
}

TEST_CASE("a callback that returns false ends its request without another call") {
  ToyModel model(kVocabulary, 2000, 1, 8);
  Engine engine(model, no_end, options(8));
  std::atomic<int> calls = 0;
  Generation generation = greedy(sequence(5), 1000);
  generation.on_token = [&](const Token&) { return ++calls < 3; };
  REQUIRE(engine.submit(generation));
  engine.drain();
  CHECK(calls == 3);
  CHECK_THROWS_AS(engine.submit(greedy({1}, 1)), Error);  // drained
}

TEST_CASE("a failed pass fails its requests, and the engine goes on") {
  ToyModel model(kVocabulary, 200, 2, 16);
  std::atomic<bool> fail = true;
  model.on_forward = [&](const std::vector<Step>&) {
    if (fail.exchange(false)) throw std::runtime_error("out of luck");
  };
  Engine engine(model, no_end, options(16));
  Answer failed;
  failed.ask(engine, greedy(sequence(5), 5));
  CHECK(failed.wait().finish() == Finish::kError);
  CHECK(failed.tokens.back().error == "out of luck");
  Answer fine;
  fine.ask(engine, greedy(sequence(5), 5));
  CHECK(fine.wait().ids() == model.greedy(sequence(5), 5));
  CHECK(engine.stats().cached_prompt_tokens == 0);
}

TEST_CASE("the end of the engine cancels what runs and waits") {
  ToyModel model(kVocabulary, 100000, 1, 8);
  Answer running, waiting;
  {
    Engine engine(model, no_end, options(8));
    running.ask(engine, greedy(sequence(5), 90000));
    waiting.ask(engine, greedy(sequence(5), 5));
  }
  CHECK(running.wait().finish() == Finish::kCancelled);
  CHECK(waiting.wait().finish() == Finish::kCancelled);
}

TEST_CASE("a request is told its end where there is no memory left to tell the reason") {
  ToyModel model(kVocabulary, 100, 2, 8);
  model.on_forward = [](const auto&) {
    const std::runtime_error error(std::string(200, 'x'));
    testing::fail_allocations(0, 1'000'000);
    throw error;
  };
  Engine engine(model, no_end, options(8));
  Generation generation = greedy({1, 2}, 3);
  std::atomic<bool> ended = false;
  Token last;
  generation.on_token = [&](const Token& token) {
    testing::fail_allocations(0, 0);
    last = token;
    ended = true;
    return true;
  };
  REQUIRE(engine.submit(std::move(generation)));
  CHECK(engine.drain(std::chrono::seconds(60)));
  REQUIRE(ended);
  CHECK(last.finish == Finish::kError);
  CHECK(last.error == "out of memory");
}

TEST_CASE("whichever allocation of the engine's thread fails, each request is told one end and the engine goes on") {
  for (const int count : {1, 1'000'000}) {
    for (int after = 0; after < 60; ++after) {
      CAPTURE(after);
      ToyModel model(kVocabulary, 100, 2, 8);
      model.on_forward = [&, first = true](const auto&) mutable {
        if (std::exchange(first, false)) testing::fail_allocations(after, count);
      };
      Engine engine(model, no_end, options(8));
      std::atomic<int> ends[4] = {};
      for (auto& end : ends) {
        Generation generation = greedy({1, 2, 3, 4, 5, 6, 7, 8, 9}, 3);
        generation.sampling.logprobs = 2;
        generation.on_token = [&](const Token& token) {
          if (token.finish != Finish::kNone) ++end;
          return true;
        };
        REQUIRE(engine.submit(std::move(generation)));
      }
      CHECK(engine.drain(std::chrono::seconds(60)));
      for (const auto& end : ends) CHECK(end == 1);
    }
  }
}

TEST_CASE("draining takes no more requests and waits for those under way, for a time") {
  ToyModel model(kVocabulary, 100000, 2, 8);
  model.pass_time = std::chrono::microseconds(200);
  Engine engine(model, no_end, options(8));
  Answer a, b;
  a.ask(engine, greedy(sequence(5), 500));
  b.ask(engine, greedy(sequence(6), 90000));
  CHECK(!engine.drain(std::chrono::seconds(1)));
  CHECK(a.wait().finish() == Finish::kLength);
  CHECK_THROWS_AS(engine.submit(greedy({1}, 1)), Error);
  engine.cancel_all();
  CHECK(engine.drain());
  CHECK(b.wait().finish() == Finish::kCancelled);
}

TEST_CASE("requests, cancellations and stats from several threads") {
  ToyModel model(kVocabulary, 300, 3, 32);
  Engine engine(model, no_end, options(32, 20));
  std::atomic<int> ended = 0, taken = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 60; ++i) {
        Generation generation = greedy(sequence(1 + (t * 60 + i) % 50, i), 20);
        generation.on_token = [&](const Token& token) {
          if (token.finish != Finish::kNone) ++ended;
          return true;
        };
        if (const auto id = engine.submit(generation)) {
          ++taken;
          if (i % 5 == 0) engine.cancel(*id);
        }
        engine.stats();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  engine.drain();
  CHECK(ended == taken);
  CHECK(engine.stats().waiting == 0);
}

TEST_CASE("a batch that cannot hold a token of each slot is refused") {
  ToyModel model(kVocabulary, 100, 8, 8);
  CHECK_THROWS_AS(Engine(model, no_end, options(8)), Error);
}
