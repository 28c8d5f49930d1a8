#include "buffers.h"

#include <doctest/doctest.h>

#include <algorithm>

#include "kv_cache.h"

using namespace powerinfer;

namespace {

constexpr uint64_t kMegabyte = 1'000'000;
constexpr uint64_t kLimit = 110 * kMegabyte;

// A model of 70 billion weights, a long context and the server's batch.
BufferShape large_shape() {
  return {.width = 8192,
          .ffn = 28672,
          .heads = 64,
          .kv_heads = 8,
          .head_size = 128,
          .vocabulary = 32000,
          .rope_size = 128,
          .batch = 512,
          .slots = 8};
}

}  // namespace

TEST_CASE("a 70B model's buffers stay below 110 MB") {
  constexpr int kContext = 32768;
  for (const int rank : {0, 1024}) {
    CAPTURE(rank);
    BufferShape shape = large_shape();
    shape.rank = rank;
    const uint64_t pass = PassBuffers(shape).bytes();
    for (const int threads : {1, 2, 16, 64}) {
      CAPTURE(threads);
      const KvShape kv{80, shape.slots, kContext, shape.heads, shape.kv_heads, shape.head_size};
      const uint64_t scores = QueryBlock::of(kv, threads, kContext).score_bytes(threads, kContext);
      CAPTURE(scores);
      // each thread has a query's scores at least
      CHECK(scores <= std::max<uint64_t>(QueryBlock::kScoreBytes, uint64_t{4} * threads * kContext));
      CHECK(pass + scores < kLimit);
      // what every token of a batch needs is there
      CHECK(pass > uint64_t{4} * shape.batch * (3 * shape.width + 2 * shape.kv_heads * shape.head_size));
    }
  }
}

TEST_CASE("a slab holds at least one token, or one piece of neurons") {
  BufferShape shape = large_shape();
  shape.rank = 1024;
  shape.hidden_bytes = 0;
  const FfnBuffers buffers(shape);
  CHECK(buffers.dense_tokens >= 1);
  CHECK(buffers.sparse_tokens == shape.slots);
  CHECK(buffers.slab_neurons(shape.batch) >= 32);
  CHECK(buffers.gate.size() >= static_cast<size_t>(buffers.dense_tokens) * shape.ffn);
  CHECK(buffers.gate.size() >= static_cast<size_t>(buffers.slab_neurons(shape.batch)) * shape.batch);
}

TEST_CASE("slabs are even and no wider than they may be") {
  CHECK(even_slab(512, 512, 8) == 512);
  CHECK(even_slab(512, 500, 8) == 256);
  CHECK(even_slab(9, 8, 8) == 8);
  CHECK(even_slab(3, 7, 8) == 7);
  CHECK(even_slab(100, 30, 8) == 30);
}
