// Instruction sets that kernels are written for. Each level's kernels are in files of their own, compiled with that level's
// flags; which to call is decided at run time.
#pragma once

#include <string>
#include <string_view>

namespace powerinfer {

enum class Isa {
  kPlain,   // any CPU
  kAvx2,    // AVX2, FMA, F16C
  kAvx512,  // also AVX-512 F, BW, DQ, VL and VNNI
};

// The best level that this CPU and its operating system support.
Isa detect_isa();

// "plain", "avx2" or "avx512".
std::string_view isa_name(Isa isa);

// The level of that name; "" is the best one here. Throws Error(kUsage) for another name or a level that this CPU lacks.
Isa parse_isa(const std::string& name);

}  // namespace powerinfer
