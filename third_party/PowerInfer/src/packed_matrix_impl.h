// Products of packed matrices with tokens, on the vectors of simd_*.h; a part of kernels_impl.h.

namespace {

// Packed matrices: 16 rows at a time, one lane each. A format unpacks a block to bytes, u[8], and adds a block's product
// to each token's sums.

struct Q4_0 {
  static constexpr size_t kScales = 1;
  static constexpr size_t kBlockBytes = 256;
  static void unpack(const uint8_t* codes, int block, Ints u[8]) { unpack_nibbles(codes + block * kBlockBytes, u); }
  static Ints start(const Activation& x, int block) { return broadcast_int(x.minus_8[block]); }
  static Ints dot(Ints acc, Ints u, Ints q) { return dot_small_bytes(acc, u, q); }
  static Floats finish(Floats total, Ints acc, const uint8_t* scales, int block, int, const Activation& x) {
    const Floats scale = mul(load_half(halves(scales) + 16 * block), broadcast(x.scale[block]));
    return fma(to_floats(acc), scale, total);
  }
};

struct Q4_1 {
  static constexpr size_t kScales = 2;  // and minima
  static constexpr size_t kBlockBytes = 256;
  static void unpack(const uint8_t* codes, int block, Ints u[8]) { unpack_nibbles(codes + block * kBlockBytes, u); }
  static Ints start(const Activation&, int) { return broadcast_int(0); }
  static Ints dot(Ints acc, Ints u, Ints q) { return dot_small_bytes(acc, u, q); }
  static Floats finish(Floats total, Ints acc, const uint8_t* scales, int block, int blocks, const Activation& x) {
    const Floats scale = mul(load_half(halves(scales) + 16 * block), broadcast(x.scale[block]));
    const Floats minimum = load_half(halves(scales) + 16 * (blocks + block));
    total = fma(to_floats(acc), scale, total);
    return fma(minimum, broadcast(x.scale[block] * static_cast<float>(x.minus_8[block]) * -0.125f), total);
  }
};

struct Q8_0 {
  static constexpr size_t kScales = 1;
  static constexpr size_t kBlockBytes = 512;
  static void unpack(const uint8_t* codes, int block, Ints u[8]) {
    // + 128: the product's first factor is unsigned
    const Ints flip = broadcast_int(static_cast<int32_t>(0x80808080));
    POWERINFER_UNROLL
    for (int j = 0; j < 8; ++j) u[j] = xor_ints(load_ints(codes + block * kBlockBytes + 64 * j), flip);
  }
  static Ints start(const Activation& x, int block) { return shift_left<4>(broadcast_int(x.minus_8[block])); }
  static Ints dot(Ints acc, Ints u, Ints q) { return dot_bytes(acc, u, q); }
  static Floats finish(Floats total, Ints acc, const uint8_t* scales, int block, int, const Activation& x) {
    const Floats scale = mul(load_half(halves(scales) + 16 * block), broadcast(x.scale[block]));
    return fma(to_floats(acc), scale, total);
  }
};

constexpr size_t kScaleBytes = 32;  // of 16 rows in fp16

// The block that is asked for while one is read, in the same group or, past its end, in the next: its codes and its scales,
// which lie apart, so that one distance in bytes would ask for a group's scales too late. Distances of 8 to 64 blocks are
// about as good; Q4_0 is faster with the second-level cache as the place, Q6_K with the first.
struct BlockAhead {
  BlockAhead(const uint8_t* codes, size_t group_bytes, int here, int blocks)
      : group(codes), block(here + (blocks < 16 ? blocks : 16)) {
    if (block >= blocks) block -= blocks, group += group_bytes;
  }
  const uint8_t* group;
  int block;
};

// Few: the weights come from memory, not from a cache.
template <typename Format, int T, bool Few>
inline void packed_group(const uint8_t* codes, size_t group_bytes, const ActivationLayout& layout, const uint8_t* x,
                         Floats* totals) {
  const int blocks = layout.blocks;
  const uint8_t* scales = codes + blocks * Format::kBlockBytes;
  POWERINFER_UNROLL
  for (int t = 0; t < T; ++t) totals[t] = zero();
  for (int block = 0; block < blocks; ++block) {
    Ints u[8];
    if constexpr (Few) {
      const BlockAhead ahead(codes, group_bytes, block, blocks);
      POWERINFER_UNROLL
      for (size_t i = 0; i < Format::kBlockBytes; i += 64) prefetch_far(ahead.group + ahead.block * Format::kBlockBytes + i);
      POWERINFER_UNROLL
      for (size_t s = 0; s < Format::kScales; ++s)
        prefetch_far(ahead.group + blocks * Format::kBlockBytes + (s * blocks + ahead.block) * kScaleBytes);
    }
    Format::unpack(codes, block, u);
    const auto token = [&](int t) { return Activation(layout, x + t * layout.bytes); };
    const auto dot = [&](Ints acc, int t, int j) {
      return Format::dot(acc, u[j], broadcast_int(load_int32(token(t).q + block * kBlock + 4 * j)));
    };
    // each sum waits for the one before: of few tokens two halves, of many the other tokens' sums fill the time
    Ints acc[T];
    POWERINFER_UNROLL
    for (int t = 0; t < T; ++t) acc[t] = Format::start(token(t), block);
    if constexpr (T < 4) {
      POWERINFER_UNROLL
      for (int t = 0; t < T; ++t) {
        Ints odd = broadcast_int(0);
        POWERINFER_UNROLL
        for (int j = 0; j < 8; j += 2) acc[t] = dot(acc[t], t, j), odd = dot(odd, t, j + 1);
        acc[t] = add_ints(acc[t], odd);
      }
    } else {
      POWERINFER_UNROLL
      for (int j = 0; j < 8; ++j) {
        POWERINFER_UNROLL
        for (int t = 0; t < T; ++t) acc[t] = dot(acc[t], t, j);
      }
    }
    POWERINFER_UNROLL
    for (int t = 0; t < T; ++t) totals[t] = Format::finish(totals[t], acc[t], scales, block, blocks, token(t));
  }
}

// Q6_K: two scales a block, and one more for 8 blocks.
template <int T, bool Few>
inline void q6_k_group(const uint8_t* codes, size_t group_bytes, const ActivationLayout& layout, const uint8_t* x,
                       Floats* totals) {
  const uint8_t* high = codes + layout.blocks * size_t{256};
  const auto* sub_scales = reinterpret_cast<const int8_t*>(high + layout.blocks * size_t{128});
  const uint8_t* scales = high + layout.blocks * size_t{128 + 32};
  const Ints top = broadcast_int(0x30303030);
  POWERINFER_UNROLL
  for (int t = 0; t < T; ++t) totals[t] = zero();
  for (int super = 0; super < layout.blocks / 8; ++super) {
    Floats partial[T];
    POWERINFER_UNROLL
    for (int t = 0; t < T; ++t) partial[t] = zero();
    for (int block = 8 * super; block < 8 * super + 8; ++block) {
      Ints u[8];
      if constexpr (Few) {
        const BlockAhead ahead(codes, group_bytes, block, layout.blocks);
        const uint8_t* next_high = ahead.group + layout.blocks * size_t{256};
        POWERINFER_UNROLL
        for (size_t i = 0; i < 256; i += 64) prefetch(ahead.group + ahead.block * size_t{256} + i);
        POWERINFER_UNROLL
        for (size_t i = 0; i < 128; i += 64) prefetch(next_high + ahead.block * size_t{128} + i);
        prefetch(next_high + layout.blocks * size_t{128} + ahead.block * size_t{32});
      }
      unpack_nibbles(codes + block * size_t{256}, u);
      const Ints h0 = load_ints(high + block * size_t{128}), h1 = load_ints(high + block * size_t{128} + 64);
      u[0] = or_ints(u[0], and_ints(shift_left<4>(h0), top));
      u[1] = or_ints(u[1], and_ints(shift_left<2>(h0), top));
      u[2] = or_ints(u[2], and_ints(h0, top));
      u[3] = or_ints(u[3], and_ints(shift_right<2>(h0), top));
      u[4] = or_ints(u[4], and_ints(shift_left<4>(h1), top));
      u[5] = or_ints(u[5], and_ints(shift_left<2>(h1), top));
      u[6] = or_ints(u[6], and_ints(h1, top));
      u[7] = or_ints(u[7], and_ints(shift_right<2>(h1), top));
      const Floats s0 = to_floats(load_int8(sub_scales + 32 * block)),
                   s1 = to_floats(load_int8(sub_scales + 32 * block + 16));
      POWERINFER_UNROLL
      for (int t = 0; t < T; ++t) {
        const Activation token(layout, x + t * layout.bytes);
        const uint8_t* q = token.q + block * kBlock;
        Ints first = minus_32_times(token.half_sum(block, 0)), second = minus_32_times(token.half_sum(block, 1));
        POWERINFER_UNROLL
        for (int j = 0; j < 4; ++j) {
          first = dot_small_bytes(first, u[j], broadcast_int(load_int32(q + 4 * j)));
          second = dot_small_bytes(second, u[j + 4], broadcast_int(load_int32(q + 4 * j + 16)));
        }
        const Floats scaled = fma(to_floats(second), s1, mul(to_floats(first), s0));
        partial[t] = fma(scaled, broadcast(token.scale[block]), partial[t]);
      }
    }
    const Floats scale = load_half(halves(scales) + 16 * super);
    POWERINFER_UNROLL
    for (int t = 0; t < T; ++t) totals[t] = fma(partial[t], scale, totals[t]);
  }
}

struct Q6_K {};

template <typename Format, int T, bool Few>
void packed_tokens(const uint8_t* data, size_t group_bytes, int rows, const ActivationLayout& layout, const uint8_t* x,
                   float* y, size_t y_stride) {
  for (int r = 0; r < rows; r += kGroupRows, data += group_bytes) {
    Floats totals[T];
    if constexpr (std::is_same_v<Format, Q6_K>) {
      q6_k_group<T, Few>(data, group_bytes, layout, x, totals);
    } else {
      packed_group<Format, T, Few>(data, group_bytes, layout, x, totals);
    }
    const int left = rows - r;
    POWERINFER_UNROLL
    for (int t = 0; t < T; ++t) {
      if (left >= kGroupRows) {
        store(y + t * y_stride + r, totals[t]);
      } else {
        store(y + t * y_stride + r, totals[t], left);
      }
    }
  }
}

template <typename Format>
void packed_kernel(const uint8_t* data, size_t group_bytes, int rows, const ActivationLayout& layout, const uint8_t* x,
                   int n, float* y, size_t y_stride) {
  const auto tile = [&]<int T, bool Few>(int t) {
    packed_tokens<Format, T, Few>(data, group_bytes, rows, layout, x + t * layout.bytes, y + t * y_stride, y_stride);
  };
  int t = 0;
  if (n > 8) {
    for (; t + 8 <= n; t += 8) tile.template operator()<8, false>(t);
  }
  for (; t + 8 <= n; t += 8) tile.template operator()<8, true>(t);
  for (; t + 4 <= n; t += 4) tile.template operator()<4, true>(t);
  for (; t + 2 <= n; t += 2) tile.template operator()<2, true>(t);
  for (; t < n; ++t) tile.template operator()<1, true>(t);
}

}  // namespace
