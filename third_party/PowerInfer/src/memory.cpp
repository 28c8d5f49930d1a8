#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <utility>

#include "errors.h"

namespace powerinfer {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// The number in a file of one number, or none ("max" of a control group).
uint64_t number_in(const char* path, uint64_t none) {
  std::ifstream file(path);
  uint64_t value = 0;
  return file >> value ? value : none;
}

}  // namespace

Memory::Memory(size_t bytes, const std::string& purpose, bool huge_pages) : mapped_(bytes + kHugePage), size_(bytes) {
  base_ = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base_ == MAP_FAILED) {
    base_ = nullptr;
    throw Error(ErrorKind::kMemory, "cannot reserve " + std::to_string(bytes >> 20) + " MiB for " + purpose + ": " +
                                        std::strerror(errno) + "; take a smaller model, --context or --slots");
  }
  data_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(base_), kHugePage));
  // advice: without huge pages everything works, slower
  if (huge_pages) ::madvise(data_, size_, MADV_HUGEPAGE);
}

Memory::~Memory() {
  if (base_) ::munmap(base_, mapped_);
}

Memory::Memory(Memory&& other) noexcept { *this = std::move(other); }

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(mapped_, other.mapped_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(taken_, other.taken_);
  return *this;
}

uint8_t* Memory::take(size_t bytes) {
  const size_t at = round_up(taken_, 64);
  if (bytes > size_ || at > size_ - bytes) throw Error(ErrorKind::kFailed, "more memory was asked for than was planned");
  taken_ = at + bytes;
  return data_ + at;
}

void Memory::forget(uint8_t* from, size_t bytes) const {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(from), page);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(from) + bytes) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

uint64_t available_memory() {
  constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();
  uint64_t available = kUnlimited;
  std::ifstream info("/proc/meminfo");
  for (std::string name; info >> name;) {
    uint64_t kib = 0;
    if (name == "MemAvailable:" && info >> kib) available = kib << 10;
    info.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  const uint64_t limit = number_in("/sys/fs/cgroup/memory.max", kUnlimited);
  const uint64_t used = number_in("/sys/fs/cgroup/memory.current", 0);
  // the group's use counts cached file pages, which it gives up when it must
  uint64_t cached = 0;
  std::ifstream stat("/sys/fs/cgroup/memory.stat");
  std::string name;
  for (uint64_t value; stat >> name >> value;) {
    if (name == "inactive_file" || name == "active_file") cached += value;
  }
  if (limit != kUnlimited) available = std::min(available, limit - std::min(limit, used - std::min(used, cached)));
  return available;
}

}  // namespace powerinfer
