#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <limits>
#include <list>
#include <mutex>
#include <thread>

#include "errors.h"
#include "sampler.h"

namespace powerinfer {
namespace {

using Clock = std::chrono::steady_clock;

// Floats that the logits of one pass may take for a prompt whose every token is scored: 16 MiB.
constexpr int kScoredLogits = 4 << 20;

struct Request {
  Request(uint64_t number_, Generation generation_, int vocabulary)
      : number(number_), generation(std::move(generation_)), sampler(generation.sampling, vocabulary, generation.prompt) {}

  const uint64_t number;
  Generation generation;
  std::atomic<bool> cancelled = false;

  // the rest belongs to the engine's thread
  Sampler sampler;
  int slot = -1;
  int computed = 0;   // prompt tokens in the slot
  int generated = 0;  // tokens sampled
  int32_t last = -1;  // the newest of them, in no slot yet
  bool ended = false;
  std::vector<Token> scored;  // the prompt's tokens, for on_prompt

  int prompt_size() const { return static_cast<int>(generation.prompt.size()); }
  bool decoding() const { return generated > 0; }
  bool scores_prompt() const { return generation.prompt_logprobs >= 0; }
};

using RequestPtr = std::shared_ptr<Request>;

struct Slot {
  std::vector<int32_t> tokens;  // held by the model
  int prompt_tokens = 0;        // leading ones that went through the prompt path: only these may serve another request,
                                // since a decoded token's keys and values need not equal a prompt token's
  uint64_t used = 0;            // pass of the last use
  RequestPtr request;
};

int common_prefix(const Slot& slot, const std::vector<int32_t>& prompt) {
  // the last prompt token is always computed: its logits are needed
  const size_t most = std::min(static_cast<size_t>(slot.prompt_tokens), prompt.size() - 1);
  size_t count = 0;
  while (count < most && slot.tokens[count] == prompt[count]) ++count;
  return static_cast<int>(count);
}

}  // namespace

struct Engine::State {
  State(Model& model_, std::function<bool(int32_t)> ends_generation_, const EngineOptions& options_)
      : model(model_),
        ends_generation(std::move(ends_generation_)),
        options(options_),
        vocabulary(model_.info().vocabulary),
        context(model_.info().context),
        slots(static_cast<size_t>(model_.info().slots)) {
    if (options.batch <= model_.info().slots) {
      throw Error(ErrorKind::kUsage, "the batch (" + std::to_string(options.batch) +
                                         " tokens) must be larger than the number of slots (" +
                                         std::to_string(model_.info().slots) + ")");
    }
    steps.reserve(slots.size()), of_step.reserve(slots.size()), offsets.reserve(slots.size());
    thread = std::thread([this] { run(); });
  }

  ~State() {
    {
      std::lock_guard lock(mutex);
      stopping = true;
    }
    work.notify_all();
    thread.join();
  }

  void check_prompt(const std::vector<int32_t>& tokens, int max_tokens) const;
  std::optional<uint64_t> submit(Generation generation);
  void cancel(uint64_t number);
  void cancel_all();
  void drop(const RequestPtr& request);

  void run();
  bool admit();
  void place(const RequestPtr& request);
  void pass();
  void forward();
  void prompt_done(Request& request, const Step& step);
  void decode_done(Request& request, const float* logits);
  void score_prompt(Request& request, const Step& step);
  void emit(Request& request, const Token& token) noexcept;
  void end(Request& request, Finish finish, const char* error = "") noexcept;
  void release(Request& request) noexcept;

  Model& model;
  const std::function<bool(int32_t)> ends_generation;
  const EngineOptions options;
  const int vocabulary, context;

  mutable std::mutex mutex;
  std::condition_variable work, idle;
  // A request's node is made once and moves from list to list, so that no allocation can fail where it would be lost.
  std::list<RequestPtr> waiting;                      // in order of arrival
  std::list<RequestPtr> dropped;                      // cancelled while waiting; told so by the engine's thread
  std::unordered_map<uint64_t, RequestPtr> requests;  // waiting and running
  EngineStats stats;
  uint64_t next_number = 1;
  bool draining = false, stopping = false;

  // the engine's thread only
  std::vector<Slot> slots;
  std::list<RequestPtr> running;  // in order of admission
  std::vector<float> logits;
  // of one pass, a place for each slot
  std::vector<Step> steps;
  std::vector<Request*> of_step;
  std::vector<size_t> offsets;  // of the step's logits
  uint64_t passes = 0;

  std::thread thread;
};

void Engine::State::check_prompt(const std::vector<int32_t>& tokens, int max_tokens) const {
  const size_t prompt = tokens.size();
  if (prompt == 0) throw request_error("the prompt is empty: it must have at least one token");
  if (prompt > static_cast<size_t>(context)) {
    throw request_error("the prompt has " + std::to_string(prompt) + " tokens, more than the context of " +
                        std::to_string(context));
  }
  if (prompt == static_cast<size_t>(context) && max_tokens > 0) {
    throw request_error("the prompt has " + std::to_string(prompt) +
                        " tokens and leaves no room for an answer in the context of " + std::to_string(context));
  }
  for (const int32_t token : tokens) {
    if (token < 0 || token >= vocabulary) {
      throw request_error("token " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(vocabulary));
    }
  }
}

std::optional<uint64_t> Engine::State::submit(Generation generation) {
  check_prompt(generation.prompt, generation.max_tokens);
  if (generation.max_tokens < 0) throw request_error("max_tokens must be 0 or more");
  generation.max_tokens = std::min(generation.max_tokens, context - static_cast<int>(generation.prompt.size()));

  std::unique_lock lock(mutex);
  if (draining || stopping) throw request_error("the engine is shutting down and takes no more requests");
  // a slot that is free now, or will be before the queue is looked at, does not count as waiting
  const auto full = [this] {
    const int free = static_cast<int>(slots.size()) - stats.running;
    return static_cast<int>(waiting.size()) >= options.queue + std::max(free, 0);
  };
  if (full()) return std::nullopt;
  const uint64_t number = next_number++;
  lock.unlock();
  std::list<RequestPtr> node;
  node.push_back(std::make_shared<Request>(number, std::move(generation), vocabulary));  // checks the sampling parameters
  lock.lock();
  if (draining || stopping) throw request_error("the engine is shutting down and takes no more requests");
  if (full()) return std::nullopt;  // others came meanwhile
  requests.emplace(number, node.front());
  waiting.splice(waiting.end(), node);
  stats.waiting = static_cast<int>(waiting.size());
  ++stats.requests;
  lock.unlock();
  work.notify_one();
  return number;
}

void Engine::State::cancel(uint64_t number) {
  {
    std::lock_guard lock(mutex);
    const auto found = requests.find(number);
    if (found == requests.end()) return;
    drop(found->second);
  }
  work.notify_one();
}

void Engine::State::cancel_all() {
  {
    std::lock_guard lock(mutex);
    for (const auto& [number, request] : requests) drop(request);
  }
  work.notify_one();
}

// Under the lock.
void Engine::State::drop(const RequestPtr& request) {
  request->cancelled = true;
  const auto queued = std::find(waiting.begin(), waiting.end(), request);
  if (queued != waiting.end()) dropped.splice(dropped.end(), waiting, queued);
  stats.waiting = static_cast<int>(waiting.size());
}

void Engine::State::run() {
  while (admit()) pass();
}

// Waits for something to do, ends cancelled requests and fills free slots; false at the end.
bool Engine::State::admit() {
  std::list<RequestPtr> cancelled, admitted;
  bool stop;
  {
    std::unique_lock lock(mutex);
    if (running.empty() && waiting.empty() && dropped.empty()) idle.notify_all();
    work.wait(lock, [&] { return stopping || !running.empty() || !waiting.empty() || !dropped.empty(); });
    stop = stopping;
    cancelled.swap(dropped);
    for (auto request = running.begin(); request != running.end();) {
      const auto next = std::next(request);
      if (stop || (*request)->cancelled) cancelled.splice(cancelled.end(), running, request);
      request = next;
    }
    if (stop) cancelled.splice(cancelled.end(), waiting);
    size_t free = static_cast<size_t>(
        std::count_if(slots.begin(), slots.end(), [](const Slot& s) { return !s.request || s.request->cancelled; }));
    for (; free > 0 && !waiting.empty(); --free) admitted.splice(admitted.end(), waiting, waiting.begin());
    stats.waiting = static_cast<int>(waiting.size());
  }
  // requests are marked as cancelled under the lock: each slot counted as free above is freed here
  for (const auto& request : cancelled) {
    if (!request->ended) end(*request, Finish::kCancelled);
  }
  std::erase_if(running, [](const RequestPtr& request) { return request->ended; });
  while (!admitted.empty()) {
    running.splice(running.end(), admitted, admitted.begin());
    place(running.back());
  }
  {
    std::lock_guard lock(mutex);
    stats.running = static_cast<int>(running.size());
  }
  return !stop;
}

// Puts a request into the free slot that shares the longest prefix with it; of equal ones, the one longest unused.
void Engine::State::place(const RequestPtr& request) {
  const std::vector<int32_t>& prompt = request->generation.prompt;
  int best = -1, kept = -1;
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i].request) continue;
    const int common = options.reuse_prefixes && !request->scores_prompt() ? common_prefix(slots[i], prompt) : 0;
    if (common > kept || (common == kept && slots[i].used < slots[static_cast<size_t>(best)].used)) {
      best = static_cast<int>(i);
      kept = common;
    }
  }
  Slot& slot = slots[static_cast<size_t>(best)];
  slot.request = request;
  slot.used = passes;
  request->slot = best;
  try {
    if (slot.tokens.size() > static_cast<size_t>(kept)) kept = model.truncate(best, kept);
    request->computed = kept;
    slot.tokens.resize(static_cast<size_t>(kept));
    slot.prompt_tokens = kept;
    std::lock_guard lock(mutex);
    stats.cached_prompt_tokens += static_cast<uint64_t>(kept);
  } catch (const std::exception& error) {
    end(*request, Finish::kError, error.what());
  }
}

// One forward pass: a token of every sequence that is being decoded, and of the prompts, oldest first, what still fits.
void Engine::State::pass() {
  std::erase_if(running, [](const RequestPtr& request) { return request->ended; });
  const int decodes =
      static_cast<int>(std::count_if(running.begin(), running.end(), [](const RequestPtr& r) { return r->decoding(); }));
  int room = options.batch - decodes;
  if (decodes > 0) room = std::min(room, std::max(options.prompt_beside, 1));

  steps.clear(), of_step.clear(), offsets.clear();
  constexpr size_t kNone = std::numeric_limits<size_t>::max();
  const size_t row = static_cast<size_t>(vocabulary);
  size_t floats = 0;
  for (const auto& request : running) {
    const Slot& slot = slots[static_cast<size_t>(request->slot)];
    Step step{};
    step.slot = request->slot;
    step.position = static_cast<int>(slot.tokens.size());
    size_t rows = 0;
    if (request->decoding()) {
      step.tokens = &request->last;
      step.count = 1;
      rows = 1;
    } else {
      int count = std::min(room, request->prompt_size() - request->computed);
      if (request->scores_prompt()) count = std::min(count, std::max(kScoredLogits / vocabulary, 1));
      if (count == 0) continue;
      room -= count;
      step.tokens = request->generation.prompt.data() + request->computed;
      step.count = count;
      step.prompt = true;
      step.all_logits = request->scores_prompt();
      if (step.all_logits) {
        rows = static_cast<size_t>(count);
      } else if (request->computed + count == request->prompt_size()) {
        rows = 1;
      }
    }
    offsets.push_back(rows > 0 ? floats : kNone);
    floats += rows * row;
    steps.push_back(step);
    of_step.push_back(request.get());
  }
  if (steps.empty()) return;
  try {
    if (logits.size() < floats) logits.resize(floats);
    for (size_t i = 0; i < steps.size(); ++i) steps[i].logits = offsets[i] == kNone ? nullptr : logits.data() + offsets[i];
    forward();
  } catch (const std::exception& error) {
    // what the slots of this pass hold is not known any more
    for (Request* request : of_step) {
      Slot& slot = slots[static_cast<size_t>(request->slot)];
      slot.tokens.clear();
      slot.prompt_tokens = 0;
      try {
        model.truncate(request->slot, 0);
      } catch (const std::exception&) {
      }
      end(*request, Finish::kError, error.what());
    }
  }
}

void Engine::State::forward() {
  const auto start = Clock::now();
  model.forward(steps);
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  ++passes;
  uint64_t prompt_tokens = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    Slot& slot = slots[static_cast<size_t>(step.slot)];
    slot.tokens.insert(slot.tokens.end(), step.tokens, step.tokens + step.count);
    slot.used = passes;
    if (!step.prompt) continue;
    prompt_tokens += static_cast<uint64_t>(step.count);
    slot.prompt_tokens += step.count;
    of_step[i]->computed += step.count;
  }
  {
    std::lock_guard lock(mutex);
    ++stats.forward_passes;
    stats.activity = model.activity();  // of this thread, like all the model's state
    stats.kv_bytes = model.kv_bytes();
    stats.prompt_tokens += prompt_tokens;
    (prompt_tokens > 0 ? stats.prompt_seconds : stats.decode_seconds) += seconds;
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    Request& request = *of_step[i];
    if (request.cancelled) continue;
    try {
      if (steps[i].prompt) {
        prompt_done(request, steps[i]);
      } else {
        decode_done(request, steps[i].logits);
      }
    } catch (const std::exception& error) {  // of this request only: its logits, its callbacks
      end(request, Finish::kError, error.what());
    }
  }
}

void Engine::State::prompt_done(Request& request, const Step& step) {
  if (request.scores_prompt()) score_prompt(request, step);
  if (request.computed < request.prompt_size()) return;
  if (request.scores_prompt() && request.generation.on_prompt) request.generation.on_prompt(request.scored);
  if (request.generation.max_tokens == 0) {
    end(request, Finish::kLength);
    return;
  }
  const size_t last = step.all_logits ? static_cast<size_t>(step.count - 1) : 0;
  decode_done(request, step.logits + last * static_cast<size_t>(vocabulary));
}

// The logits after a prompt token score the one that follows it.
void Engine::State::score_prompt(Request& request, const Step& step) {
  const std::vector<int32_t>& prompt = request.generation.prompt;
  if (request.scored.empty()) {
    Token first;
    first.id = prompt.front();
    first.logprob = std::numeric_limits<float>::quiet_NaN();
    request.scored.push_back(first);
  }
  for (int i = 0; i < step.count; ++i) {
    const size_t next = static_cast<size_t>(step.position + i + 1);
    if (next == prompt.size()) break;
    request.scored.push_back(score(step.logits + static_cast<size_t>(i) * static_cast<size_t>(vocabulary), vocabulary,
                                   prompt[next], request.generation.prompt_logprobs));
  }
}

void Engine::State::decode_done(Request& request, const float* row) {
  Token token = request.sampler.next(row);
  ++request.generated;
  request.last = token.id;
  {
    std::lock_guard lock(mutex);
    ++stats.generated_tokens;
  }
  const std::vector<int32_t>& stops = request.generation.stop_tokens;
  if ((!request.generation.ignore_eos && ends_generation(token.id)) ||
      std::find(stops.begin(), stops.end(), token.id) != stops.end()) {
    token.finish = Finish::kStop;
  } else if (request.generated >= request.generation.max_tokens) {
    token.finish = Finish::kLength;
  }
  emit(request, token);
}

void Engine::State::emit(Request& request, const Token& token) noexcept {
  bool more = false;
  if (request.generation.on_token) {
    // a callback that throws ends its request, without another call
    try {
      more = request.generation.on_token(token);
    } catch (...) {
    }
  }
  if (token.finish != Finish::kNone || !more) release(request);
}

// Where nothing is left to copy the reason with, the client gets another one.
void Engine::State::end(Request& request, Finish finish, const char* error) noexcept {
  if (request.ended) return;
  Token last;
  last.finish = finish;
  try {
    last.error = error;
  } catch (const std::bad_alloc&) {
    last.error = "out of memory";  // short enough to lie in the string itself
  }
  emit(request, last);
}

void Engine::State::release(Request& request) noexcept {
  if (request.ended) return;
  request.ended = true;
  if (request.slot >= 0) slots[static_cast<size_t>(request.slot)].request.reset();
  std::lock_guard lock(mutex);
  requests.erase(request.number);
}

Engine::Engine(Model& model, std::function<bool(int32_t)> ends_generation, const EngineOptions& options)
    : state_(std::make_unique<State>(model, std::move(ends_generation), options)) {}

Engine::~Engine() = default;

std::optional<uint64_t> Engine::submit(Generation generation) { return state_->submit(std::move(generation)); }

void Engine::check_prompt(const std::vector<int32_t>& prompt, int max_tokens) const {
  state_->check_prompt(prompt, max_tokens);
}

void Engine::cancel(uint64_t request) { state_->cancel(request); }

bool Engine::drain(std::chrono::seconds limit) {
  std::unique_lock lock(state_->mutex);
  state_->draining = true;
  return state_->idle.wait_for(lock, limit, [&] { return state_->requests.empty(); });
}

void Engine::cancel_all() { state_->cancel_all(); }

EngineStats Engine::stats() const {
  std::lock_guard lock(state_->mutex);
  return state_->stats;
}

}  // namespace powerinfer
