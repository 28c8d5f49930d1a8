// A pool of threads that run numbered chunks of work together with the calling thread.
//
// A run ends when every chunk is done, not when every thread has arrived: a thread that the system has put aside between two
// chunks holds nobody up. Waiting threads spin for a while, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace powerinfer {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // the calling thread counts as one
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls work(chunk, thread) once for each chunk in [0, chunks), thread in [0, size()); at most 65,535 chunks. One caller
  // at a time. Work must not throw.
  template <typename Work>
  void run(int chunks, const Work& work) {
    if (chunks <= 0) return;
    if (chunks == 1 || workers_.empty()) {
      for (int chunk = 0; chunk < chunks; ++chunk) work(chunk, 0);
      return;
    }
    run_chunks(
        chunks, [](const void* context, int chunk, int thread) { (*static_cast<const Work*>(context))(chunk, thread); },
        &work);
  }

 private:
  using Function = void (*)(const void* context, int chunk, int thread);
  void run_chunks(int chunks, Function function, const void* context);
  void take_chunks(uint32_t epoch, int thread);
  void worker(int thread);

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

// Physical cores that this process may run on (hyper-threads of one core count once).
int usable_cores();

}  // namespace powerinfer
