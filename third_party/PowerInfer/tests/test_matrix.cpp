#include "matrix.h"

#include <doctest/doctest.h>

#include "errors.h"
#include "reference.h"

using namespace powerinfer;
using namespace powerinfer::testing;

namespace {

constexpr TensorType kTypes[] = {TensorType::kF32,  TensorType::kF16,  TensorType::kQ4_0,
                                 TensorType::kQ4_1, TensorType::kQ8_0, TensorType::kQ6_K};

}  // namespace

TEST_CASE("halves are what the format says, both ways") {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const auto half = static_cast<uint16_t>(h);
    const float value = half_to_float(half);
    if ((h & 0x7fff) > 0x7c00) {
      CHECK(std::isnan(value));
      continue;
    }
    if ((h & 0x7fff) == 0x7c00) {
      CHECK(std::isinf(value));
    } else {
      CHECK(static_cast<double>(value) == half_value(half));
    }
    CHECK(std::signbit(value) == (h >= 0x8000));
    CHECK(float_to_half(value) == half);
    // halfway to the next one: to the even one of the two; a little beside it: to the nearer one
    if (h >= 0x7c00) continue;
    const double next = h == 0x7bff ? 65536.0 : half_value(static_cast<uint16_t>(h + 1));
    const auto middle = static_cast<float>((half_value(half) + next) / 2);
    CHECK(float_to_half(middle) == (h % 2 ? h + 1 : h));
    CHECK(float_to_half(std::nextafter(middle, 0.0f)) == h);
    CHECK(float_to_half(std::nextafter(middle, 1e9f)) == h + 1);
  }
}

TEST_CASE("packed rows are the file's") {
  Random random(1);
  ThreadPool pool(2);
  for (const TensorType type : kTypes) {
    for (const int rows : {1, 15, 16, 17, 40}) {
      for (const int columns : {256, 512, 768, 32, 96, 544, 7}) {
        if (columns % block_size(type).elements) continue;
        CAPTURE(type_name(type));
        CAPTURE(rows);
        CAPTURE(columns);
        const auto bytes = random_rows(type, rows, columns, random);
        const auto want = decode_rows(type, bytes);
        const GgufTensor tensor = tensor_of(type, bytes, rows, columns);
        Memory memory(matrix_bytes(GgufFile{}, tensor), "a test");
        const Matrix matrix = copy_matrix(tensor, memory, pool);
        CHECK(matrix.rows == rows);
        CHECK(matrix.columns == columns);
        CHECK(matrix.bytes() <= memory.size());
        int wrong = 0;
        std::vector<float> row(columns);
        for (int r = 0; r < rows; ++r) {
          dequantize_row(matrix, r, row.data());
          // products of at most 24 bits are exact in fp32, and so is what they are compared with but for Q4_1's one sum
          for (int c = 0; c < columns; ++c)
            wrong += row[c] != static_cast<float>(want[static_cast<size_t>(r) * columns + c]);
        }
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("types that no kernel multiplies with are refused") {
  const std::vector<uint8_t> bytes(4096);
  for (const uint32_t type : {12u, 26u, 10u, 24u, 30u}) {
    CHECK_THROWS_AS(matrix_bytes(GgufFile{}, tensor_of(static_cast<TensorType>(type), bytes, 1, 256)), Error);
  }
}
