// What the tests of the engine's core share: random numbers, files' rows and what they mean, computed apart from src.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gguf.h"
#include "half.h"
#include "kernels.h"

namespace powerinfer::testing {

struct Random {
  explicit Random(uint32_t seed) : engine(seed) {}
  std::mt19937 engine;

  int below(int n) { return static_cast<int>(engine() % static_cast<uint32_t>(n)); }
  float normal() { return std::normal_distribution<float>()(engine); }
  std::vector<float> normals(size_t n, float scale = 1.0f) {
    std::vector<float> values(n);
    for (float& value : values) value = scale * normal();
    return values;
  }
};

// The kernels of every instruction set that this CPU has, plain first.
inline std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> found;
  for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= detect_isa()) found.push_back(&kernels(isa));
  }
  return found;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Index of the first number whose bits differ (any NaN equals any other), or -1.
inline long first_difference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (bits_of(a[i]) != bits_of(b[i])) return static_cast<long>(i);
  }
  return -1;
}

inline double half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  return h & 0x8000 ? -magnitude : magnitude;
}

inline double half_value(const uint8_t* p) { return half_value(static_cast<uint16_t>(p[0] | p[1] << 8)); }

inline void put_half(uint8_t* p, float x) {
  const uint16_t bits = float_to_half(x);
  std::memcpy(p, &bits, sizeof bits);
}

// Rows of a tensor as a file holds them: every code possible, scales of either sign.
inline std::vector<uint8_t> random_rows(TensorType type, int rows, int columns, Random& random, float scale = 1.0f) {
  const BlockSize block = block_size(type);
  const size_t blocks = static_cast<size_t>(rows) * columns / block.elements;
  std::vector<uint8_t> bytes(blocks * block.bytes);
  for (size_t b = 0; b < blocks; ++b) {
    uint8_t* at = bytes.data() + b * block.bytes;
    const float value = scale * random.normal();
    if (type == TensorType::kF32) {
      std::memcpy(at, &value, sizeof value);
      continue;
    }
    for (uint32_t i = 0; i < block.bytes; ++i) at[i] = static_cast<uint8_t>(random.below(256));
    switch (type) {
      case TensorType::kF16:
        put_half(at, value);
        break;
      case TensorType::kQ4_1:
        put_half(at, value / 8);
        put_half(at + 2, scale * random.normal());
        break;
      case TensorType::kQ4_0:
        put_half(at, value / 5);
        break;
      case TensorType::kQ8_0:
        put_half(at, value / 75);
        break;
      default:
        put_half(at + 208, value / 1500);
        break;
    }
  }
  return bytes;
}

// The numbers that they stand for, [rows * columns].
inline std::vector<double> decode_rows(TensorType type, const std::vector<uint8_t>& bytes) {
  const BlockSize block = block_size(type);
  std::vector<double> values(bytes.size() / block.bytes * block.elements);
  for (size_t b = 0; b < bytes.size() / block.bytes; ++b) {
    const uint8_t* at = bytes.data() + b * block.bytes;
    double* out = values.data() + b * block.elements;
    switch (type) {
      case TensorType::kF32: {
        float value;
        std::memcpy(&value, at, sizeof value);
        out[0] = value;
        break;
      }
      case TensorType::kF16:
        out[0] = half_value(at);
        break;
      case TensorType::kQ4_0:
        for (int i = 0; i < 16; ++i) {
          out[i] = half_value(at) * ((at[2 + i] & 15) - 8);
          out[i + 16] = half_value(at) * ((at[2 + i] >> 4) - 8);
        }
        break;
      case TensorType::kQ4_1:
        for (int i = 0; i < 16; ++i) {
          out[i] = half_value(at) * (at[4 + i] & 15) + half_value(at + 2);
          out[i + 16] = half_value(at) * (at[4 + i] >> 4) + half_value(at + 2);
        }
        break;
      case TensorType::kQ8_0:
        for (int i = 0; i < 32; ++i) out[i] = half_value(at) * static_cast<int8_t>(at[2 + i]);
        break;
      default:  // Q6_K: 128 bytes of low nibbles, 64 of high pairs, 16 scales, fp16 scale
        for (int half = 0; half < 2; ++half) {
          for (int l = 0; l < 32; ++l) {
            const uint8_t a = at[64 * half + l], c = at[64 * half + 32 + l], high = at[128 + 32 * half + l];
            const int codes[4] = {(a & 15) | (high & 3) << 4, (c & 15) | (high >> 2 & 3) << 4, a >> 4 | (high >> 4 & 3) << 4,
                                  c >> 4 | (high >> 6) << 4};
            for (int quarter = 0; quarter < 4; ++quarter) {
              const auto sub = static_cast<int8_t>(at[192 + 8 * half + 2 * quarter + l / 16]);
              out[128 * half + 32 * quarter + l] = half_value(at + 208) * sub * (codes[quarter] - 32);
            }
          }
        }
        break;
    }
  }
  return values;
}

// A tensor of these bytes, which must outlive it.
inline GgufTensor tensor_of(TensorType type, const std::vector<uint8_t>& bytes, int rows, int columns) {
  return {"w", type, {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)}, bytes.data(), bytes.size()};
}

}  // namespace powerinfer::testing
