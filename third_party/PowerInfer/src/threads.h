// A pool of threads that run numbered chunks of work together with the calling thread.
//
// A run ends when every chunk is done, not when every thread has arrived: a thread that the system has put aside between two
// chunks holds nobody up. Waiting threads spin for a while, then sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace powerinfer {

class ThreadPool {
 public:
  // The calling thread counts as one. Throws Error(kMemory) where the system gives no more threads.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls work(chunk, thread) once for each chunk in [0, chunks), thread in [0, size()). One caller at a time. Work must not
  // throw.
  template <typename Work>
  void run(int chunks, const Work& work) {
    if (chunks <= 1 || workers_.empty()) {
      for (int chunk = 0; chunk < chunks; ++chunk) work(chunk, 0);
      return;
    }
    struct Context {
      const Work& work;
      int first;
    };
    for (int first = 0; first < chunks; first += kMostChunks) {
      const Context context{work, first};
      run_chunks(
          std::min(chunks - first, kMostChunks),
          [](const void* from, int chunk, int thread) {
            const auto& [call, before] = *static_cast<const Context*>(from);
            call(before + chunk, thread);
          },
          &context);
    }
  }

 private:
  static constexpr int kMostChunks = 0xffff;  // of one run: what next_ has bits for

  using Function = void (*)(const void* context, int chunk, int thread);
  void run_chunks(int chunks, Function function, const void* context);
  void take_chunks(uint32_t epoch, int thread);
  void worker(int thread);
  void stop();

  std::vector<std::thread> workers_;
  // what the current run is; written by the caller before the epoch that announces it, read after a chunk of it was taken
  std::atomic<Function> function_{nullptr};
  std::atomic<const void*> context_{nullptr};
  // epoch << 32 | chunks << 16 | next chunk, in one word: a late thread cannot take a chunk of a run that it does not know
  alignas(64) std::atomic<uint64_t> next_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> stop_{false};
};

// Physical cores that this process may run on (hyper-threads of one core count once), or less where a control group's quota
// allows less.
int usable_cores();

}  // namespace powerinfer
