#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "errors.h"
#include "half.h"
#include "packed_kv.h"

using namespace powerinfer;

namespace {

constexpr int kHeadSizes[] = {64, 80, 96, 112, 128, 192, 256};
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

std::vector<Isa> isas() {
  std::vector<Isa> here;
  for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512})
    if (isa <= detect_isa()) here.push_back(isa);
  return here;
}

size_t sizeof_floats(int n) { return static_cast<size_t>(n) * sizeof(float); }

std::vector<float> normal(int n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = distribution(generator);
  return x;
}

double relative_error(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0, length = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    length += want[i] * want[i];
  }
  return std::sqrt(error / length);
}

// R as rows [head_size][head_size], from the rotation of unit vectors.
std::vector<double> rotation_matrix(const PackedLayout& layout) {
  const int d = layout.head_size;
  std::vector<double> matrix(static_cast<size_t>(d * d));
  std::vector<float> x(static_cast<size_t>(d)), y(x);
  for (int j = 0; j < d; ++j) {
    std::fill(x.begin(), x.end(), 0.0f);
    x[static_cast<size_t>(j)] = 1.0f;
    packed_kernels(Isa::kPlain).rotate(layout, x.data(), y.data());
    for (int i = 0; i < d; ++i) matrix[static_cast<size_t>(i * d + j)] = y[static_cast<size_t>(i)];
  }
  return matrix;
}

int position_of(int token) { return 16 * (token >> 1 & 3) + 2 * (token >> 3) + (token & 1); }

// A token's key (else value) read back from the documented layout, in rotated space.
std::vector<double> unpacked(const PackedLayout& layout, const uint8_t* sub_page, int token, bool is_key) {
  const int d = layout.head_size, position = position_of(token);
  const PackedTables& t = *layout.tables;
  std::vector<double> out(static_cast<size_t>(d));
  uint16_t half;
  std::memcpy(&half, sub_page + (is_key ? layout.key_scale_offset : layout.value_scale_offset) + 2 * position, 2);
  const double scale = half_to_float(half);
  for (int i = 0; i < d; ++i) {
    double grid;
    if (is_key) {
      uint32_t word = 0;
      for (int byte = 3; byte >= 0; --byte) word = word << 8 | sub_page[token * d / 2 + i % (d / 2) / 4 * 4 + byte];
      const bool z = i >= d / 2;
      const int magnitude = word >> (4 * (i % 4) + (z ? 16 : 0)) & 7, sign = word >> (8 * (i % 4) + (z ? 3 : 7)) & 1;
      grid = t.key_grid[sign ? 7 - magnitude : 8 + magnitude] * static_cast<double>(t.key_step);
    } else {
      const int field = i / (d / 4);
      const int code = sub_page[layout.value_offset + i % (d / 4) * 64 + position] >> 2 * field & 3;
      grid = (static_cast<double>(field == 3 ? code ^ 2 : code) - 1.5) * static_cast<double>(t.value_step);
    }
    out[static_cast<size_t>(i)] = grid * scale;
  }
  return out;
}

// One kv head's cache with its fp32 contents.
struct Sequence {
  PackedRegion place;
  std::vector<float> keys, values;  // [tokens, head_size]
  std::vector<uint8_t> bytes;
  uint8_t* region;

  Sequence(int head_size, int tokens, unsigned seed)
      : place{PackedLayout::of(head_size), tokens},
        keys(normal(tokens * head_size, seed)),
        values(normal(tokens * head_size, seed + 1)),
        bytes(place.region_bytes() + 64, 0xA5) {
    region = bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64);
    // a dimension shared by all keys, as in real models
    for (int t = 0; t < tokens; ++t) keys[static_cast<size_t>(t * head_size + 3)] += 4.0f;
  }
  void store(const PackedKernels& kernels, int first, int end) {
    for (int t = first; t < end; ++t) {
      const size_t at = static_cast<size_t>(t * place.layout.head_size);
      kernels.store(place, region, t, &keys[at], &values[at]);
    }
  }
  // Stores and attends everything as the engine does, `step` tokens at a time. queries [tokens, group, head_size].
  std::vector<float> run(const PackedKernels& kernels, const std::vector<float>& queries, int group, int step) {
    const int d = place.layout.head_size;
    std::vector<float> out(queries.size(), kNaN);
    for (int t = 0; t < place.context; t += step) {
      const int count = std::min(step, place.context - t);
      store(kernels, t, t + count);
      const size_t at = static_cast<size_t>(t * group * d);
      kernels.attend(place, region, t, count, group, &queries[at], &out[at], group * d,
                     1.0f / std::sqrt(static_cast<float>(d)));
    }
    return out;
  }
  // One query at `position`, in double precision.
  std::vector<double> expected(const float* query, int position, const std::vector<double>& rotation) const {
    const int d = place.layout.head_size;
    std::vector<double> q(static_cast<size_t>(d), 0.0), scores, sum(static_cast<size_t>(d), 0.0);
    std::vector<std::vector<double>> rows;
    auto rotated = [&](auto&& at) {
      std::vector<double> y(static_cast<size_t>(d), 0.0);
      for (int i = 0; i < d; ++i)
        for (int j = 0; j < d; ++j) y[static_cast<size_t>(i)] += rotation[static_cast<size_t>(i * d + j)] * at(j);
      return y;
    };
    q = rotated([&](int j) { return static_cast<double>(query[j]); });
    auto token = [&](int t, bool is_key) {
      const auto& source = is_key ? keys : values;
      if (t < 4 || t > position - 128)
        return rotated([&](int j) {
          return static_cast<double>(half_to_float(float_to_half(source[static_cast<size_t>(t * d + j)])));
        });
      uint8_t* page = place.sub_page(region, t / 64);
      return unpacked(place.layout, page, t % 64, is_key);
    };
    double total = 0, top = -1e300;
    for (int t = 0; t <= position; ++t) {
      const auto k = token(t, true);
      double score = 0;
      for (int i = 0; i < d; ++i) score += q[static_cast<size_t>(i)] * k[static_cast<size_t>(i)];
      scores.push_back(score / std::sqrt(static_cast<double>(d)));
      top = std::max(top, scores.back());
    }
    for (int t = 0; t <= position; ++t) {
      const double p = std::exp(scores[static_cast<size_t>(t)] - top);
      const auto v = token(t, false);
      total += p;
      for (int i = 0; i < d; ++i) sum[static_cast<size_t>(i)] += p * v[static_cast<size_t>(i)];
    }
    std::vector<double> out(static_cast<size_t>(d), 0.0);
    for (int i = 0; i < d; ++i)
      for (int j = 0; j < d; ++j)
        out[static_cast<size_t>(j)] += rotation[static_cast<size_t>(i * d + j)] * sum[static_cast<size_t>(i)] / total;
    return out;
  }
};

uint64_t fnv1a(const std::vector<uint8_t>& bytes) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001B3u;
  return hash;
}

std::vector<float> floats_of(const std::string& hex) {
  std::vector<float> out;
  for (size_t i = 0; i + 8 <= hex.size(); i += 8)
    out.push_back(std::bit_cast<float>(static_cast<uint32_t>(std::stoul(hex.substr(i, 8), nullptr, 16))));
  return out;
}

// A token's bytes in the order keys, values, key scale, value scale.
std::string slot_of(const PackedLayout& layout, const std::vector<uint8_t>& page, int token) {
  const int d = layout.head_size, position = position_of(token);
  std::vector<int> at;
  for (int i = 0; i < d / 2; ++i) at.push_back(token * d / 2 + i);
  for (int i = 0; i < d / 4; ++i) at.push_back(layout.value_offset + 64 * i + position);
  for (const int offset : {layout.key_scale_offset, layout.value_scale_offset})
    for (int i = 0; i < 2; ++i) at.push_back(offset + 2 * position + i);
  std::string hex;
  for (const int i : at)
    for (const int digit : {page[static_cast<size_t>(i)] >> 4, page[static_cast<size_t>(i)] & 15})
      hex += "0123456789abcdef"[digit];
  return hex;
}

}  // namespace

TEST_CASE("half precision") {
  CHECK(float_to_half(1.0f) == 0x3c00);
  CHECK(float_to_half(65519.0f) == 0x7bff);
  CHECK(float_to_half(65520.0f) == 0x7c00);
  CHECK(float_to_half(-0x1p-24f) == 0x8001);
  CHECK(float_to_half(0x1p-25f) == 0);    // halfway: to even
  CHECK(float_to_half(0x1.8p-24f) == 2);  // halfway: to even
  CHECK(float_to_half(0x1.002p0f) == 0x3c00);
  CHECK(float_to_half(0x1.006p0f) == 0x3c02);
  for (uint32_t half = 0; half < 65536; ++half) {
    const float x = half_to_float(static_cast<uint16_t>(half));
    if (std::isnan(x))
      CHECK((half & 0x7fff) > 0x7c00);
    else
      REQUIRE(float_to_half(x) == half);
  }
}

TEST_CASE("packed bytes are those of the examples") {
  for (const Isa isa : isas()) {
    CAPTURE(isa_name(isa));
    std::ifstream file(TEST_DATA "/packed_kv_k4v2.txt");
    REQUIRE(file);
    PackedLayout layout = {};
    std::vector<uint8_t> page;
    std::vector<float> key, value;
    int token = 0, slots = 0, pages = 0;
    for (std::string line, name, first; std::getline(file, line);) {
      std::istringstream words(line);
      words >> name >> first;
      if (name == "head_size") {
        layout = PackedLayout::of(std::stoi(first));
        page.assign(static_cast<size_t>(layout.sub_page_bytes), 0xA5);
      } else if (name == "token") {
        token = std::stoi(first);
      } else if (name == "key") {
        key = floats_of(first);
      } else if (name == "value") {
        value = floats_of(first);
      } else if (name == "slot") {
        CAPTURE(layout.head_size);
        CAPTURE(token);
        REQUIRE(static_cast<int>(key.size()) == layout.head_size);
        packed_kernels(isa).pack_token(layout, key.data(), value.data(), page.data(), token);
        CHECK(slot_of(layout, page, token) == first);
        ++slots;
      } else if (name == "page") {
        CHECK(fnv1a(page) == std::stoull(first, nullptr, 16));
        ++pages;
      }
    }
    CHECK(slots == 14);
    CHECK(pages == 4);
  }
}

TEST_CASE("head sizes without a codebook are refused") {
  CHECK_THROWS_WITH(
      PackedLayout::of(72),
      "a packed KV cache needs a head size of 64, 80, 96, 112, 128, 192, 256, this model's is 72; use --kv f16");
  CHECK(PackedLayout::of(128).slot_bytes == 100);
  CHECK(PackedLayout::of(128).sub_page_bytes == 6400);
}

TEST_CASE("rotation is orthonormal and its inverse undoes it, with the same bits on every instruction set") {
  for (const int d : kHeadSizes) {
    CAPTURE(d);
    const PackedLayout layout = PackedLayout::of(d);
    const auto x = normal(d, 5);
    std::vector<float> plain(x.size()), y(x.size()), back(x.size());
    packed_kernels(Isa::kPlain).rotate(layout, x.data(), plain.data());
    double before = 0, after = 0;
    for (size_t i = 0; i < x.size(); ++i) before += x[i] * x[i], after += plain[i] * plain[i];
    CHECK(after == doctest::Approx(before).epsilon(1e-5));
    std::vector<float> plain_back(x.size());
    packed_kernels(Isa::kPlain).unrotate(layout, plain.data(), plain_back.data());
    for (const Isa isa : isas()) {
      packed_kernels(isa).rotate(layout, x.data(), y.data());
      CHECK(std::memcmp(y.data(), plain.data(), sizeof_floats(d)) == 0);
      packed_kernels(isa).unrotate(layout, y.data(), back.data());
      CHECK(std::memcmp(back.data(), plain_back.data(), sizeof_floats(d)) == 0);
      CHECK(relative_error(back, {x.begin(), x.end()}) < 1e-6);
    }
  }
}

TEST_CASE("scores and sums over a sub-page") {
  constexpr int kQueries = 5, kCount = 41;
  for (const int d : kHeadSizes) {
    CAPTURE(d);
    const PackedLayout layout = PackedLayout::of(d);
    std::vector<uint8_t> page(static_cast<size_t>(layout.sub_page_bytes), 0xA5);
    const auto keys = normal(kCount * d, 1), values = normal(kCount * d, 2), queries = normal(kQueries * d, 3);
    for (int t = 0; t < kCount; ++t)
      packed_kernels(Isa::kPlain)
          .pack_token(layout, &keys[static_cast<size_t>(t * d)], &values[static_cast<size_t>(t * d)], page.data(), t);
    std::vector<float> weights(kQueries * 64), plain_scores, plain_out;
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = static_cast<float>(i * 37 % 101) / 101.0f;
    std::vector<double> want_scores, want_out(static_cast<size_t>(kQueries * d), 1.0);
    for (int q = 0; q < kQueries; ++q)
      for (int t = 0; t < kCount; ++t) {
        const auto k = unpacked(layout, page.data(), t, true), v = unpacked(layout, page.data(), t, false);
        double score = 0;
        for (int i = 0; i < d; ++i) {
          score += 0.25 * k[static_cast<size_t>(i)] * queries[static_cast<size_t>(q * d + i)];
          want_out[static_cast<size_t>(q * d + i)] += v[static_cast<size_t>(i)] * weights[static_cast<size_t>(q * 64 + t)];
        }
        want_scores.push_back(score);
      }
    for (const Isa isa : isas()) {
      CAPTURE(isa_name(isa));
      const PackedKernels& kernels = packed_kernels(isa);
      std::vector<float> scores(kQueries * 64, -1.0f), out(static_cast<size_t>(kQueries * d), 1.0f), packed_scores;
      kernels.scores(layout, page.data(), kCount, queries.data(), kQueries, 0.25f, scores.data());
      kernels.accumulate(layout, page.data(), kCount, weights.data(), kQueries, out.data());
      for (int q = 0; q < kQueries; ++q) {
        for (int t = 0; t < kCount; ++t) packed_scores.push_back(scores[static_cast<size_t>(q * 64 + t)]);
        CHECK(scores[static_cast<size_t>(q * 64 + kCount)] == -1.0f);
      }
      CHECK(relative_error(packed_scores, want_scores) < 1e-4);
      CHECK(relative_error(out, want_out) < 1e-4);
      if (isa == Isa::kPlain) plain_scores = scores, plain_out = out;
      CHECK(scores == plain_scores);
      CHECK(out == plain_out);
      // a query alone
      std::vector<float> one(64, -1.0f), one_out(static_cast<size_t>(d), 1.0f);
      kernels.scores(layout, page.data(), kCount, &queries[static_cast<size_t>(3 * d)], 1, 0.25f, one.data());
      CHECK(std::memcmp(one.data(), &scores[3 * 64], sizeof_floats(64)) == 0);
      kernels.accumulate(layout, page.data(), kCount, &weights[3 * 64], 1, one_out.data());
      CHECK(std::memcmp(one_out.data(), &out[static_cast<size_t>(3 * d)], sizeof_floats(d)) == 0);
    }
  }
}

TEST_CASE("attention over first tokens, packed tokens and window") {
  for (const int d : kHeadSizes) {
    CAPTURE(d);
    const int tokens = d == 64 ? 700 : 300, group = d == 64 ? 3 : 1;
    const auto queries = normal(tokens * group * d, 9);
    std::vector<float> plain;
    for (const Isa isa : isas()) {
      CAPTURE(isa_name(isa));
      const PackedKernels& kernels = packed_kernels(isa);
      Sequence sequence(d, tokens, 20);
      const auto out = sequence.run(kernels, queries, group, 1);
      if (isa == Isa::kPlain) {
        plain = out;
        const auto rotation = rotation_matrix(sequence.place.layout);
        for (const int t : {0, 1, 3, 4, 63, 64, 127, 128, 130, 131, 132, 191, 192, 255, 299, tokens - 1}) {
          CAPTURE(t);
          for (int head = 0; head < group; ++head) {
            const size_t at = static_cast<size_t>((t * group + head) * d);
            const std::vector<float> got(&out[at], &out[at] + d);
            CHECK(relative_error(got, sequence.expected(&queries[at], t, rotation)) < 4e-4);
          }
        }
      }
      CHECK(std::memcmp(out.data(), plain.data(), out.size() * 4) == 0);
      // however the tokens are cut into calls
      for (const int step : {7, 64}) {
        Sequence other(d, tokens, 20);
        const auto again = other.run(kernels, queries, group, step);
        CHECK(std::memcmp(out.data(), again.data(), out.size() * 4) == 0);
      }
    }
  }
}

TEST_CASE("large groups of query heads are those heads alone") {
  constexpr int d = 64, tokens = 200;
  for (const Isa isa : isas()) {
    const PackedKernels& kernels = packed_kernels(isa);
    for (const int group : {16, 17, 40}) {
      Sequence sequence(d, tokens, 4);
      sequence.store(kernels, 0, tokens);
      const auto queries = normal(group * d, 6);
      std::vector<float> out(queries.size(), kNaN), one(d);
      kernels.attend(sequence.place, sequence.region, tokens - 1, 1, group, queries.data(), out.data(), group * d, 0.125f);
      for (int head = 0; head < group; ++head) {
        const size_t at = static_cast<size_t>(head * d);
        kernels.attend(sequence.place, sequence.region, tokens - 1, 1, 1, &queries[at], one.data(), d, 0.125f);
        CHECK(std::memcmp(one.data(), &out[at], sizeof_floats(d)) == 0);
      }
    }
  }
}

TEST_CASE("what is not finite gives NaN to the queries that see it, and to no others") {
  constexpr int d = 64, tokens = 400;
  const auto queries = normal(tokens * d, 9);
  for (const Isa isa : isas()) {
    CAPTURE(isa_name(isa));
    const PackedKernels& kernels = packed_kernels(isa);
    for (const float poison : {kNaN, kInfinity})
      for (const bool is_key : {true, false})
        for (const int at : {2, 100}) {
          CAPTURE(at);
          Sequence sequence(d, tokens, 20);
          const auto clean = sequence.run(kernels, queries, 1, 16);
          // every coordinate, so that an infinite key's score cannot be minus infinity alone
          for (int i = 0; i < d; ++i) (is_key ? sequence.keys : sequence.values)[static_cast<size_t>(at * d + i)] = poison;
          std::fill(sequence.bytes.begin(), sequence.bytes.end(), 0xFF);  // places not written: NaN
          const auto out = sequence.run(kernels, queries, 1, 16);
          for (int t = 0; t < tokens; ++t) {
            bool all_nan = true, equal = true;
            for (int i = 0; i < d; ++i) {
              const size_t k = static_cast<size_t>(t * d + i);
              all_nan &= std::isnan(out[k]);
              equal &= out[k] == clean[k];
            }
            CAPTURE(t);
            if (t < at)
              CHECK(equal);
            else if (!is_key && std::isinf(poison) && (at < 4 || t < at + 128))
              CHECK(!std::isfinite(out[static_cast<size_t>(t * d)]));  // an exact infinite value
            else
              CHECK(all_nan);
          }
        }
    Sequence sequence(d, 3, 20);
    sequence.store(kernels, 0, 3);
    std::vector<float> query(d, 1.0f), out(d);
    query[7] = kInfinity;
    kernels.attend(sequence.place, sequence.region, 2, 1, 1, query.data(), out.data(), d, 1.0f);
    for (const float x : out) CHECK(std::isnan(x));
  }
}

TEST_CASE("a slot is cut back only where the window's copies are left") {
  PackedLength length;
  length.append(150);
  CHECK(length.can_truncate(40));
  length.append(350);
  CHECK(length.count() == 500);
  CHECK(length.can_truncate(500));
  CHECK(length.can_truncate(500 - PackedRegion::kAhead - 1));
  CHECK(!length.can_truncate(430));
  CHECK(!length.can_truncate(501));
  CHECK(!length.can_truncate(-1));
  CHECK(!length.can_truncate(5));
  CHECK(length.can_truncate(4));
  CHECK_THROWS_AS(length.truncate(5), std::logic_error);
  length.truncate(450);
  length.append(1);
  CHECK(!length.can_truncate(434));
  CHECK(length.can_truncate(435));
  length.truncate(4);
  length.append(100);
  CHECK(length.can_truncate(50));
}

TEST_CASE("what follows a truncation is what a fresh slot gives") {
  constexpr int d = 64, tokens = 400, cut = 340;
  const PackedKernels& kernels = packed_kernels(detect_isa());
  const auto queries = normal(tokens * d, 9);
  Sequence sequence(d, tokens, 20), fresh(d, tokens, 20);
  // other tokens from `cut` on first
  auto keys = sequence.keys;
  for (size_t i = cut * d; i < keys.size(); ++i) sequence.keys[i] = 9.0f;
  sequence.run(kernels, queries, 1, 1);
  sequence.keys = keys;
  PackedLength length;
  length.append(tokens);
  REQUIRE(length.can_truncate(cut));
  const auto want = fresh.run(kernels, queries, 1, 64);
  std::vector<float> out(d);
  for (int t = cut; t < tokens; ++t) {
    sequence.store(kernels, t, t + 1);
    const size_t at = static_cast<size_t>(t * d);
    kernels.attend(sequence.place, sequence.region, t, 1, 1, &queries[at], out.data(), d, 0.125f);
    REQUIRE(std::memcmp(out.data(), &want[at], sizeof_floats(d)) == 0);
  }
}

TEST_CASE("tokens may be stored while those before them are attended") {
  constexpr int d = 80, tokens = 512, step = PackedRegion::kAhead / 2;
  const PackedKernels& kernels = packed_kernels(detect_isa());
  const auto queries = normal(tokens * d, 9);
  Sequence alone(d, tokens, 20), shared(d, tokens, 20);
  const auto want = alone.run(kernels, queries, 1, 1);
  std::vector<float> out(queries.size(), kNaN);
  shared.store(kernels, 0, step);
  for (int t = 0; t < tokens; t += step) {
    std::thread writer([&] { shared.store(kernels, t + step, std::min(tokens, t + 2 * step)); });
    const size_t at = static_cast<size_t>(t * d);
    kernels.attend(shared.place, shared.region, t, step, 1, &queries[at], &out[at], d,
                   1.0f / std::sqrt(static_cast<float>(d)));
    writer.join();
  }
  CHECK(std::memcmp(out.data(), want.data(), out.size() * 4) == 0);
}

TEST_CASE("sizes of a region") {
  const PackedRegion place{PackedLayout::of(64), 4096};
  CHECK(place.exact_bytes() == 196 * 256);
  CHECK(place.held_bytes(65) == 196 * 256 + 2 * 52 * 64);
  CHECK(place.region_bytes() % 4096 == 0);
  CHECK(place.region_bytes() >= place.held_bytes(4096));
}
