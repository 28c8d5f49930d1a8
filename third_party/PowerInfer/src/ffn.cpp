#include "ffn.h"

#include <algorithm>
#include <numeric>

namespace powerinfer {

namespace {

constexpr int kTileTokens = 8;     // tokens that the kernels of packed matrices take together
constexpr int kDenseNeurons = 32;  // neurons of one piece of work over prompt tokens
constexpr int kPanelRows = 128;    // neurons whose down rows are expanded at a time
constexpr int kListChunk = 32;     // active neurons of one piece of work for one token
constexpr int kRangeNeurons = 64;  // neurons of one piece of work for several tokens

// Into the second-level cache: the first has no room for all that is asked for here.
void ask_for(const uint8_t* at, size_t bytes) {
  constexpr int kRead = 0, kSecondLevel = 2;
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, kRead, kSecondLevel);
}

void add_bias(float* x, const float* bias, int n) {
  if (!bias) return;
  for (int i = 0; i < n; ++i) x[i] += bias[i];
}

void activate(const Kernels& kernels, Activation activation, float* x, int n) {
  if (activation == Activation::kRelu) {
    kernels.relu(x, n);
  } else {
    kernels.gelu(x, n);
  }
}

}  // namespace

void DenseFfn::run(const FfnInput& input, FfnBuffers& buffers) {
  const Operand operand =
      compute.prepare(input.normed, a.width, input.tokens, up.quantized() || gate.quantized(), buffers.activations);
  const int slab = even_slab(input.tokens, buffers.dense_tokens, kTileTokens);
  for (int first = 0; first < input.tokens; first += slab) {
    run_slab(input.slab(first, std::min(slab, input.tokens - first), a.width), operand.from(first), buffers);
  }
}

void DenseFfn::run_slab(const FfnInput& input, const Operand& operand, FfnBuffers& buffers) {
  const int n = input.tokens;
  const auto ffn = static_cast<size_t>(a.ffn);
  float* g = buffers.gate.data();
  float* u = buffers.up.data();
  if (a.gated) {
    compute.multiply({{&gate, g, ffn}, {&up, u, ffn}}, operand, n);
  } else {
    compute.multiply({{&up, u, ffn}}, operand, n);
  }
  compute.each_token(n, [&](int t) {
    float* gt = g + t * ffn;
    float* ut = u + t * ffn;
    add_bias(ut, up_bias, a.ffn);
    if (!a.gated) {
      activate(compute.kernels, a.activation, ut, a.ffn);
    } else if (a.activation == Activation::kSilu) {
      compute.kernels.silu_mul(gt, ut, a.ffn, ut);
    } else {
      compute.kernels.relu_mul(gt, ut, a.ffn, a.relu_up, ut);
    }
  });
  const Operand hidden = compute.prepare(u, a.ffn, n, down.quantized(), buffers.hidden_activations());
  float* out = buffers.out;
  compute.multiply({{&down, out, static_cast<size_t>(a.width)}}, hidden, n, [&](size_t, int first, int count) {
    for (int t = 0; t < n; ++t) {
      float* y = out + static_cast<size_t>(t) * a.width + first;
      if (down_bias) add_bias(y, down_bias + first, count);
      compute.kernels.add(input.residual + static_cast<size_t>(t) * a.width + first, y, count);
    }
  });
}

void DenseFfn::count_bytes(ModelInfo& info) const { info.matrix_bytes += gate.bytes() + up.bytes() + down.bytes(); }

void SparseFfn::count_bytes(ModelInfo& info) const {
  info.matrix_bytes += fc1.bytes() + fc2.bytes();
  info.ffn_bytes += bundles.layout.bytes * bundles.neurons;
  info.neuron_bytes = bundles.layout.bytes;
}

void SparseFfn::run(const FfnInput& input, FfnBuffers& buffers) {
  const bool quantized = bundles.layout.type == TensorType::kQ4_0;
  const Operand operand = compute.prepare(input.normed, a.width, input.tokens, quantized, buffers.activations);
  if (input.prompt_tokens) run_dense(input, operand, input.prompt_tokens, buffers);
  for (int first = input.prompt_tokens; first < input.tokens; first += buffers.sparse_tokens) {
    const int count = std::min(buffers.sparse_tokens, input.tokens - first);
    run_sparse(input.slab(first, count, a.width), operand.from(first), buffers);
  }
}

// Every neuron, many tokens: slabs of neurons, their products row by row, then their down rows as one more product. A
// token's sums run through the slabs in order.
void SparseFfn::run_dense(const FfnInput& input, const Operand& operand, int n, FfnBuffers& buffers) {
  const BundleLayout& layout = bundles.layout;
  const Kernels& kernels = compute.kernels;
  const int slab = buffers.slab_neurons(n);
  const auto stride = static_cast<size_t>(slab);
  float* g = buffers.gate.data();
  float* h = buffers.up.data();
  const auto product = [&](size_t part, size_t scales, int first, int count, float* y) {
    const uint8_t* data = bundles.neuron(first) + part;
    if (layout.type == TensorType::kQ4_0) {
      kernels.lanes_q4_0(data, layout.bytes, scales, count, operand.layout, operand.activations, n, y, stride);
    } else {
      const auto rows = layout.type == TensorType::kF16 ? kernels.rows_f16 : kernels.rows_f32;
      rows(data, layout.bytes, count, a.width, operand.x, a.width, n, y, stride);
    }
  };
  const auto panel_of = layout.type == TensorType::kQ4_0  ? kernels.panel_q4_0
                        : layout.type == TensorType::kF16 ? kernels.panel_f16
                                                          : kernels.panel_f32;
  float* out = buffers.out;
  std::fill_n(out, static_cast<size_t>(n) * a.width, 0.0f);
  for (int begin = 0; begin < a.ffn; begin += slab) {
    const int end = std::min(begin + slab, a.ffn);
    compute.pool.run((end - begin + kDenseNeurons - 1) / kDenseNeurons, [&](int chunk, int) {
      const int at = chunk * kDenseNeurons, first = begin + at, count = std::min(kDenseNeurons, end - first);
      product(layout.up, layout.up_scales, first, count, h + at);
      if (a.gated) product(layout.gate, layout.gate_scales, first, count, g + at);
      for (int t = 0; t < n; ++t) {
        float* ht = h + t * stride + at;
        if (a.gated) {
          kernels.relu_mul(g + t * stride + at, ht, count, a.relu_up, ht);
        } else {
          if (up_bias) add_bias(ht, up_bias + first, count);
          kernels.relu(ht, count);
        }
      }
    });
    compute.pool.run((a.width + kPanelColumns - 1) / kPanelColumns, [&](int chunk, int) {
      alignas(64) float panel[kPanelRows * kPanelColumns];
      const int column = chunk * kPanelColumns, columns = std::min(kPanelColumns, a.width - column);
      for (int first = begin; first < end; first += kPanelRows) {
        const int rows = std::min(kPanelRows, end - first);
        panel_of(bundles.neuron(first) + layout.down, layout.bytes, layout.down_scales, rows, column, columns, panel);
        kernels.columns(panel, rows, columns, h + (first - begin), stride, n, out + column, a.width);
      }
      if (end == a.ffn) finish(out, a.width, column, columns, n, input.residual);
    });
  }
}

void SparseFfn::finish(const float* out, size_t stride, int first_column, int columns, int n, float* residual) const {
  for (int t = 0; t < n; ++t) {
    float* x = residual + static_cast<size_t>(t) * a.width + first_column;
    if (down_bias) add_bias(x, down_bias + first_column, columns);
    compute.kernels.add(x, out + t * stride + first_column, columns);
  }
}

// Which neurons are active for each token.
void SparseFfn::predict(const FfnInput& input, FfnBuffers& buffers) {
  const int n = input.tokens;
  std::vector<TokenNeurons>& tokens = buffers.tokens;
  if (tokens.size() < static_cast<size_t>(n)) tokens.resize(n);
  // nothing is allocated on the pool's threads
  for (int t = 0; t < n; ++t) tokens[t].reserve(a.ffn);
  const auto rank = static_cast<size_t>(fc1.rows), ffn = static_cast<size_t>(a.ffn);
  if (input.all_neurons) {
    for (int t = 0; t < n; ++t) {
      tokens[t].ids.resize(ffn);
      std::iota(tokens[t].ids.begin(), tokens[t].ids.end(), 0);
      tokens[t].h.resize(ffn);
    }
    return;
  }
  float* hidden = buffers.predictor.data();
  float* scores = buffers.gate.data();
  const Operand x = compute.prepare(input.predictor, a.width, n, fc1.quantized(), buffers.predictor_activations.data());
  compute.multiply({{&fc1, hidden, rank}}, x, n, [&](size_t, int row, int rows) {
    for (int t = 0; t < n; ++t) compute.kernels.relu(hidden + t * rank + row, rows);
  });
  const Operand y = compute.prepare(hidden, fc1.rows, n, fc2.quantized(), buffers.predictor_activations.data());
  compute.multiply({{&fc2, scores, ffn}}, y, n);
  compute.each_token(n, [&](int t) {
    TokenNeurons& token = tokens[t];
    token.ids.resize(ffn + 16);
    token.ids.resize(compute.kernels.compact(scores + t * ffn, a.ffn, a.threshold, token.ids.data()));
    token.h.resize(token.ids.size());
  });
}

// h of `count` active neurons of one token.
void SparseFfn::neurons(const Operand& operand, int token, const int32_t* ids, int count, bool ask_down, float* h) const {
  const BundleLayout& layout = bundles.layout;
  const Kernels& kernels = compute.kernels;
  const Operand x = operand.from(token);
  const uint8_t* rows[kRangeNeurons];
  for (int i = 0; i < count; ++i) rows[i] = bundles.neuron(ids[i]) + layout.gate;
  const DownRow down{layout.down - layout.gate, ask_down ? layout.bytes - layout.down : 0};
  if (a.gated) {
    if (layout.type == TensorType::kQ4_0) {
      kernels.gated_q4_0(rows, count, layout.up, layout.gate_scales, layout.up_scales, x.layout, x.activations, a.relu_up,
                         down, h);
    } else {
      const auto gated = layout.type == TensorType::kF16 ? kernels.gated_f16 : kernels.gated_f32;
      gated(rows, count, layout.up, a.width, x.x, a.relu_up, down, h);
    }
    return;
  }
  if (layout.type == TensorType::kQ4_0) {
    kernels.gather_q4_0(rows, count, layout.up_scales, x.layout, x.activations, h);
  } else {
    const auto gather = layout.type == TensorType::kF16 ? kernels.gather_f16 : kernels.gather_f32;
    gather(rows, count, a.width, x.x, h);
  }
  for (int i = 0; up_bias && i < count; ++i) h[i] += up_bias[ids[i]];
  kernels.relu(h, count);
}

void SparseFfn::run_sparse(const FfnInput& input, const Operand& operand, FfnBuffers& buffers) {
  const int n = input.tokens;
  std::vector<TokenNeurons>& tokens = buffers.tokens;
  const BundleLayout& layout = bundles.layout;
  const Kernels& kernels = compute.kernels;
  predict(input, buffers);
  if (n == 1) {
    TokenNeurons& token = tokens[0];
    const auto count = static_cast<int>(token.ids.size());
    compute.pool.run((count + kListChunk - 1) / kListChunk, [&](int chunk, int) {
      const int from = chunk * kListChunk;
      neurons(operand, 0, token.ids.data() + from, std::min(kListChunk, count - from), true, token.h.data() + from);
    });
  } else {
    // by ranges of neurons: what one token has read, the next finds in the cache
    compute.pool.run((a.ffn + kRangeNeurons - 1) / kRangeNeurons, [&](int chunk, int) {
      const auto range = [&](int t) {
        const std::vector<int32_t>& ids = tokens[t].ids;
        const auto begin = std::lower_bound(ids.begin(), ids.end(), chunk * kRangeNeurons);
        const auto end = std::lower_bound(begin, ids.end(), (chunk + 1) * kRangeNeurons);
        return std::pair<int, int>(begin - ids.begin(), end - ids.begin());
      };
      std::pair<int, int> here = range(0);
      for (int t = 0; t < n; ++t) {
        const std::pair<int, int> next = t + 1 < n ? range(t + 1) : std::pair<int, int>();
        for (int i = next.first; i < next.second; ++i) ask_for(bundles.neuron(tokens[t + 1].ids[i]), layout.down);
        TokenNeurons& token = tokens[t];
        neurons(operand, t, token.ids.data() + here.first, here.second - here.first, false, token.h.data() + here.first);
        here = next;
      }
    });
  }
  const int groups = (a.ffn + kCoefficientNeurons - 1) / kCoefficientNeurons;
  compute.each_token(n, [&](int t) {
    TokenNeurons& token = tokens[t];
    token.rows.clear();
    token.weights.clear();
    token.group_begin.assign(groups + 1, 0);
    int group = 0;
    for (size_t i = 0; i < token.ids.size(); ++i) {
      if (token.h[i] == 0.0f) continue;
      while (group < token.ids[i] / kCoefficientNeurons) token.group_begin[++group] = static_cast<int>(token.rows.size());
      token.rows.push_back(bundles.neuron(token.ids[i]) + layout.down);
      token.weights.push_back(token.h[i]);
    }
    while (group < groups) token.group_begin[++group] = static_cast<int>(token.rows.size());
  });
  for (int t = 0; t < n; ++t) {
    active += tokens[t].ids.size();
    total += a.ffn;
  }
  const bool quantized = layout.type == TensorType::kQ4_0;
  const int padded = layout.padded_width();
  // wide enough that a row's part is more than a few lines, narrow enough for every thread to have one
  const int unit = quantized ? 128 : 64;
  const int wanted = std::clamp(padded / compute.pool.size(), unit, 512);
  const int columns = static_cast<int>(round_up(wanted, unit));
  float* out = buffers.out;
  std::fill_n(out, static_cast<size_t>(n) * padded, 0.0f);
  compute.pool.run((padded + columns - 1) / columns, [&](int chunk, int) {
    const int column = chunk * columns, here = std::min(columns, padded - column);
    const size_t offset = static_cast<size_t>(column) * layout.element_bytes();
    const auto add = [&](int t, int begin, int end) {
      const TokenNeurons& token = tokens[t];
      const uint8_t* const* rows = token.rows.data() + begin;
      const float* weights = token.weights.data() + begin;
      float* y = out + static_cast<size_t>(t) * padded;
      if (quantized) {
        kernels.accumulate_q4_0(rows, layout.down_scales, weights, end - begin, column / 128, here / 128, y);
      } else {
        const auto accumulate = layout.type == TensorType::kF16 ? kernels.accumulate_f16 : kernels.accumulate_f32;
        accumulate(rows, offset, weights, end - begin, here, y + column);
      }
    };
    if (n == 1 && !quantized) {
      add(0, 0, static_cast<int>(tokens[0].rows.size()));
    } else {
      // a group's rows are asked for while the group before is added
      const size_t part = quantized ? static_cast<size_t>(column) / 2 : offset;
      const size_t part_bytes =
          quantized ? static_cast<size_t>(here) / 2 : static_cast<size_t>(here) * layout.element_bytes();
      for (int group = 0; group < groups; ++group) {
        for (int t = 0; t < n; ++t) {
          const TokenNeurons& token = tokens[t];
          if (group + 1 < groups && n > 1) {
            for (int i = token.group_begin[group + 1]; i < token.group_begin[group + 2]; ++i) {
              ask_for(token.rows[i] + part, part_bytes);
              if (quantized) ask_for(token.rows[i] + layout.down_scales + column / 16, static_cast<size_t>(here) / 16);
            }
          }
          add(t, token.group_begin[group], token.group_begin[group + 1]);
        }
      }
    }
    finish(out, padded, column, std::min(here, a.width - column), n, input.residual);
  });
}

}  // namespace powerinfer
