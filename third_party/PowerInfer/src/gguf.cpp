#include "gguf.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>

#include "errors.h"
#include "file_blocks.h"

namespace powerinfer {

static_assert(std::endian::native == std::endian::little, "GGUF is little endian");

namespace {

constexpr uint32_t kMagicGguf = 0x46554747;  // "GGUF"
constexpr uint32_t kMagicPwri = 0x49525750;  // "PWRI"
constexpr uint64_t kMaxDimensions = 4;
constexpr uint64_t kMaxNameBytes = 64 * 1024;
constexpr uint64_t kDefaultAlignment = 32;

std::string quoted(std::string_view text) {
  std::string shown = "\"";
  for (unsigned char c : text.substr(0, 80)) shown += c >= 32 && c < 127 ? static_cast<char>(c) : '?';
  return shown + (text.size() > 80 ? "...\"" : "\"");
}

uint64_t scalar_bytes(ValueType type) {
  switch (type) {
    case ValueType::kUint8:
    case ValueType::kInt8:
    case ValueType::kBool:
      return 1;
    case ValueType::kUint16:
    case ValueType::kInt16:
      return 2;
    case ValueType::kUint32:
    case ValueType::kInt32:
    case ValueType::kFloat32:
      return 4;
    case ValueType::kUint64:
    case ValueType::kInt64:
    case ValueType::kFloat64:
      return 8;
    default:
      return 0;  // strings and arrays have no fixed size
  }
}

template <typename T>
T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

struct TypeInfo {
  uint32_t number;
  const char* name;
  BlockSize block;
};

template <typename Block>
constexpr BlockSize size_of() {
  return {Block::kElements, sizeof(Block)};
}

// ggml's tensor types
constexpr TypeInfo kTypes[] = {
    {0, "F32", {1, 4}},
    {1, "F16", {1, 2}},
    {2, "Q4_0", size_of<BlockQ4_0>()},
    {3, "Q4_1", size_of<BlockQ4_1>()},
    {6, "Q5_0", {32, 22}},
    {7, "Q5_1", {32, 24}},
    {8, "Q8_0", size_of<BlockQ8_0>()},
    {9, "Q8_1", {32, 40}},
    {10, "Q2_K", {256, 84}},
    {11, "Q3_K", {256, 110}},
    {12, "Q4_K", {256, 144}},
    {13, "Q5_K", {256, 176}},
    {14, "Q6_K", size_of<BlockQ6_K>()},
    {15, "Q8_K", {256, 292}},
    {16, "IQ2_XXS", {256, 66}},
    {17, "IQ2_XS", {256, 74}},
    {18, "IQ3_XXS", {256, 98}},
    {19, "IQ1_S", {256, 50}},
    {20, "IQ4_NL", {32, 18}},
    {21, "IQ3_S", {256, 110}},
    {22, "IQ2_S", {256, 82}},
    {23, "IQ4_XS", {256, 136}},
    {24, "I8", {1, 1}},
    {25, "I16", {1, 2}},
    {26, "I32", {1, 4}},
    {27, "I64", {1, 8}},
    {28, "F64", {1, 8}},
    {29, "IQ1_M", {256, 56}},
    {30, "BF16", {1, 2}},
    {34, "TQ1_0", {256, 54}},
    {35, "TQ2_0", {256, 66}},
    {39, "MXFP4", {32, 17}},
};

const TypeInfo* type_info(TensorType type) {
  for (const TypeInfo& info : kTypes) {
    if (info.number == static_cast<uint32_t>(type)) return &info;
  }
  return nullptr;
}

std::string shape_text(std::span<const uint64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace

std::string type_name(TensorType type) {
  const TypeInfo* info = type_info(type);
  return info ? info->name : "type " + std::to_string(static_cast<uint32_t>(type));
}

BlockSize block_size(TensorType type) {
  const TypeInfo* info = type_info(type);
  return info ? info->block : BlockSize{0, 0};
}

uint64_t GgufTensor::elements() const {
  uint64_t count = 1;
  for (uint64_t n : shape) count *= n;
  return count;
}

// A cursor over the header; every read checks what is left.
class GgufFile::Parser {
 public:
  explicit Parser(GgufFile& file) : file_(file) {}

  void parse() {
    const uint32_t magic = number<uint32_t>("the magic");
    if (magic != kMagicGguf && magic != kMagicPwri) {
      file_.fail("is no GGUF or PowerInfer (PWRI) file: it starts with " +
                 quoted({reinterpret_cast<const char*>(file_.bytes_.data()), 4}));
    }
    file_.sparse_ = magic == kMagicPwri;
    file_.version_ = number<uint32_t>("the version");
    if (file_.version_ != 2 && file_.version_ != 3) {
      file_.fail("is GGUF version " + std::to_string(file_.version_) + "; versions 2 and 3 can be read");
    }
    const uint64_t tensor_count = count("tensors", 4 + 8 + 4 + 8);
    const uint64_t value_count = count("metadata values", 8 + 4 + 1);
    for (uint64_t i = 0; i < value_count; ++i) {
      const std::string_view key = string("a metadata key", kMaxNameBytes);
      const auto type = static_cast<ValueType>(number<uint32_t>("a metadata type"));
      if (!file_.values_.emplace(key, value(key, type)).second) file_.fail("has the metadata key " + quoted(key) + " twice");
    }
    read_tensors(tensor_count);
  }

 private:
  void read_tensors(uint64_t tensor_count) {
    const uint64_t alignment = file_.get_uint("general.alignment", kDefaultAlignment);
    if (alignment == 0 || !std::has_single_bit(alignment)) {
      file_.fail("has alignment " + std::to_string(alignment) + ", which is no power of two");
    }
    // grown as they are read: a damaged count may be far above what the file holds
    std::vector<uint64_t> offsets;
    for (uint64_t i = 0; i < tensor_count; ++i) offsets.push_back(read_tensor_info(file_.tensors_.emplace_back()));
    // the data start at the next multiple of the alignment; a file without tensors may end at once
    const uint64_t start = position_ + (alignment - position_ % alignment) % alignment;
    for (uint64_t i = 0; i < tensor_count; ++i) {
      GgufTensor& tensor = file_.tensors_[i];
      const uint64_t size = file_.bytes_.size();
      if (offsets[i] % alignment) file_.fail("has tensor " + quoted(tensor.name) + " at an offset that is not aligned");
      if (start > size || offsets[i] > size - start || tensor.bytes > size - start - offsets[i]) {
        file_.fail("ends inside tensor " + quoted(tensor.name) + ": the file is truncated (" + std::to_string(size) +
                   " bytes)");
      }
      tensor.data = file_.bytes_.data() + start + offsets[i];
      if (!file_.tensor_index_.emplace(tensor.name, i).second) file_.fail("has tensor " + quoted(tensor.name) + " twice");
    }
  }

  uint64_t read_tensor_info(GgufTensor& tensor) {
    tensor.name = string("a tensor's name", kMaxNameBytes);
    const uint32_t dimensions = number<uint32_t>("a tensor's number of dimensions");
    if (dimensions == 0 || dimensions > kMaxDimensions) {
      file_.fail("has tensor " + quoted(tensor.name) + " of " + std::to_string(dimensions) +
                 " dimensions; 1 to 4 are allowed");
    }
    uint64_t elements = 1;
    for (uint32_t d = 0; d < dimensions; ++d) {
      const uint64_t n = number<uint64_t>("a tensor's shape");
      // 2^40 elements are more than any file holds; the product then stays within 64 bits
      if (n > (uint64_t{1} << 40) || (n && elements > (uint64_t{1} << 40) / n)) {
        file_.fail("has tensor " + quoted(tensor.name) + " with an impossible shape");
      }
      elements *= n;
      tensor.shape.push_back(n);
    }
    tensor.type = static_cast<TensorType>(number<uint32_t>("a tensor's type"));
    const BlockSize block = block_size(tensor.type);
    if (block.elements == 0) {
      file_.fail("has tensor " + quoted(tensor.name) + " of the unknown " + type_name(tensor.type));
    }
    if (tensor.shape[0] % block.elements) {
      file_.fail("has tensor " + quoted(tensor.name) + " with rows of " + std::to_string(tensor.shape[0]) +
                 " elements, no multiple of " + type_name(tensor.type) + "'s block");
    }
    tensor.bytes = elements / block.elements * block.bytes;
    return number<uint64_t>("a tensor's offset");
  }

  Value value(std::string_view key, ValueType type) {
    switch (type) {
      case ValueType::kUint8:
        return uint64_t{number<uint8_t>(key)};
      case ValueType::kUint16:
        return uint64_t{number<uint16_t>(key)};
      case ValueType::kUint32:
        return uint64_t{number<uint32_t>(key)};
      case ValueType::kUint64:
        return number<uint64_t>(key);
      case ValueType::kInt8:
        return int64_t{number<int8_t>(key)};
      case ValueType::kInt16:
        return int64_t{number<int16_t>(key)};
      case ValueType::kInt32:
        return int64_t{number<int32_t>(key)};
      case ValueType::kInt64:
        return number<int64_t>(key);
      case ValueType::kFloat32:
        return double{number<float>(key)};
      case ValueType::kFloat64:
        return number<double>(key);
      case ValueType::kBool:
        return number<uint8_t>(key) != 0;
      case ValueType::kString:
        return string(key, std::numeric_limits<uint64_t>::max());
      case ValueType::kArray:
        return array(key);
    }
    file_.fail("has metadata " + quoted(key) + " of unknown type " + std::to_string(static_cast<uint32_t>(type)));
  }

  Array array(std::string_view key) {
    Array array;
    array.type = static_cast<ValueType>(number<uint32_t>(key));
    const bool strings = array.type == ValueType::kString;
    const uint64_t element = strings ? 8 : scalar_bytes(array.type);
    if (element == 0) file_.fail("has metadata " + quoted(key) + ": an array of arrays or of an unknown type");
    array.count = count(key, element);
    array.data = file_.bytes_.data() + position_;
    if (strings) {
      array.strings.reserve(array.count);
      for (uint64_t i = 0; i < array.count; ++i) array.strings.push_back(string(key, std::numeric_limits<uint64_t>::max()));
    } else {
      position_ += array.count * element;
    }
    return array;
  }

  // A count of things of at least `smallest` bytes each: no more than the rest of the file can hold.
  uint64_t count(std::string_view what, uint64_t smallest) {
    const uint64_t n = number<uint64_t>(what);
    if (n > left() / smallest) {
      file_.fail("says it has " + std::to_string(n) + " entries of " + quoted(what) + ", more than the file can hold");
    }
    return n;
  }

  template <typename T>
  T number(std::string_view what) {
    need(sizeof(T), what);
    const T result = load<T>(file_.bytes_.data() + position_);
    position_ += sizeof(T);
    return result;
  }

  std::string_view string(std::string_view what, uint64_t longest) {
    const uint64_t length = number<uint64_t>(what);
    if (length > longest) file_.fail("has " + quoted(what) + " of " + std::to_string(length) + " bytes");
    need(length, what);
    const std::string_view text(reinterpret_cast<const char*>(file_.bytes_.data() + position_), length);
    position_ += length;
    return text;
  }

  void need(uint64_t bytes, std::string_view what) {
    if (bytes > left()) file_.fail("ends inside its header, at " + quoted(what) + ": the file is truncated or damaged");
  }

  uint64_t left() const { return file_.bytes_.size() - position_; }

  GgufFile& file_;
  uint64_t position_ = 0;
};

GgufFile GgufFile::open(const std::string& path) {
  const auto fail = [&](const std::string& what) -> Error { return model_error("model file " + path + " " + what); };
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw fail(std::string("cannot be opened: ") + std::strerror(errno));
  struct stat status {};
  const bool readable = ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
  const auto size = readable ? static_cast<size_t>(status.st_size) : 0;
  void* address = size ? ::mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0) : MAP_FAILED;
  const int mapping_error = errno;
  ::close(descriptor);
  if (!readable) throw fail("is no regular file");
  if (size == 0) throw fail("is empty");
  if (address == MAP_FAILED) throw fail(std::string("cannot be mapped: ") + std::strerror(mapping_error));
  std::shared_ptr<const void> mapping(address, [size](const void* p) { ::munmap(const_cast<void*>(p), size); });
  GgufFile file;
  file.name_ = "model file " + path;
  file.bytes_ = {static_cast<const uint8_t*>(address), size};
  file.mapping_ = std::move(mapping);
  Parser(file).parse();
  return file;
}

GgufFile GgufFile::parse(std::span<const uint8_t> bytes, const std::string& name) {
  GgufFile file;
  file.name_ = name;
  file.bytes_ = bytes;
  Parser(file).parse();
  return file;
}

void GgufFile::fail(const std::string& what) const { throw model_error(name_ + " " + what); }

const GgufFile::Value* GgufFile::value(std::string_view key) const {
  const auto found = values_.find(key);
  return found == values_.end() ? nullptr : &found->second;
}

bool GgufFile::has(std::string_view key) const { return value(key) != nullptr; }

uint32_t GgufFile::get_uint(std::string_view key) const {
  if (!has(key)) fail("lacks the metadata key " + quoted(key));
  return get_uint(key, 0);
}

uint32_t GgufFile::get_uint(std::string_view key, uint32_t fallback) const {
  const Value* found = value(key);
  if (!found) return fallback;
  constexpr uint64_t limit = std::numeric_limits<uint32_t>::max();
  if (const auto* number = std::get_if<uint64_t>(found); number && *number <= limit) return static_cast<uint32_t>(*number);
  if (const auto* number = std::get_if<int64_t>(found); number && *number >= 0 && static_cast<uint64_t>(*number) <= limit) {
    return static_cast<uint32_t>(*number);
  }
  fail("has metadata " + quoted(key) + " that is no integer from 0 to 2^32 - 1");
}

float GgufFile::get_float(std::string_view key) const {
  if (!has(key)) fail("lacks the metadata key " + quoted(key));
  return get_float(key, 0.0f);
}

float GgufFile::get_float(std::string_view key, float fallback) const {
  const Value* found = value(key);
  if (!found) return fallback;
  if (const auto* number = std::get_if<double>(found)) {
    const double magnitude = *number < 0 ? -*number : *number;
    if (magnitude <= static_cast<double>(std::numeric_limits<float>::max())) return static_cast<float>(*number);
  }
  fail("has metadata " + quoted(key) + " that is no finite number");
}

bool GgufFile::get_bool(std::string_view key, bool fallback) const {
  const Value* found = value(key);
  if (!found) return fallback;
  if (const auto* flag = std::get_if<bool>(found)) return *flag;
  fail("has metadata " + quoted(key) + " that is no boolean");
}

std::string_view GgufFile::get_string(std::string_view key) const {
  if (!has(key)) fail("lacks the metadata key " + quoted(key));
  return get_string(key, "");
}

std::string_view GgufFile::get_string(std::string_view key, std::string_view fallback) const {
  const Value* found = value(key);
  if (!found) return fallback;
  if (const auto* text = std::get_if<std::string_view>(found)) return *text;
  fail("has metadata " + quoted(key) + " that is no string");
}

const GgufFile::Array& GgufFile::array(std::string_view key) const {
  const Value* found = value(key);
  if (!found) fail("lacks the metadata key " + quoted(key));
  if (const auto* array = std::get_if<Array>(found)) return *array;
  fail("has metadata " + quoted(key) + " that is no array");
}

const std::vector<std::string_view>& GgufFile::get_strings(std::string_view key) const {
  const Array& found = array(key);
  if (found.type != ValueType::kString) fail("has metadata " + quoted(key) + " that is no array of strings");
  return found.strings;
}

std::vector<float> GgufFile::get_floats(std::string_view key) const {
  const Array& found = array(key);
  if (found.type != ValueType::kFloat32) fail("has metadata " + quoted(key) + " that is no array of 32-bit floats");
  std::vector<float> numbers(found.count);
  if (found.count) std::memcpy(numbers.data(), found.data, found.count * sizeof(float));
  return numbers;
}

std::vector<int32_t> GgufFile::get_ints(std::string_view key) const {
  const Array& found = array(key);
  if (found.type != ValueType::kInt32 && found.type != ValueType::kUint32) {
    fail("has metadata " + quoted(key) + " that is no array of 32-bit integers");
  }
  std::vector<int32_t> numbers(found.count);
  if (found.count) std::memcpy(numbers.data(), found.data, found.count * sizeof(int32_t));
  return numbers;
}

const GgufTensor* GgufFile::find(std::string_view name) const {
  const auto found = tensor_index_.find(name);
  return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

const GgufTensor& GgufFile::tensor(std::string_view name, std::initializer_list<uint64_t> shape) const {
  const GgufTensor* found = find(name);
  if (!found) fail("lacks the tensor " + quoted(name));
  // trailing dimensions of 1 are the same tensor
  std::vector<uint64_t> have = found->shape, want = shape;
  while (have.size() > 1 && have.back() == 1) have.pop_back();
  while (want.size() > 1 && want.back() == 1) want.pop_back();
  if (have != want) {
    fail("has tensor " + quoted(name) + " of shape " + shape_text(found->shape) + " where " + shape_text({shape}) +
         " is needed");
  }
  return *found;
}

void GgufFile::release(const uint8_t* from, uint64_t bytes) const {
  if (!mapping_) return;
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(from) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(from) + bytes) / page * page;
  // advice: a failure changes nothing but memory use
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace powerinfer
