#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "simd_avx512.h"

namespace powerinfer::avx512 {

constexpr Isa kIsa = Isa::kAvx512;

#include "kernels_impl.h"

}  // namespace powerinfer::avx512
