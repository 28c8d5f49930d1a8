#include "architecture.h"

#include <algorithm>

#include "errors.h"

namespace powerinfer {

namespace {

Architecture known(const GgufFile& file) {
  Architecture a;
  a.name = file.get_string("general.architecture");
  if (a.name == "bamboo") {
    a.relu_up = true;
  } else if (a.name == "falcon") {
    a.layer_norm = a.parallel = a.fused_qkv = true;
    a.gated = false;
    a.rope = Rope::kNeox;
  } else if (a.name == "opt") {
    a.layer_norm = a.biases = a.learned_positions = true;
    a.gated = false;
    a.rope = Rope::kNone;
  } else if (a.name != "llama") {  // llama's are the defaults
    throw model_error(file.name() + " is of architecture \"" + a.name + "\"; llama, bamboo, falcon and opt can be run");
  }
  return a;
}

Activation activation_of(const GgufFile& file, const Architecture& a, const std::string& asked) {
  std::string name(file.get_string("powerinfer.activation", ""));
  if (name.empty()) {
    if (a.name == "llama") {
      name = file.sparse() ? "relu" : "silu";
    } else {
      name = a.name == "falcon" && !file.sparse() ? "gelu" : "relu";
    }
  }
  if (!asked.empty()) name = asked;
  std::vector<Activation> allowed = {Activation::kRelu};
  if (!file.sparse() && !a.relu_up) allowed.push_back(a.gated ? Activation::kSilu : Activation::kGelu);
  std::string choices;
  for (const Activation activation : allowed) {
    if (name == activation_name(activation)) return activation;
    choices += (choices.empty() ? "" : " or ") + std::string(activation_name(activation));
  }
  const std::string text = "the activation of " + std::string(file.sparse() ? "sparse " : "") + a.name + " models must be " +
                           choices + ", got \"" + name + "\"";
  throw asked.empty() ? model_error(file.name() + ": " + text) : Error(ErrorKind::kUsage, "--activation: " + text);
}

int positive(const GgufFile& file, uint64_t value, const char* what, uint64_t limit) {
  if (value == 0 || value > limit) {
    throw model_error(file.name() + " has " + std::to_string(value) + " for its " + what + "; 1 to " +
                      std::to_string(limit) + " are possible");
  }
  return static_cast<int>(value);
}

}  // namespace

const char* activation_name(Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return "relu";
    case Activation::kSilu:
      return "silu";
    case Activation::kGelu:
      return "gelu";
  }
  return "";
}

Architecture Architecture::read(const GgufFile& file, const std::string& activation) {
  Architecture a = known(file);
  const auto key = [&](const char* name) { return a.name + "." + name; };
  const auto number = [&](const char* name, uint64_t limit) {
    return positive(file, file.get_uint(key(name)), name, limit);
  };
  a.layers = number("block_count", 1024);
  a.width = number("embedding_length", 1 << 16);
  a.ffn = number("feed_forward_length", 1 << 20);
  a.heads = number("attention.head_count", 1024);
  a.kv_heads = positive(file, file.get_uint(key("attention.head_count_kv"), a.heads), "attention.head_count_kv", 1024);
  a.context = number("context_length", 1 << 24);
  if (a.heads % a.kv_heads) {
    throw model_error(file.name() + " has " + std::to_string(a.heads) + " heads for " + std::to_string(a.kv_heads) +
                      " key-value heads, no multiple");
  }
  if (!file.has(key("attention.key_length")) && a.width % a.heads) {
    throw model_error(file.name() + " has a width of " + std::to_string(a.width) + " for " + std::to_string(a.heads) +
                      " heads");
  }
  a.head_size = positive(file, file.get_uint(key("attention.key_length"), a.width / a.heads), "attention.key_length", 1024);
  if (file.get_uint(key("attention.value_length"), a.head_size) != static_cast<uint32_t>(a.head_size)) {
    throw model_error(file.name() + " has keys and values of different lengths, which no supported model has");
  }
  if (a.head_size % 16) {
    throw model_error(file.name() + " has heads of " + std::to_string(a.head_size) +
                      " elements; multiples of 16 can be run");
  }
  if (a.width % 32) throw model_error(file.name() + " has a width of " + std::to_string(a.width) + ", no multiple of 32");
  const GgufTensor* embedding = file.find("token_embd.weight");
  if (!embedding || embedding->shape.size() != 2) throw model_error(file.name() + " lacks the matrix token_embd.weight");
  a.vocabulary = positive(file, embedding->shape[1], "vocabulary", 1 << 24);
  if (a.rope != Rope::kNone) {
    a.rope_size =
        positive(file, file.get_uint(key("rope.dimension_count"), a.head_size), "rope.dimension_count", a.head_size);
    if (a.rope_size % 2) throw model_error(file.name() + " has an odd rope.dimension_count");
    a.rope_base = file.get_float(key("rope.freq_base"), 10000.0f);
    const std::string_view scaling = file.get_string(key("rope.scaling.type"), "none");
    float factor = file.get_float(key("rope.scale_linear"), 1.0f);
    if (scaling == "linear") {
      factor = file.get_float(key("rope.scaling.factor"), factor);
    } else if (scaling != "none") {
      throw model_error(file.name() + " has rope scaling \"" + std::string(scaling) + "\"; none and linear can be run");
    }
    if (!(factor > 0.0f) || !(a.rope_base > 0.0f))
      throw model_error(file.name() + " has rope numbers that are not positive");
    a.rope_scale = 1.0f / factor;
  }
  const std::string epsilon = key(a.layer_norm ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon");
  a.epsilon = file.get_float(epsilon, 1e-5f);
  a.threshold = file.get_float("powerinfer.sparse_threshold", 0.0f);
  a.activation = activation_of(file, a, activation);
  if (a.learned_positions) {
    const GgufTensor* positions = file.find("position_embd.weight");
    if (!positions || positions->shape.size() != 2 || positions->shape[1] <= kLearnedPositionsOffset) {
      throw model_error(file.name() + " lacks the matrix position_embd.weight");
    }
    a.context = static_cast<int>(std::min<uint64_t>(a.context, positions->shape[1] - kLearnedPositionsOffset));
  }
  return a;
}

}  // namespace powerinfer
