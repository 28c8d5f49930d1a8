#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "simd_avx2.h"

namespace powerinfer::avx2 {

constexpr Isa kIsa = Isa::kAvx2;

#include "kernels_impl.h"

}  // namespace powerinfer::avx2
