// UTF-8 texts as Python's str methods see them: in characters.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace powerinfer::jinja {

constexpr size_t kMaxOutput = 64 << 20;  // bytes of a text that a template makes

std::vector<std::string_view> characters(std::string_view text);
std::string utf8(uint32_t code);
// `set`: the characters to remove; nullopt: white space.
std::string strip(std::string_view text, bool left, bool right, std::optional<std::string_view> set = std::nullopt);
// how: "upper", "lower", "title" or "capitalize". Throws Unsupported for text that is not ASCII.
std::string ascii_case(const std::string& text, const std::string& how);
std::string replace(const std::string& text, const std::string& from, const std::string& to);
// Adds to what a template makes. Throws Unsupported beyond kMaxOutput.
void append(std::string& out, std::string_view text);

}  // namespace powerinfer::jinja
