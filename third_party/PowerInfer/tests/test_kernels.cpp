// Every kernel of every instruction set that this CPU has: the plain one's bits, and those within a bound of the same sums
// in double precision; a token's numbers are the same alone and in any batch. Buffers are of the exact size, so that the
// address sanitizer sees whatever is read or written beside them.
#include "kernels.h"

#include <doctest/doctest.h>

#include <functional>
#include <limits>

#include "bundle.h"
#include "errors.h"
#include "matrix.h"
#include "reference.h"

using namespace powerinfer;
using namespace powerinfer::testing;

namespace {

constexpr double kEps = 0x1p-24;  // half a unit in the last place of 1
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kMostTokens = 13;

using Run = std::function<std::vector<float>(const Kernels&)>;

// The plain kernel's numbers, after a look at the others'.
std::vector<float> same_everywhere(const Run& run) {
  const auto all = all_kernels();
  const auto plain = run(*all.front());
  for (const Kernels* k : all) {
    CAPTURE(isa_name(k->isa));
    CHECK(first_difference(plain, run(*k)) == -1);
  }
  return plain;
}

// Numbers farther from the sums in double precision than their bounds.
int too_far(const std::vector<float>& got, const std::vector<double>& want, const std::vector<double>& bound) {
  int count = got.size() != want.size();
  for (size_t i = 0; i < got.size() && i < want.size(); ++i) {
    count += !(std::abs(static_cast<double>(got[i]) - want[i]) <= bound[i]);
  }
  return count;
}

// Bound of the rounding of a sum of k products in 16 lanes: each product goes through at most k / 16 + 1 + 4 roundings.
double sum_bound(int k, double magnitude) { return (k / 16 + 6) * kEps * magnitude + 1e-38; }

std::vector<uint8_t> activations_of(const Kernels& k, const std::vector<float>& x, const ActivationLayout& layout, int n) {
  std::vector<uint8_t> bytes(layout.bytes * n, 0xa5);
  for (int t = 0; t < n; ++t)
    k.quantize(x.data() + static_cast<size_t>(t) * layout.k, layout, bytes.data() + t * layout.bytes);
  return bytes;
}

// What an activation stands for.
std::vector<double> decode_activation(const ActivationLayout& layout, const uint8_t* at) {
  std::vector<double> x(layout.k);
  for (int i = 0; i < layout.k; ++i) {
    float scale;
    std::memcpy(&scale, at + layout.scale + i / 32 * 4, sizeof scale);
    x[i] = static_cast<double>(scale) * static_cast<int8_t>(at[i]);
  }
  return x;
}

void check_tokens(const std::vector<float>& together, int n, size_t stride,
                  const std::function<std::vector<float>(int)>& alone) {
  for (int t = 0; t < n; ++t) {
    CAPTURE(t);
    const std::vector<float> part(together.begin() + t * stride, together.begin() + (t + 1) * stride);
    CHECK(first_difference(part, alone(t)) == -1);
  }
}

struct Sums {
  std::vector<double> values, magnitudes;
};

// <row r, x_t> for all t, r
Sums products(const std::vector<double>& rows, const std::vector<double>& x, int count, int k, int n) {
  Sums sums;
  for (int t = 0; t < n; ++t) {
    for (int r = 0; r < count; ++r) {
      double total = 0, magnitude = 0;
      for (int i = 0; i < k; ++i) {
        const double product = rows[static_cast<size_t>(r) * k + i] * x[static_cast<size_t>(t) * k + i];
        total += product, magnitude += std::abs(product);
      }
      sums.values.push_back(total), sums.magnitudes.push_back(magnitude);
    }
  }
  return sums;
}

std::vector<double> doubles(const std::vector<float>& x) { return {x.begin(), x.end()}; }

Kernels::PackedRows packed_kernel(const Kernels& k, TensorType type) {
  switch (type) {
    case TensorType::kQ4_0:
      return k.packed_q4_0;
    case TensorType::kQ4_1:
      return k.packed_q4_1;
    case TensorType::kQ8_0:
      return k.packed_q8_0;
    default:
      return k.packed_q6_k;
  }
}

// Neurons of a sparse FFN of one type, and what its rows stand for.
struct Neurons {
  Neurons(TensorType type, int width, int count, bool gated, Random& random)
      : gate_bytes(random_rows(type, count, width, random)),
        up_bytes(random_rows(type, count, width, random)),
        down_bytes(random_rows(type, count, width, random)) {
    const GgufTensor gate_tensor = tensor_of(type, gate_bytes, count, width),
                     up_tensor = tensor_of(type, up_bytes, count, width),
                     down_tensor = tensor_of(type, down_bytes, count, width);
    layout = BundleLayout(type, width, gated);
    memory = Memory(layout.bytes * count, "a test");
    ThreadPool pool(1);
    bundles = copy_bundles(layout, gated ? &gate_tensor : nullptr, up_tensor, down_tensor, memory, pool);
    gate = decode_rows(type, gate_bytes), up = decode_rows(type, up_bytes), down = decode_rows(type, down_bytes);
    // a copy of the exact size, for the address sanitizer
    exact.assign(bundles.data, bundles.data + layout.bytes * count);
    bundles.data = exact.data();
  }
  std::vector<uint8_t> gate_bytes, up_bytes, down_bytes, exact;
  BundleLayout layout;
  Memory memory;
  Bundles bundles;
  std::vector<double> gate, up, down;
};

}  // namespace

TEST_CASE("activations in 8 bits") {
  Random random(11);
  for (const int k : {32, 64, 96, 480, 512, 544, 1056}) {
    CAPTURE(k);
    const ActivationLayout layout(k);
    auto x = random.normals(k);
    if (k >= 96) std::fill_n(x.begin() + 32, 32, 0.0f);
    if (k >= 480) x[100] = 1e-30f, x[200] = 3e38f, x[300] = 1e-40f;
    const auto plain = activations_of(*all_kernels().front(), x, layout, 1);
    for (const Kernels* kernels : all_kernels()) {
      CAPTURE(isa_name(kernels->isa));
      CHECK(activations_of(*kernels, x, layout, 1) == plain);
    }
    const auto got = decode_activation(layout, plain.data());
    int wrong = 0;
    for (int b = 0; b < k / 32; ++b) {
      float largest = 0, scale;
      for (int i = 0; i < 32; ++i) largest = std::max(largest, std::abs(x[32 * b + i]));
      std::memcpy(&scale, plain.data() + layout.scale + 4 * b, sizeof scale);
      wrong += scale != largest / 127.0f;
      int sums[2] = {};
      for (int i = 0; i < 32; ++i) {
        wrong += !(std::abs(got[32 * b + i] - x[32 * b + i]) <= 0.5001 * scale + 1e-44);
        const auto q = static_cast<int8_t>(plain[32 * b + i]);
        const auto lane = static_cast<int8_t>(plain[layout.lanes + b / 16 * 512 + i / 4 * 64 + b % 16 * 4 + i % 4]);
        wrong += lane != q;
        sums[i / 16] += q;
      }
      for (int half = 0; half < 2; ++half) {
        int32_t sum;
        std::memcpy(&sum, plain.data() + layout.sums + (b / 16 * 32 + half * 16 + b % 16) * 4, sizeof sum);
        wrong += sum != sums[half];
      }
      int32_t minus_8;
      std::memcpy(&minus_8, plain.data() + layout.minus_8 + b * 4, sizeof minus_8);
      wrong += minus_8 != -8 * (sums[0] + sums[1]);
    }
    CHECK(wrong == 0);
    // the lanes and scales of blocks that are not there
    for (int b = k / 32; b < 16 * layout.groups; ++b) {
      for (int i = 0; i < 32; ++i) wrong += plain[layout.lanes + b / 16 * 512 + i / 4 * 64 + b % 16 * 4 + i % 4] != 0;
      for (int i = 0; i < 4; ++i) wrong += plain[layout.scale + 4 * b + i] != 0;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("activations that are no numbers are the same everywhere, and harm their block alone") {
  const ActivationLayout layout(96);
  for (const float bad : {kNan, -kNan, kInf, -kInf}) {
    for (const int at : {0, 5, 15, 16, 31}) {
      std::vector<float> x(96, 0.5f);
      x[32 + at] = bad;
      const auto plain = activations_of(*all_kernels().front(), x, layout, 1);
      for (const Kernels* kernels : all_kernels()) {
        CAPTURE(isa_name(kernels->isa));
        const auto got = activations_of(*kernels, x, layout, 1);
        for (const int block : {0, 2}) {
          CHECK(std::memcmp(got.data() + 32 * block, plain.data() + 32 * block, 32) == 0);
          CHECK(decode_activation(layout, got.data())[32 * block] == doctest::Approx(0.5));
        }
        CHECK(std::memcmp(got.data(), plain.data(), layout.scale) == 0);
      }
    }
  }
}

TEST_CASE("products of rows of fp16 and fp32") {
  Random random(12);
  for (const TensorType type : {TensorType::kF16, TensorType::kF32}) {
    for (const int k : {1, 15, 16, 17, 33, 100, 512, 1040}) {
      for (const int rows : {1, 3, 4, 5, 19}) {
        const auto bytes = random_rows(type, rows, k, random);
        const auto x = random.normals(static_cast<size_t>(kMostTokens) * k);
        const size_t row_bytes = bytes.size() / rows;
        CAPTURE(type_name(type));
        CAPTURE(k);
        CAPTURE(rows);
        const auto run = [&](const Kernels& kernels, int first, int n) {
          std::vector<float> y(static_cast<size_t>(n) * rows, 7.0f);
          const auto kernel = type == TensorType::kF16 ? kernels.rows_f16 : kernels.rows_f32;
          kernel(bytes.data(), row_bytes, rows, k, x.data() + static_cast<size_t>(first) * k, k, n, y.data(), rows);
          return y;
        };
        for (int n = 1; n <= kMostTokens; ++n) same_everywhere([&](const Kernels& kernels) { return run(kernels, 0, n); });
        const auto y = run(*all_kernels().front(), 0, kMostTokens);
        const Sums want = products(decode_rows(type, bytes), doubles(x), rows, k, kMostTokens);
        std::vector<double> bound;
        for (const double magnitude : want.magnitudes) bound.push_back(sum_bound(k, magnitude));
        CHECK(too_far(y, want.values, bound) == 0);
        for (const Kernels* kernels : all_kernels()) {
          check_tokens(run(*kernels, 0, kMostTokens), kMostTokens, rows, [&](int t) { return run(*kernels, t, 1); });
          check_tokens(run(*kernels, 0, 7), 7, rows, [&](int t) { return run(*kernels, t, 1); });
        }
      }
    }
  }
}

TEST_CASE("a row's products do not depend on the rows beside it") {
  Random random(13);
  const int rows = 11, k = 72;
  const auto bytes = random_rows(TensorType::kF16, rows, k, random);
  const auto x = random.normals(3 * k);
  for (const Kernels* kernels : all_kernels()) {
    std::vector<float> all(3 * rows), one(3);
    kernels->rows_f16(bytes.data(), 2 * k, rows, k, x.data(), k, 3, all.data(), rows);
    for (int r = 0; r < rows; ++r) {
      kernels->rows_f16(bytes.data() + static_cast<size_t>(2 * k) * r, 2 * k, 1, k, x.data(), k, 3, one.data(), 1);
      for (int t = 0; t < 3; ++t) CHECK(bits_of(one[t]) == bits_of(all[t * rows + r]));
    }
  }
}

TEST_CASE("products of packed rows") {
  Random random(14);
  ThreadPool pool(1);
  for (const TensorType type : {TensorType::kQ4_0, TensorType::kQ4_1, TensorType::kQ8_0, TensorType::kQ6_K}) {
    for (const int k : {32, 96, 256, 512, 544, 768}) {
      if (k % block_size(type).elements) continue;
      for (const int rows : {1, 15, 16, 17, 40}) {
        CAPTURE(type_name(type));
        CAPTURE(k);
        CAPTURE(rows);
        const auto bytes = random_rows(type, rows, k, random);
        const GgufTensor tensor = tensor_of(type, bytes, rows, k);
        Memory memory(matrix_bytes(GgufFile{}, tensor), "a test");
        const Matrix matrix = copy_matrix(tensor, memory, pool);
        const std::vector<uint8_t> data(matrix.data, matrix.data + matrix.bytes());
        const ActivationLayout layout(k);
        const auto x = random.normals(static_cast<size_t>(kMostTokens) * k);
        const auto activations = activations_of(*all_kernels().front(), x, layout, kMostTokens);
        const auto run = [&](const Kernels& kernels, int first, int n) {
          std::vector<float> y(static_cast<size_t>(n) * rows, 7.0f);
          packed_kernel(kernels, type)(data.data(), matrix.unit_bytes, rows, layout,
                                       activations.data() + first * layout.bytes, n, y.data(), rows);
          return y;
        };
        for (int n = 1; n <= kMostTokens; ++n) same_everywhere([&](const Kernels& kernels) { return run(kernels, 0, n); });
        const auto y = run(*all_kernels().front(), 0, kMostTokens);
        std::vector<double> decoded, bound;
        for (int t = 0; t < kMostTokens; ++t) {
          const auto part = decode_activation(layout, activations.data() + t * layout.bytes);
          decoded.insert(decoded.end(), part.begin(), part.end());
        }
        // integers within a block are exact; Q4_1's two parts may cancel, so its magnitudes are of the parts
        auto weights = decode_rows(type, bytes);
        const Sums want = products(weights, decoded, rows, k, kMostTokens);
        if (type == TensorType::kQ4_1) {
          for (double& weight : weights) weight = 16 * std::abs(weight) + 20;
        }
        const Sums sizes = products(weights, decoded, rows, k, kMostTokens);
        for (const double magnitude : sizes.magnitudes) bound.push_back((k / 32 + 6) * 2 * kEps * magnitude);
        CHECK(too_far(y, want.values, bound) == 0);
        for (const Kernels* kernels : all_kernels()) {
          check_tokens(run(*kernels, 0, kMostTokens), kMostTokens, rows, [&](int t) { return run(*kernels, t, 1); });
        }
      }
    }
  }
}

TEST_CASE("the largest codes do not overflow") {
  ThreadPool pool(1);
  const int k = 512;
  for (const TensorType type : {TensorType::kQ4_0, TensorType::kQ4_1, TensorType::kQ8_0, TensorType::kQ6_K}) {
    for (const int code : {0x00, 0xff, 0x80, 0x7f}) {
      for (const float sign : {1.0f, -1.0f}) {
        CAPTURE(type_name(type));
        CAPTURE(code);
        const BlockSize block = block_size(type);
        std::vector<uint8_t> bytes(16 * k / block.elements * block.bytes, static_cast<uint8_t>(code));
        for (size_t b = 0; b < bytes.size(); b += block.bytes) {
          put_half(bytes.data() + b + (type == TensorType::kQ6_K ? 208 : 0), 1.0f);
          if (type == TensorType::kQ4_1) put_half(bytes.data() + b + 2, -3.0f);
        }
        const GgufTensor tensor = tensor_of(type, bytes, 16, k);
        Memory memory(matrix_bytes(GgufFile{}, tensor), "a test");
        const Matrix matrix = copy_matrix(tensor, memory, pool);
        const ActivationLayout layout(k);
        const std::vector<float> x(k, 127.0f * sign);
        const auto activations = activations_of(*all_kernels().front(), x, layout, 1);
        const auto y = same_everywhere([&](const Kernels& kernels) {
          std::vector<float> out(16);
          packed_kernel(kernels, type)(matrix.data, matrix.unit_bytes, 16, layout, activations.data(), 1, out.data(), 16);
          return out;
        });
        double want = 0;
        const auto row = decode_rows(type, bytes);
        for (int i = 0; i < k; ++i) want += row[i] * x[i];
        for (const float value : y) CHECK(value == doctest::Approx(want).epsilon(1e-6));
      }
    }
  }
}

TEST_CASE("products of Q4_0 rows in lanes") {
  Random random(15);
  for (const int width : {32, 64, 96, 480, 512, 544, 1024, 1056}) {
    const int rows = 9;
    CAPTURE(width);
    const Neurons neurons(TensorType::kQ4_0, width, rows, true, random);
    const BundleLayout& b = neurons.layout;
    const ActivationLayout layout(width);
    const auto x = random.normals(static_cast<size_t>(kMostTokens) * width);
    const auto activations = activations_of(*all_kernels().front(), x, layout, kMostTokens);
    const auto run = [&](const Kernels& kernels, int first, int n) {
      std::vector<float> y(static_cast<size_t>(n) * rows, 7.0f);
      kernels.lanes_q4_0(neurons.bundles.data + b.up, b.bytes, b.up_scales, rows, layout,
                         activations.data() + first * layout.bytes, n, y.data(), rows);
      return y;
    };
    for (int n = 1; n <= kMostTokens; ++n) same_everywhere([&](const Kernels& kernels) { return run(kernels, 0, n); });
    std::vector<double> decoded, bound;
    for (int t = 0; t < kMostTokens; ++t) {
      const auto part = decode_activation(layout, activations.data() + t * layout.bytes);
      decoded.insert(decoded.end(), part.begin(), part.end());
    }
    const Sums want = products(neurons.up, decoded, rows, width, kMostTokens);
    for (const double magnitude : want.magnitudes) bound.push_back((width / 512 + 8) * kEps * magnitude);
    CHECK(too_far(run(*all_kernels().front(), 0, kMostTokens), want.values, bound) == 0);
    for (const Kernels* kernels : all_kernels()) {
      check_tokens(run(*kernels, 0, kMostTokens), kMostTokens, rows, [&](int t) { return run(*kernels, t, 1); });
    }
  }
}

TEST_CASE("sparse neurons: gated and gathered products are those of dense rows") {
  Random random(16);
  for (const TensorType type : {TensorType::kF16, TensorType::kF32, TensorType::kQ4_0}) {
    for (const int width : {32, 96, 160, 544}) {
      const int all = 40;
      const Neurons neurons(type, width, all, true, random);
      const BundleLayout& b = neurons.layout;
      const ActivationLayout layout(width);
      const auto x = random.normals(width);
      for (const int count : {0, 1, 2, 3, 4, 5, 7, 8, 13, 31}) {
        std::vector<const uint8_t*> gates, ups;
        std::vector<int> ids;
        for (int i = 0; i < count; ++i) {
          ids.push_back(i + i / 4);
          gates.push_back(neurons.bundles.neuron(ids.back()) + b.gate);
          ups.push_back(neurons.bundles.neuron(ids.back()) + b.up);
        }
        for (const bool relu_up : {false, true}) {
          CAPTURE(type_name(type));
          CAPTURE(width);
          CAPTURE(count);
          CAPTURE(relu_up);
          same_everywhere([&](const Kernels& kernels) {
            const auto activation = activations_of(kernels, x, layout, 1);
            std::vector<float> h(count, 7.0f), gathered(count, 7.0f), gate(all), up(all), want(count);
            if (type == TensorType::kQ4_0) {
              kernels.gated_q4_0(gates.data(), count, b.up, b.gate_scales, b.up_scales, layout, activation.data(), relu_up,
                                 {b.down, b.bytes - b.down}, h.data());
              kernels.gather_q4_0(ups.data(), count, b.up_scales, layout, activation.data(), gathered.data());
              kernels.lanes_q4_0(neurons.bundles.data + b.gate, b.bytes, b.gate_scales, all, layout, activation.data(), 1,
                                 gate.data(), all);
              kernels.lanes_q4_0(neurons.bundles.data + b.up, b.bytes, b.up_scales, all, layout, activation.data(), 1,
                                 up.data(), all);
            } else {
              const bool half = type == TensorType::kF16;
              (half ? kernels.gated_f16 : kernels.gated_f32)(gates.data(), count, b.up, width, x.data(), relu_up,
                                                             {b.down, b.bytes - b.down}, h.data());
              (half ? kernels.gather_f16 : kernels.gather_f32)(ups.data(), count, width, x.data(), gathered.data());
              const auto rows = half ? kernels.rows_f16 : kernels.rows_f32;
              rows(neurons.bundles.data + b.gate, b.bytes, all, width, x.data(), width, 1, gate.data(), all);
              rows(neurons.bundles.data + b.up, b.bytes, all, width, x.data(), width, 1, up.data(), all);
            }
            int wrong = 0;
            for (int i = 0; i < count; ++i) {
              const float g = gate[ids[i]], u = up[ids[i]];
              want[i] = g > 0 && (!relu_up || u > 0) ? g * u : 0.0f;
              wrong += want[i] != h[i];  // a zero may be of either sign
              wrong += bits_of(u) != bits_of(gathered[i]);
            }
            CHECK(wrong == 0);
            return h;
          });
        }
      }
    }
  }
}

TEST_CASE("a gate that is zero or no number closes its neuron") {
  std::vector<float> rows(2 * 4 * 16, 1.0f);  // gate and up rows of four neurons, 16 wide
  rows[0] = kNan, rows[2 * 16] = -15.0f, rows[4 * 16] = -kInf;
  std::vector<const uint8_t*> gates;
  for (int i = 0; i < 4; ++i) gates.push_back(reinterpret_cast<const uint8_t*>(rows.data() + static_cast<size_t>(i) * 32));
  rows[16] = rows[3 * 16] = rows[5 * 16] = kNan;
  const std::vector<float> x(16, 1.0f);
  const auto h = same_everywhere([&](const Kernels& kernels) {
    std::vector<float> out(4, 7.0f);
    kernels.gated_f32(gates.data(), 4, 64, 16, x.data(), false, {0, 0}, out.data());
    return out;
  });
  CHECK(h == std::vector<float>{0, 0, 0, 256});
}

TEST_CASE("weighted sums of fp16 and fp32 rows") {
  Random random(17);
  for (const TensorType type : {TensorType::kF16, TensorType::kF32}) {
    for (const int columns : {16, 48, 64, 80, 256, 272, 336}) {
      for (const int count : {0, 1, 2, 5, 9, 40}) {
        CAPTURE(type_name(type));
        CAPTURE(columns);
        CAPTURE(count);
        const auto bytes = random_rows(type, std::max(count, 1), columns, random);
        const size_t row_bytes = bytes.size() / std::max(count, 1);
        const auto h = random.normals(count), start = random.normals(columns);
        std::vector<const uint8_t*> rows;
        for (int i = 0; i < count; ++i) rows.push_back(bytes.data() + i * row_bytes);
        const auto y = same_everywhere([&](const Kernels& kernels) {
          auto out = start;
          const auto accumulate = type == TensorType::kF16 ? kernels.accumulate_f16 : kernels.accumulate_f32;
          accumulate(rows.data(), 0, h.data(), count, columns, out.data());
          // a part of the columns is the same part of the sums
          auto part = std::vector<float>(start.begin() + columns - 16, start.end());
          accumulate(rows.data(), row_bytes / columns * (columns - 16), h.data(), count, 16, part.data());
          CHECK(first_difference(part, std::vector<float>(out.end() - 16, out.end())) == -1);
          return out;
        });
        const auto weights = decode_rows(type, bytes);
        std::vector<double> want = doubles(start), bound(columns);
        for (int c = 0; c < columns; ++c) {
          double magnitude = std::abs(want[c]);
          for (int i = 0; i < count; ++i) {
            const double product = static_cast<double>(h[i]) * weights[static_cast<size_t>(i) * columns + c];
            want[c] += product, magnitude += std::abs(product);
          }
          bound[c] = (count + 1) * kEps * magnitude;
        }
        CHECK(too_far(y, want, bound) == 0);
      }
    }
  }
}

TEST_CASE("weighted sums of Q4_0 columns") {
  Random random(18);
  for (const int width : {32, 96, 128, 160, 512, 544, 640, 1056}) {
    for (const int count : {0, 1, 2, 3, 17, 255, 256}) {
      if (count > 17 && width > 544) continue;
      CAPTURE(width);
      CAPTURE(count);
      const Neurons neurons(TensorType::kQ4_0, width, std::max(count, 1), false, random);
      const BundleLayout& b = neurons.layout;
      const int chunks = b.padded_width() / 128;
      auto h = random.normals(count);
      if (count > 5) h[3] = 0.0f, h[4] = 1e-30f, h[5] = 30.0f;
      std::vector<const uint8_t*> rows;
      for (int i = 0; i < count; ++i) rows.push_back(neurons.bundles.neuron(i) + b.down);
      const auto start = random.normals(b.padded_width());
      const auto y = same_everywhere([&](const Kernels& kernels) {
        auto out = start;
        kernels.accumulate_q4_0(rows.data(), b.down_scales, h.data(), count, 0, chunks, out.data());
        // chunk by chunk, as several threads do
        auto parts = start;
        for (int chunk = 0; chunk < chunks; ++chunk) {
          kernels.accumulate_q4_0(rows.data(), b.down_scales, h.data(), count, chunk, 1, parts.data());
        }
        CHECK(first_difference(out, parts) == -1);
        return out;
      });
      std::vector<double> want = doubles(start), bound(start.size());
      for (int c = 0; c < width; ++c) {
        double largest = 0, magnitude = std::abs(want[c]);
        for (int i = 0; i < count; ++i) {
          const size_t from = static_cast<size_t>(i) * width / 32 * 18 + c / 32 * 18;
          largest = std::max(largest, std::abs(h[i] * half_value(neurons.down_bytes.data() + from)));
          const double product = static_cast<double>(h[i]) * neurons.down[static_cast<size_t>(i) * width + c];
          want[c] += product, magnitude += std::abs(product);
        }
        // each coefficient to half of 1/32767 of the largest, times a code of at most 8; then four roundings
        bound[c] = count * 4.001 * largest / 32767 + 6 * kEps * magnitude + 1e-37;
      }
      const std::vector<float> real(y.begin(), y.begin() + width);
      want.resize(width), bound.resize(width);
      CHECK(too_far(real, want, bound) == 0);
      for (int c = width; c < b.padded_width(); ++c) CHECK(y[c] == start[c]);
    }
  }
}

TEST_CASE("weights that are no numbers end in numbers of some kind") {
  Random random(19);
  const Neurons neurons(TensorType::kQ4_0, 64, 5, false, random);
  std::vector<const uint8_t*> rows;
  for (int i = 0; i < 5; ++i) rows.push_back(neurons.bundles.neuron(i) + neurons.layout.down);
  for (const float bad : {kNan, kInf, -kInf, 3e38f}) {
    const std::vector<float> h{1.0f, bad, -1.0f, bad, 0.5f};
    for (const Kernels* kernels : all_kernels()) {
      std::vector<float> y(128);
      kernels->accumulate_q4_0(rows.data(), neurons.layout.down_scales, h.data(), 5, 0, 1, y.data());
    }
  }
}

TEST_CASE("panels hold the rows' columns, and sums over them run row by row") {
  Random random(20);
  for (const TensorType type : {TensorType::kF16, TensorType::kF32, TensorType::kQ4_0}) {
    for (const int width : {32, 96, 160}) {
      const int rows = 9;
      const Neurons neurons(type, width, rows, false, random);
      const BundleLayout& b = neurons.layout;
      for (int first = 0; first < width; first += kPanelColumns) {
        const int columns = std::min(kPanelColumns, width - first);
        CAPTURE(type_name(type));
        CAPTURE(width);
        CAPTURE(first);
        std::vector<float> panel;
        same_everywhere([&](const Kernels& kernels) {
          panel.assign(rows * kPanelColumns, 7.0f);
          const auto kernel = type == TensorType::kQ4_0  ? kernels.panel_q4_0
                              : type == TensorType::kF16 ? kernels.panel_f16
                                                         : kernels.panel_f32;
          kernel(neurons.bundles.data + b.down, b.bytes, b.down_scales, rows, first, columns, panel.data());
          return panel;
        });
        int wrong = 0;
        for (int r = 0; r < rows; ++r) {
          for (int c = 0; c < columns; ++c) {
            wrong +=
                panel[r * kPanelColumns + c] != static_cast<float>(neurons.down[static_cast<size_t>(r) * width + first + c]);
          }
        }
        CHECK(wrong == 0);
        const auto h = random.normals(static_cast<size_t>(kMostTokens) * rows);
        const auto start = random.normals(static_cast<size_t>(kMostTokens) * columns);
        const auto run = [&](const Kernels& kernels, int token, int n) {
          std::vector<float> y(start.begin() + token * columns, start.begin() + (token + n) * columns);
          kernels.columns(panel.data(), rows, columns, h.data() + token * rows, rows, n, y.data(), columns);
          return y;
        };
        for (int n = 1; n <= kMostTokens; ++n) {
          const auto y = same_everywhere([&](const Kernels& kernels) { return run(kernels, 0, n); });
          std::vector<float> want(start.begin(), start.begin() + n * columns);
          for (int t = 0; t < n; ++t) {
            for (int i = 0; i < rows; ++i) {
              for (int c = 0; c < columns; ++c) {
                float& sum = want[t * columns + c];
                sum = std::fma(h[t * rows + i], panel[i * kPanelColumns + c], sum);
              }
            }
          }
          CHECK(first_difference(y, want) == -1);
        }
      }
    }
  }
}

TEST_CASE("sparse sums have the bits of dense ones") {
  Random random(21);
  const int width = 160, count = 70;
  const Neurons neurons(TensorType::kF16, width, count, false, random);
  const BundleLayout& b = neurons.layout;
  auto h = random.normals(count);
  for (float& value : h) value = std::max(value, 0.0f);
  for (const Kernels* kernels : all_kernels()) {
    std::vector<float> dense(width), sparse(width);
    std::vector<float> panel(static_cast<size_t>(count) * kPanelColumns);
    for (int first = 0; first < width; first += kPanelColumns) {
      const int columns = std::min(kPanelColumns, width - first);
      kernels->panel_f16(neurons.bundles.data + b.down, b.bytes, 0, count, first, columns, panel.data());
      kernels->columns(panel.data(), count, columns, h.data(), count, 1, dense.data() + first, width);
    }
    std::vector<const uint8_t*> rows;
    std::vector<float> weights;
    for (int i = 0; i < count; ++i) {
      if (h[i] == 0.0f) continue;
      rows.push_back(neurons.bundles.neuron(i) + b.down);
      weights.push_back(h[i]);
    }
    kernels->accumulate_f16(rows.data(), 0, weights.data(), static_cast<int>(rows.size()), width, sparse.data());
    CHECK(first_difference(dense, sparse) == -1);
  }
}

TEST_CASE("compaction keeps scores at the threshold, in order") {
  Random random(22);
  for (int n = 0; n <= 70; ++n) {
    for (const float threshold : {0.0f, -0.0f, 0.3f, -0.5f, kInf, -kInf}) {
      auto scores = random.normals(n);
      for (int i = 0; i < n; i += 3) scores[i] = threshold;
      for (int i = 1; i < n; i += 7) scores[i] = i % 2 ? kNan : std::nextafter(threshold, -kInf);
      for (int i = 2; i < n; i += 11) scores[i] = -0.0f;
      std::vector<int32_t> want;
      for (int i = 0; i < n; ++i) {
        if (scores[i] >= threshold) want.push_back(i);
      }
      for (const Kernels* kernels : all_kernels()) {
        CAPTURE(isa_name(kernels->isa));
        CAPTURE(n);
        std::vector<int32_t> indices(n + 16);
        const int count = kernels->compact(scores.data(), n, threshold, indices.data());
        REQUIRE(count >= 0);
        indices.resize(count);
        CHECK(indices == want);
      }
    }
  }
  for (const Kernels* kernels : all_kernels()) {
    const std::vector<float> scores(100, 1.0f);
    std::vector<int32_t> indices(116);
    CHECK(kernels->compact(scores.data(), 100, 1.0f, indices.data()) == 100);
    CHECK(kernels->compact(scores.data(), 100, std::nextafter(1.0f, 2.0f), indices.data()) == 0);
    CHECK(kernels->compact(scores.data(), 100, kNan, indices.data()) == 0);
  }
}

TEST_CASE("norms") {
  Random random(23);
  for (const int k : {1, 5, 16, 31, 32, 96, 1040}) {
    CAPTURE(k);
    const auto x = random.normals(k, 3.0f), weight = random.normals(k), bias = random.normals(k);
    const double epsilon = 1e-5;
    double squares = 0, mean = 0, deviations = 0;
    for (const float value : x) squares += static_cast<double>(value) * value, mean += value;
    mean /= k;
    for (const float value : x) deviations += (value - mean) * (value - mean);
    std::vector<double> rms, rms_bound, layer, layer_bound;
    for (int i = 0; i < k; ++i) {
      const double scale = 1 / std::sqrt(squares / k + epsilon), layer_scale = 1 / std::sqrt(deviations / k + epsilon);
      rms.push_back(x[i] * scale * weight[i]);
      rms_bound.push_back((k / 16 + 10) * kEps * std::abs(rms.back()) + 1e-38);
      const double size = (std::abs(x[i]) + std::abs(mean) + 3) * layer_scale * std::abs(weight[i]) + std::abs(bias[i]);
      layer.push_back((x[i] - mean) * layer_scale * weight[i] + bias[i]);
      layer_bound.push_back((k / 16 + 10) * 2 * kEps * size + (k == 1 ? 1e-3 : 0));
    }
    CHECK(too_far(same_everywhere([&](const Kernels& kernels) {
                    std::vector<float> y(k);
                    kernels.rms_norm(x.data(), weight.data(), k, 1e-5f, y.data());
                    return y;
                  }),
                  rms, rms_bound) == 0);
    CHECK(too_far(same_everywhere([&](const Kernels& kernels) {
                    std::vector<float> y(k);
                    kernels.layer_norm(x.data(), weight.data(), bias.data(), k, 1e-5f, y.data());
                    return y;
                  }),
                  layer, layer_bound) == 0);
  }
  const std::vector<float> zeros(48), ones(48, 1.0f);
  const auto y = same_everywhere([&](const Kernels& kernels) {
    std::vector<float> out(48);
    kernels.rms_norm(zeros.data(), ones.data(), 48, 1e-5f, out.data());
    return out;
  });
  for (const float value : y) CHECK(value == 0.0f);
}

TEST_CASE("softmax") {
  Random random(24);
  for (const int n : {1, 2, 15, 16, 17, 32, 33, 100, 513}) {
    for (const float scale : {0.1f, 3.0f, 60.0f, 1e4f}) {
      CAPTURE(n);
      CAPTURE(scale);
      const auto x = random.normals(n, scale);
      const double largest = *std::max_element(x.begin(), x.end());
      double total = 0;
      for (const float value : x) total += std::exp(value - largest);
      std::vector<double> want, bound;
      for (const float value : x) {
        want.push_back(std::exp(value - largest) / total);
        // the kernel's exponential stops at e^-87; the argument is rounded, and the polynomial is good to 2^-22
        bound.push_back(want.back() * (std::abs(value - largest) * kEps * 2 + 0x1p-21 + (n / 16 + 8) * kEps) + 2e-38);
      }
      CHECK(too_far(same_everywhere([&](const Kernels& kernels) {
                      auto y = x;
                      kernels.softmax(y.data(), n);
                      return y;
                    }),
                    want, bound) == 0);
    }
  }
}

TEST_CASE("elementwise kernels") {
  Random random(25);
  for (const int n : {1, 7, 16, 17, 48, 100, 1000}) {
    CAPTURE(n);
    auto gate = random.normals(n, 4.0f);
    const auto up = random.normals(n);
    if (n > 90) gate[3] = 200.0f, gate[4] = -200.0f, gate[5] = 0.0f, gate[6] = -0.0f, gate[7] = -88.5f, gate[8] = 1e-40f;
    std::vector<double> silu, silu_bound, gelu, gelu_bound;
    for (int i = 0; i < n; ++i) {
      const double g = gate[i];
      silu.push_back(g / (1 + std::exp(-g)) * up[i]);
      silu_bound.push_back(std::abs(silu.back()) * (std::abs(g) * 2 * kEps + 0x1p-21) + 1e-35);
      gelu.push_back(0.5 * g * (1 + std::erf(g * std::sqrt(0.5))));
      gelu_bound.push_back(std::abs(g) * 4 * kEps + 1e-40);
    }
    CHECK(too_far(same_everywhere([&](const Kernels& kernels) {
                    std::vector<float> y(n);
                    kernels.silu_mul(gate.data(), up.data(), n, y.data());
                    auto in_place = up;
                    kernels.silu_mul(gate.data(), in_place.data(), n, in_place.data());
                    CHECK(first_difference(y, in_place) == -1);
                    return y;
                  }),
                  silu, silu_bound) == 0);
    CHECK(too_far(same_everywhere([&](const Kernels& kernels) {
                    auto y = gate;
                    kernels.gelu(y.data(), n);
                    return y;
                  }),
                  gelu, gelu_bound) == 0);
    for (const bool relu_up : {false, true}) {
      const auto y = same_everywhere([&](const Kernels& kernels) {
        std::vector<float> out(n);
        kernels.relu_mul(gate.data(), up.data(), n, relu_up, out.data());
        return out;
      });
      for (int i = 0; i < n; ++i) CHECK(y[i] == std::max(gate[i], 0.0f) * (relu_up ? std::max(up[i], 0.0f) : up[i]));
    }
    const auto relu = same_everywhere([&](const Kernels& kernels) {
      auto y = gate;
      kernels.relu(y.data(), n);
      return y;
    });
    const auto sum = same_everywhere([&](const Kernels& kernels) {
      auto y = gate;
      kernels.add(y.data(), up.data(), n);
      return y;
    });
    for (int i = 0; i < n; ++i) {
      CHECK(relu[i] == std::max(gate[i], 0.0f));
      CHECK(bits_of(sum[i]) == bits_of(gate[i] + up[i]));
    }
  }
  const auto closed = same_everywhere([&](const Kernels& kernels) {
    std::vector<float> x{kNan, -kInf, kInf, -1.0f};
    kernels.relu(x.data(), 4);
    return x;
  });
  CHECK(closed == std::vector<float>{0, 0, kInf, 0});
}

TEST_CASE("halves, to and from") {
  Random random(26);
  std::vector<uint16_t> halves(0x10000);
  for (uint32_t h = 0; h < 0x10000; ++h) halves[h] = static_cast<uint16_t>(h);
  same_everywhere([&](const Kernels& kernels) {
    std::vector<float> y(0x10000);
    kernels.from_half(halves.data(), 0x10000, y.data());
    return y;
  });
  for (const int n : {1, 15, 16, 17, 99, 4099}) {
    auto x = random.normals(n);
    // every exponent, and the edges of the normal and of the finite halves
    for (int i = 0; n > 99 && i < n; ++i) x[i] = std::ldexp(x[i], i % 60 - 40);
    if (n > 15)
      x[3] = 65519.0f, x[4] = 65520.0f, x[5] = -1e9f, x[6] = 0x1p-24f, x[7] = 0x1p-25f, x[8] = 0x1.8p-25f, x[9] = -0.0f;
    const auto y = same_everywhere([&](const Kernels& kernels) {
      std::vector<uint16_t> out(n, 0xa5a5);
      std::vector<float> back(n);
      kernels.to_half(x.data(), n, out.data());
      for (int i = 0; i < n; ++i) CHECK(out[i] == float_to_half(std::clamp(x[i], -65504.0f, 65504.0f)));
      kernels.from_half(out.data(), n, back.data());
      return back;
    });
    for (int i = 0; i < n; ++i) {
      if (std::abs(x[i]) < 65520.0f) CHECK(std::abs(y[i] - x[i]) <= std::max(std::abs(x[i]) * 0x1p-11f, 0x1p-25f));
    }
  }
}
