#include "threads.h"

#include <doctest/doctest.h>

#include <chrono>
#include <vector>

using namespace powerinfer;

namespace {

// Plain integers throughout: what a thread writes must be seen after the run, and no two threads may share an index;
// the thread sanitizer watches.
struct Tally {
  explicit Tally(int chunks, int threads) : of_chunk(chunks), of_thread(threads * 16) {}
  std::vector<int> of_chunk, of_thread;

  void run(ThreadPool& pool) {
    pool.run(static_cast<int>(of_chunk.size()), [&](int chunk, int thread) {
      ++of_chunk[chunk];
      ++of_thread[thread * 16];
    });
  }
  bool all(int times) const {
    for (const int n : of_chunk) {
      if (n != times) return false;
    }
    int total = 0;
    for (const int n : of_thread) total += n;
    return total == times * static_cast<int>(of_chunk.size());
  }
};

}  // namespace

TEST_CASE("every chunk is run once, whatever the numbers of threads and chunks") {
  for (int threads = 1; threads <= 16; ++threads) {
    ThreadPool pool(threads);
    CHECK(pool.size() == threads);
    for (const int chunks : {0, 1, 2, 3, 15, 16, 17, 1000}) {
      CAPTURE(threads);
      CAPTURE(chunks);
      Tally tally(chunks, threads);
      tally.run(pool);
      CHECK(tally.all(1));
    }
  }
}

TEST_CASE("more chunks than one word counts") {
  for (const int threads : {1, 2, 3}) {
    ThreadPool pool(threads);
    for (const int chunks : {65534, 65535, 65536, 65537, 131070, 200000}) {
      CAPTURE(chunks);
      Tally tally(chunks, threads);
      tally.run(pool);
      CHECK(tally.all(1));
    }
  }
}

TEST_CASE("run after run, threads late or early") {
  for (const int threads : {2, 3, 8}) {
    ThreadPool pool(threads);
    Tally few(2, threads), several(7, threads), many(40, threads);
    constexpr int kRuns = 2000;
    for (int run = 0; run < kRuns; ++run) {
      few.run(pool);
      several.run(pool);
      many.run(pool);
    }
    CHECK(few.all(kRuns));
    CHECK(several.all(kRuns));
    CHECK(many.all(kRuns));
  }
}

TEST_CASE("threads that have gone to sleep wake up") {
  ThreadPool pool(4);
  Tally tally(8, 4);
  for (int run = 0; run < 50; ++run) {
    std::this_thread::sleep_for(std::chrono::microseconds(run % 2 ? 400 : 50));
    tally.run(pool);
  }
  CHECK(tally.all(50));
}

TEST_CASE("a chunk that takes long holds up its run alone") {
  ThreadPool pool(16);
  std::vector<int> done(64);
  for (int run = 1; run <= 20; ++run) {
    pool.run(64, [&](int chunk, int) {
      if (chunk % 32 == run % 32) std::this_thread::sleep_for(std::chrono::microseconds(300));
      done[chunk] += run;
    });
    for (const int value : done) REQUIRE(value == run * (run + 1) / 2);
  }
}

TEST_CASE("what one run writes, any thread of the next one reads") {
  ThreadPool pool(4);
  std::vector<int> values(64);
  for (int run = 0; run < 500; ++run) {
    std::vector<int> next(64);
    pool.run(64, [&](int chunk, int) { next[chunk] = values[(chunk + 17) % 64] + 1; });
    values = next;
  }
  for (const int value : values) CHECK(value == 500);
}

TEST_CASE("pools come and go") {
  for (int round = 0; round < 100; ++round) {
    ThreadPool pool(1 + round % 6);
    if (round % 3 == 0) continue;
    Tally tally(5, pool.size());
    tally.run(pool);
    CHECK(tally.all(1));
  }
}

TEST_CASE("there is a core to run on") { CHECK(usable_cores() >= 1); }
