// Kernels of the packed cache in terms of packed_lanes.h, for the instruction set that the including file is compiled for.
// Every operation is written in the order in which it is to happen; compile without contraction into fused multiply-adds.
#pragma once

#include "packed_lanes.h"

namespace powerinfer {
namespace {

constexpr int kRows = 16;           // rows (positions x query heads) that attend takes at once
constexpr float kFixed = 32512.0f;  // 127 * 256: the high byte of a fixed-point number stays within int8
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMasked = -1e30f;
constexpr float kLargest = 3.40282347e38f;

// 2^x for x <= 0: 2e-7 relative; the polynomial is the Taylor series of 2^f on [-1/2, 1/2]. NaN, and -126 and below, give
// 2^-126.
POWERINFER_INLINE Floats exp2_nonpositive(const Floats& exponent) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Floats x = maximum(exponent, splat(-126.0f)), rounded = x + kRound, f = x - (rounded - kRound);
  Floats p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const Ints power = (bits_of(rounded) - 0x4b400000 + 127) << 23;
  return p * of_bits(power);
}

// ---- rotation and packing ----

// One stage of butterflies within a vector: lanes i and i + stride become a + b and a - b.
template <int stride>
POWERINFER_INLINE Floats butterflies(const Floats& x) {
  const Ints minus = (lane_index() & stride) << (31 - __builtin_ctz(stride));
  return exchange<stride>(x) + of_bits(bits_of(x) ^ minus);
}

// H x or H^T x in place, unnormalized.
void hadamard(const PackedLayout& layout, float* x, bool transpose) {
  const PackedTables& tables = *layout.tables;
  const int d = layout.head_size, inner = tables.inner;
  for (int i = 0; i < d; i += kLanes) {
    Floats v = butterflies<2>(butterflies<1>(load(x + i)));
    if (inner >= 8) v = butterflies<4>(v);
    if (inner >= 16) v = butterflies<8>(v);
    save(x + i, v);
  }
  for (int stride = 16; stride < inner; stride *= 2)
    for (int start = 0; start < d; start += 2 * stride)
      for (int i = start; i < start + stride; i += kLanes) {
        const Floats a = load(x + i), b = load(x + i + stride);
        save(x + i, a + b);
        save(x + i + stride, a - b);
      }
  if (tables.order == 1) return;
  // each block of `inner` channels, repeated to fill a vector (inner is 4, 8 or 16)
  alignas(64) float blocks[28 * kLanes], out[kMaxPackedHead];
  for (int j = 0; j < tables.order; ++j)
    for (int i = 0; i < kLanes; ++i) blocks[j * kLanes + i] = x[j * inner + i % inner];
  const float* signs = transpose ? tables.outer_transposed : tables.outer;
  for (int i = 0; i < d; i += kLanes) {
    Floats total = load(signs + i) * load(blocks);
    for (int j = 1; j < tables.order; ++j) total = total + load(signs + j * d + i) * load(blocks + j * kLanes);
    save(out + i, total);
  }
  std::memcpy(x, out, static_cast<size_t>(d) * sizeof(float));
}

void hadamard_of_signed(const PackedLayout& layout, const float* x, float* h) {
  for (int i = 0; i < layout.head_size; i += kLanes) save(h + i, load(x + i) * load(layout.tables->signs + i));
  hadamard(layout, h, false);
}

void rotate(const PackedLayout& layout, const float* x, float* y) {
  hadamard_of_signed(layout, x, y);
  for (int i = 0; i < layout.head_size; i += kLanes) save(y + i, load(y + i) * layout.tables->orthonormal);
}

void unrotate(const PackedLayout& layout, const float* x, float* y) {
  if (y != x) std::memcpy(y, x, static_cast<size_t>(layout.head_size) * sizeof(float));
  hadamard(layout, y, true);
  for (int i = 0; i < layout.head_size; i += kLanes)
    save(y + i, load(y + i) * load(layout.tables->signs + i) * layout.tables->orthonormal);
}

// Halves are added while the length is even, the rest from left to right. Overwrites x.
float tree_sum(float* x, int n) {
  while (n % 2 == 0) {
    n /= 2;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) save(x + i, load(x + i) + load(x + n + i));
    for (; i < n; ++i) x[i] = x[i] + x[n + i];
  }
  float total = x[0];
  for (int i = 1; i < n; ++i) total = total + x[i];
  return total;
}

// Codes of x [head_size], and its scale as fp16 bits: |h|^2 / <h, level + 1/2> / (step * sqrt(head_size)), NaN where x is
// not finite.
template <int codes>
uint16_t quantize(const PackedLayout& layout, const float* x, const float* boundaries, const float* grid, float step,
                  float factor, int32_t* code) {
  const int d = layout.head_size;
  alignas(64) float h[kMaxPackedHead], terms[kMaxPackedHead];
  hadamard_of_signed(layout, x, h);
  for (int i = 0; i < d; i += kLanes) save(terms + i, load(h + i) * load(h + i));
  const float energy = tree_sum(terms, d);
  const float rms = __builtin_sqrtf(energy / static_cast<float>(d));
  const float inverse = energy > 0 ? 1.0f / (rms * step) : 0.0f;
  for (int i = 0; i < d; i += kLanes) {
    const Floats t = load(h + i) * inverse;
    Ints c = {};
    Floats level = splat(grid[0]);
    for (int j = 0; j + 1 < codes; ++j) {
      const Ints above = t >= boundaries[j];
      c -= above;
      level = select(above, splat(grid[j + 1]), level);
    }
    save(code + i, c);
    save(terms + i, load(h + i) * level);
  }
  const float dot = tree_sum(terms, d);
  float scale = energy > 0 ? energy / dot * factor : 0.0f;
  // comparisons that leave a NaN as it is
  if (scale < 0x1p-24f) scale = 0x1p-24f;
  if (scale > 65504.0f) scale = 65504.0f;
  if (!(absolute(splat(energy))[0] <= kLargest)) return 0x7e00;
  uint16_t half[kLanes];
  save_half(half, splat(scale));
  return half[0];
}

void pack_token(const PackedLayout& layout, const float* key, const float* value, uint8_t* sub_page, int token) {
  const PackedTables& t = *layout.tables;
  const int d = layout.head_size, position = 16 * (token >> 1 & 3) + 2 * (token >> 3) + (token & 1);
  alignas(64) int32_t code[kMaxPackedHead];

  const uint16_t key_scale = quantize<16>(layout, key, t.key_boundaries, t.key_grid, t.key_step, t.key_factor, code);
  uint8_t* out = sub_page + token * (d / 2);
  for (int word = 0; word < d / 8; ++word) {
    const int32_t *a = code + 4 * word, *z = a + d / 2;
    for (int i = 0; i < 4; ++i) {
      const int32_t* pair = i < 2 ? a + 2 * i : z + 2 * (i - 2);
      auto magnitude = [](int32_t c) { return c < 8 ? 7 - c : c - 8; };
      out[4 * word + i] =
          static_cast<uint8_t>(magnitude(pair[0]) | magnitude(pair[1]) << 4 | (a[i] < 8 ? 0x80 : 0) | (z[i] < 8 ? 8 : 0));
    }
  }
  std::memcpy(sub_page + layout.key_scale_offset + 2 * position, &key_scale, 2);

  const uint16_t value_scale =
      quantize<4>(layout, value, t.value_boundaries, t.value_grid, t.value_step, t.value_factor, code);
  const int width = d / 4;
  for (int k = 0; k < width; ++k) {
    const int32_t byte = code[k] | code[width + k] << 2 | code[2 * width + k] << 4 | code[3 * width + k] << 6;
    sub_page[layout.value_offset + k * kTokens + position] = static_cast<uint8_t>(byte ^ 0x80);
  }
  std::memcpy(sub_page + layout.value_scale_offset + 2 * position, &value_scale, 2);
}

// ---- packed tiles ----

// A query in fixed point: the first and the second words of all groups of a tile's keys.
struct FixedQuery {
  alignas(64) int32_t words[2][kMaxPackedHead / 4];
  int32_t sum;  // of the fixed-point numbers
  float unit;   // score of 1/2 of a unit of the fixed point, a level and a scale of 1
  bool finite;
};

void fix_query(const PackedLayout& layout, const float* rotated, float scale, FixedQuery& query) {
  const int d = layout.head_size;
  Floats top = {};
  Ints bad = {};
  for (int i = 0; i < d; i += kLanes) {
    const Floats x = absolute(load(rotated + i));
    top = maximum(x, top);
    bad |= ~(x <= kLargest);
  }
  query.finite = !any(bad);
  float largest = largest_of(top);
  largest = query.finite && largest > 1e-30f ? largest : 1e-30f;
  const float inverse = kFixed / largest;
  constexpr float kRound = 12582912.0f;
  alignas(64) int32_t n[kMaxPackedHead];
  Ints sum = {};
  for (int i = 0; i < d; i += kLanes) {
    const Floats x = query.finite ? load(rotated + i) * inverse + kRound : splat(kRound);
    const Ints rounded = bits_of(x) - 0x4b400000;
    sum += rounded;
    save(n + i, rounded);
  }
  query.sum = sum_of(sum);
  query.unit = largest / kFixed * layout.tables->key_step * 0.5f * scale;
  for (int group = 0; group < d / 4; group += 4) {
    int32_t in_order[kLanes];
    for (int i = 0; i < kLanes; ++i) in_order[i] = n[key_channel(d, group + i / 4, i % 4)];
    fix(in_order, query.words[0] + group, query.words[1] + group);
  }
}

// Scores of N queries by position. Sums are integers; level + 1/2 and the bias come in at their end.
template <int N>
void score_rows(const PackedLayout& layout, const Tile& tile, const FixedQuery* queries, const float* key_scales,
                float* scores) {
  const int groups = layout.head_size / 4;
  constexpr int kBlocks = (kSums + 1) / 2;
  for (int block = 0; block < 4; block += kBlocks) {
    Sum sums[N][kBlocks];
    for (int group = 0; group < groups; ++group) {
      Quads quads[kBlocks];
      for (int k = 0; k < kBlocks; ++k) quads[k] = quads_of_keys(tile.keys + (group * kTokens + 16 * (block + k)) * 4);
      for (int r = 0; r < N; ++r)
        for (int k = 0; k < kBlocks; ++k) sums[r][k].add(quads[k], queries[r].words[0][group], queries[r].words[1][group]);
    }
    for (int r = 0; r < N; ++r)
      for (int k = 0; k < kBlocks; ++k) {
        const Ints twice = (sums[r][k].total() - kKeyBias * queries[r].sum) * 2 + queries[r].sum;
        save(scores + r * kTokens + 16 * (block + k),
             to_float(twice) * queries[r].unit * load(key_scales + 16 * (block + k)));
      }
  }
}

// Weights of 64 positions in fixed point: the first and the second words of all fours.
struct FixedWeights {
  int32_t words[2][kTokens / 4];
  int32_t sum;
  float unit;  // output of 1/2 of a unit of the fixed point and a level
};

// weights [64] by position, finite and not negative
void fix_weights(const PackedLayout& layout, const float* weights, FixedWeights& fixed) {
  Floats top = {};
  for (int i = 0; i < kTokens; i += kLanes) top = maximum(load(weights + i), top);
  const float largest = largest_of(top);
  // an inverse that is infinite would make NaN of a zero weight
  const float inverse = largest > 1e-30f ? kFixed / largest : 0.0f;
  int32_t n[kTokens];
  Ints sum = {};
  for (int i = 0; i < kTokens; i += kLanes) {
    // adding 2^23 rounds to an integer, kept in the low bits
    const Ints rounded = bits_of(load(weights + i) * inverse + 8388608.0f) & 0xffff;
    sum += rounded;
    save(n + i, rounded);
  }
  fixed.sum = sum_of(sum);
  fixed.unit = largest / kFixed * layout.tables->value_step * 0.5f;
  for (int i = 0; i < kTokens / 4; i += 4) fix(n + 4 * i, fixed.words[0] + i, fixed.words[1] + i);
}

// rotated_out [N, head_size] += weights times values.
template <int N>
void add_values(const PackedLayout& layout, const Tile& tile, const FixedWeights* weights, float* rotated_out) {
  const int d = layout.head_size, width = d / 4;
  for (int first = 0; first < width; first += kLanes) {
    // the last vector of a width that is not a multiple of 16 overlaps the one before it
    const int channel = smaller(first, width - kLanes), fresh = first - channel;
    for (int start = 0; start < 4; start += kSums) {
      Sum sums[N][kSums];
      for (int i = 0; i < kTokens / 4; ++i) {
        const ValueBytes bytes(tile.values + (i * width + channel) * 4);
        Quads quads[kSums];
        for (int k = 0; k < kSums; ++k) quads[k] = bytes.field(3 << 2 * (start + k));
        for (int r = 0; r < N; ++r)
          for (int k = 0; k < kSums; ++k) sums[r][k].add(quads[k], weights[r].words[0][i], weights[r].words[1][i]);
      }
      for (int r = 0; r < N; ++r)
        for (int k = 0; k < kSums; ++k) {
          // code - 2 + 1/2, twice
          const int field = start + k;
          const Ints twice = (sums[r][k].total() >> 2 * field) * 2 - 3 * weights[r].sum;
          const Floats added = to_float(twice) * weights[r].unit;
          float* out = rotated_out + r * d + field * width + channel;
          const Floats before = load(out);
          save(out, select(lane_index() >= fresh, before + added, before));
        }
    }
  }
}

// Calls one of three functions for rows in threes, and for what remains.
template <typename Three, typename Two, typename One>
inline void for_rows(int first, int rows, Three three, Two two, One one) {
  for (; first + 3 <= rows; first += 3) three(first);
  if (rows - first == 2) two(first);
  if (rows - first == 1) one(first);
}

void score_tile(const PackedLayout& layout, const Tile& tile, const FixedQuery* queries, int first, int rows,
                const float* key_scales, float* scores) {
  auto run = [&](auto score, int row) { score(layout, tile, queries + row, key_scales, scores + row * kTokens); };
  for_rows(
      first, rows, [&](int row) { run(score_rows<3>, row); }, [&](int row) { run(score_rows<2>, row); },
      [&](int row) { run(score_rows<1>, row); });
}

void add_tile(const PackedLayout& layout, const Tile& tile, const FixedWeights* weights, int first, int rows, float* out) {
  auto run = [&](auto add, int row) { add(layout, tile, weights + row, out + row * layout.head_size); };
  for_rows(
      first, rows, [&](int row) { run(add_values<3>, row); }, [&](int row) { run(add_values<2>, row); },
      [&](int row) { run(add_values<1>, row); });
}

// fp16 scales [64] of a sub-page as floats, by position.
void load_scales(const uint8_t* at, float* scales) {
  uint16_t half[kTokens];
  std::memcpy(half, at, sizeof half);
  for (int i = 0; i < kTokens; i += kLanes) save(scales + i, load_half(half + i));
}

void scores(const PackedLayout& layout, const uint8_t* sub_page, int tokens, const float* rotated_queries, int num_queries,
            float scale, float* scores) {
  Tile tile;
  FixedQuery query;
  alignas(64) float key_scales[kTokens], by_position[kTokens];
  load_scales(sub_page + layout.key_scale_offset, key_scales);
  unpack_keys(layout, sub_page, tile);
  for (int r = 0; r < num_queries; ++r) {
    fix_query(layout, rotated_queries + r * layout.head_size, scale, query);
    score_rows<1>(layout, tile, &query, key_scales, by_position);
    for (int i = 0; i < kTokens; ++i)
      if (token_of(i) < tokens) scores[r * kTokens + token_of(i)] = query.finite ? by_position[i] : __builtin_nanf("");
  }
}

void accumulate(const PackedLayout& layout, const uint8_t* sub_page, int tokens, const float* probabilities, int num_queries,
                float* rotated_out) {
  Tile tile;
  FixedWeights fixed;
  alignas(64) float value_scales[kTokens], weights[kTokens];
  load_scales(sub_page + layout.value_scale_offset, value_scales);
  unpack_values(layout, sub_page, tile);
  for (int r = 0; r < num_queries; ++r) {
    bool finite = true;
    for (int i = 0; i < kTokens; ++i) {
      weights[i] = token_of(i) < tokens ? probabilities[r * kTokens + token_of(i)] * value_scales[i] : 0.0f;
      finite &= weights[i] <= kLargest;
    }
    float* out = rotated_out + r * layout.head_size;
    if (finite) {
      fix_weights(layout, weights, fixed);
      add_values<1>(layout, tile, &fixed, out);
    } else {
      for (int i = 0; i < layout.head_size; ++i) out[i] = __builtin_nanf("");
    }
  }
}

// ---- attention ----

// A block of rows: consecutive positions x query heads, in this order.
struct Block {
  const PackedLayout* layout;
  int rows, heads;  // heads of a position
  int first_position;

  Tile tile;
  alignas(64) float exact[kTokens * kMaxPackedHead];  // keys of an exact tile, then its values
  alignas(64) float query[kRows * kMaxPackedHead];    // times scale * log2(e)
  FixedQuery fixed_query[kRows];
  FixedWeights weights[kRows];
  alignas(64) float scores[kRows * kTokens];
  alignas(64) float packed_out[kRows * kMaxPackedHead];  // rotated
  alignas(64) float exact_out[kRows * kMaxPackedHead];
  float maximum[kRows], sum[kRows];
  bool bad[kRows];  // the result is NaN

  int position(int row) const { return first_position + row / heads; }
  // The first token that the query at a position reads from the ring; older ones are packed or among the first.
  static int window_start(int position) { return larger(PackedRegion::kSinks, position - PackedRegion::kWindow + 1); }
};

// Turns the scores of 64 tokens that `seen` allows into weights 2^(score - maximum) in place, others into 0, and brings what
// the row has gathered so far to the new maximum.
void weigh(Block& b, int row, const Ints* seen) {
  float* scores = b.scores + row * kTokens;
  const int d = b.layout->head_size;
  Floats x[4], top = splat(b.maximum[row]);
  Ints bad = {};
  for (int k = 0; k < 4; ++k) {
    const Floats score = load(scores + 16 * k);
    bad |= seen[k] & ~(score <= kLargest);
    x[k] = select(seen[k], score, splat(kMasked));
    top = maximum(x[k], top);
  }
  b.bad[row] |= any(bad);
  const float now = largest_of(top);
  const float rescale = now > b.maximum[row] ? exp2_nonpositive(splat(b.maximum[row] - now))[0] : 1.0f;
  Floats sum = {};
  for (int k = 0; k < 4; ++k) {
    const Floats p = select(seen[k], exp2_nonpositive(x[k] - now), Floats{});
    sum += p;
    save(scores + 16 * k, p);
  }
  if (rescale != 1.0f) {
    for (int i = row * d; i < (row + 1) * d; i += kLanes) {
      save(b.packed_out + i, load(b.packed_out + i) * rescale);
      save(b.exact_out + i, load(b.exact_out + i) * rescale);
    }
  }
  b.maximum[row] = now;
  b.sum[row] = b.sum[row] * rescale + sum_of(sum);
}

// Rows from `first` on read packed tokens of this sub-page, whose first token is `start`.
void packed_tile(Block& b, const uint8_t* sub_page, int start, int first) {
  const PackedLayout& layout = *b.layout;
  alignas(64) float key_scales[kTokens], value_scales[kTokens];
  load_scales(sub_page + layout.key_scale_offset, key_scales);
  load_scales(sub_page + layout.value_scale_offset, value_scales);
  Ints token[4];
  for (int k = 0; k < 4; ++k) token[k] = (lane_index() >> 1 << 3) + (lane_index() & 1) + (start + 2 * k);
  unpack_keys(layout, sub_page, b.tile);
  score_tile(layout, b.tile, b.fixed_query, first, b.rows, key_scales, b.scores);
  for (int row = first; row < b.rows; ++row) {
    const int end = Block::window_start(b.position(row));
    Ints seen[4], bad = {};
    for (int k = 0; k < 4; ++k) seen[k] = (token[k] >= PackedRegion::kSinks) & (token[k] < end);
    weigh(b, row, seen);
    float* weights = b.scores + row * kTokens;
    for (int k = 0; k < 4; ++k) {
      const Floats scale = load(value_scales + 16 * k);
      bad |= seen[k] & ~(scale <= kLargest);
      // places not written yet may hold anything
      save(weights + 16 * k, load(weights + 16 * k) * select(seen[k] & (scale <= kLargest), scale, Floats{}));
    }
    b.bad[row] |= any(bad);
    fix_weights(layout, weights, b.weights[row]);
  }
  unpack_values(layout, sub_page, b.tile);
  add_tile(layout, b.tile, b.weights, first, b.rows, b.packed_out);
}

POWERINFER_INLINE float dot(const float* a, const float* b, int d) {
  Floats sum = {};
  for (int i = 0; i < d; i += kLanes) sum += load(a + i) * load(b + i);
  return sum_of(sum);
}

// out [N * 16] += weights [from, to) times rows of values.
template <int N>
void add_exact(const float* weights, const float* values, int d, int from, int to, float* out) {
  Floats sums[N];
  for (int k = 0; k < N; ++k) sums[k] = load(out + kLanes * k);
  for (int token = from; token < to; ++token) {
    const Floats weight = splat(weights[token]);
    for (int k = 0; k < N; ++k) sums[k] += weight * load(values + token * d + kLanes * k);
  }
  for (int k = 0; k < N; ++k) save(out + kLanes * k, sums[k]);
}

// The first tokens and the window, where they lie among the 64 tokens from `start` on; rows before `first` see none of them.
void exact_tile(Block& b, const PackedRegion& place, uint8_t* region, int start, int first) {
  const int d = b.layout->head_size, last = b.position(b.rows - 1);
  const int sinks = start == 0 ? PackedRegion::kSinks : 0;
  const int window = larger(Block::window_start(b.first_position) - start, sinks);
  const int end = smaller(kTokens, last + 1 - start);
  auto load_rows = [&](int half) {
    for (int token = 0; token < end; ++token) {
      if (token >= sinks && token < window) continue;
      const uint16_t* from = (token < sinks ? place.sink(region, token) : place.recent(region, start + token)) + half * d;
      for (int i = 0; i < d; i += kLanes) save(b.exact + token * d + i, load_half(from + i));
    }
  };
  load_rows(0);
  for (int row = first; row < b.rows; ++row) {
    const int position = b.position(row), row_window = larger(Block::window_start(position) - start, sinks);
    const int row_sinks = smaller(sinks, position + 1 - start), row_end = smaller(kTokens, position + 1 - start);
    float* scores = b.scores + row * kTokens;
    for (int token = 0; token < kTokens; ++token) scores[token] = 0.0f;
    for (int token = 0; token < row_sinks; ++token) scores[token] = dot(b.query + row * d, b.exact + token * d, d);
    for (int token = row_window; token < row_end; ++token) scores[token] = dot(b.query + row * d, b.exact + token * d, d);
    Ints seen[4];
    for (int k = 0; k < 4; ++k) {
      const Ints token = lane_index() + 16 * k;
      seen[k] = (token < row_sinks) | ((token >= row_window) & (token < row_end));
    }
    weigh(b, row, seen);
  }
  load_rows(1);
  for (int row = first; row < b.rows; ++row) {
    const int position = b.position(row), row_window = larger(Block::window_start(position) - start, sinks);
    const int row_sinks = smaller(sinks, position + 1 - start), row_end = smaller(kTokens, position + 1 - start);
    const float* weights = b.scores + row * kTokens;
    auto add = [&](auto add_exact, int i, int from, int to) {
      add_exact(weights, b.exact + i, d, from, to, b.exact_out + row * d + i);
    };
    int i = 0;
    for (; i + 64 <= d; i += 64) {
      add(add_exact<4>, i, 0, row_sinks);
      add(add_exact<4>, i, row_window, row_end);
    }
    for (; i < d; i += 16) {
      add(add_exact<1>, i, 0, row_sinks);
      add(add_exact<1>, i, row_window, row_end);
    }
  }
}

// out: of row r at out + r / heads * stride + r % heads * head_size
void attend_block(const PackedRegion& place, uint8_t* region, Block& b, const float* queries, float* out, int64_t stride,
                  float scale) {
  const PackedLayout& layout = *b.layout;
  const int d = layout.head_size, last = b.position(b.rows - 1);
  const float unit = scale * kLog2E;
  alignas(64) float rotated[kMaxPackedHead];
  for (int row = 0; row < b.rows; ++row) {
    const float* q = queries + row / b.heads * stride + row % b.heads * d;
    rotate(layout, q, rotated);
    fix_query(layout, rotated, unit, b.fixed_query[row]);
    for (int i = 0; i < d; i += kLanes) {
      save(b.query + row * d + i, load(q + i) * unit);
      save(b.packed_out + row * d + i, Floats{});
      save(b.exact_out + row * d + i, Floats{});
    }
    b.maximum[row] = kMasked;
    b.sum[row] = 0.0f;
    b.bad[row] = !b.fixed_query[row].finite;
  }

  // rows that see tokens of a tile are the last ones
  const int packed_end = Block::window_start(last), exact_start = Block::window_start(b.first_position);
  if (packed_end > PackedRegion::kSinks) {
    for (int start = 0, first = 0; start < packed_end; start += kTokens) {
      while (Block::window_start(b.position(first)) <= start) ++first;
      const uint8_t* sub_page = place.sub_page(region, start / kTokens);
      // the next sub-page arrives while this one is computed
      if (start + kTokens < packed_end)
        for (int i = 0; i < layout.sub_page_bytes; i += 64) __builtin_prefetch(sub_page + layout.sub_page_bytes + i);
      packed_tile(b, sub_page, start, first);
    }
  }
  int first = 0;
  exact_tile(b, place, region, 0, first);
  for (int start = larger(kTokens, exact_start / kTokens * kTokens); start <= last; start += kTokens) {
    while (b.position(first) < start) ++first;
    exact_tile(b, place, region, start, first);
  }

  for (int row = 0; row < b.rows; ++row) {
    // no score above kMasked: all were minus infinity
    const bool bad = b.bad[row] || !(b.maximum[row] > kMasked);
    const float inverse = bad ? __builtin_nanf("") : 1.0f / b.sum[row];
    unrotate(layout, b.packed_out + row * d, rotated);
    float* to = out + row / b.heads * stride + row % b.heads * d;
    for (int i = 0; i < d; i += kLanes) save(to + i, (load(rotated + i) + load(b.exact_out + row * d + i)) * inverse);
  }
}

void attend(const PackedRegion& place, const uint8_t* region, int position, int positions, int group, const float* queries,
            float* out, int64_t stride, float scale) {
  Block b;
  b.layout = &place.layout;
  const int d = place.layout.head_size;
  // of a region only read here
  uint8_t* bytes = const_cast<uint8_t*>(region);
  int heads;
  for (int head = 0; head < group; head += heads) {
    heads = smaller(kRows, group - head);
    const int step = kRows / heads;
    for (int i = 0; i < positions; i += step) {
      b.first_position = position + i;
      b.heads = heads;
      b.rows = smaller(step, positions - i) * heads;
      const int64_t at = i * stride + head * d;
      attend_block(place, bytes, b, queries + at, out + at, stride, scale);
    }
  }
}

void store(const PackedRegion& place, uint8_t* region, int position, const float* key, const float* value) {
  const int d = place.layout.head_size;
  pack_token(place.layout, key, value, place.sub_page(region, position / kTokens), position % kTokens);
  auto copy = [&](uint16_t* to) {
    for (int i = 0; i < d; i += kLanes) {
      save_half(to + i, load(key + i));
      save_half(to + d + i, load(value + i));
    }
  };
  copy(position < PackedRegion::kSinks ? place.sink(region, position) : place.recent(region, position));
}

constexpr PackedKernels kKernels = {rotate, unrotate, pack_token, scores, accumulate, store, attend};

}  // namespace
}  // namespace powerinfer
