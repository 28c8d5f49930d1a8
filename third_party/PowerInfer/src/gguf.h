// Reads GGUF version 2 and 3, and PowerInfer's PWRI: the same container, whose magic alone says that the model's FFNs are
// sparse. Every offset, size, count, string and type is checked before it is used; what does not hold is an Error(kModel).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <variant>
#include <vector>

namespace powerinfer {

enum class ValueType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

// Those that are named here; files with tensors of the others can be opened, not run.
enum class TensorType : uint32_t { kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8, kQ4_K = 12, kQ6_K = 14, kI32 = 26 };

// "Q4_0" and the like; "type 99" for one that is not known.
std::string type_name(TensorType type);
// Elements of one block, and its bytes in a file; 0 for a type that is not known.
struct BlockSize {
  uint32_t elements;
  uint32_t bytes;
};
BlockSize block_size(TensorType type);

struct GgufTensor {
  std::string name;
  TensorType type;
  std::vector<uint64_t> shape;  // fastest dimension first, as in the file
  const uint8_t* data;          // in the mapped file
  uint64_t bytes;

  uint64_t elements() const;
};

class GgufFile {
 public:
  // Maps the file. Throws Error(kModel) if it cannot be read or is malformed.
  static GgufFile open(const std::string& path);
  // The same for bytes in memory, which must outlive the result; `name` is for messages.
  static GgufFile parse(std::span<const uint8_t> bytes, const std::string& name = "model");

  const std::string& name() const { return name_; }
  bool sparse() const { return sparse_; }  // magic PWRI
  uint32_t version() const { return version_; }
  uint64_t size() const { return bytes_.size(); }

  // Metadata. `get_*` without a fallback throw Error(kModel) where the key is missing; all throw where its type is another
  // one or a number is out of the asked type's range.
  bool has(std::string_view key) const;
  uint32_t get_uint(std::string_view key) const;
  uint32_t get_uint(std::string_view key, uint32_t fallback) const;
  float get_float(std::string_view key) const;
  float get_float(std::string_view key, float fallback) const;
  bool get_bool(std::string_view key, bool fallback) const;
  std::string_view get_string(std::string_view key) const;
  std::string_view get_string(std::string_view key, std::string_view fallback) const;
  const std::vector<std::string_view>& get_strings(std::string_view key) const;
  std::vector<float> get_floats(std::string_view key) const;
  std::vector<int32_t> get_ints(std::string_view key) const;

  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufTensor* find(std::string_view name) const;  // nullptr where there is none
  // The named tensor with exactly this shape (fastest dimension first); Error(kModel) otherwise.
  const GgufTensor& tensor(std::string_view name, std::initializer_list<uint64_t> shape) const;

  // Tells the kernel that these mapped bytes are not needed any more.
  void release(const uint8_t* from, uint64_t bytes) const;

 private:
  struct Array {
    ValueType type;
    uint64_t count;
    const uint8_t* data;                    // numbers, unaligned
    std::vector<std::string_view> strings;  // of an array of strings
  };
  using Value = std::variant<uint64_t, int64_t, double, bool, std::string_view, Array>;
  class Parser;

  const Value* value(std::string_view key) const;
  const Array& array(std::string_view key) const;
  [[noreturn]] void fail(const std::string& what) const;

  std::string name_;
  std::shared_ptr<const void> mapping_;  // keeps the file mapped
  std::span<const uint8_t> bytes_;
  bool sparse_ = false;
  uint32_t version_ = 0;
  std::unordered_map<std::string_view, Value> values_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, size_t> tensor_index_;
};

}  // namespace powerinfer
