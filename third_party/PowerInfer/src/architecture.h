// What the architectures differ in, and a model's numbers as its file states them.
#pragma once

#include <string>
#include <vector>

#include "gguf.h"
#include "model.h"

namespace powerinfer {

enum class Activation { kRelu, kSilu, kGelu };
enum class Rope { kNone, kInterleaved, kNeox };  // pairs (2 i, 2 i + 1), or (i, i + half)

// Rows in front of opt's table of positions that no position uses.
constexpr int kLearnedPositionsOffset = 2;

struct Architecture {
  std::string name;
  bool layer_norm = false;  // LayerNorm with bias instead of RMSNorm
  bool gated = true;        // FFN has gate and up
  bool relu_up = false;     // bamboo: relu(gate) * relu(up)
  bool parallel = false;    // falcon: attention and FFN read the layer's input, both are added to it
  bool fused_qkv = false;
  bool biases = false;  // of the attention's and the FFN's matrices
  bool learned_positions = false;
  Rope rope = Rope::kInterleaved;

  // Numbers; sizes in elements.
  int layers = 0, width = 0, heads = 0, kv_heads = 0, head_size = 0, ffn = 0, vocabulary = 0, context = 0;
  int rope_size = 0;                              // elements of a head that are rotated
  float rope_base = 10000.0f, rope_scale = 1.0f;  // positions are multiplied by rope_scale
  float epsilon = 1e-5f;
  float threshold = 0.0f;  // a neuron is active where its predictor's score is at least this
  Activation activation = Activation::kSilu;

  // Throws Error(kModel) for another architecture or numbers that cannot be.
  static Architecture read(const GgufFile& file, const std::string& activation);
};

const char* activation_name(Activation activation);

}  // namespace powerinfer
