// Operators, indices and slices. They throw Unsupported for what prints or counts otherwise in Python.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "jinja/value.h"

namespace powerinfer::jinja {

Value binary(const std::string& op, const Value& a, const Value& b);
bool contains(const Value& container, const Value& v);
// object.key
Value attribute(const Value& object, std::string_view key);
// object[key]
Value item(const Value& object, const Value& key);
// object[low:high:stride] of a list or a string
Value slice(const Value& object, std::optional<int64_t> low, std::optional<int64_t> high, int64_t stride);

}  // namespace powerinfer::jinja
