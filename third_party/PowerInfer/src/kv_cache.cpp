#include "kv_cache.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "packed_kv.h"

namespace powerinfer {

namespace {

constexpr int kTokenBlock = 16;   // queries of one key-value head that read it together
constexpr int kPanelRows = 128;   // values of so many tokens are read together
constexpr int kPanelQueries = 4;  // fewer read the values as they are

// [layer][slot][keys, values][kv head][context][head size] fp16; pages come as tokens do.
class F16Cache : public KvCache {
 public:
  F16Cache(const KvShape& shape, const Compute& compute, size_t score_bytes)
      : shape_(shape),
        compute_(compute),
        score_bytes_(score_bytes),
        head_bytes_(size_t{2} * shape.context * shape.head_size),
        memory_(head_bytes_ * shape.kv_heads * 2 * shape.slots * shape.layers, "the KV cache", false),
        scratch_(compute.pool.size()) {}

  void attend(int layer, const std::vector<KvTokens>& tokens, const float* keys, const float* values, const float* queries,
              float* out) override {
    for (const KvTokens& span : tokens) store(layer, span, keys, values);
    const int group = shape_.heads / shape_.kv_heads;
    items_.clear();
    size_t most = 0, scores = 0;
    for (size_t s = 0; s < tokens.size(); ++s) {
      const int length = tokens[s].position + tokens[s].count;
      const QueryBlock block = QueryBlock::of(shape_, compute_.pool.size(), length, score_bytes_);
      for (int t = 0; t < tokens[s].count; t += block.tokens) {
        const int count = std::min(block.tokens, tokens[s].count - t);
        for (int head = 0; head < shape_.heads; head += std::min(block.heads, group - head % group)) {
          items_.push_back({static_cast<int>(s), t, count, head, std::min(block.heads, group - head % group)});
        }
      }
      const size_t rows = static_cast<size_t>(std::min(block.tokens, tokens[s].count)) * block.heads;
      most = std::max(most, rows);
      scores = std::max(scores, rows * round_up(length, 16));
    }
    // nothing is allocated on the pool's threads
    for (Scratch& scratch : scratch_) {
      scratch.queries.reserve(most * shape_.head_size);
      scratch.out.reserve(most * shape_.head_size);
      scratch.scores.reserve(scores);
      scratch.panel.reserve(static_cast<size_t>(kPanelRows) * kPanelColumns);
    }
    compute_.pool.run(static_cast<int>(items_.size()), [&](int i, int thread) {
      const Item& item = items_[i];
      attend_block(layer, tokens[item.step], item, queries, out, scratch_[thread]);
    });
  }

  void append(const std::vector<KvTokens>&) override {}
  int truncate(int slot, int count) override {
    for (int layer = 0; layer < shape_.layers; ++layer) {
      for (int which = 0; which < 2; ++which) {
        for (int head = 0; head < shape_.kv_heads; ++head) {
          auto* at = reinterpret_cast<uint8_t*>(rows(layer, slot, which, head));
          const size_t kept = size_t{2} * count * shape_.head_size;
          memory_.forget(at + kept, head_bytes_ - kept);
        }
      }
    }
    return count;
  }
  uint64_t bytes(int tokens) const override {
    return uint64_t{2} * 2 * shape_.layers * shape_.kv_heads * shape_.head_size * tokens;
  }

 private:
  struct Item {
    int step, first, count;  // tokens of a span
    int head, heads;         // query heads of one key-value head
  };
  struct Scratch {
    std::vector<float> queries, scores, panel, out;
  };

  void store(int layer, const KvTokens& tokens, const float* keys, const float* values) {
    const size_t stride = static_cast<size_t>(shape_.kv_heads) * shape_.head_size;
    compute_.each_token(tokens.count, [&](int t) {
      for (int head = 0; head < shape_.kv_heads; ++head) {
        const size_t from = (tokens.first + t) * stride + static_cast<size_t>(head) * shape_.head_size;
        const size_t at = static_cast<size_t>(tokens.position + t) * shape_.head_size;
        compute_.kernels.to_half(keys + from, shape_.head_size, rows(layer, tokens.slot, 0, head) + at);
        compute_.kernels.to_half(values + from, shape_.head_size, rows(layer, tokens.slot, 1, head) + at);
      }
    });
  }

  uint16_t* rows(int layer, int slot, int which, int head) const {
    const size_t index = ((static_cast<size_t>(layer) * shape_.slots + slot) * 2 + which) * shape_.kv_heads + head;
    return reinterpret_cast<uint16_t*>(memory_.data() + index * head_bytes_);
  }

  void attend_block(int layer, const KvTokens& tokens, const Item& item, const float* queries, float* out,
                    Scratch& scratch) {
    const Kernels& kernels = compute_.kernels;
    const int size = shape_.head_size, rows_count = item.count * item.heads;
    const int kv_head = item.head / (shape_.heads / shape_.kv_heads);
    const size_t stride = static_cast<size_t>(shape_.heads) * size;
    const int length = tokens.position + item.first + item.count;  // tokens that the last query sees
    const size_t score_stride = round_up(length, 16);
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    scratch.queries.resize(static_cast<size_t>(rows_count) * size);
    scratch.out.assign(static_cast<size_t>(rows_count) * size, 0.0f);
    scratch.scores.resize(rows_count * score_stride);
    scratch.panel.resize(static_cast<size_t>(kPanelRows) * kPanelColumns);
    const auto offset = [&](int row) {
      const int token = tokens.first + item.first + row / item.heads;
      return token * stride + static_cast<size_t>(item.head + row % item.heads) * size;
    };
    for (int row = 0; row < rows_count; ++row) {
      for (int c = 0; c < size; ++c) scratch.queries[static_cast<size_t>(row) * size + c] = queries[offset(row) + c] * scale;
    }
    const auto row_bytes = static_cast<size_t>(size) * 2;
    kernels.rows_f16(reinterpret_cast<const uint8_t*>(rows(layer, tokens.slot, 0, kv_head)), row_bytes, length, size,
                     scratch.queries.data(), size, rows_count, scratch.scores.data(), score_stride);
    for (int row = 0; row < rows_count; ++row) {
      float* scores = scratch.scores.data() + row * score_stride;
      const int seen = tokens.position + item.first + row / item.heads + 1;
      kernels.softmax(scores, seen);
      std::fill(scores + seen, scores + length, 0.0f);
    }
    const auto* values = reinterpret_cast<const uint8_t*>(rows(layer, tokens.slot, 1, kv_head));
    if (rows_count < kPanelQueries) {
      // expanding values to fp32 pays for many queries only; the order of sums is the same
      const uint8_t* some[kPanelRows];
      for (int position = 0; position < length; position += kPanelRows) {
        const int here = std::min(kPanelRows, length - position);
        for (int i = 0; i < here; ++i) some[i] = values + (position + i) * row_bytes;
        for (int row = 0; row < rows_count; ++row) {
          kernels.accumulate_f16(some, 0, scratch.scores.data() + row * score_stride + position, here, size,
                                 scratch.out.data() + static_cast<size_t>(row) * size);
        }
      }
    } else {
      for (int position = 0; position < length; position += kPanelRows) {
        const int here = std::min(kPanelRows, length - position);
        for (int c = 0; c < size; c += kPanelColumns) {
          const int columns = std::min(kPanelColumns, size - c);
          kernels.panel_f16(values + position * row_bytes, row_bytes, 0, here, c, columns, scratch.panel.data());
          kernels.columns(scratch.panel.data(), here, columns, scratch.scores.data() + position, score_stride, rows_count,
                          scratch.out.data() + c, size);
        }
      }
    }
    for (int row = 0; row < rows_count; ++row) {
      std::copy_n(scratch.out.data() + static_cast<size_t>(row) * size, size, out + offset(row));
    }
  }

  KvShape shape_;
  Compute compute_;
  size_t score_bytes_;
  size_t head_bytes_;
  Memory memory_;
  std::vector<Scratch> scratch_;
  std::vector<Item> items_;
};

// [layer][slot][kv head] regions of packed_kv.h.
class PackedCache : public KvCache {
 public:
  PackedCache(const KvShape& shape, const Compute& compute)
      : shape_(shape),
        compute_(compute),
        kernels_(packed_kernels(compute.kernels.isa)),
        place_{PackedLayout::of(shape.head_size), shape.context},
        region_bytes_(place_.region_bytes()),
        memory_(region_bytes_ * shape.kv_heads * shape.slots * shape.layers, "the KV cache", false),
        lengths_(shape.slots) {}

  void attend(int layer, const std::vector<KvTokens>& spans, const float* keys, const float* values, const float* queries,
              float* out) override {
    const int heads = shape_.kv_heads, group = shape_.heads / heads, block = std::max(1, kTokenBlock / group);
    const auto queries_of = [&](int token, int head) {
      return static_cast<size_t>(token) * shape_.heads * shape_.head_size +
             static_cast<size_t>(head) * group * shape_.head_size;
    };
    const auto store = [&](const KvTokens& span, int t, int head) {
      const size_t from = (static_cast<size_t>(span.first + t) * heads + head) * shape_.head_size;
      kernels_.store(place_, region(layer, span.slot, head), span.position + t, keys + from, values + from);
    };
    const auto read = [&](const KvTokens& span, int t, int count, int head) {
      const size_t at = queries_of(span.first + t, head);
      kernels_.attend(place_, region(layer, span.slot, head), span.position + t, count, group, queries + at, out + at,
                      static_cast<int64_t>(shape_.heads) * shape_.head_size,
                      1.0f / std::sqrt(static_cast<float>(shape_.head_size)));
    };
    // single tokens: stored and attended by one thread each
    single_.clear();
    for (const KvTokens& span : spans) {
      if (span.count == 1) single_.push_back(&span);
    }
    compute_.pool.run(static_cast<int>(single_.size()) * heads, [&](int i, int) {
      store(*single_[i / heads], 0, i % heads);
      read(*single_[i / heads], 0, 1, i % heads);
    });
    // prompts: as many tokens at a time as may be stored ahead of a query
    for (const KvTokens& span : spans) {
      for (int first = 0; span.count > 1 && first < span.count; first += PackedRegion::kAhead) {
        const int here = std::min(PackedRegion::kAhead, span.count - first);
        compute_.pool.run(here * heads, [&](int i, int) { store(span, first + i / heads, i % heads); });
        const int blocks = (here + block - 1) / block;
        compute_.pool.run(blocks * heads, [&](int i, int) {
          const int t = i / heads * block;
          read(span, first + t, std::min(block, here - t), i % heads);
        });
      }
    }
  }

  void append(const std::vector<KvTokens>& spans) override {
    for (const KvTokens& span : spans) lengths_[span.slot].append(span.count);
  }

  int truncate(int slot, int count) override {
    PackedLength& length = lengths_[slot];
    if (!length.can_truncate(count)) count = 0;
    length.truncate(count);
    for (int layer = 0; layer < shape_.layers; ++layer) {
      for (int head = 0; head < shape_.kv_heads; ++head) {
        const uint64_t held = count ? place_.held_bytes(count) : 0;
        memory_.forget(region(layer, slot, head) + held, region_bytes_ - held);
      }
    }
    return count;
  }

  uint64_t bytes(int tokens) const override {
    return tokens ? place_.held_bytes(tokens) * shape_.layers * shape_.kv_heads : 0;
  }

 private:
  uint8_t* region(int layer, int slot, int head) const {
    return memory_.data() + ((static_cast<size_t>(layer) * shape_.slots + slot) * shape_.kv_heads + head) * region_bytes_;
  }

  KvShape shape_;
  Compute compute_;
  const PackedKernels& kernels_;
  PackedRegion place_;
  size_t region_bytes_;
  Memory memory_;
  std::vector<PackedLength> lengths_;
  std::vector<const KvTokens*> single_;
};

}  // namespace

QueryBlock QueryBlock::of(const KvShape& shape, int threads, int length, size_t score_bytes) {
  const int group = shape.heads / shape.kv_heads;
  const size_t fit = std::max<size_t>(1, score_bytes / (sizeof(float) * threads * round_up(length, 16)));
  const int rows = static_cast<int>(std::min<size_t>(fit, std::max(kTokenBlock, group)));
  return {std::max(1, rows / group), std::min(rows, group)};
}

std::unique_ptr<KvCache> make_packed_cache(const KvShape& shape, const Compute& compute) {
  return std::make_unique<PackedCache>(shape, compute);
}

std::unique_ptr<KvCache> make_f16_cache(const KvShape& shape, const Compute& compute, size_t score_bytes) {
  return std::make_unique<F16Cache>(shape, compute, score_bytes);
}

}  // namespace powerinfer
