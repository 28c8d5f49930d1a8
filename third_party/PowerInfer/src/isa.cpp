#include "isa.h"

#include "errors.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#endif

namespace powerinfer {

#if defined(__x86_64__)
namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf) {
  Registers r;
  __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// Which register states the operating system saves; needs OSXSAVE.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

constexpr uint32_t bit(int n) { return uint32_t{1} << n; }
bool has(uint64_t bits, uint64_t wanted) { return (bits & wanted) == wanted; }

Isa detect() {
  const Registers one = cpuid(1), seven = cpuid(7);
  // leaf 1, ECX: FMA, OSXSAVE, AVX, F16C; leaf 7, EBX: AVX2
  if (!has(one.c, bit(12) | bit(27) | bit(28) | bit(29)) || !has(seven.b, bit(5))) return Isa::kPlain;
  const uint64_t states = saved_states();
  if (!has(states, 0x06)) return Isa::kPlain;  // XMM, YMM
  // leaf 7, EBX: AVX-512 F, DQ, BW, VL; ECX: VNNI; states: opmask, upper halves of ZMM 0 to 15, ZMM 16 to 31
  const bool has_avx512 = has(seven.b, bit(16) | bit(17) | bit(30) | bit(31)) && has(seven.c, bit(11)) && has(states, 0xe6);
  return has_avx512 ? Isa::kAvx512 : Isa::kAvx2;
}

}  // namespace

Isa detect_isa() {
  static const Isa isa = detect();
  return isa;
}
#else
Isa detect_isa() { return Isa::kPlain; }
#endif

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPlain:
      return "plain";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "";
}

Isa parse_isa(const std::string& name) {
  const Isa best = detect_isa();
  if (name.empty()) return best;
  for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512}) {
    if (name != isa_name(isa)) continue;
    if (isa > best) {
      throw Error(ErrorKind::kUsage, "instruction set " + name + " is not supported by this CPU, at most " +
                                         std::string(isa_name(best)) + " is");
    }
    return isa;
  }
  throw Error(ErrorKind::kUsage, "instruction set must be plain, avx2 or avx512, got '" + name + "'");
}

}  // namespace powerinfer
