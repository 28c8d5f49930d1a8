#include "half.h"
#include "packed_kernels.h"
#include "packed_kernels_impl.h"

namespace powerinfer {

const PackedKernels& plain_packed_kernels() { return kKernels; }

}  // namespace powerinfer
