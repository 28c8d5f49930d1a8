// Small models as files in memory, written byte by byte as the format says; tests change what they hold before that.
#pragma once

#include <algorithm>
#include <map>
#include <variant>

#include "reference.h"

namespace powerinfer::testing {

struct ModelShape {
  std::string architecture = "llama";
  bool sparse = true;
  TensorType type = TensorType::kF16;
  int layers = 2, width = 64, heads = 4, kv_heads = 2, ffn = 80, vocabulary = 70, context = 64;
};

struct ModelFile {
  struct Tensor {
    TensorType type;
    std::vector<uint64_t> shape;
    std::vector<uint8_t> bytes;
  };
  using Value = std::variant<uint32_t, float, std::string, uint64_t, int32_t>;

  bool sparse = true;
  std::map<std::string, Value> values;
  std::map<std::string, Tensor> tensors;

  std::vector<uint8_t> bytes() const {
    std::vector<uint8_t> out;
    const auto raw = [&](const void* from, size_t n) {
      const auto* begin = static_cast<const uint8_t*>(from);
      out.insert(out.end(), begin, begin + n);
    };
    const auto number = [&](auto value) { raw(&value, sizeof value); };
    const auto string = [&](const std::string& text) {
      number(uint64_t{text.size()});
      raw(text.data(), text.size());
    };
    raw(sparse ? "PWRI" : "GGUF", 4);
    number(uint32_t{3});
    number(uint64_t{tensors.size()});
    number(uint64_t{values.size()});
    for (const auto& [key, value] : values) {
      constexpr uint32_t kTypes[] = {4, 6, 8, 10, 5};
      string(key);
      number(kTypes[value.index()]);
      std::visit(
          [&](const auto& held) {
            if constexpr (std::is_same_v<std::decay_t<decltype(held)>, std::string>) {
              string(held);
            } else {
              number(held);
            }
          },
          value);
    }
    uint64_t offset = 0;
    for (const auto& [name, tensor] : tensors) {
      string(name);
      number(static_cast<uint32_t>(tensor.shape.size()));
      for (const uint64_t n : tensor.shape) number(n);
      number(static_cast<uint32_t>(tensor.type));
      number(offset);
      offset += (tensor.bytes.size() + 31) / 32 * 32;
    }
    out.resize((out.size() + 31) / 32 * 32);
    for (const auto& [name, tensor] : tensors) {
      raw(tensor.bytes.data(), tensor.bytes.size());
      out.resize((out.size() + 31) / 32 * 32);
    }
    return out;
  }
};

// fp32 numbers in a tensor of that type; quantized ones are rounded to Q4_0.
inline std::vector<uint8_t> encode(TensorType type, const std::vector<double>& values) {
  const BlockSize block = block_size(type);
  std::vector<uint8_t> bytes(values.size() / block.elements * block.bytes);
  for (size_t b = 0; b < values.size() / block.elements; ++b) {
    uint8_t* at = bytes.data() + b * block.bytes;
    const double* from = values.data() + b * block.elements;
    if (type == TensorType::kF32) {
      const auto value = static_cast<float>(*from);
      std::memcpy(at, &value, sizeof value);
    } else if (type == TensorType::kF16) {
      put_half(at, static_cast<float>(*from));
    } else {
      double largest = 1e-9;
      for (int i = 0; i < 32; ++i) largest = std::max(largest, std::abs(from[i]));
      put_half(at, static_cast<float>(largest / 7));
      const double scale = half_value(at);
      const auto code = [&](int i) { return std::clamp(static_cast<int>(std::lround(from[i] / scale)) + 8, 0, 15); };
      for (int i = 0; i < 16; ++i) at[2 + i] = static_cast<uint8_t>(code(i) | code(i + 16) << 4);
    }
  }
  return bytes;
}

// A model of random weights. A sparse one's predictors are exact but for rounding, which the threshold leaves room for: the
// projection that decides a neuron reads the residual without its mean, through a norm whose weights are 1, and
// fc2 relu(fc1 x) with fc1 = [I; -I] and fc2 = [C, -C] is C x. Predictors are F32 whatever the type of the rest.
inline ModelFile make_model(const ModelShape& shape, uint32_t seed = 1) {
  Random random(seed);
  ModelFile file;
  file.sparse = shape.sparse;
  const std::string& a = shape.architecture;
  const bool gated = a == "llama" || a == "bamboo", opt = a == "opt";
  const int n = shape.width, head = n / shape.heads, kv = shape.kv_heads * head;
  const auto key = [&](const char* name) { return a + "." + name; };
  file.values["general.architecture"] = a;
  file.values[key("block_count")] = static_cast<uint32_t>(shape.layers);
  file.values[key("embedding_length")] = static_cast<uint32_t>(n);
  file.values[key("feed_forward_length")] = static_cast<uint32_t>(shape.ffn);
  file.values[key("attention.head_count")] = static_cast<uint32_t>(shape.heads);
  file.values[key("attention.head_count_kv")] = static_cast<uint32_t>(shape.kv_heads);
  file.values[key("context_length")] = static_cast<uint32_t>(shape.context);
  file.values[key(gated ? "attention.layer_norm_rms_epsilon" : "attention.layer_norm_epsilon")] = 1e-5f;
  if (!opt) file.values[key("rope.freq_base")] = 10000.0f;
  if (shape.sparse) file.values["powerinfer.sparse_threshold"] = shape.type == TensorType::kQ4_0 ? -0.2f : -1e-3f;

  const auto normals = [&](size_t count, double scale) {
    std::vector<double> values(count);
    for (double& value : values) value = scale * random.normal();
    return values;
  };
  const auto add = [&](const std::string& name, TensorType type, int columns, int rows, const std::vector<double>& values) {
    std::vector<uint64_t> dimensions{static_cast<uint64_t>(columns)};
    if (rows) dimensions.push_back(static_cast<uint64_t>(rows));
    file.tensors[name] = {type, dimensions, encode(type, values)};
  };
  const auto matrix = [&](const std::string& name, int columns, int rows) {
    add(name, shape.type, columns, rows, normals(static_cast<size_t>(columns) * rows, 1 / std::sqrt(columns)));
  };
  const auto vector = [&](const std::string& name, int size, double mean, double scale) {
    auto values = normals(size, scale);
    for (double& value : values) value += mean;
    add(name, TensorType::kF32, size, 0, values);
  };
  const auto norm = [&](const std::string& name, bool plain) {
    vector(name + ".weight", n, 1, plain ? 0 : 0.1);
    if (!gated) vector(name + ".bias", n, 0, plain ? 0 : 0.1);
  };

  add("token_embd.weight", shape.type, n, shape.vocabulary, normals(static_cast<size_t>(n) * shape.vocabulary, 1));
  if (opt) {
    add("position_embd.weight", TensorType::kF16, n, shape.context + 2,
        normals(static_cast<size_t>(n) * (shape.context + 2), 0.3));
  }
  norm("output_norm", false);
  if (!opt) matrix("output.weight", n, shape.vocabulary);
  for (int i = 0; i < shape.layers; ++i) {
    const std::string blk = "blk." + std::to_string(i) + ".";
    norm(blk + "attn_norm", a == "falcon");
    if (a == "falcon") {
      matrix(blk + "attn_qkv.weight", n, n + 2 * kv);
    } else {
      matrix(blk + "attn_q.weight", n, n);
      matrix(blk + "attn_k.weight", n, kv);
      matrix(blk + "attn_v.weight", n, kv);
      norm(blk + "ffn_norm", true);
    }
    matrix(blk + "attn_output.weight", n, n);
    if (opt) {
      for (const char* name : {"attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"}) {
        vector(blk + name, std::string(name) == "attn_k.bias" || std::string(name) == "attn_v.bias" ? kv : n, 0, 0.1);
      }
      vector(blk + "ffn_up.bias", shape.ffn, 0, 0);
      vector(blk + (shape.sparse ? "ffn_down_t.bias" : "ffn_down.bias"), n, 0, 0.1);
    }
    const std::string deciding = blk + (gated ? "ffn_gate.weight" : "ffn_up.weight");
    if (gated) matrix(blk + "ffn_gate.weight", n, shape.ffn);
    matrix(blk + "ffn_up.weight", n, shape.ffn);
    if (!shape.sparse) {
      matrix(blk + "ffn_down.weight", shape.ffn, n);
      continue;
    }
    matrix(blk + "ffn_down_t.weight", n, shape.ffn);
    const auto decider = decode_rows(shape.type, file.tensors[deciding].bytes);
    std::vector<double> fc1(static_cast<size_t>(2 * n) * n), fc2(static_cast<size_t>(2 * n) * shape.ffn);
    for (int r = 0; r < n; ++r) fc1[r * n + r] = 1, fc1[(n + r) * n + r] = -1;
    for (int r = 0; r < shape.ffn; ++r) {
      double mean = 0;
      for (int c = 0; c < n && !gated; ++c) mean += decider[r * n + c] / n;
      for (int c = 0; c < n; ++c) {
        fc2[r * 2 * n + c] = decider[r * n + c] - mean;
        fc2[r * 2 * n + n + c] = mean - decider[r * n + c];
      }
    }
    add(blk + "fc1.weight", TensorType::kF32, n, 2 * n, fc1);
    add(blk + "fc2.weight", TensorType::kF32, 2 * n, shape.ffn, fc2);
  }
  return file;
}

}  // namespace powerinfer::testing
