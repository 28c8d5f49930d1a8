// Vectors of 16 lanes: the few operations the attend kernel is written in, with AVX-512 where the compiler's own form is slow.
#pragma once

#include "common.h"

namespace pq {

constexpr IntVec kLaneIndex = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
using Bytes = int8_t __attribute__((vector_size(16)));

inline Vec splat(float x) { return Vec{} + x; }
inline Vec to_float(IntVec x) { return __builtin_convertvector(x, Vec); }
inline Vec load(const float* x) { return *reinterpret_cast<const Vec*>(x); }
inline void save(float* out, Vec x) { *reinterpret_cast<Vec*>(out) = x; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

template <typename T, typename V, typename F>
T fold(V v, F f) {
  T total = v[0];
  for (int lane = 1; lane < kLanes; ++lane) total = f(total, v[lane]);
  return total;
}

inline float largest_of(Vec v) {
#ifdef PQ_AVX512
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
  return fold<float>(v, [](float a, float b) { return a > b ? a : b; });
#endif
}
inline float sum_of(Vec v) {
#ifdef PQ_AVX512
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  return fold<float>(v, [](float a, float b) { return a + b; });
#endif
}
inline int32_t sum_of(IntVec v) {
#ifdef PQ_AVX512
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(v));
#else
  return fold<int32_t>(v, [](int32_t a, int32_t b) { return a + b; });
#endif
}

// 2^x for x <= 0 (2e-7 relative; the polynomial is the Taylor series of 2^f on [-1/2, 1/2]); -126 and below give 2^-126.
inline Vec exp2_nonpositive(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  x = larger(x, splat(-126.0f));
  const Vec rounded = x + kRound, f = x - (rounded - kRound);
  Vec p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const IntVec power = (reinterpret_cast<IntVec>(rounded) - 0x4b400000 + 127) << 23;
  return p * reinterpret_cast<Vec>(power);
}
inline float exp2_nonpositive(float x) { return exp2_nonpositive(splat(x))[0]; }

inline IntVec dot_bytes(IntVec sum, const uint8_t* unsigned_bytes, int32_t four_signed) {
#ifdef PQ_AVX512
  return reinterpret_cast<IntVec>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), _mm512_load_si512(unsigned_bytes),
                                                      _mm512_set1_epi32(four_signed)));
#else
  int8_t s[4];
  std::memcpy(s, &four_signed, 4);
  for (int lane = 0; lane < kLanes; ++lane)
    sum[lane] += unsigned_bytes[4 * lane] * s[0] + unsigned_bytes[4 * lane + 1] * s[1] +
                 unsigned_bytes[4 * lane + 2] * s[2] + unsigned_bytes[4 * lane + 3] * s[3];
  return sum;
#endif
}

#ifdef PQ_AVX512
// 16 x 16 transpose of 32-bit words, in registers.
inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
      r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
    }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 2; ++k) {
      t[8 * k + i] = _mm512_shuffle_i32x4(r[8 * k + i], r[8 * k + 4 + i], 0x88);
      t[8 * k + 4 + i] = _mm512_shuffle_i32x4(r[8 * k + i], r[8 * k + 4 + i], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}
#endif

}  // namespace pq
