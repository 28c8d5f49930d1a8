// Weight matrices as the kernels read them.
#pragma once

#include <cstdint>
#include <functional>

#include "gguf.h"
#include "kernels.h"
#include "memory.h"
#include "threads.h"

namespace powerinfer {

// Called with bytes of a file that have been copied.
using Copied = std::function<void(const uint8_t* from, uint64_t bytes)>;

// y = W x, W [rows, columns]. F32 and F16 lie row by row; quantized types in groups of 16 rows (kernels.h).
struct Matrix {
  TensorType type = TensorType::kF32;
  int rows = 0, columns = 0;
  const uint8_t* data = nullptr;
  size_t unit_bytes = 0;  // of a row, or of a group of 16 rows

  bool quantized() const { return type != TensorType::kF32 && type != TensorType::kF16; }
  size_t bytes() const { return unit_bytes * (quantized() ? (rows + kGroupRows - 1) / kGroupRows : rows); }
};

// Bytes that copy_matrix needs for a tensor. Throws Error(kModel) for a type that no kernel multiplies with.
size_t matrix_bytes(const GgufFile& file, const GgufTensor& tensor);
// The tensor's weights in `memory`, laid out for the kernels.
// `copied` is told, on the pool's threads, which bytes of the file are not needed any more.
Matrix copy_matrix(const GgufTensor& tensor, Memory& memory, ThreadPool& pool, const Copied& copied = {});

// One row as fp32 [columns].
void dequantize_row(const Matrix& matrix, int row, float* out);

// Rows [first, first + count) of W with n tokens: y[t * y_stride + row]. `first` is a multiple of 16. x [n][columns] fp32
// and, for quantized types, the same as activations.
void multiply(const Kernels& kernels, const Matrix& matrix, int first, int count, const float* x,
              const ActivationLayout& layout, const uint8_t* activations, int n, float* y, size_t y_stride);

}  // namespace powerinfer
