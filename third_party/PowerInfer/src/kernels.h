// The arithmetic of the forward pass, once for each instruction set. All give the same bits: kernels_impl.h fixes the order
// of every sum, simd_*.h the meaning of every operation.
//
// Every result belongs to one (row, token) pair and is summed in an order that depends on neither the other rows nor the
// other tokens of a call: a token's numbers are the same alone and in a batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace powerinfer {

constexpr int kBlock = 32;      // elements that share a scale
constexpr int kGroupRows = 16;  // rows of a packed matrix that are stored together
constexpr int kPanelColumns = 64;
constexpr int kCoefficientNeurons = 256;  // neurons whose 16-bit coefficients share a scale (accumulate_q4_0)

// One token's activations in 8 bits, for products with quantized weights: x = scale * q in each block of 32.
//   q      int8  [k]                    as the elements lie
//   lanes  int8  [groups][8][16][4]     element 4 j + i of block 16 g + b at [g][j][b][i]; groups of 16 blocks, zero-filled
//   scale  fp32  [16 groups]
//   sums   int32 [groups][2][16]        of the first and of the second half of each block
//   minus_8 int32 [16 groups]           -8 times the sum of each block: what the offset of 4-bit codes adds
struct ActivationLayout {
  explicit ActivationLayout(int k_)
      : k(k_),
        blocks(k_ / kBlock),
        groups((blocks + 15) / 16),
        lanes((static_cast<size_t>(k_) + 63) / 64 * 64),
        scale(lanes + static_cast<size_t>(groups) * 512),
        sums(scale + static_cast<size_t>(groups) * 64),
        minus_8(sums + static_cast<size_t>(groups) * 128),
        bytes(minus_8 + static_cast<size_t>(groups) * 64) {}
  int k, blocks, groups;
  size_t lanes, scale, sums, minus_8;  // offsets in bytes; q is at 0
  size_t bytes;                        // of one token, a multiple of 64
};

// Packed matrices: 16 rows together, one vector lane a row. Of each group of 16 rows, for the block kb of 32 columns:
//   Q4_0  [blocks][4][16][4] nibble pairs: byte i of plane p, lane r: column 8 p + i (low) and 8 p + 4 + i (high);
//         then [blocks][16] fp16 scales
//   Q4_1  the same, then [blocks][16] fp16 scales and [blocks][16] fp16 minima
//   Q8_0  [blocks][8][16][4] int8: column 4 j + i of plane j; then [blocks][16] fp16 scales
//   Q6_K  [blocks][4][16][4] low nibbles as Q4_0, [blocks][2][16][4]: bits 2 s of plane j / 4's byte are the high bits of
//         column 4 j + i with s = j % 4; then [2 blocks][16] int8 scales and [blocks / 8][16] fp16 scales
// A group's bytes are those of its rows in the file, rounded up to 64.
//
// A sparse neuron's Q4_0 rows in a bundle (bundle.h): gate and up as "lanes", one vector lane a block:
//   [groups of 16 blocks][4][lanes][4] nibble pairs as above with a block for a row; lanes = 16, fewer in the last group
// and down as "columns", for one neuron all columns c of a chunk of 128: 16-bit word 8 q + 4 u + p (q, p in 0..3, u in 0, 1)
// holds in its nibble n the column 32 n + 16 u + 4 q + p.

// The row that is read next of a neuron that is not zero: where it lies from the gate on. 0 bytes: nobody reads it soon.
struct DownRow {
  size_t offset, bytes;
};

struct Kernels {
  Isa isa;

  void (*quantize)(const float* x, const ActivationLayout& layout, uint8_t* activation);

  // y[t * y_stride + r] = <row r, x_t>: rows of fp16 or fp32 that are row_bytes apart, x [n][x_stride] fp32
  using Rows = void (*)(const uint8_t* data, size_t row_bytes, int rows, int k, const float* x, size_t x_stride, int n,
                        float* y, size_t y_stride);
  Rows rows_f16, rows_f32;

  // the same for packed matrices, x [n] activations; data is where a group of 16 rows begins
  using PackedRows = void (*)(const uint8_t* data, size_t group_bytes, int rows, const ActivationLayout& layout,
                              const uint8_t* x, int n, float* y, size_t y_stride);
  PackedRows packed_q4_0, packed_q4_1, packed_q8_0, packed_q6_k;

  // the same for Q4_0 rows in lanes; scales_offset: from a row's codes to its fp16 scales
  void (*lanes_q4_0)(const uint8_t* data, size_t row_bytes, size_t scales_offset, int rows, const ActivationLayout& layout,
                     const uint8_t* x, int n, float* y, size_t y_stride);

  // Sparse neurons of one token. h[i] = relu(<gate_i, x>) * <up_i, x>, with relu_up also relu of the second; up is not read
  // where the gate is not positive. gates[i] and its up row at gates[i] + up_offset.
  using Gated = void (*)(const uint8_t* const* gates, int count, size_t up_offset, int k, const float* x, bool relu_up,
                         DownRow down, float* h);
  Gated gated_f16, gated_f32;
  void (*gated_q4_0)(const uint8_t* const* gates, int count, size_t up_offset, size_t gate_scales, size_t up_scales,
                     const ActivationLayout& layout, const uint8_t* x, bool relu_up, DownRow down, float* h);
  // h[i] = <row_i, x>
  void (*gather_f16)(const uint8_t* const* rows, int count, int k, const float* x, float* h);
  void (*gather_f32)(const uint8_t* const* rows, int count, int k, const float* x, float* h);
  void (*gather_q4_0)(const uint8_t* const* rows, int count, size_t scales_offset, const ActivationLayout& layout,
                      const uint8_t* x, float* h);

  // y[c] += sum over i, in order, of h[i] * rows[i][c], rows from `offset` bytes on; columns a multiple of 16
  using Accumulate = void (*)(const uint8_t* const* rows, size_t offset, const float* h, int count, int columns, float* y);
  Accumulate accumulate_f16, accumulate_f32;
  // the same for Q4_0 columns, of at most 256 neurons; chunks of 128 columns from first_chunk on, y of the whole row,
  // rows[i] the neuron's down codes. h * scale is rounded to 16 bits of the largest one of the block and the neurons
  void (*accumulate_q4_0)(const uint8_t* const* rows, size_t scales_offset, const float* h, int count, int first_chunk,
                          int chunks, float* y);

  // fp32 copies of `columns` (at most 64) columns of rows: panel [rows][64]
  using Panel = void (*)(const uint8_t* data, size_t row_bytes, size_t scales_offset, int rows, int first_column,
                         int columns, float* panel);
  Panel panel_f16, panel_f32, panel_q4_0;
  // y[t * y_stride + c] += sum over i, in order, of h[t * h_stride + i] * panel[i][c]
  void (*columns)(const float* panel, int rows, int columns, const float* h, size_t h_stride, int n, float* y,
                  size_t y_stride);

  // indices i, ascending, with scores[i] >= threshold; `indices` has room for 16 more
  int (*compact)(const float* scores, int n, float threshold, int32_t* indices);

  void (*rms_norm)(const float* x, const float* weight, int k, float epsilon, float* y);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int k, float epsilon, float* y);
  void (*softmax)(float* x, int n);                                       // in place
  void (*silu_mul)(const float* gate, const float* up, int n, float* y);  // silu(gate) * up
  void (*relu_mul)(const float* gate, const float* up, int n, bool relu_up, float* y);
  void (*relu)(float* x, int n);
  void (*gelu)(float* x, int n);                        // x Phi(x), by the error function
  void (*add)(float* x, const float* y, int n);         // x += y
  void (*to_half)(const float* x, int n, uint16_t* y);  // beyond the largest half: the largest
  void (*from_half)(const uint16_t* x, int n, float* y);
};

// The kernels of that instruction set, which this CPU must have.
const Kernels& kernels(Isa isa);

}  // namespace powerinfer
