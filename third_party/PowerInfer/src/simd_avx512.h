// Vectors of sixteen 32-bit lanes on AVX-512 with VNNI. simd_avx2.h and simd_plain.h give the same functions, whose results
// are the same to the last bit; kernels_impl.h is written on them.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace powerinfer::avx512 {

using Floats = __m512;
using Ints = __m512i;

inline __mmask16 lanes_mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
// lanes from n on are zero, and their memory is not touched
inline Floats load(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes_mask(n), p); }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
inline void store(float* p, Floats a, int n) { _mm512_mask_storeu_ps(p, lanes_mask(n), a); }
inline Floats load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load_half(const uint16_t* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_mask(n), p)); }
inline void store_half(uint16_t* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
// to the nearest integer, ties to even
inline Ints round(Floats a) { return _mm512_cvtps_epi32(a); }
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
// 2^n for n in [-126, 127]
inline Floats exp2(Ints n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

// lanes 0 + 8, 1 + 9, ... first, then 0 + 4, ... , 0 + 2, 1 + 3, then the two
inline float sum(Floats a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float max_lane(Floats a) {
  const __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

inline Ints broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline Ints load_ints(const void* p, int n) { return _mm512_maskz_loadu_epi32(lanes_mask(n), p); }
inline void store_ints(void* p, Ints a) { _mm512_storeu_si512(p, a); }
inline Ints load_int8(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_int8(int8_t* p, Ints a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }
// GCC's _mm512_reduce_add_epi32 adds signed numbers, which must not wrap
inline int32_t sum_ints(Ints a) {
  const __m256i b = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  const __m128i c = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  const __m128i d = _mm_add_epi32(c, _mm_unpackhi_epi64(c, c));
  return _mm_cvtsi128_si32(_mm_add_epi32(d, _mm_shuffle_epi32(d, 1)));
}
inline Ints and_ints(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints or_ints(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints xor_ints(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints sub_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
template <int bits>
inline Ints shift_right(Ints a) {
  return _mm512_srli_epi32(a, bits);
}
template <int bits>
inline Ints shift_left(Ints a) {
  return _mm512_slli_epi32(a, bits);
}
// acc + the four products of each lane's bytes, a unsigned, b signed; small: a is at most 127, which AVX2 needs to know
inline Ints dot_bytes(Ints acc, Ints a, Ints b) { return _mm512_dpbusd_epi32(acc, a, b); }
inline Ints dot_small_bytes(Ints acc, Ints a, Ints b) { return _mm512_dpbusd_epi32(acc, a, b); }
// acc + the two products of each lane's signed 16-bit halves
inline Ints dot_words(Ints acc, Ints a, Ints b) { return _mm512_dpwssd_epi32(acc, a, b); }
// 16-bit halves of a and b in turn; of each 128-bit quarter its low (high) half
inline Ints interleave_low(Ints a, Ints b) { return _mm512_unpacklo_epi16(a, b); }
inline Ints interleave_high(Ints a, Ints b) { return _mm512_unpackhi_epi16(a, b); }

// Writes base + i of every lane i with a >= b to `out`, in order, and returns how many; up to 16 entries may be overwritten.
inline int compact(Floats a, Floats b, int n, int32_t base, int32_t* out) {
  const __mmask16 mask = _mm512_mask_cmp_ps_mask(lanes_mask(n), a, b, _CMP_GE_OQ);
  const Ints lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lane, _mm512_set1_epi32(base))));
  return __builtin_popcount(mask);
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// into the second-level cache
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace powerinfer::avx512
