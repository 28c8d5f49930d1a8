// Keys and values of every sequence, and attention over them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "compute.h"
#include "memory.h"

namespace powerinfer {

struct KvShape {
  int layers, slots, context;  // context: tokens of one slot
  int heads, kv_heads, head_size;
};

// Consecutive tokens of one slot in a forward pass.
struct KvTokens {
  int slot;
  int position;  // of the first
  int first;     // its index among the pass's tokens
  int count;
};

class KvCache {
 public:
  virtual ~KvCache() = default;
  // Stores keys and values [tokens of the pass][kv_heads * head_size] of all spans, then attention of their queries
  // [tokens of the pass][heads * head_size], each over the tokens of its slot up to itself; `out` is shaped as the queries
  // and may be the queries.
  virtual void attend(int layer, const std::vector<KvTokens>& spans, const float* keys, const float* values,
                      const float* queries, float* out) = 0;
  // Every layer of these spans is stored.
  virtual void append(const std::vector<KvTokens>& spans) = 0;
  // Cuts a slot back to `count` tokens, or to none where what later tokens need of them is gone; the number that is left.
  virtual int truncate(int slot, int count) = 0;
  virtual uint64_t bytes(int tokens) const = 0;  // that a slot of so many tokens holds
};

// Queries that read keys and values together in the fp16 cache: `tokens` of `heads` query heads each, as many as pay for
// themselves and whose scores of `length` tokens fit, on all threads together, into `score_bytes`; one query a thread at
// least.
struct QueryBlock {
  static constexpr size_t kScoreBytes = size_t{6} << 20;
  int tokens, heads;

  static QueryBlock of(const KvShape& shape, int threads, int length, size_t score_bytes = kScoreBytes);
  size_t score_bytes(int threads, int length) const {
    return sizeof(float) * threads * tokens * heads * round_up(length, 16);
  }
};

std::unique_ptr<KvCache> make_f16_cache(const KvShape& shape, const Compute& compute,
                                        size_t score_bytes = QueryBlock::kScoreBytes);
// Keys in 4 bits, values in 2 (packed_kv.h). Throws Error(kUsage) for a head size that has no codebook.
std::unique_ptr<KvCache> make_packed_cache(const KvShape& shape, const Compute& compute);

}  // namespace powerinfer
