// simd_avx512.h's functions in plain C++: slow, for any CPU, and what the others are tested against.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace powerinfer::plain {

struct Floats {
  float lane[16];
};
struct Ints {
  int32_t lane[16];
};

// fn(i) of every lane
template <typename Function>
inline Floats floats(Function fn) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.lane[i] = fn(i);
  return r;
}
template <typename Function>
inline Ints ints(Function fn) {
  Ints r;
  for (int i = 0; i < 16; ++i) r.lane[i] = static_cast<int32_t>(fn(i));
  return r;
}

inline Floats zero() { return Floats{}; }
inline Floats broadcast(float x) {
  return floats([&](int) { return x; });
}
inline Floats load(const float* p, int n) {
  return floats([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline Floats load(const float* p) { return load(p, 16); }
inline void store(float* p, Floats a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.lane[i];
}
inline void store(float* p, Floats a) { store(p, a, 16); }
inline Floats load_half(const uint16_t* p, int n) {
  return floats([&](int i) { return i < n ? half_to_float(p[i]) : 0.0f; });
}
inline Floats load_half(const uint16_t* p) { return load_half(p, 16); }
inline void store_half(uint16_t* p, Floats a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.lane[i]);
}
inline Floats add(Floats a, Floats b) {
  return floats([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Floats sub(Floats a, Floats b) {
  return floats([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Floats mul(Floats a, Floats b) {
  return floats([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Floats div(Floats a, Floats b) {
  return floats([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return floats([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
// as the instructions do: b where either is NaN
inline Floats max(Floats a, Floats b) {
  return floats([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats min(Floats a, Floats b) {
  return floats([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats abs(Floats a) {
  return floats([&](int i) { return std::fabs(a.lane[i]); });
}
inline Ints round(Floats a) {
  // what the instructions give where no integer fits
  return ints(
      [&](int i) { return std::fabs(a.lane[i]) < 0x1p31f ? static_cast<int32_t>(std::nearbyint(a.lane[i])) : INT32_MIN; });
}
inline Floats to_floats(Ints a) {
  return floats([&](int i) { return static_cast<float>(a.lane[i]); });
}
inline Floats exp2(Ints n) {
  return floats([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(n.lane[i] + 127) << 23;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  });
}
inline float sum(Floats a) {
  for (int width = 8; width; width /= 2) {
    for (int i = 0; i < width; ++i) a.lane[i] += a.lane[i + width];
  }
  return a.lane[0];
}
inline float max_lane(Floats a) {
  for (int width = 8; width; width /= 2) {
    for (int i = 0; i < width; ++i) a.lane[i] = a.lane[i] > a.lane[i + width] ? a.lane[i] : a.lane[i + width];
  }
  return a.lane[0];
}

inline Ints broadcast_int(int32_t x) {
  return ints([&](int) { return x; });
}
inline Ints load_ints(const void* p, int n) {
  Ints r{};
  std::memcpy(r.lane, p, static_cast<size_t>(n) * 4);
  return r;
}
inline Ints load_ints(const void* p) { return load_ints(p, 16); }
inline void store_ints(void* p, Ints a) { std::memcpy(p, a.lane, sizeof a.lane); }
inline Ints load_int8(const int8_t* p) {
  return ints([&](int i) { return p[i]; });
}
inline void store_int8(int8_t* p, Ints a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.lane[i]);
}
inline int32_t sum_ints(Ints a) {
  uint32_t total = 0;
  for (int32_t lane : a.lane) total += static_cast<uint32_t>(lane);
  return static_cast<int32_t>(total);
}
inline Ints and_ints(Ints a, Ints b) {
  return ints([&](int i) { return a.lane[i] & b.lane[i]; });
}
inline Ints or_ints(Ints a, Ints b) {
  return ints([&](int i) { return a.lane[i] | b.lane[i]; });
}
inline Ints xor_ints(Ints a, Ints b) {
  return ints([&](int i) { return a.lane[i] ^ b.lane[i]; });
}
inline Ints add_ints(Ints a, Ints b) {
  return ints([&](int i) { return static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i]); });
}
inline Ints sub_ints(Ints a, Ints b) {
  return ints([&](int i) { return static_cast<uint32_t>(a.lane[i]) - static_cast<uint32_t>(b.lane[i]); });
}
template <int bits>
inline Ints shift_right(Ints a) {
  return ints([&](int i) { return static_cast<uint32_t>(a.lane[i]) >> bits; });
}
template <int bits>
inline Ints shift_left(Ints a) {
  return ints([&](int i) { return static_cast<uint32_t>(a.lane[i]) << bits; });
}
inline Ints dot_bytes(Ints acc, Ints a, Ints b) {
  return ints([&](int i) {
    int32_t total = acc.lane[i];
    for (int j = 0; j < 32; j += 8) {
      total += (a.lane[i] >> j & 255) * static_cast<int8_t>(b.lane[i] >> j & 255);
    }
    return total;
  });
}
inline Ints dot_small_bytes(Ints acc, Ints a, Ints b) { return dot_bytes(acc, a, b); }
inline Ints dot_words(Ints acc, Ints a, Ints b) {
  return ints([&](int i) {
    return acc.lane[i] + static_cast<int16_t>(a.lane[i] & 0xffff) * static_cast<int16_t>(b.lane[i] & 0xffff) +
           (a.lane[i] >> 16) * (b.lane[i] >> 16);
  });
}
inline Ints interleave(Ints a, Ints b, int first) {
  uint16_t x[32], y[32], r[32];
  std::memcpy(x, a.lane, sizeof x);
  std::memcpy(y, b.lane, sizeof y);
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int i = 0; i < 4; ++i) {
      r[8 * quarter + 2 * i] = x[8 * quarter + first + i];
      r[8 * quarter + 2 * i + 1] = y[8 * quarter + first + i];
    }
  }
  Ints result;
  std::memcpy(result.lane, r, sizeof r);
  return result;
}
inline Ints interleave_low(Ints a, Ints b) { return interleave(a, b, 0); }
inline Ints interleave_high(Ints a, Ints b) { return interleave(a, b, 4); }

inline int compact(Floats a, Floats b, int n, int32_t base, int32_t* out) {
  int count = 0;
  for (int i = 0; i < n; ++i) {
    out[count] = base + i;
    count += a.lane[i] >= b.lane[i] ? 1 : 0;
  }
  return count;
}

inline void prefetch(const void*) {}
inline void prefetch_far(const void*) {}

}  // namespace powerinfer::plain
