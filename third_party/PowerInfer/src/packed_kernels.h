// One table of kernels for each instruction set, made by the file of its name.
#pragma once

#include "packed_kv.h"

namespace powerinfer {

const PackedKernels& plain_packed_kernels();
const PackedKernels& avx2_packed_kernels();
const PackedKernels& avx512_packed_kernels();

}  // namespace powerinfer
