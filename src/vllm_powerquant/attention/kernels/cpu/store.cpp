// Store: rotate, quantize and pack new tokens into their pages, and copy them into their exact blocks.
//
// Sixteen vectors at a time, one to a lane. Compiled without contraction into fused multiply-adds: every operation is the
// one attention/reference.py names, in its order, so the bytes are equal to the reference's whatever the batch.
#include <algorithm>

#include "unpack.h"

namespace pq {

// Mirrors cpu_kernels._StoreArgs.
struct StoreArgs {
  const Format* format;
  Rows key, value;
  int32_t dtype;
  int32_t num_kv_heads;
  int64_t num_tokens;
  const int64_t* slots;           // [num_tokens], below 0: padding
  Pages cache;                    // packed pages, or data null: none; the token stride is not used
  const float* key_frame;        // [num_kv_heads, 3, head_size] (centre, scale, 1 / scale) or null
  const int64_t* exact_slots;     // [num_tokens] or null; block 0 is the null block and is not written
  Pages exact;                    // [.., block_size, 2 * head_size] of dtype: keys, then values
};

namespace {

Vec tree_sum(Vec* x, int n) {
  while (n % 2 == 0) {
    n /= 2;
    for (int i = 0; i < n; ++i) x[i] = x[i] + x[i + n];
  }
  Vec total = x[0];
  for (int i = 1; i < n; ++i) total = total + x[i];
  return total;
}

Vec splat(float x) { return Vec{} + x; }

// attention/trellis.py's encode: t [head_size] -> code and grid (n + 1/2), [head_size]. Sums are multiples of 4 with the
// symbol before in the last two bits, and below 2^24, so floats hold them exactly and the first of equal sums is the least.
void encode_trellis(const Vec* t, int head_size, int ring, IntVec* code, Vec* grid) {
  constexpr float kLimit = 16.0f, kUnit = 8.0f, kFar = 0x1p23f, kRound = 0x1.8p23f;
  int level[4][4];
  for (int symbol = 0; symbol < 4; ++symbol)
    for (int before = 0; before < 4; ++before) level[symbol][before] = trellis_level(symbol, before);
  for (int first = 0; first < head_size; first += ring) {
    Vec least[4][4];
    for (int start = 0; start < 4; ++start)
      for (int symbol = 0; symbol < 4; ++symbol) least[start][symbol] = splat(symbol == start ? 0.0f : kFar);
    UnsignedVec choices[16];  // of each start and symbol, the symbol before: 2 bits
    for (int i = 0; i < ring; ++i) {
      Vec x = t[first + i];
      x = x > splat(-kLimit) ? x : splat(-kLimit);
      x = x < splat(kLimit) ? x : splat(kLimit);
      x = x * splat(kUnit) + splat(kRound) - splat(kRound);
      Vec error[16];
      for (int n = 0; n < 16; ++n) {
        const float l = kUnit * (static_cast<float>(n) - 7.5f);
        error[n] = splat(4.0f * l * l) - splat(8.0f * l) * x;
      }
      UnsignedVec chosen = {};
      for (int start = 0; start < 4; ++start) {
        Vec next[4];
        for (int symbol = 0; symbol < 4; ++symbol) {
          Vec best = least[start][0] + error[level[symbol][0]];
          for (int before = 1; before < 4; ++before) {
            const Vec sum = least[start][before] + splat(static_cast<float>(before)) + error[level[symbol][before]];
            best = sum < best ? sum : best;
          }
          const IntVec tag = __builtin_convertvector(best, IntVec) & 3;
          chosen |= reinterpret_cast<UnsignedVec>(tag) << (8 * start + 2 * symbol);
          next[symbol] = best - __builtin_convertvector(tag, Vec);
        }
        for (int symbol = 0; symbol < 4; ++symbol) least[start][symbol] = next[symbol];
      }
      choices[i] = chosen;
    }
    Vec best = least[0][0];
    IntVec start = {};
    for (int s = 1; s < 4; ++s) {
      const IntVec better = least[s][s] < best;
      best = better ? least[s][s] : best;
      start = better ? IntVec{} + s : start;
    }
    IntVec now = start;
    for (int i = ring - 1; i >= 0; --i) {
      code[first + i] = now;
      now = reinterpret_cast<IntVec>(choices[i] >> reinterpret_cast<UnsignedVec>(8 * start + 2 * now) & 3u);
    }
    for (int i = 0; i < ring; ++i) {
      const IntVec before = code[first + (i + ring - 1) % ring];
      const IntVec a = code[first + i] ^ before >> 1;
      grid[first + i] = __builtin_convertvector(a + 4 * (a ^ 3 * (before & 1)), Vec) - splat(7.5f);
    }
  }
}

// h [head_size] vectors of 16 lanes -> idx [16][head_size], scale [16] (see reference.quantize)
void quantize(Vec* h, int head_size, int bits, int ring, const int8_t* levels, float step, float scale_factor, uint8_t* idx,
              _Float16* scale) {
  Vec terms[kMaxHeadSize], grids[kMaxHeadSize];
  IntVec codes[kMaxHeadSize];
  for (int i = 0; i < head_size; ++i) terms[i] = h[i] * h[i];
  const Vec energy = tree_sum(terms, head_size);
  const Vec mean = energy / static_cast<float>(head_size);
  Vec inverse;
  for (int lane = 0; lane < kLanes; ++lane)
    inverse[lane] = energy[lane] > 0 ? 1.0f / (std::sqrt(mean[lane]) * step) : 0.0f;
  const int n = 1 << bits;
  if (ring) {
    for (int i = 0; i < head_size; ++i) terms[i] = h[i] * inverse;
    encode_trellis(terms, head_size, ring, codes, grids);
  }
  for (int i = 0; i < head_size; ++i) {
    const Vec t = h[i] * inverse;
    IntVec code = {};
    Vec grid;
    if (ring) {
      code = codes[i];
      grid = grids[i];
    } else if (bits == 8) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float level = std::floor(t[lane]);
        code[lane] = level >= -128.0f ? static_cast<int>(std::min(level, 127.0f)) + 128 : 0;
        grid[lane] = static_cast<float>(levels[code[lane]]) + 0.5f;
      }
    } else {
      grid = splat(static_cast<float>(levels[0]) + 0.5f);
      for (int j = 1; j < n; ++j) {
        const float boundary = (static_cast<float>(levels[j]) + static_cast<float>(levels[j - 1]) + 1.0f) * 0.5f;
        const IntVec above = t >= splat(boundary);
        code -= above;
        grid = above ? splat(static_cast<float>(levels[j]) + 0.5f) : grid;
      }
    }
    terms[i] = h[i] * grid;
    for (int lane = 0; lane < kLanes; ++lane) idx[lane * head_size + i] = static_cast<uint8_t>(code[lane]);
  }
  const Vec dot = tree_sum(terms, head_size);
  for (int lane = 0; lane < kLanes; ++lane) {
    float s = energy[lane] > 0 ? energy[lane] / dot[lane] * scale_factor : 0.0f;
    s = std::min(std::max(s, 0x1p-24f), 65504.0f);
    scale[lane] = static_cast<_Float16>(std::isfinite(energy[lane]) ? s : NAN);
  }
}

void pack_key(const Format& f, const uint8_t* idx, uint8_t* sub_page, int token) {
  const int d = f.head_size;
  if (f.key_bits == 4) {
    uint8_t* out = sub_page + f.key_plane[0] + token * (d / 2);
    auto magnitude = [](int c) { return c < 8 ? 7 - c : c - 8; };
    auto negative = [](int c) { return c < 8 ? 1 : 0; };
    for (int word = 0; word < d / 8; ++word) {
      const uint8_t *a = idx + 4 * word, *z = a + d / 2;
      for (int i = 0; i < 4; ++i) {
        const uint8_t* pair = i < 2 ? a + 2 * i : z + 2 * (i - 2);
        out[4 * word + i] = static_cast<uint8_t>(magnitude(pair[0]) | magnitude(pair[1]) << 4 | negative(a[i]) << 7 |
                                                 negative(z[i]) << 3);
      }
    }
  } else if (f.key_bits == 8) {
    uint8_t* out = sub_page + f.key_plane[0] + token * d;
    for (int i = 0; i < d; ++i) out[i] = idx[i] ^ 0x80;
  } else {
    const int width = d / 4;
    uint8_t* out = sub_page + f.key_plane[0] + token * width;
    for (int k = 0; k < width; ++k) {
      int byte = 0;
      for (int field = 0; field < 4; ++field) byte |= (idx[field * width + k] & 3) << 2 * field;
      out[k] = static_cast<uint8_t>(byte);
    }
    if (f.key_bits == 3) {
      uint8_t* high = sub_page + f.key_plane[1] + token * (d / 8);
      for (int k = 0; k < d / 8; ++k) {
        int byte = 0;
        for (int field = 0; field < 8; ++field) byte |= (idx[field * (d / 8) + k] >> 2) << field;
        high[k] = static_cast<uint8_t>(byte);
      }
    }
  }
}

void pack_value(const Format& f, const uint8_t* idx, uint8_t* sub_page, int position) {
  const int d = f.head_size;
  uint8_t* out = sub_page + f.value_plane[0] + position;
  if (f.value_bits == 8) {
    for (int i = 0; i < d; ++i) out[i * kTokens] = idx[i] ^ 0x80;
  } else if (f.value_bits == 4) {
    for (int k = 0; k < d / 2; ++k) out[k * kTokens] = static_cast<uint8_t>(idx[k] | idx[d / 2 + k] << 4);
  } else {
    const int width = d / 4, flip = f.value_bits == 2 && !f.value_ring ? 0x80 : 0;
    for (int k = 0; k < width; ++k) {
      int byte = flip;
      for (int field = 0; field < 4; ++field) byte ^= (idx[field * width + k] & 3) << 2 * field;
      out[k * kTokens] = static_cast<uint8_t>(byte);
    }
    if (f.value_bits == 3) {
      uint8_t* high = sub_page + f.value_plane[1] + position;
      for (int k = 0; k < d / 8; ++k) {
        int byte = 0;
        for (int field = 0; field < 8; ++field) byte |= (idx[field * (d / 8) + k] >> 2) << field;
        high[k * kTokens] = static_cast<uint8_t>(byte);
      }
    }
  }
}

const char* row(const Rows& rows, int64_t token, int64_t head, int64_t bytes) {
  return static_cast<const char*>(rows.data) + (token * rows.token_stride + head * rows.head_stride) * bytes;
}

// Sixteen (token, head) vectors starting at `first`, of keys or of values.
void store_batch(const StoreArgs& a, int64_t first, int64_t count, bool is_key) {
  const Format& f = *a.format;
  const int d = f.head_size;
  const int64_t bytes = element_bytes(a.dtype);
  alignas(64) Vec h[kMaxHeadSize], scratch[kMaxHeadSize];
  alignas(64) uint8_t idx[kLanes * kMaxHeadSize];
  _Float16 scale[kLanes];
  float x[kMaxHeadSize];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t vector = std::min(first + lane, first + count - 1);
    const int64_t token = vector / a.num_kv_heads, head = vector % a.num_kv_heads;
    load_floats(row(is_key ? a.key : a.value, token, head, bytes), a.dtype, d, x);
    if (is_key && a.key_frame) {
      const float* frame = a.key_frame + head * 3 * d;
      for (int i = 0; i < d; ++i) x[i] = (x[i] - frame[i]) * frame[d + i];
    }
    for (int i = 0; i < d; ++i) h[i][lane] = x[i] * f.signs[i];
  }
  hadamard(h, scratch, d, f.outer_order, f.outer, false);
  if (is_key)
    quantize(h, d, f.key_bits, 0, f.key_levels, f.key_step, f.key_scale_factor, idx, scale);
  else
    quantize(h, d, f.value_bits, f.value_ring, f.value_levels, f.value_step, f.value_scale_factor, idx, scale);
  for (int lane = 0; lane < count; ++lane) {
    const int64_t token = (first + lane) / a.num_kv_heads, head = (first + lane) % a.num_kv_heads;
    const int64_t slot = a.slots[token];
    if (slot < 0) continue;
    const int64_t in_block = slot % a.cache.block_size;
    uint8_t* sub_page = a.cache.data + slot / a.cache.block_size * a.cache.block_stride + head * a.cache.head_stride +
                        in_block / kTokens * f.sub_page_bytes;
    const int in_sub_page = static_cast<int>(in_block % kTokens), position = position_of(in_sub_page);
    if (is_key)
      pack_key(f, idx + lane * d, sub_page, in_sub_page);
    else
      pack_value(f, idx + lane * d, sub_page, position);
    std::memcpy(sub_page + (is_key ? f.key_scale : f.value_scale) + 2 * position, &scale[lane], 2);
  }
}

void store_exact(const StoreArgs& a, int64_t token) {
  const int64_t slot = a.exact_slots[token];
  if (slot < a.exact.block_size) return;
  const size_t bytes = static_cast<size_t>(a.format->head_size * element_bytes(a.dtype));
  for (int64_t head = 0; head < a.num_kv_heads; ++head) {
    uint8_t* out = a.exact.data + slot / a.exact.block_size * a.exact.block_stride + head * a.exact.head_stride +
                   slot % a.exact.block_size * a.exact.token_stride;
    std::memcpy(out, row(a.key, token, head, element_bytes(a.dtype)), bytes);
    std::memcpy(out + bytes, row(a.value, token, head, element_bytes(a.dtype)), bytes);
  }
}

}  // namespace
}  // namespace pq

// Two tokens never share a byte, so batches may run in any order on any threads.
extern "C" void pq_store(const pq::StoreArgs* args) {
  const pq::StoreArgs& a = *args;
  const int64_t vectors = a.num_tokens * a.num_kv_heads;
  const int64_t batches = (vectors + pq::kLanes - 1) / pq::kLanes;
#pragma omp parallel for schedule(static) if (batches > 1)
  for (int64_t job = 0; job < (a.cache.data ? 2 * batches : 0); ++job) {
    const int64_t first = job / 2 * pq::kLanes;
    pq::store_batch(a, first, std::min<int64_t>(pq::kLanes, vectors - first), job % 2 == 0);
  }
  if (a.exact_slots)
    for (int64_t token = 0; token < a.num_tokens; ++token) pq::store_exact(a, token);
}
