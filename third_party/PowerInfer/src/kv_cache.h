// Keys and values of every sequence, and attention over them.
#pragma once

#include <cstdint>
#include <memory>

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
  // Stores keys and values [tokens of the pass][kv_heads * head_size] of these tokens.
  virtual void store(int layer, const KvTokens& tokens, const float* keys, const float* values) = 0;
  // Attention of these tokens' queries [tokens of the pass][heads * head_size] over all tokens of their slot up to
  // themselves, which have been stored; `out` is shaped as the queries.
  virtual void attend(int layer, const std::vector<KvTokens>& tokens, const float* queries, float* out) = 0;
  // Tokens up to which a slot can be cut back without losing anything, at most `count`.
  virtual int truncatable(int slot, int count) const = 0;
  virtual void truncate(int slot, int count) = 0;
  virtual uint64_t bytes_per_token() const = 0;
};

std::unique_ptr<KvCache> make_f16_cache(const KvShape& shape, const Compute& compute);

}  // namespace powerinfer
