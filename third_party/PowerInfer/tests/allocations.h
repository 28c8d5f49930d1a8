// Lets allocations fail, for tests of what is left when memory is.
#pragma once

namespace powerinfer::testing {

// On this thread the next `after` allocations by operator new succeed, the `count` that follow throw std::bad_alloc.
void fail_allocations(int after, int count);

}  // namespace powerinfer::testing
