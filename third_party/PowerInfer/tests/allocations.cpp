#include "allocations.h"

#include <cstdlib>
#include <new>

namespace powerinfer::testing {
namespace {

thread_local int left_before = 0, left_failing = 0;

bool fails() {
  if (left_failing == 0) return false;
  if (left_before > 0) {
    --left_before;
    return false;
  }
  --left_failing;
  return true;
}

}  // namespace

void fail_allocations(int after, int count) { left_before = after, left_failing = count; }

}  // namespace powerinfer::testing

void* operator new(std::size_t size) {
  void* made = powerinfer::testing::fails() ? nullptr : std::malloc(size ? size : 1);
  if (!made) throw std::bad_alloc();
  return made;
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return powerinfer::testing::fails() ? nullptr : std::malloc(size ? size : 1);
}
void operator delete(void* made) noexcept { std::free(made); }
void operator delete(void* made, std::size_t) noexcept { std::free(made); }
