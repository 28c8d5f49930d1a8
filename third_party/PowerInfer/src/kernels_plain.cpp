#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "simd_plain.h"

namespace powerinfer::plain {

constexpr Isa kIsa = Isa::kPlain;

#include "kernels_impl.h"

}  // namespace powerinfer::plain
