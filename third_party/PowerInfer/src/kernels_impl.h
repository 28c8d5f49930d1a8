// Bodies of the kernels, written once on the vectors of simd_*.h; included by kernels_*.cpp inside that level's namespace.

// Tiles live in registers only where the loops over them are unrolled.
#if defined(__clang__)
#define POWERINFER_UNROLL _Pragma("unroll")
#else
#define POWERINFER_UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

// Element types of rows: 16 elements from element i on, as floats.
struct Half {
  static constexpr int kBytes = 2;
  static Floats at(const uint8_t* row, int i) { return load_half(reinterpret_cast<const uint16_t*>(row) + i); }
  static Floats at(const uint8_t* row, int i, int n) { return load_half(reinterpret_cast<const uint16_t*>(row) + i, n); }
};
struct Single {
  static constexpr int kBytes = 4;
  static Floats at(const uint8_t* row, int i) { return load(reinterpret_cast<const float*>(row) + i); }
  static Floats at(const uint8_t* row, int i, int n) { return load(reinterpret_cast<const float*>(row) + i, n); }
};

const uint16_t* halves(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

void prefetch_range(const uint8_t* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) prefetch(p + i);
}

// How far ahead one stream is asked for. Reading fp16 rows of 2,048 bytes on an Intel Xeon (powerinfer-bench --row-bytes
// 2048) gives 17.7 GB/s a core with 2,048, 18.5 with 4,096, 19.0 with 8,192; Q4_0 codes came a little slower with more than
// 4,096.
constexpr size_t kBytesAhead = 4096;

// Products of rows with tokens: R rows x T tokens at a time, one vector of sums for each

// `Ahead` rows from `next` on, side by side, are asked for meanwhile.
template <typename Element, int R, int T, int Ahead>
inline void rows_tile(const uint8_t* const* rows, int k, const float* x, size_t x_stride, float* y, size_t y_stride,
                      const uint8_t* next = nullptr) {
  Floats acc[R][T];
  POWERINFER_UNROLL
  for (int r = 0; r < R; ++r) {
    POWERINFER_UNROLL
    for (int t = 0; t < T; ++t) acc[r][t] = zero();
  }
  const auto step = [&](int i) {
    Floats w[R];
    POWERINFER_UNROLL
    for (int r = 0; r < R; ++r) w[r] = Element::at(rows[r], i);
    POWERINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      const Floats xt = load(x + t * x_stride + i);
      POWERINFER_UNROLL
      for (int r = 0; r < R; ++r) acc[r][t] = fma(w[r], xt, acc[r][t]);
    }
  };
  constexpr int kLine = 64 / Element::kBytes;
  int i = 0;
  const size_t row_bytes = static_cast<size_t>(k) * Element::kBytes;
  for (; i + kLine <= k; i += kLine) {
    POWERINFER_UNROLL
    for (int r = 0; r < Ahead; ++r) prefetch_far(next + r * row_bytes + static_cast<size_t>(i) * Element::kBytes);
    POWERINFER_UNROLL
    for (int j = 0; j < kLine; j += 16) step(i + j);
  }
  for (; i + 16 <= k; i += 16) step(i);
  if (i < k) {
    POWERINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      const Floats xt = load(x + t * x_stride + i, k - i);
      POWERINFER_UNROLL
      for (int r = 0; r < R; ++r) acc[r][t] = fma(Element::at(rows[r], i, k - i), xt, acc[r][t]);
    }
  }
  POWERINFER_UNROLL
  for (int t = 0; t < T; ++t) {
    POWERINFER_UNROLL
    for (int r = 0; r < R; ++r) y[t * y_stride + r] = sum(acc[r][t]);
  }
}

constexpr int kQuad = 4;

// Products of up to four rows with x, while the lines of four other rows come: `ahead` may be null.
template <typename Element>
inline void quad(const uint8_t* const* rows, int count, const uint8_t* const* ahead, int ahead_count, int k, const float* x,
                 float* y) {
  const size_t bytes = static_cast<size_t>(k) * Element::kBytes;
  if (count < kQuad) {
    for (int r = 0; r < ahead_count; ++r) prefetch_range(ahead[r], bytes);
    for (int r = 0; r < count; ++r) rows_tile<Element, 1, 1, 0>(rows + r, k, x, 0, y + r, 0);
    return;
  }
  // one line of each row ahead for each line that is read
  constexpr int kLine = 64 / Element::kBytes;
  Floats acc[kQuad];
  POWERINFER_UNROLL
  for (int r = 0; r < kQuad; ++r) acc[r] = zero();
  int i = 0;
  for (; i + kLine <= k; i += kLine) {
    for (int r = 0; r < ahead_count; ++r) prefetch(ahead[r] + i * Element::kBytes);
    POWERINFER_UNROLL
    for (int j = 0; j < kLine; j += 16) {
      const Floats xt = load(x + i + j);
      POWERINFER_UNROLL
      for (int r = 0; r < kQuad; ++r) acc[r] = fma(Element::at(rows[r], i + j), xt, acc[r]);
    }
  }
  for (; i + 16 <= k; i += 16) {
    const Floats xt = load(x + i);
    POWERINFER_UNROLL
    for (int r = 0; r < kQuad; ++r) acc[r] = fma(Element::at(rows[r], i), xt, acc[r]);
  }
  if (i < k) {
    const Floats xt = load(x + i, k - i);
    POWERINFER_UNROLL
    for (int r = 0; r < kQuad; ++r) acc[r] = fma(Element::at(rows[r], i, k - i), xt, acc[r]);
  }
  POWERINFER_UNROLL
  for (int r = 0; r < kQuad; ++r) y[r] = sum(acc[r]);
}

template <typename Element, int R, int T, int Ahead>
inline void rows_block(const uint8_t* data, size_t row_bytes, int k, const float* x, size_t x_stride, float* y,
                       size_t y_stride, const uint8_t* next = nullptr) {
  const uint8_t* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = data + r * row_bytes;
  rows_tile<Element, R, T, Ahead>(rows, k, x, x_stride, y, y_stride, next);
}

// With one or two tokens a row at a time, as one stream: that is a fifth faster than four streams side by side. With more
// four rows at a time, with up to 6 tokens and then with `Rest`, for which they are in the cache: more sums than registers
// would be slow. Few tokens wait for memory, which is asked for ahead; the tiles of many find it in the cache.
template <typename Element, int T, int Rest, bool Few>
void rows_of_tokens(const uint8_t* data, size_t row_bytes, int rows, int k, const float* x, size_t x_stride, float* y,
                    size_t y_stride) {
  if constexpr (T <= 2) {
    for (int r = 0; r < rows; ++r) {
      const uint8_t* at = data + r * row_bytes;
      rows_block<Element, 1, T, 1>(at, row_bytes, k, x, x_stride, y + r, y_stride, at + kBytesAhead);
    }
  } else {
    const float* x_rest = x + T * x_stride;
    float* y_rest = y + T * y_stride;
    constexpr int kAhead = !Few ? 0 : Rest > 0 ? 2 : 4;
    int r = 0;
    for (; r + 4 <= rows; r += 4) {
      const uint8_t* at = data + r * row_bytes;
      const uint8_t* next = at + 4 * row_bytes;
      rows_block<Element, 4, T, kAhead>(at, row_bytes, k, x, x_stride, y + r, y_stride, next);
      if constexpr (Rest > 0)
        rows_block<Element, 4, Rest, kAhead>(at, row_bytes, k, x_rest, x_stride, y_rest + r, y_stride,
                                             next + kAhead * row_bytes);
    }
    for (; r < rows; ++r) {
      const uint8_t* at = data + r * row_bytes;
      rows_block<Element, 1, T, 0>(at, row_bytes, k, x, x_stride, y + r, y_stride);
      if constexpr (Rest > 0) rows_block<Element, 1, Rest, 0>(at, row_bytes, k, x_rest, x_stride, y_rest + r, y_stride);
    }
  }
}

template <typename Element>
void rows_kernel(const uint8_t* data, size_t row_bytes, int rows, int k, const float* x, size_t x_stride, int n, float* y,
                 size_t y_stride) {
  const auto tile = [&]<int T, int Rest, bool Few>(int t) {
    rows_of_tokens<Element, T, Rest, Few>(data, row_bytes, rows, k, x + t * x_stride, x_stride, y + t * y_stride, y_stride);
  };
  int t = 0;
  if (n > 8) {
    for (; t + 6 <= n; t += 6) tile.template operator()<6, 0, false>(t);
  }
  switch (n - t) {
    case 1:
      return tile.template operator()<1, 0, true>(t);
    case 2:
      return tile.template operator()<2, 0, true>(t);
    case 3:
      return tile.template operator()<3, 0, true>(t);
    case 4:
      return tile.template operator()<4, 0, true>(t);
    case 5:
      return tile.template operator()<5, 0, true>(t);
    case 6:
      return tile.template operator()<6, 0, true>(t);
    case 7:
      return tile.template operator()<4, 3, true>(t);
    case 8:
      return tile.template operator()<4, 4, true>(t);
    default:
      return;
  }
}

// Quantized activations

// Where x is no number its code is the smallest integer, and sums of such codes wrap.
int32_t minus_8_times(uint32_t sum) { return static_cast<int32_t>(0u - 8u * sum); }
Ints minus_32_times(int32_t sum) { return broadcast_int(static_cast<int32_t>(0u - 32u * static_cast<uint32_t>(sum))); }

void quantize(const float* x, const ActivationLayout& layout, uint8_t* activation) {
  auto* q = reinterpret_cast<int8_t*>(activation);
  auto* lanes = reinterpret_cast<int8_t*>(activation + layout.lanes);
  auto* scale = reinterpret_cast<float*>(activation + layout.scale);
  auto* sums = reinterpret_cast<int32_t*>(activation + layout.sums);
  auto* minus_8 = reinterpret_cast<int32_t*>(activation + layout.minus_8);
  std::memset(activation + layout.lanes, 0, layout.bytes - layout.lanes);
  for (int b = 0; b < layout.blocks; ++b) {
    const Floats first = load(x + b * kBlock), second = load(x + b * kBlock + 16);
    const float largest = max_lane(max(abs(first), abs(second)));
    scale[b] = largest / 127.0f;
    const Floats inverse = broadcast(largest > 0.0f ? 127.0f / largest : 0.0f);
    const Ints a = round(mul(first, inverse)), c = round(mul(second, inverse));
    store_int8(q + b * kBlock, a);
    store_int8(q + b * kBlock + 16, c);
    const int group = b / 16, lane = b % 16;
    sums[group * 32 + lane] = sum_ints(a);
    sums[group * 32 + 16 + lane] = sum_ints(c);
    minus_8[b] =
        minus_8_times(static_cast<uint32_t>(sums[group * 32 + lane]) + static_cast<uint32_t>(sums[group * 32 + 16 + lane]));
    POWERINFER_UNROLL
    for (int j = 0; j < 8; ++j) std::memcpy(lanes + group * 512 + j * 64 + lane * 4, q + b * kBlock + 4 * j, 4);
  }
}

// Where the parts of one token's activations are.
struct Activation {
  Activation(const ActivationLayout& layout, const uint8_t* at)
      : q(at),
        lanes(at + layout.lanes),
        scale(reinterpret_cast<const float*>(at + layout.scale)),
        sums(reinterpret_cast<const int32_t*>(at + layout.sums)),
        minus_8(reinterpret_cast<const int32_t*>(at + layout.minus_8)) {}
  const uint8_t* q;
  const uint8_t* lanes;
  const float* scale;
  const int32_t* sums;
  const int32_t* minus_8;

  int32_t half_sum(int block, int half) const { return sums[block / 16 * 32 + half * 16 + block % 16]; }
};

int32_t load_int32(const uint8_t* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Low and high nibbles of four planes: u[j] holds, of each lane, columns 4 j .. 4 j + 3.
inline void unpack_nibbles(const uint8_t* planes, Ints u[8]) {
  const Ints low = broadcast_int(0x0f0f0f0f);
  POWERINFER_UNROLL
  for (int p = 0; p < 4; ++p) {
    const Ints both = load_ints(planes + 64 * p);
    u[2 * p] = and_ints(both, low);
    u[2 * p + 1] = and_ints(shift_right<4>(both), low);
  }
}

}  // namespace

#include "packed_matrix_impl.h"

namespace {

// Q4_0 rows in lanes: one row, a vector lane for each of 16 blocks

template <int T>
inline void lanes_row(const uint8_t* row, const uint8_t* scales, const ActivationLayout& layout, const uint8_t* x, float* y,
                      size_t y_stride) {
  Floats totals[T];
  POWERINFER_UNROLL
  for (int t = 0; t < T; ++t) totals[t] = zero();
  const Ints low = broadcast_int(0x0f0f0f0f);
  for (int group = 0; group < layout.groups; ++group) {
    const int lanes = layout.blocks - 16 * group < 16 ? layout.blocks - 16 * group : 16;
    Ints u[8];
    Floats scale;
    if (lanes == 16) {
      unpack_nibbles(row, u);
      scale = load_half(halves(scales) + 16 * group);
    } else {
      POWERINFER_UNROLL
      for (int p = 0; p < 4; ++p) {
        const Ints both = load_ints(row + p * 4 * lanes, lanes);
        u[2 * p] = and_ints(both, low);
        u[2 * p + 1] = and_ints(shift_right<4>(both), low);
      }
      scale = load_half(halves(scales) + 16 * group, lanes);
    }
    row += 16 * lanes;
    POWERINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      const Activation token(layout, x + t * layout.bytes);
      const uint8_t* q = token.lanes + group * 512;
      Ints even = load_ints(token.minus_8 + 16 * group), odd = broadcast_int(0);
      POWERINFER_UNROLL
      for (int j = 0; j < 8; j += 2) {
        even = dot_small_bytes(even, u[j], load_ints(q + 64 * j));
        odd = dot_small_bytes(odd, u[j + 1], load_ints(q + 64 * j + 64));
      }
      totals[t] = fma(to_floats(add_ints(even, odd)), mul(scale, load(token.scale + 16 * group)), totals[t]);
    }
  }
  POWERINFER_UNROLL
  for (int t = 0; t < T; ++t) y[t * y_stride] = sum(totals[t]);
}

void lanes_q4_0(const uint8_t* data, size_t row_bytes, size_t scales_offset, int rows, const ActivationLayout& layout,
                const uint8_t* x, int n, float* y, size_t y_stride) {
  const auto tile = [&]<int T>(int t) {
    for (int r = 0; r < rows; ++r) {
      const uint8_t* row = data + r * row_bytes;
      lanes_row<T>(row, row + scales_offset, layout, x + t * layout.bytes, y + t * y_stride + r, y_stride);
    }
  };
  int t = 0;
  for (; t + 6 <= n; t += 6) tile.template operator()<6>(t);
  for (; t + 2 <= n; t += 2) tile.template operator()<2>(t);
  for (; t < n; ++t) tile.template operator()<1>(t);
}

// Sparse neurons of one token

template <typename Element>
void gated_kernel(const uint8_t* const* gates, int count, size_t up_offset, int k, const float* x, bool relu_up,
                  DownRow down, float* h) {
  // asked for while the next neurons are computed
  const uint8_t* ahead[2 * kQuad];
  int downs = 0;
  for (int i = 0; i < count; i += kQuad) {
    const int here = count - i < kQuad ? count - i : kQuad;
    const int next = count - i - here < kQuad ? count - i - here : kQuad;
    const uint8_t* all_ups[kQuad];
    for (int r = 0; r < here; ++r) all_ups[r] = gates[i + r] + up_offset;
    for (int r = 0; r < here; ++r) ahead[downs + r] = all_ups[r];
    float gate[kQuad];
    quad<Element>(gates + i, here, ahead, downs + here, k, x, gate);
    const uint8_t* ups[kQuad];
    int position[kQuad];
    int positive = 0;
    for (int r = 0; r < here; ++r) {
      h[i + r] = 0.0f;
      if (!(gate[r] > 0.0f)) continue;
      ups[positive] = all_ups[r];
      position[positive++] = r;
    }
    float up[kQuad];
    quad<Element>(ups, positive, gates + i + here, next, k, x, up);
    downs = 0;
    for (int p = 0; p < positive; ++p) {
      if (relu_up && !(up[p] > 0.0f)) continue;
      h[i + position[p]] = gate[position[p]] * up[p];
      if (down.bytes) ahead[downs++] = gates[i + position[p]] + down.offset;
    }
  }
  for (int d = 0; d < downs; ++d) prefetch_range(ahead[d], down.bytes);
}

template <typename Element>
void gather_kernel(const uint8_t* const* rows, int count, int k, const float* x, float* h) {
  for (int i = 0; i < count; i += kQuad) {
    const int here = count - i < kQuad ? count - i : kQuad;
    const int next = count - i - here < kQuad ? count - i - here : kQuad;
    quad<Element>(rows + i, here, rows + i + here, next, k, x, h + i);
  }
}

// neurons whose rows are asked for before they are needed
constexpr int kNeuronsAhead = 4;

void gated_q4_0(const uint8_t* const* gates, int count, size_t up_offset, size_t gate_scales, size_t up_scales,
                const ActivationLayout& layout, const uint8_t* x, bool relu_up, DownRow down, float* h) {
  const size_t codes = static_cast<size_t>(layout.k) / 2, scales = static_cast<size_t>(layout.blocks) * 2;
  const auto ask = [&](const uint8_t* gate) {
    prefetch_range(gate, codes);
    prefetch_range(gate + gate_scales, scales);
    prefetch_range(gate + up_offset, codes);
    prefetch_range(gate + up_offset + up_scales, scales);
  };
  for (int i = 0; i < count && i < kNeuronsAhead; ++i) ask(gates[i]);
  for (int i = 0; i < count; ++i) {
    if (i + kNeuronsAhead < count) ask(gates[i + kNeuronsAhead]);
    float gate, up;
    lanes_row<1>(gates[i], gates[i] + gate_scales, layout, x, &gate, 0);
    h[i] = 0.0f;
    if (!(gate > 0.0f)) continue;
    const uint8_t* row = gates[i] + up_offset;
    lanes_row<1>(row, row + up_scales, layout, x, &up, 0);
    if (relu_up && !(up > 0.0f)) continue;
    h[i] = gate * up;
    prefetch_range(gates[i] + down.offset, down.bytes);
  }
}

void gather_q4_0(const uint8_t* const* rows, int count, size_t scales_offset, const ActivationLayout& layout,
                 const uint8_t* x, float* h) {
  const size_t codes = static_cast<size_t>(layout.k) / 2, scales = static_cast<size_t>(layout.blocks) * 2;
  for (int i = 0; i < count; ++i) {
    if (i + kNeuronsAhead < count) {
      prefetch_range(rows[i + kNeuronsAhead], codes);
      prefetch_range(rows[i + kNeuronsAhead] + scales_offset, scales);
    }
    lanes_row<1>(rows[i], rows[i] + scales_offset, layout, x, h + i, 0);
  }
}

// Weighted sums of rows

template <typename Element, int V>
inline void accumulate_columns(const uint8_t* const* rows, size_t offset, const float* h, int count, float* y) {
  Floats acc[V];
  POWERINFER_UNROLL
  for (int v = 0; v < V; ++v) acc[v] = load(y + 16 * v);
  for (int i = 0; i < count; ++i) {
    if (i + kNeuronsAhead < count)
      prefetch_range(rows[i + kNeuronsAhead] + offset, static_cast<size_t>(V) * 16 * Element::kBytes);
    const Floats factor = broadcast(h[i]);
    POWERINFER_UNROLL
    for (int v = 0; v < V; ++v) acc[v] = fma(factor, Element::at(rows[i] + offset, 16 * v), acc[v]);
  }
  POWERINFER_UNROLL
  for (int v = 0; v < V; ++v) store(y + 16 * v, acc[v]);
}

template <typename Element>
void accumulate_kernel(const uint8_t* const* rows, size_t offset, const float* h, int count, int columns, float* y) {
  int c = 0;
  const auto at = [&] { return offset + static_cast<size_t>(c) * Element::kBytes; };
  for (; c + 256 <= columns; c += 256) accumulate_columns<Element, 16>(rows, at(), h, count, y + c);
  for (; c + 64 <= columns; c += 64) accumulate_columns<Element, 4>(rows, at(), h, count, y + c);
  for (; c + 16 <= columns; c += 16) accumulate_columns<Element, 1>(rows, at(), h, count, y + c);
}

// One chunk of 128 columns, the four nibbles of each word together: rows are read once.
inline void add_chunk(const uint8_t* const* rows, int pairs, size_t chunk_offset, const int32_t* coefficients,
                      const int32_t* starts, const float* scales, float* y) {
  const Ints nibbles = broadcast_int(0x000f000f);
  Ints acc[8];
  POWERINFER_UNROLL
  for (int n = 0; n < 4; ++n) acc[2 * n] = acc[2 * n + 1] = broadcast_int(starts[n]);
  for (int p = 0; p < pairs; ++p) {
    const Ints a = load_ints(rows[2 * p] + chunk_offset), b = load_ints(rows[2 * p + 1] + chunk_offset);
    const Ints low = interleave_low(a, b), high = interleave_high(a, b);
    const int32_t* factor = coefficients + 16 * p;
    acc[0] = dot_words(acc[0], and_ints(low, nibbles), broadcast_int(factor[0]));
    acc[1] = dot_words(acc[1], and_ints(high, nibbles), broadcast_int(factor[0]));
    acc[2] = dot_words(acc[2], and_ints(shift_right<4>(low), nibbles), broadcast_int(factor[1]));
    acc[3] = dot_words(acc[3], and_ints(shift_right<4>(high), nibbles), broadcast_int(factor[1]));
    acc[4] = dot_words(acc[4], and_ints(shift_right<8>(low), nibbles), broadcast_int(factor[2]));
    acc[5] = dot_words(acc[5], and_ints(shift_right<8>(high), nibbles), broadcast_int(factor[2]));
    acc[6] = dot_words(acc[6], and_ints(shift_right<12>(low), nibbles), broadcast_int(factor[3]));
    acc[7] = dot_words(acc[7], and_ints(shift_right<12>(high), nibbles), broadcast_int(factor[3]));
  }
  POWERINFER_UNROLL
  for (int i = 0; i < 8; ++i) store(y + 16 * i, fma(to_floats(acc[i]), broadcast(scales[i / 2]), load(y + 16 * i)));
}

void accumulate_q4_0(const uint8_t* const* rows, size_t scales_offset, const float* h, int count, int first_chunk,
                     int chunks, float* y) {
  if (count == 0) return;
  constexpr float kLargest = 32767.0f;
  const uint8_t* padded[kCoefficientNeurons + 1];
  float weights[kCoefficientNeurons + 1];
  for (int i = 0; i < count; ++i) padded[i] = rows[i], weights[i] = h[i];
  padded[count] = rows[count - 1], weights[count] = 0.0f;
  const int pairs = (count + 1) / 2;
  const Ints low_half = broadcast_int(0xffff);
  // four chunks of four blocks: 16 blocks' scales are one vector
  for (int chunk = first_chunk; chunk < first_chunk + chunks; chunk += 4) {
    const int here = first_chunk + chunks - chunk < 4 ? first_chunk + chunks - chunk : 4;
    const int blocks = 4 * here;
    const auto scales_of = [&](int i) { return load_half(halves(padded[i] + scales_offset) + 4 * chunk, blocks); };
    Floats largest = zero();
    for (int i = 0; i < count; ++i) largest = max(abs(mul(scales_of(i), broadcast(weights[i]))), largest);
    alignas(64) float inverse[16], scale[16];
    store(scale, largest);
    for (int b = 0; b < 16; ++b) {
      inverse[b] = scale[b] > 0.0f ? kLargest / scale[b] : 0.0f;
      scale[b] /= kLargest;
    }
    const Floats to_codes = load(inverse);
    alignas(64) int32_t coefficients[(kCoefficientNeurons + 1) / 2][16];
    alignas(64) int32_t starts[16];
    Ints total = broadcast_int(0);
    for (int p = 0; p < pairs; ++p) {
      const Ints a = round(mul(mul(scales_of(2 * p), broadcast(weights[2 * p])), to_codes));
      const Ints b = round(mul(mul(scales_of(2 * p + 1), broadcast(weights[2 * p + 1])), to_codes));
      total = add_ints(total, add_ints(a, b));
      store_ints(coefficients[p], or_ints(and_ints(a, low_half), shift_left<16>(b)));
    }
    store_ints(starts, total);
    for (int& start : starts) start = minus_8_times(static_cast<uint32_t>(start));
    for (int c = 0; c < here; ++c) {
      add_chunk(padded, pairs, static_cast<size_t>(chunk + c) * 64, coefficients[0] + 4 * c, starts + 4 * c, scale + 4 * c,
                y + (chunk + c) * 128);
    }
  }
}

template <typename Element>
void panel_kernel(const uint8_t* data, size_t row_bytes, size_t, int rows, int first_column, int columns, float* panel) {
  for (int r = 0; r < rows; ++r) {
    const uint8_t* row = data + r * row_bytes;
    int c = 0;
    for (; c + 16 <= columns; c += 16) store(panel + r * kPanelColumns + c, Element::at(row, first_column + c));
    if (c < columns) store(panel + r * kPanelColumns + c, Element::at(row, first_column + c, columns - c));
  }
}

void panel_q4_0(const uint8_t* data, size_t row_bytes, size_t scales_offset, int rows, int first_column, int columns,
                float* panel) {
  for (int r = 0; r < rows; ++r) {
    const uint8_t* row = data + r * row_bytes;
    for (int c = 0; c < columns; c += 16) {
      const int column = first_column + c, chunk = column / 128, nibble = column % 128 / 32, half = column / 16 % 2;
      const uint16_t* words = halves(row + chunk * 64) + 4 * half;
      const float scale = sum(load_half(halves(row + scales_offset) + column / kBlock, 1));
      float* out = panel + r * kPanelColumns + c;
      for (int q = 0; q < 4; ++q) {
        POWERINFER_UNROLL
        for (int p = 0; p < 4; ++p) out[4 * q + p] = static_cast<float>((words[8 * q + p] >> 4 * nibble & 15) - 8) * scale;
      }
    }
  }
}

template <int T, int V>
inline void columns_tile(const float* panel, int rows, int column, const float* h, size_t h_stride, float* y,
                         size_t y_stride) {
  Floats acc[T][V];
  POWERINFER_UNROLL
  for (int t = 0; t < T; ++t) {
    POWERINFER_UNROLL
    for (int v = 0; v < V; ++v) acc[t][v] = load(y + t * y_stride + column + 16 * v);
  }
  for (int i = 0; i < rows; ++i) {
    Floats w[V];
    POWERINFER_UNROLL
    for (int v = 0; v < V; ++v) w[v] = load(panel + i * kPanelColumns + column + 16 * v);
    POWERINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      const Floats factor = broadcast(h[t * h_stride + i]);
      POWERINFER_UNROLL
      for (int v = 0; v < V; ++v) acc[t][v] = fma(factor, w[v], acc[t][v]);
    }
  }
  POWERINFER_UNROLL
  for (int t = 0; t < T; ++t) {
    POWERINFER_UNROLL
    for (int v = 0; v < V; ++v) store(y + t * y_stride + column + 16 * v, acc[t][v]);
  }
}

void columns_kernel(const float* panel, int rows, int columns, const float* h, size_t h_stride, int n, float* y,
                    size_t y_stride) {
  const auto tokens = [&]<int T>(int t) {
    int column = 0;
    for (; column + 64 <= columns; column += 64) {
      columns_tile<T, 4>(panel, rows, column, h + t * h_stride, h_stride, y + t * y_stride, y_stride);
    }
    for (; column + 16 <= columns; column += 16) {
      columns_tile<T, 1>(panel, rows, column, h + t * h_stride, h_stride, y + t * y_stride, y_stride);
    }
  };
  int t = 0;
  for (; t + 6 <= n; t += 6) tokens.template operator()<6>(t);
  for (; t + 2 <= n; t += 2) tokens.template operator()<2>(t);
  for (; t < n; ++t) tokens.template operator()<1>(t);
}

int compact_kernel(const float* scores, int n, float threshold, int32_t* indices) {
  const Floats limit = broadcast(threshold);
  int count = 0;
  for (int i = 0; i < n; i += 16) {
    const int here = n - i < 16 ? n - i : 16;
    const Floats value = here == 16 ? load(scores + i) : load(scores + i, here);
    count += compact(value, limit, here, i, indices + count);
  }
  return count;
}

// Elementwise

// fn(vector, i) stored over y, 16 at a time; `in` gives the vectors
template <typename Function>
inline void each(int n, float* y, Function fn) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store(y + i, fn(i, 16));
  if (i < n) store(y + i, fn(i, n - i), n - i);
}

inline Floats part(const float* x, int i, int n) { return n == 16 ? load(x + i) : load(x + i, n); }

// e^x to about 2^-22 of its value, 0 far below: 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]
inline Floats exponential(Floats x) {
  x = max(min(x, broadcast(88.0f)), broadcast(-87.0f));
  const Ints n = round(mul(x, broadcast(1.44269504f)));
  const Floats whole = to_floats(n);
  Floats r = fma(whole, broadcast(-0.693359375f), x);
  r = fma(whole, broadcast(2.12194440e-4f), r);
  Floats p = broadcast(1.0f / 720);
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return mul(p, exp2(n));
}

void rms_norm(const float* x, const float* weight, int k, float epsilon, float* y) {
  Floats squares = zero();
  for (int i = 0; i < k; i += 16) {
    const Floats v = part(x, i, k - i < 16 ? k - i : 16);
    squares = fma(v, v, squares);
  }
  const Floats scale = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(k) + epsilon));
  each(k, y, [&](int i, int n) { return mul(mul(part(x, i, n), scale), part(weight, i, n)); });
}

void layer_norm(const float* x, const float* weight, const float* bias, int k, float epsilon, float* y) {
  Floats total = zero();
  for (int i = 0; i < k; i += 16) total = add(total, part(x, i, k - i < 16 ? k - i : 16));
  const float mean = sum(total) / static_cast<float>(k);
  each(k, y, [&](int i, int n) { return sub(part(x, i, n), broadcast(mean)); });
  Floats squares = zero();
  for (int i = 0; i < k; i += 16) {
    const Floats v = part(y, i, k - i < 16 ? k - i : 16);
    squares = fma(v, v, squares);
  }
  const Floats scale = broadcast(1.0f / std::sqrt(sum(squares) / static_cast<float>(k) + epsilon));
  each(k, y, [&](int i, int n) { return fma(mul(part(y, i, n), scale), part(weight, i, n), part(bias, i, n)); });
}

void softmax(float* x, int n) {
  float largest = x[0];
  int i = 0;
  if (n >= 16) {
    Floats top = load(x);
    for (i = 16; i + 16 <= n; i += 16) top = max(load(x + i), top);
    largest = max_lane(top);
  }
  for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  const Floats shift = broadcast(largest);
  each(n, x, [&](int j, int m) { return exponential(sub(part(x, j, m), shift)); });
  Floats total = zero();
  for (int j = 0; j < n; j += 16) total = add(total, part(x, j, n - j < 16 ? n - j : 16));
  const Floats inverse = broadcast(1.0f / sum(total));
  each(n, x, [&](int j, int m) { return mul(part(x, j, m), inverse); });
}

void silu_mul(const float* gate, const float* up, int n, float* y) {
  each(n, y, [&](int i, int m) {
    const Floats g = part(gate, i, m);
    const Floats one = broadcast(1.0f);
    return mul(div(g, add(one, exponential(sub(zero(), g)))), part(up, i, m));
  });
}

void relu_mul(const float* gate, const float* up, int n, bool relu_up, float* y) {
  each(n, y, [&](int i, int m) {
    const Floats u = part(up, i, m);
    return mul(max(part(gate, i, m), zero()), relu_up ? max(u, zero()) : u);
  });
}

void relu(float* x, int n) {
  each(n, x, [&](int i, int m) { return max(part(x, i, m), zero()); });
}

void gelu(float* x, int n) {
  for (int i = 0; i < n; ++i) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
}

void add_kernel(float* x, const float* y, int n) {
  each(n, x, [&](int i, int m) { return add(part(x, i, m), part(y, i, m)); });
}

// To the nearest finite half: an infinite value would make the tokens that must not see it NaN, by 0 * infinity.
inline Floats finite_half(Floats x) { return min(broadcast(65504.0f), max(broadcast(-65504.0f), x)); }

void to_half(const float* x, int n, uint16_t* y) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store_half(y + i, finite_half(load(x + i)));
  if (i < n) {
    uint16_t last[16];
    store_half(last, finite_half(load(x + i, n - i)));
    for (int j = 0; i + j < n; ++j) y[i + j] = last[j];
  }
}

void from_half(const uint16_t* x, int n, float* y) {
  each(n, y, [&](int i, int m) { return m == 16 ? load_half(x + i) : load_half(x + i, m); });
}

}  // namespace

const Kernels& table() {
  static constexpr Kernels kTable = {
      .isa = kIsa,
      .quantize = quantize,
      .rows_f16 = rows_kernel<Half>,
      .rows_f32 = rows_kernel<Single>,
      .packed_q4_0 = packed_kernel<Q4_0>,
      .packed_q4_1 = packed_kernel<Q4_1>,
      .packed_q8_0 = packed_kernel<Q8_0>,
      .packed_q6_k = packed_kernel<Q6_K>,
      .lanes_q4_0 = lanes_q4_0,
      .gated_f16 = gated_kernel<Half>,
      .gated_f32 = gated_kernel<Single>,
      .gated_q4_0 = gated_q4_0,
      .gather_f16 = gather_kernel<Half>,
      .gather_f32 = gather_kernel<Single>,
      .gather_q4_0 = gather_q4_0,
      .accumulate_f16 = accumulate_kernel<Half>,
      .accumulate_f32 = accumulate_kernel<Single>,
      .accumulate_q4_0 = accumulate_q4_0,
      .panel_f16 = panel_kernel<Half>,
      .panel_f32 = panel_kernel<Single>,
      .panel_q4_0 = panel_q4_0,
      .columns = columns_kernel,
      .compact = compact_kernel,
      .rms_norm = rms_norm,
      .layer_norm = layer_norm,
      .softmax = softmax,
      .silu_mul = silu_mul,
      .relu_mul = relu_mul,
      .relu = relu,
      .gelu = gelu,
      .add = add_kernel,
      .to_half = to_half,
      .from_half = from_half,
  };
  return kTable;
}
