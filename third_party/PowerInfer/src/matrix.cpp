#include "matrix.h"

#include <algorithm>
#include <cstring>

#include "errors.h"
#include "file_blocks.h"
#include "half.h"

namespace powerinfer {

namespace {

// Bytes that a block of 32 columns takes in a part of a group of 16 rows.
constexpr size_t kNibbles = kGroupRows * kBlock / 2;
constexpr size_t kHighBits = kGroupRows * kBlock / 4;
constexpr size_t kCodes = kGroupRows * kBlock;
constexpr size_t kHalves = kGroupRows * 2;     // an fp16 number of each row
constexpr size_t kSubScales = kGroupRows * 2;  // two int8 of each row
constexpr int kSuper = BlockQ6_K::kElements / kBlock;

// Where a group's parts begin, in bytes.
struct Group {
  Group(TensorType type, int columns) {
    const size_t blocks = static_cast<size_t>(columns) / kBlock;
    switch (type) {
      case TensorType::kQ4_0:
        scales = blocks * kNibbles, bytes = scales + blocks * kHalves;
        break;
      case TensorType::kQ4_1:
        scales = blocks * kNibbles, bytes = scales + 2 * blocks * kHalves;
        break;
      case TensorType::kQ8_0:
        scales = blocks * kCodes, bytes = scales + blocks * kHalves;
        break;
      case TensorType::kQ6_K:
        high = blocks * kNibbles, sub_scales = high + blocks * kHighBits, scales = sub_scales + blocks * kSubScales;
        bytes = scales + blocks / kSuper * kHalves;
        break;
      default:
        break;
    }
    bytes = round_up(bytes, 64);
  }
  size_t high = 0, sub_scales = 0, scales = 0, bytes = 0;
};

// Puts one row of the file into lane `lane` of a group.
void pack_row(TensorType type, const Group& group, int columns, const uint8_t* row, int lane, uint8_t* out) {
  const int blocks = columns / kBlock;
  const auto nibbles = [&](int block, auto code) {
    for (int c = 0; c < kBlock; ++c) {
      uint8_t& byte = out[block * kNibbles + c / 8 * 64 + lane * 4 + c % 4];
      byte = static_cast<uint8_t>(byte | (code(c) & 15) << (c / 4 % 2 * 4));
    }
  };
  const auto scale = [&](size_t part, int block, const uint8_t(&half)[2]) {
    std::memcpy(out + part + block * kHalves + lane * 2, half, 2);
  };
  for (int b = 0; b < blocks; ++b) {
    if (type == TensorType::kQ4_0) {
      const auto& block = block_at<BlockQ4_0>(row, b);
      nibbles(b, [&](int c) { return q4_code(block.codes, c); });
      scale(group.scales, b, block.scale);
    } else if (type == TensorType::kQ4_1) {
      const auto& block = block_at<BlockQ4_1>(row, b);
      nibbles(b, [&](int c) { return q4_code(block.codes, c); });
      scale(group.scales, b, block.scale);
      scale(group.scales, blocks + b, block.minimum);
    } else if (type == TensorType::kQ8_0) {
      const auto& block = block_at<BlockQ8_0>(row, b);
      for (int c = 0; c < kBlock; c += 4) std::memcpy(out + b * kCodes + c / 4 * 64 + lane * 4, block.codes + c, 4);
      scale(group.scales, b, block.scale);
    } else {
      const auto& block = block_at<BlockQ6_K>(row, b / kSuper);
      const int first = b % kSuper * kBlock;
      nibbles(b, [&](int c) { return q6_k_code(block, first + c); });
      for (int c = 0; c < kBlock; ++c) {
        const int plane = c / 4;
        uint8_t& byte = out[group.high + b * kHighBits + plane / 4 * 64 + lane * 4 + c % 4];
        byte = static_cast<uint8_t>(byte | (q6_k_code(block, first + c) >> 4) << plane % 4 * 2);
      }
      for (int half = 0; half < 2; ++half) {
        out[group.sub_scales + b * kSubScales + half * kGroupRows + lane] =
            static_cast<uint8_t>(block.scales[first / 16 + half]);
      }
      if (first == 0) scale(group.scales, b / kSuper, block.scale);
    }
  }
}

float half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return half_to_float(bits);
}

}  // namespace

size_t matrix_bytes(const GgufFile& file, const GgufTensor& tensor) {
  const auto columns = static_cast<int>(tensor.shape[0]);
  const size_t rows = tensor.elements() / std::max<uint64_t>(1, tensor.shape[0]);
  switch (tensor.type) {
    case TensorType::kF32:
    case TensorType::kF16:
      return round_up(tensor.bytes, 64);
    case TensorType::kQ4_0:
    case TensorType::kQ4_1:
    case TensorType::kQ8_0:
    case TensorType::kQ6_K:
      return Group(tensor.type, columns).bytes * ((rows + kGroupRows - 1) / kGroupRows);
    default:
      throw model_error(file.name() + " has tensor \"" + tensor.name + "\" of " + type_name(tensor.type) +
                        "; weights can be F32, F16, Q4_0, Q4_1, Q8_0 or Q6_K: convert the model to one of these");
  }
}

Matrix copy_matrix(const GgufTensor& tensor, Memory& memory, ThreadPool& pool, const Copied& copied) {
  Matrix matrix;
  matrix.type = tensor.type;
  matrix.columns = static_cast<int>(tensor.shape[0]);
  matrix.rows = static_cast<int>(tensor.elements() / tensor.shape[0]);
  if (!matrix.quantized()) {
    matrix.unit_bytes = tensor.bytes / matrix.rows;
    uint8_t* out = memory.take(tensor.bytes);
    constexpr size_t kPiece = size_t{4} << 20;
    pool.run(static_cast<int>((tensor.bytes + kPiece - 1) / kPiece), [&](int piece, int) {
      const size_t from = piece * kPiece, bytes = std::min(kPiece, tensor.bytes - from);
      std::memcpy(out + from, tensor.data + from, bytes);
      if (copied) copied(tensor.data + from, bytes);
    });
    matrix.data = out;
    return matrix;
  }
  const Group group(matrix.type, matrix.columns);
  const size_t row_bytes = tensor.bytes / matrix.rows;
  const int groups = (matrix.rows + kGroupRows - 1) / kGroupRows;
  uint8_t* out = memory.take(group.bytes * groups);
  pool.run(groups, [&](int g, int) {
    const int lanes = std::min(kGroupRows, matrix.rows - g * kGroupRows);
    for (int lane = 0; lane < lanes; ++lane) {
      const uint8_t* row = tensor.data + (static_cast<size_t>(g) * kGroupRows + lane) * row_bytes;
      pack_row(matrix.type, group, matrix.columns, row, lane, out + g * group.bytes);
    }
    if (copied) copied(tensor.data + static_cast<size_t>(g) * kGroupRows * row_bytes, lanes * row_bytes);
  });
  matrix.data = out;
  matrix.unit_bytes = group.bytes;
  return matrix;
}

void dequantize_row(const Matrix& matrix, int row, float* out) {
  if (!matrix.quantized()) {
    const uint8_t* from = matrix.data + row * matrix.unit_bytes;
    if (matrix.type == TensorType::kF32) {
      std::memcpy(out, from, matrix.unit_bytes);
    } else {
      for (int c = 0; c < matrix.columns; ++c) out[c] = half_at(from + 2 * c);
    }
    return;
  }
  const Group group(matrix.type, matrix.columns);
  const uint8_t* at = matrix.data + row / kGroupRows * group.bytes;
  const int lane = row % kGroupRows, blocks = matrix.columns / kBlock;
  for (int c = 0; c < matrix.columns; ++c) {
    const int b = c / kBlock, within = c % kBlock;
    const uint8_t byte = at[b * kNibbles + within / 8 * 64 + lane * 4 + within % 4];
    const int nibble = within / 4 % 2 ? byte >> 4 : byte & 15;
    const float scale = half_at(at + group.scales + b * kHalves + lane * 2);
    if (matrix.type == TensorType::kQ4_0) {
      out[c] = static_cast<float>(nibble - 8) * scale;
    } else if (matrix.type == TensorType::kQ4_1) {
      out[c] = static_cast<float>(nibble) * scale + half_at(at + group.scales + (blocks + b) * kHalves + lane * 2);
    } else if (matrix.type == TensorType::kQ8_0) {
      out[c] = static_cast<float>(static_cast<int8_t>(at[b * kCodes + within / 4 * 64 + lane * 4 + within % 4])) * scale;
    } else {
      const int plane = within / 4;
      const uint8_t high = at[group.high + b * kHighBits + plane / 4 * 64 + lane * 4 + within % 4];
      const int code = nibble | (high >> plane % 4 * 2 & 3) << 4;
      const auto sub = static_cast<int8_t>(at[group.sub_scales + b * kSubScales + within / 16 * kGroupRows + lane]);
      out[c] = static_cast<float>((code - 32) * sub) * half_at(at + group.scales + b / kSuper * kHalves + lane * 2);
    }
  }
}

void multiply(const Kernels& kernels, const Matrix& matrix, int first, int count, const float* x,
              const ActivationLayout& layout, const uint8_t* activations, int n, float* y, size_t y_stride) {
  const auto k = static_cast<size_t>(matrix.columns);
  const auto packed = [&](Kernels::PackedRows kernel) {
    kernel(matrix.data + first / kGroupRows * matrix.unit_bytes, matrix.unit_bytes, count, layout, activations, n, y + first,
           y_stride);
  };
  const auto rows = [&](Kernels::Rows kernel) {
    kernel(matrix.data + first * matrix.unit_bytes, matrix.unit_bytes, count, matrix.columns, x, k, n, y + first, y_stride);
  };
  switch (matrix.type) {
    case TensorType::kF32:
      return rows(kernels.rows_f32);
    case TensorType::kF16:
      return rows(kernels.rows_f16);
    case TensorType::kQ4_0:
      return packed(kernels.packed_q4_0);
    case TensorType::kQ4_1:
      return packed(kernels.packed_q4_1);
    case TensorType::kQ8_0:
      return packed(kernels.packed_q8_0);
    default:
      return packed(kernels.packed_q6_k);
  }
}

}  // namespace powerinfer
