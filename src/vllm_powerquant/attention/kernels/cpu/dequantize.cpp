// Dequantize: a run of one request's context as keys and values in rotated space, for attention by matrix products.
#include <algorithm>
#include <memory>

#include "unpack.h"

namespace pq {

// Mirrors cpu_kernels._DequantizeArgs.
struct DequantizeArgs {
  const Format* format;
  Pages cache;
  const int32_t* block_table;      // of one request
  Pages exact;                     // data null: none
  const int32_t* exact_table;
  int32_t residual_tokens, sink_tokens;
  const float* key_frame;         // [num_kv_heads, 3, head_size] (centre, scale, 1 / scale) or null
  int32_t num_kv_heads, dtype;
  int64_t context;                 // tokens before the request's chunk
  int64_t first, count;            // tokens to dequantize; first is a multiple of 64
  void *keys, *values;             // out, [num_kv_heads, count, head_size] of dtype, in rotated space
};

namespace {

struct Workspace {
  PackedTile tile;
  alignas(64) float row[kMaxHeadSize], row_scratch[kMaxHeadSize];
};

// One sub-page of one kv head, in rotated space: packed tokens as level * scale, exact ones rotated.
void dequantize_tile(const DequantizeArgs& a, Workspace& s, int head, int64_t tile) {
  const Format& f = *a.format;
  const int d = f.head_size;
  const int64_t bytes = element_bytes(a.dtype), first = a.first + tile * kTokens;
  const int count = static_cast<int>(std::min<int64_t>(kTokens, a.first + a.count - first));
  const ExactRule rule{a.context, a.exact.data ? a.exact_table : nullptr, a.exact.block_size, a.residual_tokens,
                       a.sink_tokens};
  const uint8_t* page = a.cache.data + a.block_table[first / a.cache.block_size] * a.cache.block_stride +
                        head * a.cache.head_stride + first % a.cache.block_size / kTokens * f.sub_page_bytes;
  unpack_keys(f, page, s.tile);
  unpack_values(f, page, s.tile);
  alignas(64) float key_scale[kTokens], value_scale[kTokens];
  load_floats(page + f.key_scale, kFloat16, kTokens, key_scale);
  load_floats(page + f.value_scale, kFloat16, kTokens, value_scale);
  const float orthonormal = 1.0f / std::sqrt(static_cast<float>(d));
  auto save_row = [&](void* out, int t) {
    store_floats(s.row, a.dtype, d, static_cast<char*>(out) + ((head * a.count + first - a.first + t) * d) * bytes);
  };
  for (int t = 0; t < count; ++t) {
    if (rule.is_exact(first + t)) {
      const int64_t size = a.exact.block_size, token = first + t;
      const uint8_t* at = a.exact.data + a.exact_table[token / size] * a.exact.block_stride + head * a.exact.head_stride +
                          token % size * a.exact.token_stride;
      for (int half = 0; half < 2; ++half) {
        load_floats(at + half * d * bytes, a.dtype, d, s.row);
        for (int i = 0; i < d; ++i) {
          if (half == 0 && a.key_frame) {
            const float* frame = a.key_frame + head * 3 * d;
            s.row[i] = (s.row[i] - frame[i]) * frame[d + i];
          }
          s.row[i] *= f.signs[i] * orthonormal;
        }
        hadamard(s.row, s.row_scratch, d, f.outer_order, f.outer, false);
        save_row(half == 0 ? a.keys : a.values, t);
      }
      continue;
    }
    const int position = position_of(t);
    const float key_unit = key_scale[position] * f.key_step, value_unit = value_scale[position] * f.value_step;
    for (int i = 0; i < d; ++i)
      s.row[i] = (static_cast<float>(s.tile.keys[(i / 4 * kTokens + position) * 4 + i % 4]) - 127.5f) * key_unit;
    save_row(a.keys, t);
    for (int i = 0; i < d; ++i)
      s.row[i] = (static_cast<float>(s.tile.values[(position / 4 * d + i) * 4 + position % 4]) - 127.5f) * value_unit;
    save_row(a.values, t);
  }
}
}  // namespace
}  // namespace pq

extern "C" void pq_dequantize(const pq::DequantizeArgs* args) {
  const int64_t tiles = (args->count + pq::kTokens - 1) / pq::kTokens;
#pragma omp parallel
  {
    thread_local std::unique_ptr<pq::Workspace> workspace;
    if (!workspace) workspace.reset(new pq::Workspace);
    workspace->tile.set_codebooks(*args->format);
#pragma omp for schedule(static)
    for (int64_t job = 0; job < tiles * args->num_kv_heads; ++job)
      pq::dequantize_tile(*args, *workspace, static_cast<int>(job / tiles), job % tiles);
  }
}
