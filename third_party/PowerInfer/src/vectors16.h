// Vectors of 16 floats or integers, made of the registers that the instruction set has: the same numbers on all of them.
// For files compiled with an instruction set's flags, so all is in an unnamed namespace.
#pragma once

#include <cstdint>
#include <cstring>

namespace powerinfer {
namespace {

// GCC leaves some of these out of line, with vectors passed through memory
#define POWERINFER_INLINE [[gnu::always_inline]] inline

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kPartLanes = 16;
#elif defined(__AVX2__)
constexpr int kPartLanes = 8;
#else
constexpr int kPartLanes = 4;
#endif
constexpr int kParts = kLanes / kPartLanes;

using FloatPart = float __attribute__((vector_size(4 * kPartLanes)));
using IntPart = int32_t __attribute__((vector_size(4 * kPartLanes)));

template <typename P, typename T>
struct Vector {
  P part[kParts];
  POWERINFER_INLINE T operator[](int lane) const { return part[lane / kPartLanes][lane % kPartLanes]; }
};
using Floats = Vector<FloatPart, float>;
using Ints = Vector<IntPart, int32_t>;

POWERINFER_INLINE Floats vector_of(const FloatPart (&part)[kParts]) {
  Floats v;
  for (int i = 0; i < kParts; ++i) v.part[i] = part[i];
  return v;
}
POWERINFER_INLINE Ints vector_of(const IntPart (&part)[kParts]) {
  Ints v;
  for (int i = 0; i < kParts; ++i) v.part[i] = part[i];
  return v;
}

#define POWERINFER_BINARY(op)                                                        \
  template <typename P, typename T>                                                  \
  POWERINFER_INLINE auto operator op(const Vector<P, T>& a, const Vector<P, T>& b) { \
    decltype(a.part[0] op b.part[0]) part[kParts];                                   \
    for (int i = 0; i < kParts; ++i) part[i] = a.part[i] op b.part[i];               \
    return vector_of(part);                                                          \
  }                                                                                  \
  template <typename P, typename T>                                                  \
  POWERINFER_INLINE auto operator op(const Vector<P, T>& a, T b) {                   \
    decltype(a.part[0] op b) part[kParts];                                           \
    for (int i = 0; i < kParts; ++i) part[i] = a.part[i] op b;                       \
    return vector_of(part);                                                          \
  }
POWERINFER_BINARY(+)
POWERINFER_BINARY(-)
POWERINFER_BINARY(*)
POWERINFER_BINARY(&)
POWERINFER_BINARY(|)
POWERINFER_BINARY(^)
POWERINFER_BINARY(<<)
POWERINFER_BINARY(>>)
POWERINFER_BINARY(<)  // comparisons: all bits of a lane set where true
POWERINFER_BINARY(>)
POWERINFER_BINARY(<=)
POWERINFER_BINARY(>=)
#undef POWERINFER_BINARY

POWERINFER_INLINE Ints operator~(const Ints& a) { return a ^ -1; }
template <typename P, typename T>
POWERINFER_INLINE void operator+=(Vector<P, T>& a, const Vector<P, T>& b) {
  a = a + b;
}
POWERINFER_INLINE void operator-=(Ints& a, const Ints& b) { a = a - b; }
POWERINFER_INLINE void operator|=(Ints& a, const Ints& b) { a = a | b; }

// part by part: GCC copies more than a register at once in pieces that later loads wait for
template <typename P, typename T>
POWERINFER_INLINE void load_parts(Vector<P, T>& v, const void* from) {
  for (int i = 0; i < kParts; ++i) {
    P part;
    std::memcpy(&part, static_cast<const char*>(from) + i * sizeof part, sizeof part);
    v.part[i] = part;
  }
}
POWERINFER_INLINE Floats load(const float* x) {
  Floats v;
  load_parts(v, x);
  return v;
}
POWERINFER_INLINE Ints load(const int32_t* x) {
  Ints v;
  load_parts(v, x);
  return v;
}
template <typename P, typename T>
POWERINFER_INLINE void save(T* out, const Vector<P, T>& v) {
  for (int i = 0; i < kParts; ++i) {
    const P part = v.part[i];
    std::memcpy(out + i * kPartLanes, &part, sizeof part);
  }
}
POWERINFER_INLINE Floats splat(float x) {
  Floats v;
  for (int i = 0; i < kParts; ++i) v.part[i] = x - FloatPart{};
  return v;
}

POWERINFER_INLINE Ints bits_of(const Floats& x) {
  Ints v;
  for (int i = 0; i < kParts; ++i) v.part[i] = reinterpret_cast<IntPart>(x.part[i]);
  return v;
}
POWERINFER_INLINE Floats of_bits(const Ints& x) {
  Floats v;
  for (int i = 0; i < kParts; ++i) v.part[i] = reinterpret_cast<FloatPart>(x.part[i]);
  return v;
}
POWERINFER_INLINE Floats to_float(const Ints& x) {
  Floats v;
  for (int i = 0; i < kParts; ++i) v.part[i] = __builtin_convertvector(x.part[i], FloatPart);
  return v;
}
POWERINFER_INLINE Ints lane_index() {
  constexpr int32_t kIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kIndex);
}

POWERINFER_INLINE Floats absolute(const Floats& x) { return of_bits(bits_of(x) & 0x7fffffff); }
POWERINFER_INLINE Floats select(const Ints& condition, const Floats& yes, const Floats& no) {
  return of_bits((condition & bits_of(yes)) | (~condition & bits_of(no)));
}
POWERINFER_INLINE Floats maximum(const Floats& a, const Floats& b) { return select(a > b, a, b); }

// Lane i of the result is lane i ^ stride; stride 1, 2, 4 or 8.
template <int stride, typename P, typename T>
POWERINFER_INLINE Vector<P, T> exchange(const Vector<P, T>& x) {
  Vector<P, T> v;
  if constexpr (stride >= kPartLanes) {
    for (int i = 0; i < kParts; ++i) v.part[i] = x.part[i ^ stride / kPartLanes];
  } else {
    constexpr int s = stride;
    for (int i = 0; i < kParts; ++i) {
      const P p = x.part[i];
#if defined(__AVX512F__)
      v.part[i] = __builtin_shufflevector(p, p, 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s, 4 ^ s, 5 ^ s, 6 ^ s, 7 ^ s, 8 ^ s, 9 ^ s, 10 ^ s,
                                          11 ^ s, 12 ^ s, 13 ^ s, 14 ^ s, 15 ^ s);
#elif defined(__AVX2__)
      v.part[i] = __builtin_shufflevector(p, p, 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s, 4 ^ s, 5 ^ s, 6 ^ s, 7 ^ s);
#else
      v.part[i] = __builtin_shufflevector(p, p, 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s);
#endif
    }
  }
  return v;
}

// Joins lanes 0 .. 7 with 8 .. 15, then 0 .. 3 with 4 .. 7, and so on.
template <typename P, typename T, typename F>
POWERINFER_INLINE T fold(Vector<P, T> v, F join) {
  v = join(v, exchange<8>(v));
  v = join(v, exchange<4>(v));
  v = join(v, exchange<2>(v));
  return join(v, exchange<1>(v))[0];
}
template <typename P, typename T>
POWERINFER_INLINE T sum_of(const Vector<P, T>& v) {
  return fold(v, [](const auto& a, const auto& b) { return a + b; });
}
POWERINFER_INLINE float largest_of(const Floats& v) {
  return fold(v, [](const auto& a, const auto& b) { return maximum(a, b); });
}
POWERINFER_INLINE bool any(const Ints& v) {
  return fold(v, [](const auto& a, const auto& b) { return a | b; }) != 0;
}

}  // namespace
}  // namespace powerinfer
