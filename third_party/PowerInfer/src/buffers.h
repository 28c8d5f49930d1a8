// The working memory of forward passes: what an engine holds beside its weights, its KV cache and each thread's attention
// scores (kv_cache.h). It is bounded by what is needed for every token of a batch, [batch][width] a few times, and by
// `hidden_bytes` for what is as wide as the FFN, which is computed in slabs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace powerinfer {

constexpr size_t kHiddenBytes = size_t{16} << 20;
constexpr size_t kLogitsTogether = 16;  // tokens whose logits are computed together

struct BufferShape {
  int width = 0, ffn = 0, heads = 0, kv_heads = 0, head_size = 0, vocabulary = 0;
  int rope_size = 0;
  int rank = 0;  // of the widest predictor; 0: a dense model
  int batch = 0, slots = 0;
  bool parallel = false, fused_qkv = false;
  size_t hidden_bytes = kHiddenBytes;
};

// One token of a sparse pass.
struct TokenNeurons {
  std::vector<int32_t> ids;          // active, ascending
  std::vector<float> h;              // of each
  std::vector<const uint8_t*> rows;  // down rows where h is not zero, ascending
  std::vector<float> weights;        // their h
  std::vector<int> group_begin;      // first of them in each group of neurons

  // Room for all neurons.
  void reserve(int ffn);
  static size_t bytes(int ffn);
};

struct FfnBuffers {
  FfnBuffers() = default;
  explicit FfnBuffers(const BufferShape& shape);
  uint64_t bytes() const;

  int ffn = 0;
  int dense_tokens = 0;                        // of a slab of a dense FFN
  int sparse_tokens = 0;                       // of a slab of a sparse pass
  std::vector<float> gate, up;                 // [tokens of a slab][ffn], or [tokens][neurons of a slab]
  std::vector<float> predictor;                // [sparse_tokens][rank]
  std::vector<uint8_t> predictor_activations;  // of the predictor's input, then of its hidden values
  std::vector<TokenNeurons> tokens;            // made as they are needed
  // The attention's, which it does not need any more:
  float* out = nullptr;            // [batch][padded width]
  uint8_t* activations = nullptr;  // of the FFN's input

  // Neurons of a slab for n tokens.
  int slab_neurons(int n) const;
  // The activations of up's slab: they take the place of the gate, which is used up by then.
  uint8_t* hidden_activations() { return reinterpret_cast<uint8_t*>(gate.data()); }
};

struct PassBuffers {
  PassBuffers() = default;
  explicit PassBuffers(const BufferShape& shape);
  PassBuffers(PassBuffers&&) = default;  // not copied: parts point into others
  PassBuffers& operator=(PassBuffers&&) = default;
  // With all that passes will make of it.
  uint64_t bytes() const;

  std::vector<float> x;                        // [batch][width] the residual
  std::vector<float> normed;                   // [batch][width] the input of a layer's part, then the attention's output
  std::vector<float> layer_input, ffn_normed;  // [batch][width] with parallel attention and FFN
  std::vector<float> q;              // [batch][heads * head_size] queries, then what they attended; FfnBuffers::out
  std::vector<float> k, v;           // [batch][kv_heads * head_size]
  std::vector<float> qkv;            // [batch] of all three
  std::vector<float> cosine, sine;   // [batch][rope_size / 2]
  std::vector<float> logits;         // [kLogitsTogether][vocabulary] where several tokens' are asked for
  std::vector<uint8_t> activations;  // [batch]
  FfnBuffers ffn;
};

// The size of pieces of at most `most` that `total` is cut into: as even as multiples of `unit` allow.
int even_slab(int total, int most, int unit);

}  // namespace powerinfer
