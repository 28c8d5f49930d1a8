// What the packed cache's kernels do with an instruction set's own instructions; the three forms give the same numbers.
// Included by one file for each set and compiled with its flags, so nothing here may be shared: all in an unnamed namespace,
// and no inline functions of other headers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "packed_kv.h"
#include "vectors16.h"

namespace powerinfer {
namespace {

constexpr int kTokens = kSubPageTokens;
inline int smaller(int a, int b) { return a < b ? a : b; }
inline int larger(int a, int b) { return a > b ? a : b; }
inline int token_of(int position) { return (position & 15) >> 1 << 3 | position >> 4 << 1 | (position & 1); }

// A tile is a sub-page made ready for dot products of 4 numbers in each of 16 lanes.
//   keys     [head_size / 4][64 positions][4 channels]: level + kKeyBias; group 2w + m has the channels 4w + m, 4w + 2 + m
//   of
//            each half of the head
//   values   [16][head_size / 4][4 positions]: stored bytes, field 3 unflipped
struct Tile {
  alignas(64) uint8_t keys[kTokens * kMaxPackedHead];
  alignas(64) uint8_t values[kTokens * kMaxPackedHead / 4];
};

// Channels of the 4 numbers of a group of keys.
inline int key_channel(int head_size, int group, int i) {
  return (i < 2 ? 0 : head_size / 2) + group / 2 * 4 + group % 2 + i % 2 * 2;
}

#if defined(__AVX512VNNI__)

inline Floats load_half(const uint16_t* x) {
  return {{_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))}};
}
inline void save_half(uint16_t* out, const Floats& v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtps_ph(v.part[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// 16 integers of up to 15 bits and a sign: for each four, a word of high bytes and one of low bytes, n = 256 * high + low.
inline void fix(const int32_t* n, int32_t* first, int32_t* second) {
  const __m512i all = _mm512_loadu_si512(n);
  const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(all, 24), 24);
  const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(all, low), 8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm512_cvtepi32_epi8(high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm512_cvtepi32_epi8(low));
}

// 4 bytes of each lane, in the form that an instruction multiplies.
using Quads = __m512i;
inline Quads quads_of_keys(const uint8_t* bytes) { return _mm512_load_si512(bytes); }
struct ValueBytes {
  __m512i bytes;
  explicit ValueBytes(const uint8_t* at) : bytes(_mm512_loadu_si512(at)) {}
  Quads field(int mask) const { return _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(mask))); }
};
constexpr int kSums = 4;  // of each of 3 rows, in registers
constexpr int kKeyBias = 128;

struct Sum {
  __m512i high = _mm512_setzero_si512(), low = _mm512_setzero_si512();
  void add(Quads quads, int32_t first, int32_t second) {
    high = _mm512_dpbusd_epi32(high, quads, _mm512_set1_epi32(first));
    low = _mm512_dpbusd_epi32(low, quads, _mm512_set1_epi32(second));
  }
  Ints total() const { return {{reinterpret_cast<IntPart>(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low))}}; }
};

// 16 x 16 transpose of 32-bit words.
inline void transpose(__m512i* r) {
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

inline __m512i every_four_bytes(int a, int b, int c, int d) { return _mm512_set1_epi32(d << 24 | c << 16 | b << 8 | a); }
inline __m512i in_each_word(int a, int b, int c, int d) {
  return _mm512_add_epi8(every_four_bytes(a, b, c, d),
                         _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)));
}

void unpack_keys(const PackedLayout& layout, const uint8_t* sub_page, Tile& tile) {
  const int words = layout.head_size / 8, token_bytes = layout.head_size / 2;
  // magnitude, and 8 more where the level is negative -> level + bias
  alignas(16) uint8_t levels[16];
  for (int i = 0; i < 8; ++i) {
    levels[i] = static_cast<uint8_t>(layout.tables->key_grid[8 + i] - 0.5f + kKeyBias);
    levels[8 + i] = static_cast<uint8_t>(layout.tables->key_grid[7 - i] - 0.5f + kKeyBias);
  }
  const __m512i lookup = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(levels)));
  const __m512i seven = _mm512_set1_epi8(7), eight = _mm512_set1_epi8(8);
  const __m512i sign_bits = every_four_bytes(0x80, 0x80, 8, 8);
  const __m512i even = in_each_word(0, 2, 0, 2), odd = in_each_word(1, 3, 1, 3);
  for (int block = 0; block < 4; ++block)
    for (int first = 0; first < words; first += 16) {
      const int count = smaller(16, words - first);
      const __mmask16 wanted = static_cast<__mmask16>((1u << count) - 1);
      __m512i w[16];
      for (int i = 0; i < 16; ++i)
        w[i] = _mm512_maskz_loadu_epi32(wanted, sub_page + token_of(16 * block + i) * token_bytes + 4 * first);
      transpose(w);
      for (int k = 0; k < count; ++k) {
        auto put = [&](int m, __m512i magnitudes, __m512i order) {
          const __mmask64 negative = _mm512_test_epi8_mask(_mm512_shuffle_epi8(w[k], order), sign_bits);
          const __m512i codes = _mm512_mask_add_epi8(magnitudes, negative, magnitudes, eight);
          _mm512_store_si512(tile.keys + ((2 * (first + k) + m) * kTokens + 16 * block) * 4,
                             _mm512_shuffle_epi8(lookup, codes));
        };
        put(0, _mm512_and_si512(w[k], seven), even);
        put(1, _mm512_and_si512(_mm512_srli_epi32(w[k], 4), seven), odd);
      }
    }
}

void unpack_values(const PackedLayout& layout, const uint8_t* sub_page, Tile& tile) {
  const int width = layout.head_size / 4;
  const uint8_t* bytes = sub_page + layout.value_offset;
  for (int first = 0; first < width; first += 16) {
    const int count = smaller(16, width - first);
    __m512i w[16];
    for (int i = 0; i < 16; ++i)
      w[i] = i < count ? _mm512_loadu_si512(bytes + (first + i) * kTokens) : _mm512_setzero_si512();
    transpose(w);
    for (int i = 0; i < 16; ++i)
      _mm512_mask_storeu_epi32(tile.values + (i * width + first) * 4, static_cast<__mmask16>((1u << count) - 1),
                               _mm512_xor_si512(w[i], _mm512_set1_epi8(-128)));
  }
}

#elif defined(__AVX2__)

inline Floats load_half(const uint16_t* x) {
  Floats v;
  for (int i = 0; i < 2; ++i) v.part[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * i)));
  return v;
}
inline void save_half(uint16_t* out, const Floats& v) {
  for (int i = 0; i < 2; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * i), _mm256_cvtps_ph(v.part[i], _MM_FROUND_TO_NEAREST_INT));
}

// 16 integers of up to 15 bits and a sign: for each four, a word of numbers 0 and 2, and one of numbers 1 and 3.
inline void fix(const int32_t* n, int32_t* first, int32_t* second) {
  auto pair = [](int32_t a, int32_t b) { return static_cast<int32_t>((a & 0xffff) | static_cast<uint32_t>(b) << 16); };
  for (int i = 0; i < 4; ++i) {
    first[i] = pair(n[4 * i], n[4 * i + 2]);
    second[i] = pair(n[4 * i + 1], n[4 * i + 3]);
  }
}

// 4 bytes of each lane as 16-bit numbers: 0 and 2 apart from 1 and 3.
struct Quads {
  __m256i even[2], odd[2];
};
inline __m256i load_bytes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
inline Quads quads_of_keys(const uint8_t* bytes) {
  Quads q;
  for (int i = 0; i < 2; ++i) {
    const __m256i v = load_bytes(bytes + 32 * i);
    q.even[i] = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
    q.odd[i] = _mm256_srai_epi16(v, 8);
  }
  return q;
}
struct ValueBytes {
  __m256i bytes[2];
  explicit ValueBytes(const uint8_t* at) : bytes{load_bytes(at), load_bytes(at + 32)} {}
  Quads field(int mask) const {
    Quads q;
    for (int i = 0; i < 2; ++i) {
      q.even[i] = _mm256_and_si256(bytes[i], _mm256_set1_epi16(static_cast<short>(mask)));
      q.odd[i] = _mm256_and_si256(_mm256_srli_epi16(bytes[i], 8), _mm256_set1_epi16(static_cast<short>(mask)));
    }
    return q;
  }
};
constexpr int kSums = 1;  // of each of 3 rows, in registers
constexpr int kKeyBias = 0;

struct Sum {
  __m256i lanes[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  void add(const Quads& q, int32_t first, int32_t second) {
    const __m256i even = _mm256_set1_epi32(first), odd = _mm256_set1_epi32(second);
    for (int i = 0; i < 2; ++i)
      lanes[i] =
          _mm256_add_epi32(lanes[i], _mm256_add_epi32(_mm256_madd_epi16(q.even[i], even), _mm256_madd_epi16(q.odd[i], odd)));
  }
  Ints total() const { return {{reinterpret_cast<IntPart>(lanes[0]), reinterpret_cast<IntPart>(lanes[1])}}; }
};

// 8 x 8 transpose of 32-bit words.
inline void transpose(__m256i* r) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; ++k) {
      r[i + 2 * k] = _mm256_unpacklo_epi64(t[i + k], t[i + k + 2]);
      r[i + 2 * k + 1] = _mm256_unpackhi_epi64(t[i + k], t[i + k + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
    t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

inline __m256i every_four_bytes(int a, int b, int c, int d) { return _mm256_set1_epi32(d << 24 | c << 16 | b << 8 | a); }
inline __m256i in_each_word(int a, int b, int c, int d) {
  return _mm256_add_epi8(every_four_bytes(a, b, c, d),
                         _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)));
}

void unpack_keys(const PackedLayout& layout, const uint8_t* sub_page, Tile& tile) {
  const int words = layout.head_size / 8, token_bytes = layout.head_size / 2;
  alignas(16) int8_t levels[16];
  for (int i = 0; i < 8; ++i) {
    levels[i] = static_cast<int8_t>(layout.tables->key_grid[8 + i] - 0.5f);
    levels[8 + i] = static_cast<int8_t>(layout.tables->key_grid[7 - i] - 0.5f);
  }
  const __m256i lookup = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(levels)));
  const __m256i seven = _mm256_set1_epi8(7), eight = _mm256_set1_epi8(8);
  const __m256i sign_bits = every_four_bytes(0x80, 0x80, 8, 8);
  const __m256i even = in_each_word(0, 2, 0, 2), odd = in_each_word(1, 3, 1, 3);
  for (int block = 0; block < 8; ++block)
    for (int first = 0; first < words; first += 8) {
      const int count = smaller(8, words - first);
      const __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      __m256i w[8];
      for (int i = 0; i < 8; ++i) {
        const uint8_t* at = sub_page + token_of(8 * block + i) * token_bytes + 4 * first;
        w[i] = _mm256_maskload_epi32(reinterpret_cast<const int*>(at), wanted);
      }
      transpose(w);
      for (int k = 0; k < count; ++k) {
        auto put = [&](int m, __m256i magnitudes, __m256i order) {
          const __m256i signs = _mm256_and_si256(_mm256_shuffle_epi8(w[k], order), sign_bits);
          const __m256i negative = _mm256_and_si256(_mm256_cmpeq_epi8(signs, sign_bits), eight);
          _mm256_store_si256(reinterpret_cast<__m256i*>(tile.keys + ((2 * (first + k) + m) * kTokens + 8 * block) * 4),
                             _mm256_shuffle_epi8(lookup, _mm256_or_si256(magnitudes, negative)));
        };
        put(0, _mm256_and_si256(w[k], seven), even);
        put(1, _mm256_and_si256(_mm256_srli_epi32(w[k], 4), seven), odd);
      }
    }
}

void unpack_values(const PackedLayout& layout, const uint8_t* sub_page, Tile& tile) {
  const int width = layout.head_size / 4;
  const uint8_t* bytes = sub_page + layout.value_offset;
  for (int half = 0; half < 2; ++half)
    for (int first = 0; first < width; first += 8) {
      const int count = smaller(8, width - first);
      const __m256i wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      __m256i w[8];
      for (int i = 0; i < 8; ++i)
        w[i] = i < count ? load_bytes(bytes + (first + i) * kTokens + 32 * half) : _mm256_setzero_si256();
      transpose(w);
      for (int i = 0; i < 8; ++i)
        _mm256_maskstore_epi32(reinterpret_cast<int*>(tile.values + ((8 * half + i) * width + first) * 4), wanted,
                               _mm256_xor_si256(w[i], _mm256_set1_epi8(-128)));
    }
}

#else

inline Floats load_half(const uint16_t* x) {
  float out[16];
  for (int i = 0; i < 16; ++i) {
    const uint32_t sign = static_cast<uint32_t>(x[i] & 0x8000) << 16, magnitude = static_cast<uint32_t>(x[i] & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (magnitude >= 0x0f800000) bits = 0x7f800000 | magnitude;
    bits |= sign;
    std::memcpy(out + i, &bits, 4);
  }
  return load(out);
}
inline void save_half(uint16_t* out, const Floats& v) {
  float in[16];
  save(in, v);
  for (int i = 0; i < 16; ++i) out[i] = float_to_half(in[i]);
}

// 16 integers of up to 15 bits and a sign: for each four, a word of numbers 0 and 1, and one of numbers 2 and 3.
inline void fix(const int32_t* n, int32_t* first, int32_t* second) {
  auto pair = [](int32_t a, int32_t b) { return static_cast<int32_t>((a & 0xffff) | static_cast<uint32_t>(b) << 16); };
  for (int i = 0; i < 4; ++i) {
    first[i] = pair(n[4 * i], n[4 * i + 1]);
    second[i] = pair(n[4 * i + 2], n[4 * i + 3]);
  }
}

// 4 bytes of each lane as floats: four products of them and of fixed-point numbers, and their sum, are exact.
struct Quads {
  Floats numbers[4];
};
inline Ints load_words(const uint8_t* bytes) {
  Ints w;
  load_parts(w, bytes);
  return w;
}
inline Quads quads_of_keys(const uint8_t* bytes) {
  const Ints w = load_words(bytes);
  return {{to_float(w << 24 >> 24), to_float(w << 16 >> 24), to_float(w << 8 >> 24), to_float(w >> 24)}};
}
struct ValueBytes {
  Ints words;
  explicit ValueBytes(const uint8_t* at) : words(load_words(at)) {}
  Quads field(int mask) const {
    return {
        {to_float(words & mask), to_float(words >> 8 & mask), to_float(words >> 16 & mask), to_float(words >> 24 & mask)}};
  }
};
constexpr int kSums = 1;  // of each of 3 rows, in registers
constexpr int kKeyBias = 0;

struct Sum {
  Ints lanes = {};
  void add(const Quads& q, int32_t first, int32_t second) {
    const Floats sum =
        q.numbers[0] * static_cast<float>(static_cast<int16_t>(first)) + q.numbers[1] * static_cast<float>(first >> 16) +
        q.numbers[2] * static_cast<float>(static_cast<int16_t>(second)) + q.numbers[3] * static_cast<float>(second >> 16);
    for (int i = 0; i < kParts; ++i) lanes.part[i] += __builtin_convertvector(sum.part[i], IntPart);
  }
  Ints total() const { return lanes; }
};

void unpack_keys(const PackedLayout& layout, const uint8_t* sub_page, Tile& tile) {
  const int words = layout.head_size / 8;
  // magnitude, and 8 more where the level is negative -> level
  uint8_t levels[16];
  for (int i = 0; i < 8; ++i) {
    levels[i] = static_cast<uint8_t>(static_cast<int8_t>(layout.tables->key_grid[8 + i] - 0.5f));
    levels[8 + i] = static_cast<uint8_t>(static_cast<int8_t>(layout.tables->key_grid[7 - i] - 0.5f));
  }
  for (int position = 0; position < kTokens; ++position) {
    const uint8_t* word = sub_page + token_of(position) * words * 4;
    uint8_t* out = tile.keys + 4 * position;
    for (int i = 0; i < words; ++i, word += 4, out += 8 * kTokens) {
      const int b0 = word[0], b1 = word[1], b2 = word[2], b3 = word[3];
      uint8_t* odd = out + 4 * kTokens;
      out[0] = levels[(b0 & 7) | (b0 >> 4 & 8)];
      out[1] = levels[(b1 & 7) | (b2 >> 4 & 8)];
      out[2] = levels[(b2 & 7) | (b0 & 8)];
      out[3] = levels[(b3 & 7) | (b2 & 8)];
      odd[0] = levels[(b0 >> 4 & 7) | (b1 >> 4 & 8)];
      odd[1] = levels[(b1 >> 4 & 7) | (b3 >> 4 & 8)];
      odd[2] = levels[(b2 >> 4 & 7) | (b1 & 8)];
      odd[3] = levels[(b3 >> 4 & 7) | (b3 & 8)];
    }
  }
}

void unpack_values(const PackedLayout& layout, const uint8_t* sub_page, Tile& tile) {
  const int width = layout.head_size / 4;
  const uint8_t* bytes = sub_page + layout.value_offset;
  for (int k = 0; k < width; ++k)
    for (int position = 0; position < kTokens; ++position)
      tile.values[(position / 4 * width + k) * 4 + position % 4] = bytes[k * kTokens + position] ^ 0x80;
}

#endif

}  // namespace
}  // namespace powerinfer
