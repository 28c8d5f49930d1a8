// A layer's feed-forward network, dense or sparse, behind one interface: whoever computes it (these kernels, a GPU beside
// them) gets the layer's vectors and adds its output to the residual.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "architecture.h"
#include "buffers.h"
#include "bundle.h"
#include "compute.h"

namespace powerinfer {

struct FfnInput {
  const float* normed;     // [n][width], what the weights multiply
  const float* predictor;  // [n][width], what the predictor reads
  float* residual;         // [n][width], += output
  int tokens;
  int prompt_tokens;  // the first of them: many, for which every neuron is computed
  bool all_neurons;   // also for the others: no prediction

  // Tokens [first, first + count) alone, none of them a prompt's.
  FfnInput slab(int first, int count, size_t width) const {
    return {normed + first * width, predictor + first * width, residual + first * width, count, 0, all_neurons};
  }
};

class Ffn {
 public:
  virtual ~Ffn() = default;
  virtual void run(const FfnInput& input, FfnBuffers& buffers) = 0;
  // Adds what one token's decoding reads (ModelInfo).
  virtual void count_bytes(ModelInfo& info) const = 0;
  // Neurons computed over sparse tokens, and neurons they had.
  uint64_t active = 0, total = 0;
};

struct DenseFfn : Ffn {
  DenseFfn(const Architecture& architecture, const Compute& compute) : a(architecture), compute(compute) {}
  void run(const FfnInput& input, FfnBuffers& buffers) override;
  void count_bytes(ModelInfo& info) const override;

  const Architecture& a;
  Compute compute;
  Matrix gate, up, down;
  const float* up_bias = nullptr;    // [ffn] or null
  const float* down_bias = nullptr;  // [width] or null

 private:
  void run_slab(const FfnInput& input, const Operand& operand, FfnBuffers& buffers);
};

struct SparseFfn : Ffn {
  SparseFfn(const Architecture& architecture, const Compute& compute) : a(architecture), compute(compute) {}
  void run(const FfnInput& input, FfnBuffers& buffers) override;
  void count_bytes(ModelInfo& info) const override;

  const Architecture& a;
  Compute compute;
  Bundles bundles;
  Matrix fc1, fc2;  // scores = fc2 relu(fc1 x)
  const float* up_bias = nullptr;
  const float* down_bias = nullptr;

 private:
  void run_dense(const FfnInput& input, const Operand& operand, int n, FfnBuffers& buffers);
  void run_sparse(const FfnInput& input, const Operand& operand, FfnBuffers& buffers);
  void predict(const FfnInput& input, FfnBuffers& buffers);
  void neurons(const Operand& operand, int token, const int32_t* ids, int count, bool ask_down, float* h) const;
  void finish(const float* out, size_t stride, int first_column, int columns, int n, float* residual) const;
};

}  // namespace powerinfer
