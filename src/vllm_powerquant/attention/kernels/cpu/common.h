// Shared by the store and attend kernels: the arguments that Python hands over, and vectors of 16 floats.
// The byte layout is attention/layout.py's: every offset arrives in Format.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define PQ_AVX512 1
#endif

namespace pq {

constexpr int kTokens = 64;        // tokens of a sub-page
constexpr int kMaxHeadSize = 256;
constexpr int kLanes = 16;

using Vec = float __attribute__((vector_size(64)));
using IntVec = int32_t __attribute__((vector_size(64)));
using UnsignedVec = uint32_t __attribute__((vector_size(64)));

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Mirrors vllm_powerquant.attention.kernels.cpu_kernels._Format.
struct Format {
  int32_t head_size, outer_order, key_bits, value_bits;
  int32_t value_ring;                      // channels of a ring of attention/trellis.py; 0: the scalar codec
  int64_t key_plane[2], value_plane[2];    // bytes from the sub-page's start
  int64_t key_scale, value_scale;          // likewise
  int64_t sub_page_bytes;
  const float* signs;                      // [head_size]
  const int8_t* outer;                     // [outer_order, outer_order], +-1
  const int8_t* key_levels;                // [2 ** key_bits], level n means n + 1/2
  const int8_t* value_levels;              // [2 ** value_bits]; not used by the trellis
  float key_step, value_step;
  float key_scale_factor, value_scale_factor;
};

// A [num_blocks, num_kv_heads, block_size, ...] cache; strides in bytes.
struct Pages {
  uint8_t* data;
  int64_t block_stride, head_stride, token_stride, block_size;
};

// [tokens, heads, head_size]; strides in elements, head_size contiguous.
struct Rows {
  const void* data;
  int64_t token_stride, head_stride;
};

// Which tokens of one request's context are read from its exact blocks: reference.exact_positions.
struct ExactRule {
  int64_t context;                   // tokens before the chunk
  const int32_t* table;              // block ids, 0 = null block; null pointer: nothing is exact
  int64_t block_size;
  int32_t residual_tokens, sink_tokens;

  bool is_exact(int64_t token) const {
    if (!table) return false;
    if (token >= sink_tokens && !(residual_tokens > 0 && token > context - residual_tokens)) return false;
    return table[token / block_size] > 0;
  }
};

inline int position_of(int token) { return 16 * ((token >> 1) & 3) + 2 * (token >> 3) + (token & 1); }
inline int token_at(int position) {
  return ((position & 15) >> 1) << 3 | (position >> 4) << 1 | (position & 1);
}

inline float bf16_to_float(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline int64_t element_bytes(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

inline void load_floats(const void* source, int32_t dtype, int n, float* out) {
  if (dtype == kFloat32) {
    std::memcpy(out, source, static_cast<size_t>(n) * 4);
  } else if (dtype == kBFloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(source);
    for (int i = 0; i < n; ++i) out[i] = bf16_to_float(x[i]);
  } else {
    const _Float16* x = static_cast<const _Float16*>(source);
    int i = 0;
#ifdef PQ_AVX512
    for (; i + kLanes <= n; i += kLanes)
      _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
#endif
    for (; i < n; ++i) out[i] = static_cast<float>(x[i]);
  }
}

inline void store_floats(const float* x, int32_t dtype, int n, void* target) {
  if (dtype == kFloat32) {
    std::memcpy(target, x, static_cast<size_t>(n) * 4);
  } else if (dtype == kBFloat16) {
    uint16_t* out = static_cast<uint16_t*>(target);
    for (int i = 0; i < n; ++i) out[i] = float_to_bf16(x[i]);
  } else {
    _Float16* out = static_cast<_Float16*>(target);
    for (int i = 0; i < n; ++i) out[i] = static_cast<_Float16>(x[i]);
  }
}

// H x (or H^T x), unnormalized, for T = float or a vector of 16 independent columns. The order of operations is
// attention/rotation.py's.
template <typename T>
void hadamard(T* x, T* scratch, int head_size, int order, const int8_t* outer, bool transpose) {
  const int inner = head_size / order;
  for (int stride = 1; stride < inner; stride *= 2)
    for (int start = 0; start < head_size; start += 2 * stride)
      for (int i = start; i < start + stride; ++i) {
        T a = x[i], b = x[i + stride];
        x[i] = a + b;
        x[i + stride] = a - b;
      }
  if (order == 1) return;
  for (int row = 0; row < order; ++row)
    for (int i = 0; i < inner; ++i) {
      auto sign = [&](int j) { return transpose ? outer[j * order + row] : outer[row * order + j]; };
      T total = sign(0) > 0 ? x[i] : -x[i];
      for (int j = 1; j < order; ++j) {
        T term = x[j * inner + i];
        total = sign(j) > 0 ? total + term : total - term;
      }
      scratch[row * inner + i] = total;
    }
  for (int i = 0; i < head_size; ++i) x[i] = scratch[i];
}

}  // namespace pq
