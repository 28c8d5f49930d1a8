#include "buffers.h"

#include <doctest/doctest.h>

#include "compute.h"
#include "kv_cache.h"
#include "reference.h"

using namespace powerinfer;
using namespace powerinfer::testing;

namespace {

constexpr uint64_t kMegabyte = 1'000'000;
constexpr uint64_t kLimit = 100 * kMegabyte;

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

TEST_CASE("a 70B model's buffers stay below 100 MB") {
  constexpr int kContext = 32768;
  for (const int rank : {0, 1024}) {
    CAPTURE(rank);
    BufferShape shape = large_shape();
    shape.rank = rank;
    const uint64_t pass = PassBuffers(shape).bytes();
    for (const int threads : {1, 2, 16, 32}) {  // with more, one query a thread is more than the scores may take
      CAPTURE(threads);
      const KvShape kv{80, shape.slots, kContext, shape.heads, shape.kv_heads, shape.head_size};
      const uint64_t scores = QueryBlock::of(kv, threads, kContext).score_bytes(threads, kContext);
      CAPTURE(scores);
      CHECK(scores <= QueryBlock::kScoreBytes);
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

TEST_CASE("attention does not depend on how many queries read the keys together") {
  const KvShape shape{.layers = 1, .slots = 2, .context = 200, .heads = 6, .kv_heads = 2, .head_size = 16};
  constexpr int kPrompt = 190, kTokens = kPrompt + 1;
  Random random(3);
  const auto keys = random.normals(size_t{kTokens} * shape.kv_heads * shape.head_size);
  const auto values = random.normals(size_t{kTokens} * shape.kv_heads * shape.head_size);
  const auto queries = random.normals(size_t{kTokens} * shape.heads * shape.head_size);
  ThreadPool pool(1);
  const Compute compute{kernels(detect_isa()), pool};
  const std::vector<KvTokens> spans = {{0, 0, 0, kPrompt}, {1, 0, kPrompt, 1}};
  const auto attended = [&](size_t score_bytes) {
    auto out = queries;  // in place
    make_f16_cache(shape, compute, score_bytes)->attend(0, spans, keys.data(), values.data(), out.data(), out.data());
    return out;
  };
  const auto want = attended(QueryBlock::kScoreBytes);
  for (const int rows : {0, 1, 2, 3, 5, 7}) {
    CAPTURE(rows);
    const size_t bytes = sizeof(float) * rows * round_up(kPrompt, 16);
    const QueryBlock block = QueryBlock::of(shape, 1, kPrompt, bytes);
    CHECK(block.tokens * block.heads == (rows == 2 ? 2 : rows <= 1 ? 1 : rows / 3 * 3));
    CHECK(attended(bytes) == want);
  }
  std::vector<float> out(queries.size());
  make_f16_cache(shape, compute)->attend(0, spans, keys.data(), values.data(), queries.data(), out.data());
  CHECK(out == want);
}
