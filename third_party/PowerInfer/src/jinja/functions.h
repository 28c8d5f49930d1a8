// The functions, methods, filters and tests that chat templates call. They throw Unsupported for others and for arguments
// that are not known here.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>

#include "jinja/value.h"

namespace powerinfer::jinja {

struct Arguments {
  Items values;
  Dict keywords;

  void at_most(size_t count, std::initializer_list<std::string_view> names, const std::string& what) const;
  const std::string& text(size_t i, const std::string& what) const;
};

// Throws Raised for raise_exception. namespace() is the renderer's.
Value call_function(const std::string& name, const Arguments& arguments);
Value call_method(const Value& object, const std::string& name, const Arguments& arguments);
Value apply_filter(const Value& object, const std::string& name, const Arguments& arguments);
// `other`: nullptr for a test without an argument.
bool apply_test(const Value& v, const std::string& name, const Value* other);

}  // namespace powerinfer::jinja
