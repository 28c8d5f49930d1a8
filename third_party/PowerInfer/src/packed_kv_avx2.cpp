#include "packed_kernels.h"
#include "packed_kernels_impl.h"

namespace powerinfer {

const PackedKernels& avx2_packed_kernels() { return kKernels; }

}  // namespace powerinfer
