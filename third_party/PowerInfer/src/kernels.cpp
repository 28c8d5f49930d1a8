#include "kernels.h"

namespace powerinfer {

namespace plain {
const Kernels& table();
}
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}

const Kernels& kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::table();
  if (isa == Isa::kAvx2) return avx2::table();
#endif
  return plain::table();
}

}  // namespace powerinfer
