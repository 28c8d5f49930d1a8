#include "bundle.h"

#include <doctest/doctest.h>

#include "errors.h"
#include "reference.h"

using namespace powerinfer;
using namespace powerinfer::testing;

namespace {

uint16_t half_bits(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

// The code of column c in a row of lanes or of columns, from the text of kernels.h.
int lanes_code(const uint8_t* row, int width, int c) {
  const int blocks = width / 32, block = c / 32, group = block / 16, lane = block % 16, column = c % 32;
  const int lanes = std::min(16, blocks - 16 * group);
  const uint8_t byte = row[group * 256 + column / 8 * 4 * lanes + lane * 4 + column % 4];
  return column % 8 < 4 ? byte & 15 : byte >> 4;
}

int columns_code(const uint8_t* row, int c) {
  const int chunk = c / 128, within = c % 128;
  for (int word = 0; word < 32; ++word) {
    for (int nibble = 0; nibble < 4; ++nibble) {
      const int q = word / 8, u = word / 4 % 2, p = word % 4;
      if (32 * nibble + 16 * u + 4 * q + p == within) return half_bits(row + chunk * 64 + 2 * word) >> 4 * nibble & 15;
    }
  }
  return -1;
}

int file_code(const std::vector<uint8_t>& rows, size_t row_bytes, int row, int c) {
  const uint8_t* block = rows.data() + row * row_bytes + c / 32 * 18;
  return c % 32 < 16 ? block[2 + c % 16] & 15 : block[2 + c % 16] >> 4;
}

}  // namespace

TEST_CASE("a neuron's rows lie side by side") {
  Random random(2);
  ThreadPool pool(3);
  for (const TensorType type : {TensorType::kF32, TensorType::kF16, TensorType::kQ4_0}) {
    for (const bool gated : {true, false}) {
      for (const int width : {32, 64, 96, 128, 512, 544, 1056}) {
        for (const int neurons : {1, 63, 64, 65, 130}) {
          if (neurons > 65 && width > 128) continue;
          CAPTURE(type_name(type));
          CAPTURE(width);
          CAPTURE(neurons);
          const auto gate = random_rows(type, neurons, width, random), up = random_rows(type, neurons, width, random),
                     down = random_rows(type, neurons, width, random);
          const GgufTensor gate_tensor = tensor_of(type, gate, neurons, width);
          const GgufTensor up_tensor = tensor_of(type, up, neurons, width);
          const GgufTensor down_tensor = tensor_of(type, down, neurons, width);
          const GgufTensor* gate_or_none = gated ? &gate_tensor : nullptr;
          const BundleLayout layout = bundle_layout(GgufFile{}, gate_or_none, up_tensor, down_tensor);
          CHECK(layout.bytes % 64 == 0);
          Memory memory(layout.bytes * neurons, "a test");
          const Bundles bundles = copy_bundles(layout, gate_or_none, up_tensor, down_tensor, memory, pool);
          REQUIRE(bundles.neurons == neurons);
          const size_t row_bytes = up.size() / neurons;
          int wrong = 0;
          for (int i = 0; i < neurons; ++i) {
            const uint8_t* at = bundles.neuron(i);
            if (type != TensorType::kQ4_0) {
              wrong += gated && std::memcmp(at + layout.gate, gate.data() + i * row_bytes, row_bytes) != 0;
              wrong += std::memcmp(at + layout.up, up.data() + i * row_bytes, row_bytes) != 0;
              wrong += std::memcmp(at + layout.down, down.data() + i * row_bytes, row_bytes) != 0;
              continue;
            }
            for (int c = 0; c < width; ++c) {
              if (gated) wrong += lanes_code(at + layout.gate, width, c) != file_code(gate, row_bytes, i, c);
              wrong += lanes_code(at + layout.up, width, c) != file_code(up, row_bytes, i, c);
              wrong += columns_code(at + layout.down, c) != file_code(down, row_bytes, i, c);
            }
            for (int b = 0; b < width / 32; ++b) {
              const size_t from = i * row_bytes + b * 18;
              if (gated) wrong += half_bits(at + layout.gate + layout.gate_scales + 2 * b) != half_bits(gate.data() + from);
              wrong += half_bits(at + layout.up + layout.up_scales + 2 * b) != half_bits(up.data() + from);
              wrong += half_bits(at + layout.down + layout.down_scales + 2 * b) != half_bits(down.data() + from);
            }
          }
          CHECK(wrong == 0);
        }
      }
    }
  }
}

TEST_CASE("a single neuron may have rows of one dimension") {
  Random random(3);
  ThreadPool pool(1);
  const auto rows = random_rows(TensorType::kF16, 1, 32, random);
  GgufTensor tensor = tensor_of(TensorType::kF16, rows, 1, 32);
  tensor.shape.pop_back();
  const BundleLayout layout = bundle_layout(GgufFile{}, &tensor, tensor, tensor);
  Memory memory(layout.bytes, "a test");
  CHECK(copy_bundles(layout, &tensor, tensor, tensor, memory, pool).neurons == 1);
}

TEST_CASE("bundles of several types, or of others than F32, F16 and Q4_0, are refused") {
  Random random(4);
  const auto halves = random_rows(TensorType::kF16, 2, 32, random), nibbles = random_rows(TensorType::kQ4_0, 2, 32, random);
  const auto bytes = random_rows(TensorType::kQ8_0, 2, 32, random);
  const GgufTensor f16 = tensor_of(TensorType::kF16, halves, 2, 32), q4 = tensor_of(TensorType::kQ4_0, nibbles, 2, 32);
  const GgufTensor q8 = tensor_of(TensorType::kQ8_0, bytes, 2, 32);
  CHECK_THROWS_AS(bundle_layout(GgufFile{}, &f16, q4, q4), Error);
  CHECK_THROWS_AS(bundle_layout(GgufFile{}, &q4, q4, f16), Error);
  CHECK_THROWS_AS(bundle_layout(GgufFile{}, nullptr, f16, q4), Error);
  CHECK_THROWS_AS(bundle_layout(GgufFile{}, &q8, q8, q8), Error);
}
