// The neurons of a sparse FFN, each with all its weights side by side: one stream to read for a neuron that is active.
#pragma once

#include <cstdint>

#include "gguf.h"
#include "matrix.h"

namespace powerinfer {

// Where a neuron's rows lie in its bundle, in bytes. F16 and F32: [gate | up | down], each a row of `width` numbers. Q4_0:
// [gate codes, scales | up codes, scales | down codes, scales], gate and up in lanes, down in columns (kernels.h), the down
// codes aligned to 64.
struct BundleLayout {
  BundleLayout() = default;
  BundleLayout(TensorType type, int width, bool gated);

  TensorType type = TensorType::kF16;
  int width = 0;
  bool gated = false;  // without a gate, `gate` is the up row
  size_t gate = 0, up = 0, down = 0;
  size_t gate_scales = 0, up_scales = 0, down_scales = 0;  // from the row's codes
  size_t bytes = 0;                                        // from one neuron to the next, a multiple of 64

  int element_bytes() const { return type == TensorType::kF16 ? 2 : 4; }  // of F16 and F32
  // Columns of a down row as the kernels see it: the width, for Q4_0 rounded up to 128.
  int padded_width() const { return type == TensorType::kQ4_0 ? static_cast<int>(round_up(width, 128)) : width; }
};

struct Bundles {
  BundleLayout layout;
  int neurons = 0;
  const uint8_t* data = nullptr;

  const uint8_t* neuron(int i) const { return data + i * layout.bytes; }
};

// Bundles of tensors [width, neurons]; gate may be null. The three must be of one type, F32, F16 or Q4_0: Error(kModel).
BundleLayout bundle_layout(const GgufFile& file, const GgufTensor* gate, const GgufTensor& up, const GgufTensor& down);
// `copied` as copy_matrix has it.
Bundles copy_bundles(const BundleLayout& layout, const GgufTensor* gate, const GgufTensor& up, const GgufTensor& down,
                     Memory& memory, ThreadPool& pool, const Copied& copied = {});

}  // namespace powerinfer
