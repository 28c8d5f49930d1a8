// What every part of the forward pass works with: kernels, threads, and matrix products over them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "kernels.h"
#include "matrix.h"
#include "threads.h"

namespace powerinfer {

// Vectors of n tokens as a product reads them: fp32 and, for quantized weights, 8-bit activations.
struct Operand {
  const float* x = nullptr;  // [n][layout.k]
  ActivationLayout layout{0};
  const uint8_t* activations = nullptr;

  Operand from(int token) const {
    return {x + static_cast<size_t>(token) * layout.k, layout, activations + static_cast<size_t>(token) * layout.bytes};
  }
};

struct Compute {
  const Kernels& kernels;
  ThreadPool& pool;

  // The operand of x [n][k]; quantized into `buffer` where `quantized`.
  Operand prepare(const float* x, int k, int n, bool quantized, uint8_t* buffer) const {
    Operand operand{x, ActivationLayout(k), buffer};
    if (quantized) {
      each_token(n, [&](int t) {
        kernels.quantize(x + static_cast<size_t>(t) * k, operand.layout, buffer + t * operand.layout.bytes);
      });
    }
    return operand;
  }

  // fn(token) of n tokens; few are not worth waking the threads.
  template <typename Function>
  void each_token(int n, const Function& fn) const {
    if (n < 4) {
      for (int t = 0; t < n; ++t) fn(t);
    } else {
      pool.run(n, [&](int t, int) { fn(t); });
    }
  }

  struct Product {
    const Matrix* matrix;
    float* y;  // [n][y_stride]
    size_t y_stride;
  };

  // Several products of one operand; `after(product, first row, rows)` on the thread that computed these rows.
  template <size_t N, typename After>
  void multiply(const Product (&products)[N], const Operand& operand, int n, const After& after) const {
    int chunks[N + 1] = {};
    int rows[N];
    for (size_t p = 0; p < N; ++p) {
      rows[p] = chunk_rows(*products[p].matrix, n);
      chunks[p + 1] = chunks[p] + (products[p].matrix->rows + rows[p] - 1) / rows[p];
    }
    pool.run(chunks[N], [&](int chunk, int) {
      size_t p = 0;
      while (chunk >= chunks[p + 1]) ++p;
      const Matrix& matrix = *products[p].matrix;
      const int first = (chunk - chunks[p]) * rows[p];
      const int count = std::min(rows[p], matrix.rows - first);
      powerinfer::multiply(kernels, matrix, first, count, operand.x, operand.layout, operand.activations, n, products[p].y,
                           products[p].y_stride);
      after(p, first, count);
    });
  }
  template <size_t N>
  void multiply(const Product (&products)[N], const Operand& operand, int n) const {
    multiply(products, operand, n, [](size_t, int, int) {});
  }

 private:
  // Rows that a thread takes at a time: enough bytes to hide the taking, few enough to share the work out evenly.
  int chunk_rows(const Matrix& matrix, int n) const {
    const size_t row_bytes = std::max<size_t>(1, matrix.unit_bytes / (matrix.quantized() ? kGroupRows : 1));
    const size_t wanted = n > 8 ? 32 : std::max<size_t>(1, (size_t{64} << 10) / row_bytes);
    const size_t fair = static_cast<size_t>(matrix.rows) / (4 * pool.size());
    return static_cast<int>(std::max<size_t>(kGroupRows, std::min(wanted, fair) / kGroupRows * kGroupRows));
  }
};

}  // namespace powerinfer
