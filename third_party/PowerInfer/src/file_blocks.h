// The quantized blocks that weights are computed from, byte for byte as they lie in a file. Scales and minima are fp16, kept
// as bytes: a block may begin at any address.
#pragma once

#include <cstdint>

namespace powerinfer {

// element = scale * (code - 8)
struct BlockQ4_0 {
  static constexpr int kElements = 32;
  uint8_t scale[2];
  uint8_t codes[16];  // elements 0 .. 15 in the low nibbles, 16 .. 31 in the high ones
};
static_assert(sizeof(BlockQ4_0) == 18);

// element = scale * code + minimum
struct BlockQ4_1 {
  static constexpr int kElements = 32;
  uint8_t scale[2];
  uint8_t minimum[2];
  uint8_t codes[16];  // as BlockQ4_0's
};
static_assert(sizeof(BlockQ4_1) == 20);

// element = scale * code
struct BlockQ8_0 {
  static constexpr int kElements = 32;
  uint8_t scale[2];
  int8_t codes[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

// element = scale * scales[element / 16] * (code - 32)
struct BlockQ6_K {
  static constexpr int kElements = 256;
  uint8_t low[128];  // of the codes' 6 bits; see q6_k_code
  uint8_t high[64];
  int8_t scales[16];
  uint8_t scale[2];
};
static_assert(sizeof(BlockQ6_K) == 210);

template <typename Block>
const Block& block_at(const uint8_t* row, int block) {
  static_assert(alignof(Block) == 1);
  return reinterpret_cast<const Block*>(row)[block];
}

// 0 .. 15
inline int q4_code(const uint8_t (&codes)[16], int element) {
  const uint8_t both = codes[element % 16];
  return element < 16 ? both & 15 : both >> 4;
}

// 0 .. 63. A half of 128 elements is four quarters of 32: the low nibbles of the first two, then those of the last two,
// share bytes, and the high bits of all four.
inline int q6_k_code(const BlockQ6_K& block, int element) {
  const int half = element / 128, within = element % 128, quarter = within / 32, l = within % 32;
  const uint8_t low = block.low[64 * half + l + 32 * (quarter % 2)];
  const uint8_t high = block.high[32 * half + l];
  return (quarter < 2 ? low & 15 : low >> 4) | (high >> 2 * quarter & 3) << 4;
}

}  // namespace powerinfer
