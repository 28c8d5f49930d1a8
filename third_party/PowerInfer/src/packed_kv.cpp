#include "packed_kv.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>

#include "errors.h"
#include "packed_kernels.h"

namespace powerinfer {
namespace {

// Lloyd-Max levels of keys, whose upper half is given (the lower mirrors it: -1 - level), and even levels of values.
struct Codebooks {
  int head_size, order;
  double key_step, value_step;
  std::array<int, 8> key_levels;
};

constexpr Codebooks kCodebooks[] = {
    {64, 1, 0.023681163787841797, 0.99017333984375, {5, 16, 27, 39, 52, 67, 85, 111}},
    {80, 20, 0.023685455322265625, 0.9912872314453125, {5, 16, 27, 39, 52, 67, 85, 112}},
    {96, 12, 0.023595333099365234, 0.992034912109375, {5, 16, 27, 39, 52, 67, 86, 113}},
    {112, 28, 0.02365255355834961, 0.9925537109375, {5, 16, 27, 39, 52, 67, 86, 113}},
    {128, 1, 0.023695945739746094, 0.992950439453125, {5, 16, 27, 39, 52, 67, 86, 113}},
    {192, 12, 0.023797035217285156, 0.993865966796875, {5, 16, 27, 39, 52, 67, 86, 113}},
    {256, 1, 0.023847579956054688, 0.99432373046875, {5, 16, 27, 39, 52, 67, 86, 113}},
};
constexpr size_t kHeadSizes = std::size(kCodebooks);

// Quadratic character of i - j modulo the prime q.
int jacobsthal(int q, int i, int j) {
  const int difference = ((i - j) % q + q) % q;
  if (difference == 0) return 0;
  for (int x = 1; x < q; ++x)
    if (x * x % q == difference) return 1;
  return -1;
}

// Entry of the Hadamard matrix of order 1, 12, 20 (Paley's first construction) or 28 (his second).
int outer_entry(int order, int i, int j) {
  if (order == 1) return 1;
  if (order == 28) {
    const int a = i / 2, b = j / 2;
    if (a == b) return i % 2 == 0 && j % 2 == 0 ? 1 : -1;
    const int conference = a == 0 || b == 0 ? 1 : jacobsthal(13, a - 1, b - 1);
    return conference * (i % 2 && j % 2 ? -1 : 1);
  }
  if (i == j) return 1;
  if (i == 0) return 1;
  if (j == 0) return -1;
  return jacobsthal(order - 1, i - 1, j - 1);
}

// Top bits of SplitMix64.
void random_signs(int head_size, float* signs) {
  uint64_t state = 0x5EED'0F'B175u + static_cast<uint64_t>(head_size);
  for (int i = 0; i < head_size; ++i) {
    state += 0x9E3779B97F4A7C15u;
    uint64_t z = state;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    signs[i] = (z ^ z >> 31) >> 63 ? 1.0f : -1.0f;
  }
}

PackedTables make_tables(const Codebooks& books) {
  PackedTables t = {};
  const int d = books.head_size;
  t.order = books.order;
  t.inner = d / books.order;
  random_signs(d, t.signs);
  if (t.order > 1) {
    for (int column = 0; column < t.order; ++column)
      for (int channel = 0; channel < d; ++channel) {
        const int row = channel / t.inner;
        t.outer[column * d + channel] = static_cast<float>(outer_entry(t.order, row, column));
        t.outer_transposed[column * d + channel] = static_cast<float>(outer_entry(t.order, column, row));
      }
  }
  const double root = std::sqrt(static_cast<double>(d));
  t.orthonormal = static_cast<float>(1.0 / root);
  for (size_t i = 0; i < 8; ++i) {
    t.key_grid[8 + i] = static_cast<float>(books.key_levels[i]) + 0.5f;
    t.key_grid[7 - i] = -t.key_grid[8 + i];
  }
  for (int i = 0; i < 4; ++i) t.value_grid[i] = static_cast<float>(i) - 1.5f;
  for (int i = 0; i < 15; ++i) t.key_boundaries[i] = (t.key_grid[i] + t.key_grid[i + 1]) * 0.5f;
  for (int i = 0; i < 3; ++i) t.value_boundaries[i] = (t.value_grid[i] + t.value_grid[i + 1]) * 0.5f;
  t.key_step = static_cast<float>(books.key_step);
  t.value_step = static_cast<float>(books.value_step);
  t.key_factor = static_cast<float>(1.0 / (static_cast<double>(t.key_step) * root));
  t.value_factor = static_cast<float>(1.0 / (static_cast<double>(t.value_step) * root));
  return t;
}

const std::array<PackedTables, kHeadSizes>& all_tables() {
  static const auto tables = [] {
    std::array<PackedTables, kHeadSizes> made;
    for (size_t i = 0; i < kHeadSizes; ++i) made[i] = make_tables(kCodebooks[i]);
    return made;
  }();
  return tables;
}

}  // namespace

PackedLayout PackedLayout::of(int head_size) {
  std::string allowed;
  for (size_t i = 0; i < kHeadSizes; ++i) {
    const int d = kCodebooks[i].head_size;
    if (d == head_size) {
      PackedLayout layout;
      layout.head_size = d;
      layout.slot_bytes = d * 6 / 8 + 4;
      layout.sub_page_bytes = kSubPageTokens * layout.slot_bytes;
      layout.value_offset = kSubPageTokens * d / 2;
      layout.key_scale_offset = kSubPageTokens * d * 6 / 8;
      layout.value_scale_offset = layout.key_scale_offset + 2 * kSubPageTokens;
      layout.tables = &all_tables()[i];
      return layout;
    }
    allowed += (i ? ", " : "") + std::to_string(d);
  }
  throw Error(ErrorKind::kUsage, "a packed KV cache needs a head size of " + allowed + ", this model's is " +
                                     std::to_string(head_size) + "; use --kv f16");
}

uint16_t* PackedRegion::sink(uint8_t* region, int token) const {
  return reinterpret_cast<uint16_t*>(region) + token * 2 * layout.head_size;
}

uint16_t* PackedRegion::recent(uint8_t* region, int token) const { return sink(region, kSinks + token % kRing); }

uint8_t* PackedRegion::sub_page(uint8_t* region, int index) const {
  return region + exact_bytes() + static_cast<uint64_t>(index) * static_cast<uint64_t>(layout.sub_page_bytes);
}

uint64_t PackedRegion::exact_bytes() const { return uint64_t{kSinks + kRing} * 4 * static_cast<uint64_t>(layout.head_size); }

uint64_t PackedRegion::held_bytes(int tokens) const {
  const int sub_pages = (tokens + kSubPageTokens - 1) / kSubPageTokens;
  return exact_bytes() + static_cast<uint64_t>(sub_pages) * static_cast<uint64_t>(layout.sub_page_bytes);
}

uint64_t PackedRegion::region_bytes() const { return (held_bytes(context) + 4095) / 4096 * 4096; }

void PackedLength::append(int tokens) {
  count_ += tokens;
  const int oldest = count_ - PackedRegion::kRing;
  if (oldest > oldest_) oldest_ = oldest;
}

bool PackedLength::can_truncate(int count) const {
  if (count < 0 || count > count_) return false;
  if (count <= PackedRegion::kSinks) return true;
  const int first_needed = std::max(PackedRegion::kSinks, count - PackedRegion::kWindow + 1);
  return first_needed >= oldest_;
}

void PackedLength::truncate(int count) {
  if (!can_truncate(count)) throw std::logic_error("cannot truncate to " + std::to_string(count) + " tokens");
  count_ = count;
  // later tokens come to the ring in order again
  if (count <= PackedRegion::kSinks) oldest_ = 0;
}

const PackedKernels& packed_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512_packed_kernels();
  if (isa == Isa::kAvx2) return avx2_packed_kernels();
#endif
  (void)isa;
  return plain_packed_kernels();
}

}  // namespace powerinfer
