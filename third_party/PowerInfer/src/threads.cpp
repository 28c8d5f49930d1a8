#include "threads.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <limits>
#include <set>
#include <string>
#include <system_error>

#include "errors.h"

namespace powerinfer {

namespace {

// longer than the pauses between the runs of one forward pass, shorter than a time slice
constexpr auto kSpin = std::chrono::microseconds(60);
constexpr int kPausesPerLook = 32;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Until value != old: spinning at first, then asleep.
uint32_t wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      const uint32_t now = value.load(std::memory_order_acquire);
      if (now != old) return now;
      pause();
    }
  } while (std::chrono::steady_clock::now() - start < kSpin);
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
  try {
    workers_.reserve(std::max(0, threads - 1));
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { worker(thread); });
  } catch (const std::system_error& error) {
    stop();
    throw Error(ErrorKind::kMemory, "cannot start " + std::to_string(threads) + " threads: " + error.what());
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stop_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run_chunks(int chunks, Function function, const void* context) {
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  function_.store(function, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  next_.store(uint64_t{epoch} << 32 | static_cast<uint64_t>(chunks) << 16, std::memory_order_release);
  // sequentially consistent: the look at who sleeps must not come before it
  epoch_.store(epoch);
  epoch_.notify_all();
  take_chunks(epoch, 0);
  uint32_t done = done_.load(std::memory_order_acquire);
  while (done != static_cast<uint32_t>(chunks)) done = wait_for_change(done_, done);
}

void ThreadPool::take_chunks(uint32_t epoch, int thread) {
  uint64_t next = next_.load(std::memory_order_acquire);
  while (next >> 32 == epoch) {
    const uint32_t chunks = next >> 16 & 0xffff;
    const uint32_t chunk = next & 0xffff;
    if (chunk >= chunks) return;
    if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    // from here to the increment of done_ the run cannot end, so function and context are its own
    const Function function = function_.load(std::memory_order_relaxed);
    function(context_.load(std::memory_order_relaxed), static_cast<int>(chunk), thread);
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) done_.notify_one();
    next = next_.load(std::memory_order_acquire);
  }
}

void ThreadPool::worker(int thread) {
  uint32_t seen = 0;
  while (true) {
    seen = wait_for_change(epoch_, seen);
    if (stop_) return;
    take_chunks(seen, thread);
  }
}

// Processors that a control group's quota of CPU time amounts to, rounded up.
int cpu_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  double quota = 0, period = 0;
  // "max" in place of the first number: no quota
  if (!(file >> quota >> period) || quota <= 0 || period <= 0) return std::numeric_limits<int>::max();
  return std::max(1, static_cast<int>(std::ceil(quota / period)));
}

int usable_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return std::max(1u, std::thread::hardware_concurrency());
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list";
    std::string siblings;
    if (!(std::ifstream(topology) >> siblings)) siblings = std::to_string(cpu);
    cores.insert(siblings);
  }
  return std::clamp(static_cast<int>(cores.size()), 1, cpu_quota());
}

}  // namespace powerinfer
