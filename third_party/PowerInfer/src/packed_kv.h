// The packed KV cache: keys in 4 bits and values in 2, by a random rotation and an integer codebook, one fp16 scale for
// each; the first tokens and the newest ones also in fp16. The bytes are the K4/V2 format of which tests/data has examples.
//
// A sub-page holds 64 tokens of one kv head:   [ keys | values | key scales fp16[64] | value scales fp16[64] ]
//   keys     [64 tokens][head_size / 2]: 4 bytes are a little-endian word of the codes of 4 channels A (4w .. 4w + 3) and 4
//            channels Z (head_size / 2 later): magnitude of A_i at bit 4i, of Z_i at bit 16 + 4i, sign of A_i at bit 8i + 7,
//            of Z_i at 8i + 3 (code 8 .. 15: sign 0, magnitude code - 8; code 0 .. 7: sign 1, magnitude 7 - code)
//   values   [head_size / 4][64 positions]: byte k's bits 2f, 2f + 1 are the code of channel f * head_size / 4 + k; the high
//            bit of field 3 is flipped
//   scales   by position; position of token t: 16 * (t >> 1 & 3) + 2 * (t >> 3) + (t & 1)
// No byte is shared by two tokens, and writing one never reads.
#pragma once

#include <cstdint>

#include "isa.h"

namespace powerinfer {

constexpr int kSubPageTokens = 64;
constexpr int kMaxPackedHead = 256;

// Numbers of one head size: rotation and codebooks.
struct PackedTables {
  int order, inner;  // the Hadamard matrix is the product of one of `order` and one of `inner`, a power of two
  alignas(64) float signs[kMaxPackedHead];  // +-1
  alignas(64) float outer[3136];  // [order][head_size]: entry (i, column) of the outer matrix at channel i * inner + ..
  alignas(64) float outer_transposed[3136];
  float orthonormal;                              // 1 / sqrt(head_size)
  float key_grid[16], value_grid[4];              // code -> level + 1/2
  float key_boundaries[15], value_boundaries[3];  // a code is the number of boundaries that are not above
  float key_step, value_step;                     // a coordinate is grid * step * scale
  float key_factor, value_factor;                 // 1 / (step * sqrt(head_size))
};

// Sizes and offsets in bytes of one sub-page.
struct PackedLayout {
  int head_size;
  int slot_bytes;  // of one token of one kv head
  int sub_page_bytes;
  int value_offset, key_scale_offset, value_scale_offset;  // keys are at 0
  const PackedTables* tables;

  // Throws Error(kUsage) for a head size that has no codebook.
  static PackedLayout of(int head_size);
};

// Where the cache of one (slot, layer, kv head) lies in its region, a block of `region_bytes` aligned to 64:
//
//   [ first tokens fp16 | ring of newest tokens fp16 | sub-pages ]    an fp16 token is its key, then its value
//
// Nothing of a region needs to be set beforehand, and its sub-pages are touched in order as tokens are stored: a region may
// be address space without memory. The query at position p reads tokens 0 .. kSinks - 1 and p - kWindow + 1 .. p in fp16,
// all others packed; so what it sees depends on p alone. Tokens are packed as they are stored, from fp32.
struct PackedRegion {
  static constexpr int kSinks = 4;
  static constexpr int kWindow = 128;
  static constexpr int kAhead = 64;  // tokens that may be stored beyond the query attended
  static constexpr int kRing = kWindow + kAhead;

  PackedLayout layout;
  int context;  // tokens at most

  // fp16 [2, head_size] of a token: the first kSinks, and the newest kRing stored.
  uint16_t* sink(uint8_t* region, int token) const;
  uint16_t* recent(uint8_t* region, int token) const;
  // The sub-page of tokens 64 * index and on.
  uint8_t* sub_page(uint8_t* region, int index) const;

  uint64_t exact_bytes() const;           // before the sub-pages
  uint64_t held_bytes(int tokens) const;  // what that many tokens occupy
  uint64_t region_bytes() const;          // whole memory pages of 4 KiB
};

// How many tokens a slot holds, in all of its regions alike, and to which numbers it can be cut back.
class PackedLength {
 public:
  int count() const { return count_; }
  void append(int tokens);
  // Whether the fp16 copies that the query at position `count` reads are still there. The last kAhead + 1 tokens can always
  // be cut off, and all but kSinks or fewer; in between the caller truncates to 0 and computes the tokens again.
  bool can_truncate(int count) const;
  // Throws std::logic_error unless can_truncate(count).
  void truncate(int count);

 private:
  int count_ = 0;
  int oldest_ = 0;  // first token whose place in the ring no later token has taken
};

// Kernels of one instruction set. All of them give the same bits: packing and rotating keep one order of operations, and
// attention sums fixed-point integers, or floats in a fixed order. A row's result does not depend on the rows beside it.
// None allocates; attend uses about 150 KiB of stack.
struct PackedKernels {
  // Orthonormal rotation of x [head_size] into y, and its inverse; y may be x.
  void (*rotate)(const PackedLayout& layout, const float* x, float* y);
  void (*unrotate)(const PackedLayout& layout, const float* x, float* y);

  // Writes one token's key and value [head_size] to its place (0 .. 63) in a sub-page.
  void (*pack_token)(const PackedLayout& layout, const float* key, const float* value, uint8_t* sub_page, int token);

  // scores [num_queries, 64] of the first `tokens` tokens, others untouched: scale * <query, key>; queries in fixed point of
  // 15 bits and a sign.
  void (*scores)(const PackedLayout& layout, const uint8_t* sub_page, int tokens, const float* rotated_queries,
                 int num_queries, float scale, float* scores);

  // rotated_out [num_queries, head_size] += probabilities [num_queries, 64] (of the first `tokens` tokens, not negative)
  // times values; probabilities in fixed point of 15 bits.
  void (*accumulate)(const PackedLayout& layout, const uint8_t* sub_page, int tokens, const float* probabilities,
                     int num_queries, float* rotated_out);

  // Stores one token's key and value [head_size]: packed and in fp16. Tokens may be stored in any order and by any threads,
  // also while others are attended, but none beyond kAhead tokens after the oldest query not yet attended: a prompt goes
  // through a layer's attention 64 tokens at a time, all stored and then all attended.
  void (*store)(const PackedRegion& place, uint8_t* region, int position, const float* key, const float* value);

  // Attention of `group` query heads that share this kv head, for `positions` consecutive tokens from `position` on; needs
  // the tokens 0 .. position + positions - 1 stored, and none beyond position + kAhead. Several positions in one call share
  // the work of unpacking.
  //   queries, out   [positions, group, head_size], positions `stride` floats apart
  void (*attend)(const PackedRegion& place, const uint8_t* region, int position, int positions, int group,
                 const float* queries, float* out, int64_t stride, float scale);
};

const PackedKernels& packed_kernels(Isa isa);

}  // namespace powerinfer
