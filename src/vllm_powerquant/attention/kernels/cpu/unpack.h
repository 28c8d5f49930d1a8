// Packed sub-pages to unsigned bytes (level + 128), in the order that the integer dot products read.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace pq {

// One unpacked sub-page of one kv head.
struct PackedTile {
  alignas(64) uint8_t keys[kTokens * kMaxHeadSize];     // [head_size / 4][64 positions][4 channels]
  alignas(64) uint8_t values[kTokens * kMaxHeadSize];   // [16][head_size][4 positions]
  alignas(64) uint8_t bytes[kTokens * kMaxHeadSize];    // scratch
  uint8_t key_lut[256], value_lut[256];                 // stored code -> level + 128

  void set_codebooks(const Format& f) {
    for (int i = 0; i < 1 << f.key_bits; ++i) key_lut[i] = static_cast<uint8_t>(f.key_levels[i] + 128);
    for (int i = 0; i < 1 << f.value_bits; ++i) value_lut[i] = static_cast<uint8_t>(f.value_levels[i] + 128);
  }
};

// Codes of the generic layout, one token or position at a time: idx of channel i from bytes `stride` apart.
inline int code_at(const uint8_t* low, const uint8_t* high, int bits, int d, int i, int64_t stride) {
  if (bits == 8) return low[i * stride] ^ 0x80;
  if (bits == 4) return low[i % (d / 2) * stride] >> (i / (d / 2) * 4) & 15;
  int code = low[i % (d / 4) * stride] >> (i / (d / 4) * 2) & 3;
  if (bits == 3) code |= (high[i % (d / 8) * stride] >> (i / (d / 8)) & 1) << 2;
  return code;
}

[[maybe_unused]] inline void unpack_keys_plain(const Format& f, const uint8_t* page, PackedTile& s) {
  const int d = f.head_size;
  for (int position = 0; position < kTokens; ++position) {
    const int token = token_at(position);
    const uint8_t* low = page + f.key_plane[0] + token * (d * (f.key_bits == 3 ? 2 : f.key_bits) / 8);
    const uint8_t* high = page + f.key_plane[1] + token * (d / 8);
    for (int i = 0; i < d; ++i) {
      int code;
      if (f.key_bits == 4) {
        const int word = i % (d / 2) / 4, channel = i % 4, z = i / (d / 2);
        const uint8_t* w = low + 4 * word;
        const int magnitude = w[2 * z + channel / 2] >> (channel % 2 * 4) & 7;
        code = w[channel] >> (z ? 3 : 7) & 1 ? 7 - magnitude : 8 + magnitude;
      } else {
        code = code_at(low, high, f.key_bits, d, i, 1);
      }
      s.keys[(i / 4 * kTokens + position) * 4 + i % 4] = s.key_lut[code];
    }
  }
}

// attention/trellis.py: n + 8 of a symbol and the one before it in its ring.
inline int trellis_level(int symbol, int before) {
  const int a = symbol ^ before >> 1;
  return a + 4 * (a ^ 3 * (before & 1));
}

[[maybe_unused]] inline void unpack_values_plain(const Format& f, const uint8_t* page, PackedTile& s) {
  const int d = f.head_size;
  const uint8_t *low = page + f.value_plane[0], *high = page + f.value_plane[1];
  const int flip = f.value_bits == 2 ? 2 : 0, n = f.value_ring;
  for (int i = 0; i < d; ++i)
    for (int position = 0; position < kTokens; ++position) {
      if (n) {
        const int before = i / n * n + (i % n + n - 1) % n;
        const int level = trellis_level(code_at(low + position, high, 2, d, i, kTokens),
                                        code_at(low + position, high, 2, d, before, kTokens));
        s.values[(position / 4 * d + i) * 4 + position % 4] = static_cast<uint8_t>(level + 120);
        continue;
      }
      int code = code_at(low + position, high + position, f.value_bits, d, i, kTokens);
      if (i >= d - d / 4) code ^= flip;
      s.values[(position / 4 * d + i) * 4 + position % 4] = s.value_lut[code];
    }
}

#ifdef PQ_AVX512
inline __m512i lookup(__m512i codes, __m512i lut) { return _mm512_shuffle_epi8(lut, codes); }

inline void unpack_keys(const Format& f, const uint8_t* page, PackedTile& s) {
  const int d = f.head_size, bits = f.key_bits;
  if (bits == 3 && d % 32) return unpack_keys_plain(f, page, s);
  const int low_bytes = bits == 3 ? d / 4 : d * bits / 8, words = low_bytes / 4, high_words = d / 32;
  const __m512i lut = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.key_lut)));
  const __m512i three = _mm512_set1_epi8(3), seven = _mm512_set1_epi8(7), ones = _mm512_set1_epi8(1);
  for (int block = 0; block < 4; ++block) {
    __m512i high[16];
    if (bits == 3) {
      const __mmask16 tail = static_cast<__mmask16>((1 << high_words) - 1);
      for (int i = 0; i < 16; ++i)
        high[i] = _mm512_maskz_loadu_epi32(tail, page + f.key_plane[1] + token_at(16 * block + i) * (d / 8));
      transpose16(high);
    }
    for (int first = 0; first < words; first += 16) {
      const int count = std::min(16, words - first);
      const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
      __m512i w[16];
      for (int i = 0; i < 16; ++i)
        w[i] = _mm512_maskz_loadu_epi32(mask, page + f.key_plane[0] + token_at(16 * block + i) * low_bytes + 4 * first);
      transpose16(w);
      for (int k = 0; k < count; ++k) {
        const int word = first + k;
        auto put = [&](int group, __m512i codes) {
          _mm512_store_si512(s.keys + (group * kTokens + 16 * block) * 4, codes);
        };
        if (bits == 4) {
          // magnitudes of the word's low half are A's, of its high half Z's: spread the nibbles of each half over 4 bytes
          const __m512i low = _mm512_and_si512(w[k], seven);
          const __m512i upper = _mm512_and_si512(_mm512_srli_epi32(w[k], 4), seven);
          const __m512i pick_a = _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
          const __m512i pick_z = _mm512_broadcast_i32x4(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
          auto spread = [&](__m512i pick) {
            return _mm512_or_si512(_mm512_shuffle_epi8(low, pick),
                                   _mm512_slli_epi16(_mm512_shuffle_epi8(upper, pick), 8));
          };
          // code = sign ? 7 - magnitude : 8 + magnitude = (magnitude | 8) ^ (sign ? 15 : 0)
          const __m512i eight = _mm512_set1_epi8(8), all = _mm512_set1_epi8(15);
          auto code = [&](__m512i magnitude, __m512i sign_at_top) {
            const __m512i c = _mm512_or_si512(magnitude, eight);
            return _mm512_xor_si512(c, _mm512_maskz_mov_epi8(_mm512_movepi8_mask(sign_at_top), all));
          };
          put(word, lookup(code(spread(pick_a), w[k]), lut));
          put(d / 8 + word, lookup(code(spread(pick_z), _mm512_slli_epi32(w[k], 4)), lut));
        } else if (bits == 8) {
          put(word, _mm512_xor_si512(w[k], _mm512_set1_epi8(-128)));
        } else {
          for (int field = 0; field < 4; ++field) {
            __m512i c = _mm512_and_si512(_mm512_srli_epi32(w[k], 2 * field), three);
            if (bits == 3) {
              const int upper = word >= d / 32;
              const __m512i h = _mm512_srli_epi32(high[word - upper * (d / 32)], 2 * field + upper);
              c = _mm512_or_si512(c, _mm512_slli_epi32(_mm512_and_si512(h, ones), 2));
            }
            put(field * (d / 16) + word, lookup(c, lut));
          }
        }
      }
    }
  }
}

inline void unpack_values(const Format& f, const uint8_t* page, PackedTile& s) {
  const int d = f.head_size, bits = f.value_bits;
  const uint8_t *low = page + f.value_plane[0], *high = page + f.value_plane[1];
  const __m512i lut = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s.value_lut)));
  const __m512i three = _mm512_set1_epi8(3);
  auto columns = [&](const uint8_t* source, int count, __m512i* w) {
    for (int i = 0; i < 16; ++i)
      w[i] = i < count ? _mm512_loadu_si512(source + i * kTokens) : _mm512_setzero_si512();
    transpose16(w);
  };
  auto put = [&](int word, int channel, int count, __m512i codes) {
    _mm512_mask_storeu_epi32(s.values + (word * d + channel) * 4, static_cast<__mmask16>((1u << count) - 1), codes);
  };
  __m512i w[16];
  if (bits == 8) {
    for (int first = 0; first < d; first += 16) {
      columns(low + first * kTokens, 16, w);
      for (int i = 0; i < 16; ++i) put(i, first, 16, _mm512_xor_si512(w[i], _mm512_set1_epi8(-128)));
    }
  } else if (bits == 4) {
    for (int first = 0; first < d / 2; first += 16) {
      const int count = std::min(16, d / 2 - first);
      columns(low + first * kTokens, count, w);
      const __m512i fifteen = _mm512_set1_epi8(15);
      for (int i = 0; i < 16; ++i) {
        put(i, first, count, lookup(_mm512_and_si512(w[i], fifteen), lut));
        put(i, d / 2 + first, count, lookup(_mm512_and_si512(_mm512_srli_epi32(w[i], 4), fifteen), lut));
      }
    }
  } else if (f.value_ring) {
    const int n = f.value_ring;
    alignas(64) int32_t lane_before[16];
    for (int i = 0; i < 16; ++i) lane_before[i] = (i + n - 1) % n;
    const __m512i ring = _mm512_load_si512(lane_before);
    const __m512i low_bits = _mm512_set1_epi8(0x55), high_bits = _mm512_set1_epi8(static_cast<char>(0xAA));
    const __m512i a_bits = _mm512_set1_epi8(0x33), fifteen = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(120);
    for (int first = 0; first < d / 4; first += n) {
      columns(low + first * kTokens, n, w);
      for (int i = 0; i < 16; ++i) {
        // four fields of symbols at once: a, then b, as trellis_level
        const __m512i before = _mm512_permutexvar_epi32(ring, w[i]);
        const __m512i a = _mm512_xor_si512(w[i], _mm512_and_si512(_mm512_srli_epi32(before, 1), low_bits));
        const __m512i twice = _mm512_or_si512(_mm512_and_si512(before, low_bits),
                                              _mm512_and_si512(_mm512_slli_epi32(before, 1), high_bits));
        const __m512i b = _mm512_xor_si512(a, twice);
        const __m512i even = _mm512_or_si512(_mm512_and_si512(a, a_bits), _mm512_andnot_si512(a_bits, _mm512_slli_epi32(b, 2)));
        const __m512i odd = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(a, 2), a_bits), _mm512_andnot_si512(a_bits, b));
        put(i, first, n, _mm512_add_epi8(_mm512_and_si512(even, fifteen), offset));
        put(i, d / 4 + first, n, _mm512_add_epi8(_mm512_and_si512(odd, fifteen), offset));
        put(i, d / 2 + first, n, _mm512_add_epi8(_mm512_and_si512(_mm512_srli_epi32(even, 4), fifteen), offset));
        put(i, d / 4 * 3 + first, n, _mm512_add_epi8(_mm512_and_si512(_mm512_srli_epi32(odd, 4), fifteen), offset));
      }
    }
  } else if (bits == 2) {
    for (int first = 0; first < d / 4; first += 16) {
      const int count = std::min(16, d / 4 - first);
      columns(low + first * kTokens, count, w);
      for (int i = 0; i < 16; ++i) {
        const __m512i plain = _mm512_xor_si512(w[i], _mm512_set1_epi8(-128));
        for (int field = 0; field < 4; ++field)
          put(i, field * (d / 4) + first, count, lookup(_mm512_and_si512(_mm512_srli_epi32(plain, 2 * field), three), lut));
      }
    }
  } else {
    for (int channel = 0; channel < d; ++channel) {
      const __m512i l = _mm512_loadu_si512(low + channel % (d / 4) * kTokens);
      const __m512i h = _mm512_loadu_si512(high + channel % (d / 8) * kTokens);
      const __m512i c = _mm512_and_si512(_mm512_srli_epi16(l, channel / (d / 4) * 2), three);
      const __m512i b = _mm512_and_si512(_mm512_srli_epi16(h, channel / (d / 8)), _mm512_set1_epi8(1));
      _mm512_store_si512(s.bytes + channel * kTokens, lookup(_mm512_or_si512(c, _mm512_slli_epi16(b, 2)), lut));
    }
    for (int first = 0; first < d; first += 16) {
      columns(s.bytes + first * kTokens, 16, w);
      for (int i = 0; i < 16; ++i) put(i, first, 16, w[i]);
    }
  }
}
#else
inline void unpack_keys(const Format& f, const uint8_t* page, PackedTile& s) { unpack_keys_plain(f, page, s); }
inline void unpack_values(const Format& f, const uint8_t* page, PackedTile& s) { unpack_values_plain(f, page, s); }
#endif

}  // namespace pq
