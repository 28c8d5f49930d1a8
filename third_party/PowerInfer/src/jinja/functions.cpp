#include "jinja/functions.h"

#include <algorithm>
#include <ctime>
#include <optional>

#include "jinja/operations.h"
#include "jinja/text.h"

namespace powerinfer::jinja {

namespace {

using Type = Value::Type;

}  // namespace

void Arguments::at_most(size_t count, std::initializer_list<std::string_view> names, const std::string& what) const {
  bool fine = values.size() <= count;
  for (const auto& keyword : keywords) fine = fine && std::find(names.begin(), names.end(), keyword.first) != names.end();
  if (!fine) throw Unsupported(what + " with these arguments");
}

const std::string& Arguments::text(size_t i, const std::string& what) const {
  if (i >= values.size() || !values[i].is(Type::kString)) throw Unsupported(what + " with these arguments");
  return values[i].text();
}

Value call_function(const std::string& name, const Arguments& a) {
  if (name == "raise_exception") {
    a.at_most(1, {}, name);
    throw Raised(a.values.empty() ? "the chat template refuses these messages" : text_of(a.values[0]));
  }
  if (name == "dict") {
    if (!a.values.empty()) throw Unsupported("dict with these arguments");
    return Value::dict(a.keywords);
  }
  if (name == "range") {
    a.at_most(3, {}, name);
    if (a.values.empty()) throw Unsupported("range with these arguments");
    const int64_t begin = a.values.size() > 1 ? as_index(a.values[0]) : 0;
    const int64_t end = as_index(a.values[a.values.size() > 1 ? 1 : 0]);
    const int64_t stride = a.values.size() > 2 ? as_index(a.values[2]) : 1;
    if (stride == 0) throw Unsupported("range with step 0");
    Items list;
    for (int64_t i = begin; stride > 0 ? i < end : i > end;) {
      if (list.size() >= 100'000) throw Unsupported("a range of this size");
      list.push_back(Value::integer(i));
      if (__builtin_add_overflow(i, stride, &i)) break;
    }
    return Value::list(std::move(list));
  }
  if (name == "strftime_now") {
    a.at_most(1, {}, name);
    const std::time_t now = std::time(nullptr);
    std::tm local{};
    localtime_r(&now, &local);
    char text[256];
    const size_t length = std::strftime(text, sizeof text, a.text(0, name).c_str(), &local);
    return Value::string(std::string(text, length));
  }
  throw Unsupported("the function " + name);
}

Value call_method(const Value& object, const std::string& m, const Arguments& a) {
  if (!a.keywords.empty()) throw Unsupported(m + " with these arguments");
  if (object.is(Type::kString)) {
    const std::string& s = object.text();
    if (m == "strip" || m == "lstrip" || m == "rstrip") {
      a.at_most(1, {}, m);
      std::optional<std::string_view> set;
      if (!a.values.empty()) set = a.text(0, m);
      return Value::string(strip(s, m != "rstrip", m != "lstrip", set));
    }
    if (m == "upper" || m == "lower" || m == "title" || m == "capitalize") {
      a.at_most(0, {}, m);
      return Value::string(ascii_case(s, m));
    }
    if (m == "startswith" || m == "endswith") {
      a.at_most(1, {}, m);
      const std::string& part = a.text(0, m);
      return Value::boolean(m == "startswith" ? s.starts_with(part) : s.ends_with(part));
    }
    if (m == "replace") {
      a.at_most(2, {}, m);
      return Value::string(replace(s, a.text(0, m), a.text(1, m)));
    }
    if (m == "split") {
      a.at_most(2, {}, m);
      const std::string& by = a.text(0, m);
      int64_t most = a.values.size() > 1 ? as_index(a.values[1]) : -1;
      if (by.empty()) throw Unsupported("split by an empty text");
      Items parts;
      size_t at = 0;
      for (size_t found; most != 0 && (found = s.find(by, at)) != std::string::npos; at = found + by.size(), --most) {
        parts.push_back(Value::string(s.substr(at, found - at)));
      }
      parts.push_back(Value::string(s.substr(at)));
      return Value::list(std::move(parts));
    }
  }
  if (object.is(Type::kDict)) {
    if (m == "get") {
      a.at_most(2, {}, m);
      const Value* found = lookup(object.entries(), a.text(0, m));
      return found ? *found : a.values.size() > 1 ? a.values[1] : Value::none();
    }
    if (m == "items" || m == "keys" || m == "values") {
      a.at_most(0, {}, m);
      Items list;
      for (const auto& [key, value] : object.entries()) {
        if (m == "items") {
          list.push_back(Value::list(Items{Value::string(key), value}));
        } else {
          list.push_back(m == "keys" ? Value::string(key) : value);
        }
      }
      return Value::list(std::move(list));
    }
  }
  throw Unsupported("the method " + m + " of " + type_name(object));
}

Value apply_filter(const Value& object, const std::string& f, const Arguments& a) {
  if (f == "default" || f == "d") {
    a.at_most(2, {"default_value", "boolean"}, f);
    const Value* named = lookup(a.keywords, "boolean");
    const bool falsy = a.values.size() > 1 ? truth(a.values[1]) : named && truth(*named);
    const bool missing = object.is(Type::kUndefined) || (falsy && !truth(object));
    if (!missing) return object;
    const Value* fallback = lookup(a.keywords, "default_value");
    return !a.values.empty() ? a.values[0] : fallback ? *fallback : Value::string("");
  }
  if (!a.keywords.empty()) throw Unsupported("the filter " + f + " with these arguments");
  if (f == "trim") {
    a.at_most(1, {}, f);
    std::optional<std::string_view> set;
    if (!a.values.empty()) set = a.text(0, f);
    return Value::string(strip(text_of(object), true, true, set));
  }
  if (f == "upper" || f == "lower" || f == "capitalize") return Value::string(ascii_case(text_of(object), f));
  if (f == "safe" || (f == "string" && object.is(Type::kString))) return object;
  if (f == "string") return Value::string(text_of(object));
  if (f == "length" || f == "count") {
    size_t length;
    if (object.is(Type::kDict)) {
      length = object.entries().size();
    } else {
      length = object.is(Type::kString) ? characters(object.text()).size() : items_of(object).size();
    }
    return Value::integer(static_cast<int64_t>(length));
  }
  if (f == "first" || f == "last") {
    const List list = items_of(object);
    return list.empty() ? Value() : list[f == "first" ? 0 : list.size() - 1];
  }
  if (f == "list") return Value::list(items_of(object));
  if (f == "reverse" && object.is(Type::kList)) {
    const auto size = static_cast<int64_t>(object.items().size());
    return Value::list(object.items().slice(size - 1, -1, object.items().size()));
  }
  if (f == "replace") {
    a.at_most(2, {}, f);
    return Value::string(replace(text_of(object), a.text(0, f), a.text(1, f)));
  }
  if (f == "join") {
    a.at_most(1, {}, f);
    const std::string between = a.values.empty() ? "" : a.text(0, f);
    std::string out;
    const List list = items_of(object);
    for (size_t i = 0; i < list.size(); ++i) append(out, (i ? between : "") + text_of(list[i]));
    return Value::string(std::move(out));
  }
  throw Unsupported("the filter " + f);
}

bool apply_test(const Value& v, const std::string& t, const Value* other) {
  if (other) {
    if (t == "equalto" || t == "eq" || t == "sameas") return equal(v, *other);
    if (t == "in") return contains(*other, v);
    throw Unsupported("the test " + t);
  }
  if (t == "defined") return !v.is(Type::kUndefined);
  if (t == "undefined") return v.is(Type::kUndefined);
  if (t == "none") return v.is(Type::kNone);
  if (t == "string") return v.is(Type::kString);
  if (t == "mapping") return v.is(Type::kDict) && !v.is_namespace();
  if (t == "sequence" || t == "iterable") {
    return v.is(Type::kString) || v.is(Type::kList) || v.is(Type::kDict) || v.is(Type::kUndefined);
  }
  if (t == "number") return is_number(v);
  if (t == "integer") return v.is(Type::kInt);
  if (t == "float") return v.is(Type::kFloat);
  if (t == "boolean") return v.is(Type::kBool);
  if (t == "true") return v.is(Type::kBool) && v.int64();
  if (t == "false") return v.is(Type::kBool) && !v.int64();
  if (t == "odd" || t == "even") {
    if (!v.is(Type::kInt)) throw Unsupported("the test " + t + " of " + type_name(v));
    return (v.int64() % 2 != 0) == (t == "odd");
  }
  throw Unsupported("the test " + t);
}

}  // namespace powerinfer::jinja
