#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <new>
#include <numeric>
#include <set>

#include "architecture.h"
#include "buffers.h"
#include "compute.h"
#include "errors.h"
#include "ffn.h"
#include "kv_cache.h"

namespace powerinfer {

namespace {

struct Norm {
  const float* weight = nullptr;  // [width]
  const float* bias = nullptr;    // of a LayerNorm
};

struct Layer {
  Norm attention_norm, ffn_norm, attention_norm_2;  // the last one: falcon with two norms, read by its attention
  Matrix q, k, v, qkv, output;
  const float *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *output_bias = nullptr;
  std::unique_ptr<Ffn> ffn;
};

std::string blk(int layer, const char* name) { return "blk." + std::to_string(layer) + "." + name; }

// Copies a file's tensors for the kernels: first the plan of every tensor, then one piece of memory, then the copies.
class Loader {
 public:
  Loader(const GgufFile& file, const Architecture& a, ThreadPool& pool) : file_(file), a_(a), pool_(pool) {}

  // Each runs twice: the first time to count bytes.
  template <typename Fill>
  Memory run(Fill fill) {
    fill(*this);
    refuse_unused();
    const uint64_t available = available_memory();
    if (bytes_ > available) {
      throw Error(ErrorKind::kMemory, file_.name() + " needs " + std::to_string(bytes_ >> 20) + " MiB for its weights and " +
                                          std::to_string(available >> 20) + " MiB are available; take a smaller model");
    }
    memory_ = Memory(bytes_, "the weights of " + file_.name());
    counting_ = false;
    fill(*this);
    return std::move(memory_);
  }

  Matrix matrix(const std::string& name, int columns, int rows) {
    const GgufTensor& tensor = use(name, {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)});
    if (tensor.bytes == 0) throw model_error(file_.name() + " has tensor \"" + name + "\" without any numbers");
    if (counting_) {
      bytes_ += round_up(matrix_bytes(file_, tensor), 64);
      return {};
    }
    const Matrix matrix = copy_matrix(tensor, memory_, pool_, copied_);
    file_.release(tensor.data, tensor.bytes);
    return matrix;
  }
  Matrix matrix(const std::string& name, int columns) {  // any number of rows
    const GgufTensor* tensor = file_.find(name);
    const bool is_matrix = tensor && tensor->shape.size() == 2;
    return matrix(name, columns, is_matrix ? static_cast<int>(std::min<uint64_t>(tensor->shape[1], 1 << 30)) : 0);
  }

  const float* vector(const std::string& name, int size) {
    const GgufTensor& tensor = use(name, {static_cast<uint64_t>(size)});
    if (tensor.type != TensorType::kF32 && tensor.type != TensorType::kF16) {
      throw model_error(file_.name() + " has tensor \"" + name + "\" of " + type_name(tensor.type) +
                        "; it can be F32 or F16");
    }
    if (counting_) {
      bytes_ += round_up(size_t{4} * size, 64);
      return nullptr;
    }
    auto* out = reinterpret_cast<float*>(memory_.take(size_t{4} * size));
    Matrix row;
    row.type = tensor.type, row.rows = 1, row.columns = size, row.data = tensor.data, row.unit_bytes = tensor.bytes;
    dequantize_row(row, 0, out);
    return out;
  }
  const float* optional_vector(const std::string& name, int size) { return file_.find(name) ? vector(name, size) : nullptr; }
  Norm norm(const std::string& name) {
    return {vector(name + ".weight", a_.width), a_.layer_norm ? vector(name + ".bias", a_.width) : nullptr};
  }

  Bundles bundles(const std::string& gate, const std::string& up, const std::string& down) {
    const auto width = static_cast<uint64_t>(a_.width), ffn = static_cast<uint64_t>(a_.ffn);
    const GgufTensor* gate_tensor = a_.gated ? &use(gate, {width, ffn}) : nullptr;
    const GgufTensor& up_tensor = use(up, {width, ffn});
    const GgufTensor& down_tensor = use(down, {width, ffn});
    const BundleLayout layout = bundle_layout(file_, gate_tensor, up_tensor, down_tensor);
    if (counting_) {
      bytes_ += round_up(layout.bytes * a_.ffn, 64);
      return {};
    }
    const Bundles bundles = copy_bundles(layout, gate_tensor, up_tensor, down_tensor, memory_, pool_, copied_);
    for (const GgufTensor* tensor : {gate_tensor, &up_tensor, &down_tensor}) {
      if (tensor) file_.release(tensor->data, tensor->bytes);
    }
    return bundles;
  }

  bool has(const std::string& name) const { return file_.find(name) != nullptr; }
  int rows(const std::string& name) const { return static_cast<int>(file_.find(name)->shape.back()); }

 private:
  const GgufTensor& use(const std::string& name, std::initializer_list<uint64_t> shape) {
    const GgufTensor& tensor = file_.tensor(name, shape);
    used_.insert(&tensor);
    return tensor;
  }
  // A layer's weights that nothing here reads (biases, experts, norms of keys) would be missing from its output.
  void refuse_unused() const {
    for (const GgufTensor& tensor : file_.tensors()) {
      const std::string& name = tensor.name;
      const bool weight = name.starts_with("blk.") && (name.ends_with(".weight") || name.ends_with(".bias"));
      // a predictor changes no output, and old files carry the angles of rotary embeddings
      const bool harmless =
          name.ends_with(".fc1.weight") || name.ends_with(".fc2.weight") || name.ends_with(".attn_rot_embd.weight");
      if (weight && !harmless && !used_.contains(&tensor)) {
        throw model_error(file_.name() + " has tensor \"" + name + "\", which a " + a_.name + " model of " +
                          std::to_string(a_.layers) + " layers cannot use here");
      }
    }
  }

  const GgufFile& file_;
  const Architecture& a_;
  ThreadPool& pool_;
  std::set<const GgufTensor*> used_;
  // piece by piece: a whole layer of the file would count beside its copy
  const Copied copied_ = [this](const uint8_t* from, uint64_t bytes) { file_.release(from, bytes); };
  bool counting_ = true;
  size_t bytes_ = 0;
  Memory memory_;
};

int threads_of(const ModelOptions& options) {
  if (options.threads < 0 || options.threads > 1024) {
    throw Error(ErrorKind::kUsage, "--threads is " + std::to_string(options.threads) + "; 1 to 1024, or 0 for every core");
  }
  return options.threads ? options.threads : usable_cores();
}

class TransformerModel : public Model {
 public:
  TransformerModel(const GgufFile& file, const ModelOptions& options)
      : options_(options),
        a_(Architecture::read(file, options.activation)),
        pool_(threads_of(options)),
        kernels_(kernels(parse_isa(options.isa))),
        compute_{kernels_, pool_} {
    check_options();
    info_.sparse = file.sparse();
    Loader loader(file, a_, pool_);
    memory_ = loader.run([&](Loader& load) { load_weights(load); });
    fill_info(file);
    // addresses have 47 bits
    if (4.0 * a_.layers * options_.slots * info_.context * a_.kv_heads * a_.head_size > 0x1p46) {
      throw Error(ErrorKind::kMemory, "no machine has memory for the KV cache of " + std::to_string(options_.slots) + " x " +
                                          std::to_string(info_.context) + " tokens; take a smaller --context or --slots");
    }
    const KvShape shape{a_.layers, options_.slots, info_.context, a_.heads, a_.kv_heads, a_.head_size};
    kv_ = options_.kv == KvType::kPacked ? make_packed_cache(shape, compute_) : make_f16_cache(shape, compute_);
    info_.kv_bytes_per_token = kv_->bytes(info_.context) / info_.context;
    held_.assign(options_.slots, 0);
    make_buffers();
  }

  const ModelInfo& info() const override { return info_; }
  void forward(const std::vector<Step>& steps) override;
  int truncate(int slot, int count) override {
    if (count < held_[slot]) held_[slot] = kv_->truncate(slot, count);
    return held_[slot];
  }
  Activity activity() const override {
    Activity sum;
    for (const Layer& layer : layers_) sum.active += layer.ffn->active, sum.total += layer.ffn->total;
    return sum;
  }
  uint64_t kv_bytes() const override {
    return std::accumulate(held_.begin(), held_.end(), uint64_t{0},
                           [&](uint64_t sum, int n) { return sum + kv_->bytes(n); });
  }

 private:
  void check_options() const {
    const auto check = [](const char* flag, int value, int least, int most) {
      if (value < least || value > most) {
        throw Error(ErrorKind::kUsage, std::string(flag) + " is " + std::to_string(value) + "; " + std::to_string(least) +
                                           " to " + std::to_string(most) + " are possible");
      }
    };
    check("--slots", options_.slots, 1, 1024);
    check("--batch", options_.batch, options_.slots, 8192);
    check("--context", options_.context, 0, a_.context);
  }

  void load_weights(Loader& load);
  std::unique_ptr<Ffn> load_ffn(Loader& load, int layer);
  void fill_info(const GgufFile& file);
  void make_buffers();

  // Parts of a pass over n tokens
  void gather(const std::vector<Step>& steps);
  void embed(int n);
  void rotations(int n);
  void rotate(float* x, int heads, size_t stride, int token) const;
  void normalize(const Norm& norm, const float* x, float* y) const;
  void normalize(const Norm& norm, const float* x, int n, float* y) const;
  void attention(const Layer& layer, int index, int n);
  void logits(int n);

  ModelOptions options_;
  Architecture a_;
  ThreadPool pool_;
  const Kernels& kernels_;
  Compute compute_;
  ModelInfo info_;
  Memory memory_;

  Matrix embedding_, output_, positions_;
  Norm output_norm_;
  std::vector<float> frequencies_;  // [rope_size / 2] angle of one position
  std::vector<Layer> layers_;
  std::unique_ptr<KvCache> kv_;
  std::vector<int> held_;

  // The pass under way: prompt tokens first
  struct Entry {
    int32_t token;
    int position;
    float* logits;
  };
  std::vector<Entry> entries_;
  std::vector<KvTokens> spans_;
  int dense_tokens_ = 0;

  PassBuffers buffers_;
};

void TransformerModel::load_weights(Loader& load) {
  const int q_size = a_.heads * a_.head_size, kv_size = a_.kv_heads * a_.head_size;
  embedding_ = load.matrix("token_embd.weight", a_.width, a_.vocabulary);
  if (a_.learned_positions) positions_ = load.matrix("position_embd.weight", a_.width);
  output_norm_ = load.norm("output_norm");
  output_ = load.has("output.weight") ? load.matrix("output.weight", a_.width, a_.vocabulary) : embedding_;
  frequencies_.clear();
  if (a_.rope != Rope::kNone) {
    const int half = a_.rope_size / 2;
    const float* factors = load.optional_vector("rope_freqs.weight", half);
    for (int i = 0; i < half; ++i) {
      const double exponent = -2.0 * i / a_.rope_size;
      frequencies_.push_back(
          static_cast<float>(std::pow(a_.rope_base, exponent) * a_.rope_scale / (factors ? factors[i] : 1.0f)));
    }
  }
  layers_.clear();
  for (int i = 0; i < a_.layers; ++i) {
    Layer layer;
    layer.attention_norm = load.norm(blk(i, "attn_norm"));
    if (a_.fused_qkv) {
      layer.qkv = load.matrix(blk(i, "attn_qkv.weight"), a_.width, q_size + 2 * kv_size);
      if (load.has(blk(i, "attn_norm_2.weight"))) layer.attention_norm_2 = load.norm(blk(i, "attn_norm_2"));
    } else {
      layer.q = load.matrix(blk(i, "attn_q.weight"), a_.width, q_size);
      layer.k = load.matrix(blk(i, "attn_k.weight"), a_.width, kv_size);
      layer.v = load.matrix(blk(i, "attn_v.weight"), a_.width, kv_size);
    }
    layer.output = load.matrix(blk(i, "attn_output.weight"), q_size, a_.width);
    if (a_.biases) {
      layer.q_bias = load.vector(blk(i, "attn_q.bias"), q_size);
      layer.k_bias = load.vector(blk(i, "attn_k.bias"), kv_size);
      layer.v_bias = load.vector(blk(i, "attn_v.bias"), kv_size);
      layer.output_bias = load.vector(blk(i, "attn_output.bias"), a_.width);
    }
    if (!a_.parallel) layer.ffn_norm = load.norm(blk(i, "ffn_norm"));
    layer.ffn = load_ffn(load, i);
    layers_.push_back(std::move(layer));
  }
}

std::unique_ptr<Ffn> TransformerModel::load_ffn(Loader& load, int i) {
  const float* up_bias = a_.biases ? load.vector(blk(i, "ffn_up.bias"), a_.ffn) : nullptr;
  if (!info_.sparse) {
    auto ffn = std::make_unique<DenseFfn>(a_, compute_);
    if (a_.gated) ffn->gate = load.matrix(blk(i, "ffn_gate.weight"), a_.width, a_.ffn);
    ffn->up = load.matrix(blk(i, "ffn_up.weight"), a_.width, a_.ffn);
    ffn->down = load.matrix(blk(i, "ffn_down.weight"), a_.ffn, a_.width);
    ffn->up_bias = up_bias;
    if (a_.biases) ffn->down_bias = load.vector(blk(i, "ffn_down.bias"), a_.width);
    return ffn;
  }
  auto ffn = std::make_unique<SparseFfn>(a_, compute_);
  ffn->bundles = load.bundles(blk(i, "ffn_gate.weight"), blk(i, "ffn_up.weight"), blk(i, "ffn_down_t.weight"));
  ffn->fc1 = load.matrix(blk(i, "fc1.weight"), a_.width);
  ffn->fc2 = load.matrix(blk(i, "fc2.weight"), load.rows(blk(i, "fc1.weight")), a_.ffn);
  ffn->up_bias = up_bias;
  if (a_.biases) ffn->down_bias = load.vector(blk(i, "ffn_down_t.bias"), a_.width);
  return ffn;
}

void TransformerModel::fill_info(const GgufFile& file) {
  info_.name = file.get_string("general.name", "");
  info_.architecture = a_.name;
  info_.activation = activation_name(a_.activation);
  info_.isa = isa_name(kernels_.isa);
  info_.layers = a_.layers;
  info_.width = a_.width;
  info_.heads = a_.heads;
  info_.kv_heads = a_.kv_heads;
  info_.head_size = a_.head_size;
  info_.ffn = a_.ffn;
  info_.vocabulary = a_.vocabulary;
  info_.context = options_.context ? options_.context : a_.context;
  info_.slots = options_.slots;
  info_.threads = pool_.size();
  info_.weight_bytes = memory_.size();
  info_.matrix_bytes = output_.bytes();
  for (const Layer& layer : layers_) {
    for (const Matrix* matrix : {&layer.q, &layer.k, &layer.v, &layer.qkv, &layer.output})
      info_.matrix_bytes += matrix->bytes();
    layer.ffn->count_bytes(info_);
  }
}

void TransformerModel::make_buffers() {
  int rank = 0;
  for (const Layer& layer : layers_) {
    if (const auto* sparse = dynamic_cast<const SparseFfn*>(layer.ffn.get())) rank = std::max(rank, sparse->fc1.rows);
  }
  buffers_ = PassBuffers({.width = a_.width,
                          .ffn = a_.ffn,
                          .heads = a_.heads,
                          .kv_heads = a_.kv_heads,
                          .head_size = a_.head_size,
                          .vocabulary = a_.vocabulary,
                          .rope_size = 2 * static_cast<int>(frequencies_.size()),
                          .rank = rank,
                          .batch = options_.batch,
                          .slots = options_.slots,
                          .parallel = a_.parallel,
                          .fused_qkv = a_.fused_qkv,
                          .hidden_bytes = options_.hidden_bytes});
}

void TransformerModel::gather(const std::vector<Step>& steps) {
  entries_.clear();
  spans_.clear();
  const auto take = [&](const Step& step) {
    spans_.push_back({step.slot, step.position, static_cast<int>(entries_.size()), step.count});
    for (int t = 0; t < step.count; ++t) {
      const bool wanted = step.logits && (step.all_logits || t == step.count - 1);
      float* logits = wanted ? step.logits + (step.all_logits ? static_cast<size_t>(t) * a_.vocabulary : 0) : nullptr;
      entries_.push_back({step.tokens[t], step.position + t, logits});
    }
    held_[step.slot] = step.position + step.count;
  };
  const auto dense = [&](const Step& step) { return step.prompt && options_.prompt_ffn == FfnMode::kDense; };
  int64_t tokens = 0;
  std::set<int> slots;
  for (const Step& step : steps) {
    if (step.slot < 0 || step.slot >= options_.slots || step.count < 1 || step.position != held_[step.slot] ||
        step.count > info_.context - step.position || !slots.insert(step.slot).second) {
      throw Error(ErrorKind::kFailed, "a forward pass was asked for tokens that do not continue their slot");
    }
    tokens += step.count;
    if (tokens > options_.batch) {
      throw Error(ErrorKind::kFailed, "a forward pass was asked for more tokens than its batch holds");
    }
    for (int t = 0; t < step.count; ++t) {
      if (step.tokens[t] < 0 || step.tokens[t] >= a_.vocabulary) {
        throw request_error("token id " + std::to_string(step.tokens[t]) + " is outside the vocabulary of " +
                            std::to_string(a_.vocabulary));
      }
    }
  }
  for (const Step& step : steps) {
    if (dense(step)) take(step);
  }
  dense_tokens_ = static_cast<int>(entries_.size());
  for (const Step& step : steps) {
    if (!dense(step)) take(step);
  }
}

void TransformerModel::embed(int n) {
  compute_.each_token(n, [&](int t) {
    float* x = buffers_.x.data() + static_cast<size_t>(t) * a_.width;
    dequantize_row(embedding_, entries_[t].token, x);
    if (a_.learned_positions) {
      float* position = buffers_.normed.data() + static_cast<size_t>(t) * a_.width;
      dequantize_row(positions_, entries_[t].position + kLearnedPositionsOffset, position);
      kernels_.add(x, position, a_.width);
    }
  });
}

void TransformerModel::rotations(int n) {
  const size_t half = frequencies_.size();
  compute_.each_token(n, [&](int t) {
    for (size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(entries_[t].position) * frequencies_[i];
      buffers_.cosine[t * half + i] = std::cos(angle);
      buffers_.sine[t * half + i] = std::sin(angle);
    }
  });
}

void TransformerModel::rotate(float* x, int heads, size_t stride, int t) const {
  const size_t half = frequencies_.size();
  const float* cosine = buffers_.cosine.data() + t * half;
  const float* sine = buffers_.sine.data() + t * half;
  for (int head = 0; head < heads; ++head) {
    float* at = x + t * stride + static_cast<size_t>(head) * a_.head_size;
    for (size_t i = 0; i < half; ++i) {
      float& first = a_.rope == Rope::kInterleaved ? at[2 * i] : at[i];
      float& second = a_.rope == Rope::kInterleaved ? at[2 * i + 1] : at[i + half];
      const float a = first, b = second;
      first = a * cosine[i] - b * sine[i];
      second = a * sine[i] + b * cosine[i];
    }
  }
}

void TransformerModel::normalize(const Norm& norm, const float* x, float* y) const {
  if (a_.layer_norm) {
    kernels_.layer_norm(x, norm.weight, norm.bias, a_.width, a_.epsilon, y);
  } else {
    kernels_.rms_norm(x, norm.weight, a_.width, a_.epsilon, y);
  }
}

void TransformerModel::normalize(const Norm& norm, const float* x, int n, float* y) const {
  const auto width = static_cast<size_t>(a_.width);
  compute_.each_token(n, [&](int t) { normalize(norm, x + t * width, y + t * width); });
}

// x_ += attention(normed_)
void TransformerModel::attention(const Layer& layer, int index, int n) {
  const auto q_size = static_cast<size_t>(a_.heads) * a_.head_size,
             kv_size = static_cast<size_t>(a_.kv_heads) * a_.head_size;
  const bool quantized = layer.q.quantized() || layer.k.quantized() || layer.v.quantized() || layer.qkv.quantized();
  const Operand input = compute_.prepare(buffers_.normed.data(), a_.width, n, quantized, buffers_.activations.data());
  if (a_.fused_qkv) {
    const size_t all = q_size + 2 * kv_size;
    compute_.multiply({{&layer.qkv, buffers_.qkv.data(), all}}, input, n);
    compute_.each_token(n, [&](int t) {
      const float* from = buffers_.qkv.data() + t * all;
      std::copy_n(from, q_size, buffers_.q.data() + t * q_size);
      std::copy_n(from + q_size, kv_size, buffers_.k.data() + t * kv_size);
      std::copy_n(from + q_size + kv_size, kv_size, buffers_.v.data() + t * kv_size);
    });
  } else {
    compute_.multiply({{&layer.q, buffers_.q.data(), q_size},
                       {&layer.k, buffers_.k.data(), kv_size},
                       {&layer.v, buffers_.v.data(), kv_size}},
                      input, n);
  }
  compute_.each_token(n, [&](int t) {
    if (layer.q_bias) {
      kernels_.add(buffers_.q.data() + t * q_size, layer.q_bias, static_cast<int>(q_size));
      kernels_.add(buffers_.k.data() + t * kv_size, layer.k_bias, static_cast<int>(kv_size));
      kernels_.add(buffers_.v.data() + t * kv_size, layer.v_bias, static_cast<int>(kv_size));
    }
    rotate(buffers_.q.data(), a_.heads, q_size, t);
    rotate(buffers_.k.data(), a_.kv_heads, kv_size, t);
  });
  kv_->attend(index, spans_, buffers_.k.data(), buffers_.v.data(), buffers_.q.data(), buffers_.q.data());
  const Operand attended = compute_.prepare(buffers_.q.data(), static_cast<int>(q_size), n, layer.output.quantized(),
                                            buffers_.activations.data());
  const auto width = static_cast<size_t>(a_.width);
  compute_.multiply({{&layer.output, buffers_.normed.data(), width}}, attended, n, [&](size_t, int first, int count) {
    for (int t = 0; t < n; ++t) {
      float* y = buffers_.x.data() + t * width + first;
      kernels_.add(y, buffers_.normed.data() + t * width + first, count);
      if (layer.output_bias) kernels_.add(y, layer.output_bias + first, count);
    }
  });
}

void TransformerModel::forward(const std::vector<Step>& steps) {
  gather(steps);
  const auto n = static_cast<int>(entries_.size());
  if (n == 0) return;
  embed(n);
  rotations(n);
  const auto width = static_cast<size_t>(a_.width);
  for (int i = 0; i < a_.layers; ++i) {
    const Layer& layer = layers_[i];
    normalize(layer.attention_norm, buffers_.x.data(), n, buffers_.normed.data());
    FfnInput ffn{buffers_.normed.data(), buffers_.x.data(),
                 buffers_.x.data(),      n,
                 dense_tokens_,          options_.decode_ffn == FfnMode::kDense};
    if (a_.parallel) {
      std::copy_n(buffers_.x.data(), n * width, buffers_.layer_input.data());
      std::copy_n(buffers_.normed.data(), n * width, buffers_.ffn_normed.data());
      ffn.normed = buffers_.ffn_normed.data();
      ffn.predictor = buffers_.layer_input.data();
      if (layer.attention_norm_2.weight) normalize(layer.attention_norm_2, buffers_.x.data(), n, buffers_.normed.data());
      attention(layer, i, n);
    } else {
      attention(layer, i, n);
      normalize(layer.ffn_norm, buffers_.x.data(), n, buffers_.normed.data());
    }
    layer.ffn->run(ffn, buffers_.ffn);
  }
  kv_->append(spans_);
  logits(n);
}

void TransformerModel::logits(int n) {
  // tokens whose logits are asked for, side by side
  std::vector<int> wanted;
  for (int t = 0; t < n; ++t) {
    if (entries_[t].logits) wanted.push_back(t);
  }
  const auto width = static_cast<size_t>(a_.width), vocabulary = static_cast<size_t>(a_.vocabulary);
  for (size_t first = 0; first < wanted.size(); first += kLogitsTogether) {
    const auto count = static_cast<int>(std::min(kLogitsTogether, wanted.size() - first));
    compute_.each_token(count, [&](int i) {
      normalize(output_norm_, buffers_.x.data() + wanted[first + i] * width, buffers_.normed.data() + i * width);
    });
    const Operand input =
        compute_.prepare(buffers_.normed.data(), a_.width, count, output_.quantized(), buffers_.activations.data());
    if (count == 1) {
      compute_.multiply({{&output_, entries_[wanted[first]].logits, vocabulary}}, input, 1);
      continue;
    }
    buffers_.logits.resize(kLogitsTogether * vocabulary);
    compute_.multiply({{&output_, buffers_.logits.data(), vocabulary}}, input, count);
    for (int i = 0; i < count; ++i) {
      std::copy_n(buffers_.logits.data() + i * vocabulary, vocabulary, entries_[wanted[first + i]].logits);
    }
  }
}

}  // namespace

std::unique_ptr<Model> Model::load(const GgufFile& file, const ModelOptions& options) {
  try {
    return std::make_unique<TransformerModel>(file, options);
  } catch (const std::bad_alloc&) {
    throw Error(ErrorKind::kMemory, "not enough memory for " + file.name() + "; take a smaller model, --context or --slots");
  }
}

}  // namespace powerinfer
