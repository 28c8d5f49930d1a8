// Memory that is reserved up front and taken from the system as it is touched, in huge pages where it has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace powerinfer {

class Memory {
 public:
  Memory() = default;
  // Zero-filled, aligned to 2 MiB. Throws Error(kMemory), which says what it was for.
  Memory(size_t bytes, const std::string& purpose, bool huge_pages = true);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  // The next `bytes` of it, aligned to 64.
  uint8_t* take(size_t bytes);
  // Gives the pages that lie wholly inside back to the system; they read as zeros.
  void forget(uint8_t* from, size_t bytes) const;

 private:
  void* base_ = nullptr;
  size_t mapped_ = 0;
  uint8_t* data_ = nullptr;
  size_t size_ = 0, taken_ = 0;
};

// Bytes that this process can still take: what the system says is available, or less where a control group limits it.
uint64_t available_memory();

constexpr size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace powerinfer
