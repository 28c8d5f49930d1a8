#include <doctest/doctest.h>

#include <cstring>

#include "errors.h"
#include "gguf.h"

using namespace powerinfer;

namespace {

// A file written byte by byte, as the format says.
struct Writer {
  std::vector<uint8_t> bytes;

  template <typename T>
  Writer& number(T value) {
    const size_t end = bytes.size();
    bytes.resize(end + sizeof value);
    std::memcpy(bytes.data() + end, &value, sizeof value);
    return *this;
  }
  Writer& string(std::string_view text) {
    number<uint64_t>(text.size());
    bytes.insert(bytes.end(), text.begin(), text.end());
    return *this;
  }
};

// One F32 tensor [2, 3], an integer, a string and an array of strings.
std::vector<uint8_t> small_file(const char* magic = "PWRI") {
  Writer w;
  w.bytes.assign(magic, magic + 4);
  w.number<uint32_t>(3).number<uint64_t>(1).number<uint64_t>(3);
  w.string("a.count").number<uint32_t>(4).number<uint32_t>(7);
  w.string("a.name").number<uint32_t>(8).string("x");
  w.string("a.words").number<uint32_t>(9).number<uint32_t>(8).number<uint64_t>(2).string("one").string("two");
  w.string("w").number<uint32_t>(2).number<uint64_t>(2).number<uint64_t>(3).number<uint32_t>(0).number<uint64_t>(0);
  while (w.bytes.size() % 32) w.bytes.push_back(0);
  for (int i = 0; i < 6; ++i) w.number<float>(static_cast<float>(i));
  return w.bytes;
}

}  // namespace

TEST_CASE("a small file reads back") {
  const auto bytes = small_file();
  const auto file = GgufFile::parse(bytes);
  CHECK(file.sparse());
  CHECK(!GgufFile::parse(small_file("GGUF")).sparse());
  CHECK(file.get_uint("a.count") == 7);
  CHECK(file.get_string("a.name") == "x");
  CHECK(file.get_strings("a.words")[1] == "two");
  const GgufTensor& tensor = file.tensor("w", {2, 3});
  CHECK(tensor.bytes == 24);
  CHECK(reinterpret_cast<const float*>(tensor.data)[5] == 5.0f);
  CHECK_THROWS_AS(file.tensor("w", {3, 2}), Error);
  CHECK_THROWS_AS(file.get_float("a.count"), Error);
  CHECK_THROWS_AS(file.get_uint("a.missing"), Error);
}

TEST_CASE("every truncation is an error") {
  const auto bytes = small_file();
  for (size_t length = 0; length < bytes.size(); ++length) {
    const std::span<const uint8_t> part(bytes.data(), length);
    CHECK_THROWS_AS(GgufFile::parse(part), Error);
  }
}

TEST_CASE("every byte set to every value is an error or a file") {
  const auto bytes = small_file();
  for (size_t at = 0; at < bytes.size(); ++at) {
    for (int value = 0; value < 256; ++value) {
      auto damaged = bytes;
      damaged[at] = static_cast<uint8_t>(value);
      try {
        GgufFile::parse(damaged);
      } catch (const Error& error) {
        CHECK(error.kind() == ErrorKind::kModel);
      }
    }
  }
}
