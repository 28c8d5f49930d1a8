// Attend: softmax(q K^T) V of each request's chunk over its packed pages, its exact blocks and the chunk's own raw tokens.
//
// A task is a block of query rows (tokens x the query heads of one kv head) over a run of a request's context. It walks
// tiles of up to 64 tokens, converts each once and uses it for all rows:
//   packed tile   unpacked to unsigned bytes in the thread's cache; scores and outputs are integer dot products with the
//                 query and the probabilities in 16-bit fixed point, split into a high and a low byte
//   exact tile    sinks, residual window or the chunk itself, in fp32
// Packed and exact outputs are accumulated apart (rotated and not) under one running maximum and sum, and joined at the end
// by rotating the packed one back. Long contexts are cut into runs of fixed length and merged, so results do not depend on
// the number of threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "unpack.h"

namespace pq {

// Mirrors cpu_kernels._AttendArgs.
struct AttendArgs {
  const Format* format;
  Rows query, key, value;          // the chunk's tokens, raw
  void* out;                       // [tokens, num_heads, head_size] of dtype
  int64_t out_token_stride, out_head_stride;
  int32_t dtype;
  int32_t num_requests, num_heads, num_kv_heads;
  const int32_t* query_start;      // [num_requests], first token of the chunk
  const int32_t* query_lens;       // [num_requests], its tokens
  const int32_t* seq_lens;         // [num_requests], the chunk included
  Pages cache;                     // data null: every position before the chunk is exact
  const int32_t* block_table;      // [num_requests, block_table_stride]
  int64_t block_table_stride;
  Pages exact;                     // data null: none
  const int32_t* exact_table;      // block ids, 0 = null block
  int64_t exact_table_stride;
  int32_t residual_tokens, sink_tokens;
  const float* key_frame;         // [num_kv_heads, 3, head_size] (centre, scale, 1 / scale) or null
  float scale;                     // of the scores
};


namespace {

constexpr int kRows = 64;            // query rows of a task, at most
constexpr int kRunTiles = 32;        // sub-pages of a run: 2,048 tokens
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMasked = -1e30f;
constexpr float kFixed = 32512.0f;   // 127 * 256: the high byte of a fixed-point number stays in int8

// What a thread works in. Aligned rows; sizes for the largest head.
struct Scratch {
  PackedTile tile;
  alignas(64) float exact_rows[kTokens * kMaxHeadSize];  // keys as they come
  alignas(64) float exact_keys[kMaxHeadSize * kTokens];  // [head_size][64 tokens]
  alignas(64) float exact_values[kTokens * kMaxHeadSize];
  alignas(64) float query[kRows * kMaxHeadSize];         // in the keys' frame, times scale * log2(e)
  alignas(64) int8_t query_high[kRows * kMaxHeadSize], query_low[kRows * kMaxHeadSize];  // rotated, fixed point
  float query_unit[kRows];                               // value of one unit of the fixed point
  int32_t query_sum[kRows];
  alignas(64) float scores[kRows * kTokens];
  alignas(64) int8_t weight_high[kRows * kTokens], weight_low[kRows * kTokens];
  float weight_unit[kRows], rescale[kRows];
  int32_t weight_sum[kRows];
  float maximum[kRows], sum[kRows];
  alignas(64) float packed_out[kRows * kMaxHeadSize];    // rotated
  alignas(64) float exact_out[kRows * kMaxHeadSize];
  alignas(64) float row[kMaxHeadSize], row_scratch[kMaxHeadSize];
};

struct Task {
  int32_t request, head;              // head: of keys and values
  int32_t first_head, num_heads;      // query heads, at most kRows of them: row = query * num_heads + head
  int32_t first_query, num_queries;   // within the chunk
  int32_t first_tile, last_tile;      // of the packed context
  bool exact;                         // also the sinks, the residual window and the chunk
  int64_t partial;                    // first row of its partial results, or -1: writes the output
};

struct Context {
  const AttendArgs& a;
  int d, group;
  int64_t dtype_bytes;
};
// ---- packed tiles ----------------------------------------------------------------------------------------------------

inline int32_t four(const int8_t* bytes) {
  int32_t word;
  std::memcpy(&word, bytes, 4);
  return word;
}

// Scores of N rows against a packed tile: integer sums of fixed-point query times (level + 1/2), as floats.
template <int N>
void packed_scores(const Context& c, Scratch& s, int row, const float* key_scale) {
  const int d = c.d;
  for (int block = 0; block < 4; block += 2) {
    IntVec high[N][2] = {}, low[N][2] = {};
    for (int group = 0; group < d / 4; ++group) {
      const uint8_t* keys = s.tile.keys + (group * kTokens + 16 * block) * 4;
      for (int r = 0; r < N; ++r) {
        const int32_t h = four(s.query_high + (row + r) * d + 4 * group), l = four(s.query_low + (row + r) * d + 4 * group);
        for (int k = 0; k < 2; ++k) {
          high[r][k] = dot_bytes(high[r][k], keys + 64 * k, h);
          low[r][k] = dot_bytes(low[r][k], keys + 64 * k, l);
        }
      }
    }
    for (int r = 0; r < N; ++r) {
      const int32_t total = s.query_sum[row + r];
      const float unit = s.query_unit[row + r];
      for (int k = 0; k < 2; ++k) {
        // unsigned bytes hold level + 128; 1/2 is added in floating point
        const IntVec exact = high[r][k] * 256 + low[r][k] - 128 * total;
        save(s.scores + (row + r) * kTokens + 16 * (block + k),
             (to_float(exact) + 0.5f * static_cast<float>(total)) * unit * load(key_scale + 16 * (block + k)));
      }
    }
  }
}

// Adds N rows of fixed-point weights times a packed tile's values to the rotated outputs.
template <int N>
void packed_outputs(const Context& c, Scratch& s, int row) {
  const int d = c.d;
  for (int channel = 0; channel < d; channel += kLanes) {
    IntVec high[N] = {}, low[N] = {};
    for (int word = 0; word < kTokens / 4; ++word) {
      const uint8_t* values = s.tile.values + (word * d + channel) * 4;
      for (int r = 0; r < N; ++r) {
        high[r] = dot_bytes(high[r], values, four(s.weight_high + (row + r) * kTokens + 4 * word));
        low[r] = dot_bytes(low[r], values, four(s.weight_low + (row + r) * kTokens + 4 * word));
      }
    }
    for (int r = 0; r < N; ++r) {
      const int32_t total = s.weight_sum[row + r];
      const float unit = s.weight_unit[row + r], rescale = s.rescale[row + r];
      const IntVec exact = high[r] * 256 + low[r] - 128 * total;
      float* out = s.packed_out + (row + r) * d + channel;
      save(out, load(out) * rescale + (to_float(exact) + 0.5f * static_cast<float>(total)) * unit);
    }
  }
}

template <typename Body3, typename Body2, typename Body1>
void for_rows(int rows, Body3 three, Body2 two, Body1 one) {
  int row = 0;
  for (; row + 3 <= rows; row += 3) three(row);
  if (rows - row == 2) two(row);
  if (rows - row == 1) one(row);
}

// valid: 1 where the position holds a token to be read packed, else 0.
void packed_tile(const Context& c, Scratch& s, int rows, const uint8_t* page, const float* valid) {
  const Format& f = *c.a.format;
  alignas(64) float key_scale[kTokens], value_scale[kTokens];
  load_floats(page + f.key_scale, kFloat16, kTokens, key_scale);
  load_floats(page + f.value_scale, kFloat16, kTokens, value_scale);
  // bytes of slots never written may hold anything, NaN among them
  for (int i = 0; i < kTokens; ++i) {
    key_scale[i] = valid[i] > 0 ? key_scale[i] : 0.0f;
    value_scale[i] = valid[i] > 0 ? value_scale[i] : 0.0f;
  }
  unpack_keys(f, page, s.tile);
  for_rows(rows, [&](int row) { packed_scores<3>(c, s, row, key_scale); },
           [&](int row) { packed_scores<2>(c, s, row, key_scale); },
           [&](int row) { packed_scores<1>(c, s, row, key_scale); });
  for (int row = 0; row < rows; ++row) {
    float* scores = s.scores + row * kTokens;
    Vec x[4], top = splat(s.maximum[row]);
    for (int k = 0; k < 4; ++k) {
      x[k] = load(valid + 16 * k) > 0 ? load(scores + 16 * k) : splat(kMasked);
      top = larger(top, x[k]);
    }
    const float maximum = largest_of(top);
    const float rescale = maximum > s.maximum[row] ? exp2_nonpositive(s.maximum[row] - maximum) : 1.0f;
    Vec sum = {}, heaviest = {};
    for (int k = 0; k < 4; ++k) {
      const Vec p = exp2_nonpositive(x[k] - maximum) * load(valid + 16 * k);
      sum += p;
      x[k] = p * load(value_scale + 16 * k);
      heaviest = larger(heaviest, x[k]);
    }
    const float largest = largest_of(heaviest);
    const float inverse = largest > 0 ? kFixed / largest : 0.0f;
    IntVec total = {};
    for (int k = 0; k < 4; ++k) {
      // adding 2^23 rounds to an integer, kept in the low bits
      const IntVec n = reinterpret_cast<IntVec>(x[k] * inverse + 8388608.0f) & 0xffff;
      const IntVec low = ((n & 255) ^ 128) - 128;
      total += n;
      const Bytes low_bytes = __builtin_convertvector(low, Bytes), high_bytes = __builtin_convertvector((n - low) >> 8, Bytes);
      std::memcpy(s.weight_low + row * kTokens + 16 * k, &low_bytes, 16);
      std::memcpy(s.weight_high + row * kTokens + 16 * k, &high_bytes, 16);
    }
    if (rescale != 1.0f)
      for (int i = 0; i < c.d; i += kLanes) save(s.exact_out + row * c.d + i, load(s.exact_out + row * c.d + i) * rescale);
    s.weight_sum[row] = sum_of(total);
    s.weight_unit[row] = largest * f.value_step / kFixed;
    s.rescale[row] = rescale;
    s.maximum[row] = maximum;
    s.sum[row] = s.sum[row] * rescale + sum_of(sum);
  }
  unpack_values(f, page, s.tile);
  for_rows(rows, [&](int row) { packed_outputs<3>(c, s, row); }, [&](int row) { packed_outputs<2>(c, s, row); },
           [&](int row) { packed_outputs<1>(c, s, row); });
}

// ---- exact tiles -----------------------------------------------------------------------------------------------------

// Up to 64 raw tokens, collected one by one, attended together.
struct ExactTile {
  int count = 0;

  void add(const Context& c, Scratch& s, int head, const void* key, const void* value) {
    const int d = c.d;
    float* row = s.exact_rows + count * d;
    load_floats(key, c.a.dtype, d, row);
    if (c.a.key_frame) {
      const float* frame = c.a.key_frame + head * 3 * d;
      for (int i = 0; i < d; ++i) row[i] = (row[i] - frame[i]) * frame[d + i];
    }
    load_floats(value, c.a.dtype, d, s.exact_values + count * d);
    ++count;
  }
};

// exact_rows [count][head_size] -> exact_keys [head_size][64]; columns beyond count hold anything.
void transpose_exact_keys(const Context& c, Scratch& s, int count) {
  const int d = c.d;
#ifdef PQ_AVX512
  for (int token = 0; token < count; token += kLanes)
    for (int channel = 0; channel < d; channel += kLanes) {
      __m512i block[16];
      for (int i = 0; i < kLanes; ++i) block[i] = _mm512_load_si512(s.exact_rows + (token + i) * d + channel);
      transpose16(block);
      for (int i = 0; i < kLanes; ++i) _mm512_store_si512(s.exact_keys + (channel + i) * kTokens + token, block[i]);
    }
#else
  for (int token = 0; token < count; ++token)
    for (int i = 0; i < d; ++i) s.exact_keys[i * kTokens + token] = s.exact_rows[token * d + i];
#endif
}

template <int N>
void exact_scores(const Context& c, Scratch& s, int row) {
  const int d = c.d;
  Vec sums[N][4] = {};
  for (int i = 0; i < d; ++i) {
    const Vec* keys = reinterpret_cast<const Vec*>(s.exact_keys + i * kTokens);
    for (int r = 0; r < N; ++r) {
      const Vec q = splat(s.query[(row + r) * d + i]);
      for (int k = 0; k < 4; ++k) sums[r][k] += q * keys[k];
    }
  }
  for (int r = 0; r < N; ++r) std::memcpy(s.scores + (row + r) * kTokens, sums[r], sizeof(sums[r]));
}

template <int N>
void exact_outputs(const Context& c, Scratch& s, int row, int count) {
  const int d = c.d;
  for (int channel = 0; channel < d; channel += kLanes) {
    Vec sums[N];
    for (int r = 0; r < N; ++r) sums[r] = *reinterpret_cast<const Vec*>(s.exact_out + (row + r) * d + channel);
    for (int t = 0; t < count; ++t) {
      const Vec v = *reinterpret_cast<const Vec*>(s.exact_values + t * d + channel);
      for (int r = 0; r < N; ++r) sums[r] += splat(s.scores[(row + r) * kTokens + t]) * v;
    }
    for (int r = 0; r < N; ++r) std::memcpy(s.exact_out + (row + r) * d + channel, &sums[r], sizeof(Vec));
  }
}

// visible_from[query] .. : row of query token i sees the tile's first min(count, first_visible + i) tokens.
void exact_tile(const Context& c, Scratch& s, int rows, int num_heads, int count, int first_visible) {
  transpose_exact_keys(c, s, count);
  for_rows(rows, [&](int row) { exact_scores<3>(c, s, row); }, [&](int row) { exact_scores<2>(c, s, row); },
           [&](int row) { exact_scores<1>(c, s, row); });
  for (int row = 0; row < rows; ++row) {
    const int seen = std::max(0, std::min(count, first_visible + row / num_heads));
    float* scores = s.scores + row * kTokens;
    Vec x[4], top = splat(s.maximum[row]);
    for (int k = 0; k < 4; ++k) {
      x[k] = kLaneIndex + 16 * k < seen ? load(scores + 16 * k) : splat(kMasked);
      top = larger(top, x[k]);
    }
    const float maximum = largest_of(top);
    const float rescale = maximum > s.maximum[row] ? exp2_nonpositive(s.maximum[row] - maximum) : 1.0f;
    Vec sum = {};
    for (int k = 0; k < 4; ++k) {
      const Vec p = kLaneIndex + 16 * k < seen ? exp2_nonpositive(x[k] - maximum) : splat(0.0f);
      save(scores + 16 * k, p);
      sum += p;
    }
    if (rescale != 1.0f)
      for (int i = row * c.d; i < (row + 1) * c.d; i += kLanes) {
        save(s.exact_out + i, load(s.exact_out + i) * rescale);
        save(s.packed_out + i, load(s.packed_out + i) * rescale);
      }
    s.maximum[row] = maximum;
    s.sum[row] = s.sum[row] * rescale + sum_of(sum);
  }
  for_rows(rows, [&](int row) { exact_outputs<3>(c, s, row, count); }, [&](int row) { exact_outputs<2>(c, s, row, count); },
           [&](int row) { exact_outputs<1>(c, s, row, count); });
}

// ---- tasks -----------------------------------------------------------------------------------------------------------

const char* raw_row(const Context& c, const Rows& rows, int64_t token, int64_t head) {
  return static_cast<const char*>(rows.data) + (token * rows.token_stride + head * rows.head_stride) * c.dtype_bytes;
}

void load_queries(const Context& c, Scratch& s, const Task& task) {
  const Format& f = *c.a.format;
  const int d = c.d;
  const float unit = c.a.scale * kLog2E, orthonormal = 1.0f / std::sqrt(static_cast<float>(d));
  for (int row = 0; row < task.num_queries * task.num_heads; ++row) {
    const int64_t token = c.a.query_start[task.request] + task.first_query + row / task.num_heads;
    float* q = s.query + row * d;
    const int64_t head = task.first_head + row % task.num_heads;
    load_floats(raw_row(c, c.a.query, token, head), c.a.dtype, d, q);
    if (c.a.key_frame) {
      const float* frame = c.a.key_frame + head / (c.a.num_heads / c.a.num_kv_heads) * 3 * d;
      for (int i = 0; i < d; ++i) q[i] *= frame[2 * d + i];
    }
    for (int i = 0; i < d; ++i) {
      s.row[i] = q[i] * f.signs[i];
      q[i] *= unit;
    }
    hadamard(s.row, s.row_scratch, d, f.outer_order, f.outer, false);
    float largest = 1e-30f;
    for (int i = 0; i < d; ++i) largest = std::max(largest, std::fabs(s.row[i]));
    const float inverse = kFixed / largest;
    int32_t total = 0;
    for (int i = 0; i < d; ++i) {
      const int32_t n = static_cast<int32_t>(std::nearbyintf(s.row[i] * inverse));
      const int32_t low = static_cast<int8_t>(n & 255);
      total += n;
      s.query_low[row * d + i] = static_cast<int8_t>(low);
      s.query_high[row * d + i] = static_cast<int8_t>((n - low) >> 8);
    }
    s.query_sum[row] = total;
    s.query_unit[row] = largest / kFixed * orthonormal * unit * f.key_step;
    s.maximum[row] = kMasked;
    s.sum[row] = 0.0f;
    std::memset(s.packed_out + row * d, 0, static_cast<size_t>(d) * 4);
    std::memset(s.exact_out + row * d, 0, static_cast<size_t>(d) * 4);
  }
}

void run(const Context& c, Scratch& s, const Task& task, float* partials) {
  const AttendArgs& a = c.a;
  const Format& f = *a.format;
  const int d = c.d, rows = task.num_queries * task.num_heads;
  const int64_t start = a.query_start[task.request];
  const ExactRule rule{a.seq_lens[task.request] - a.query_lens[task.request],
                       a.exact.data ? a.exact_table + task.request * a.exact_table_stride : nullptr, a.exact.block_size,
                       a.residual_tokens, a.sink_tokens};
  load_queries(c, s, task);

  if (task.exact) {
    ExactTile tile;
    auto flush = [&](int first_visible) {
      if (tile.count) exact_tile(c, s, rows, task.num_heads, tile.count, first_visible);
      tile.count = 0;
    };
    auto add_exact = [&](int64_t token) {
      if (!rule.is_exact(token)) return;
      const int64_t rows_of_block = a.exact.block_size;
      const uint8_t* at = a.exact.data + rule.table[token / rows_of_block] * a.exact.block_stride +
                          task.head * a.exact.head_stride + token % rows_of_block * a.exact.token_stride;
      tile.add(c, s, task.head, at, at + d * c.dtype_bytes);
      if (tile.count == kTokens) flush(kTokens);
    };
    if (rule.table) {
      const int64_t sinks = std::min<int64_t>(a.sink_tokens, rule.context);
      const int64_t window = a.residual_tokens > 0 ? std::max(sinks, rule.context - a.residual_tokens + 1) : rule.context;
      for (int64_t token = 0; token < sinks; ++token) add_exact(token);
      for (int64_t token = window; token < rule.context; ++token) add_exact(token);
    }
    flush(kTokens);
    const int last = task.first_query + task.num_queries;
    for (int first = 0; first < last; first += kTokens) {
      const int end = std::min(last, first + kTokens);
      for (int i = first; i < end; ++i)
        tile.add(c, s, task.head, raw_row(c, a.key, start + i, task.head), raw_row(c, a.value, start + i, task.head));
      flush(task.first_query - first + 1);
    }
  }

  const int64_t tiles_of_block = a.cache.block_size / kTokens;
  auto sub_page = [&](int64_t t) {
    const int64_t block = a.block_table[task.request * a.block_table_stride + t / tiles_of_block];
    return a.cache.data + block * a.cache.block_stride + task.head * a.cache.head_stride +
           t % tiles_of_block * f.sub_page_bytes;
  };
  alignas(64) float valid[kTokens];
  for (int64_t t = task.first_tile; t < task.last_tile; ++t) {
    bool any = false;
    // most tiles lie between the sinks and the window, all of their tokens packed
    const int64_t first = t * kTokens;
    const bool whole = first + kTokens <= rule.context - std::max(0, a.residual_tokens) && first >= a.sink_tokens;
    if (whole) {
      for (int k = 0; k < kTokens; k += kLanes) save(valid + k, splat(1.0f));
      any = true;
    }
    for (int position = 0; !whole && position < kTokens; ++position) {
      const int64_t token = t * kTokens + token_at(position);
      const bool packed = token < rule.context && !rule.is_exact(token);
      valid[position] = packed ? 1.0f : 0.0f;
      any |= packed;
    }
    if (!any) continue;
    // the next tile's bytes arrive while this one is computed
    if (t + 1 < task.last_tile)
      for (int64_t line = 0; line < f.sub_page_bytes; line += 64) __builtin_prefetch(sub_page(t + 1) + line);
    packed_tile(c, s, rows, sub_page(t), valid);
  }

  const float orthonormal = 1.0f / std::sqrt(static_cast<float>(d));
  for (int row = 0; row < rows; ++row) {
    std::memcpy(s.row, s.packed_out + row * d, static_cast<size_t>(d) * 4);
    hadamard(s.row, s.row_scratch, d, f.outer_order, f.outer, true);
    float* exact = s.exact_out + row * d;
    for (int i = 0; i < d; ++i) s.row[i] = s.row[i] * f.signs[i] * orthonormal + exact[i];
    if (task.partial >= 0) {
      float* out = partials + (task.partial + row) * (d + 2);
      std::memcpy(out, s.row, static_cast<size_t>(d) * 4);
      out[d] = s.maximum[row];
      out[d + 1] = s.sum[row];
    } else {
      const float inverse = 1.0f / s.sum[row];
      for (int i = 0; i < d; ++i) s.row[i] *= inverse;
      const int64_t token = start + task.first_query + row / task.num_heads, head = task.first_head + row % task.num_heads;
      store_floats(s.row, a.dtype, d,
                   static_cast<char*>(a.out) + (token * a.out_token_stride + head * a.out_head_stride) * c.dtype_bytes);
    }
  }
}

// Joins the partial results of tasks[first, last), which differ in their run only.
void merge(const Context& c, Scratch& s, const Task* tasks, int64_t first, int64_t last, const float* partials) {
  const AttendArgs& a = c.a;
  const Task& task = tasks[first];
  const int d = c.d;
  for (int row = 0; row < task.num_queries * task.num_heads; ++row) {
    auto partial = [&](int64_t i) { return partials + (tasks[i].partial + row) * (d + 2); };
    float top = kMasked, sum = 0.0f;
    for (int64_t i = first; i < last; ++i) top = std::max(top, partial(i)[d]);
    std::fill(s.row, s.row + d, 0.0f);
    for (int64_t i = first; i < last; ++i) {
      const float weight = exp2_nonpositive(partial(i)[d] - top);
      sum += weight * partial(i)[d + 1];
      for (int k = 0; k < d; ++k) s.row[k] += weight * partial(i)[k];
    }
    for (int k = 0; k < d; ++k) s.row[k] /= sum;
    const int64_t token = a.query_start[task.request] + task.first_query + row / task.num_heads;
    const int64_t head = task.first_head + row % task.num_heads;
    store_floats(s.row, a.dtype, d,
                 static_cast<char*>(a.out) + (token * a.out_token_stride + head * a.out_head_stride) * c.dtype_bytes);
  }
}



}  // namespace
}  // namespace pq

extern "C" void pq_attend(const pq::AttendArgs* args) {
  using namespace pq;
  const AttendArgs& a = *args;
  const Context c{a, a.format->head_size, a.num_heads / a.num_kv_heads, element_bytes(a.dtype)};
  const int block_heads = std::min(c.group, kRows), block_queries = kRows / block_heads;
  std::vector<Task> tasks;
  std::vector<std::pair<int64_t, int64_t>> merges;
  int64_t partial_rows = 0;
  for (int32_t r = 0; r < a.num_requests; ++r) {
    const int32_t queries = a.query_lens[r];
    const int64_t context = a.seq_lens[r] - queries;
    const int32_t tiles = a.cache.data ? static_cast<int32_t>((context + kTokens - 1) / kTokens) : 0;
    const int32_t runs = queries <= block_queries ? std::max(1, (tiles + kRunTiles - 1) / kRunTiles) : 1;
    int32_t heads;
    for (int32_t first_head = 0; first_head < a.num_heads; first_head += heads) {
      // the last block of a group may be smaller
      const int32_t head = first_head / c.group;
      heads = std::min(block_heads, (head + 1) * c.group - first_head);
      for (int32_t q = 0; q < queries; q += block_queries) {
        const int64_t first = static_cast<int64_t>(tasks.size());
        const int32_t count = std::min(block_queries, queries - q);
        for (int32_t i = 0; i < runs; ++i) {
          tasks.push_back({r, head, first_head, heads, q, count,
                           static_cast<int32_t>(static_cast<int64_t>(tiles) * i / runs),
                           static_cast<int32_t>(static_cast<int64_t>(tiles) * (i + 1) / runs), i == runs - 1,
                           runs > 1 ? partial_rows : -1});
          if (runs > 1) partial_rows += count * heads;
        }
        if (runs > 1) merges.emplace_back(first, first + runs);
      }
    }
  }
  const std::unique_ptr<float[]> partials(new float[static_cast<size_t>(partial_rows * (c.d + 2))]);
#pragma omp parallel
  {
    thread_local std::unique_ptr<Scratch> own;
    if (!own) own.reset(new Scratch);
    Scratch& scratch = *own;
    scratch.tile.set_codebooks(*a.format);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < static_cast<int64_t>(tasks.size()); ++i) run(c, scratch, tasks[static_cast<size_t>(i)], partials.get());
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < static_cast<int64_t>(merges.size()); ++i)
      merge(c, scratch, tasks.data(), merges[static_cast<size_t>(i)].first, merges[static_cast<size_t>(i)].second, partials.get());
  }
}
