#include "jinja/operations.h"

#include <algorithm>
#include <vector>

#include "jinja/text.h"

namespace powerinfer::jinja {

namespace {

using Type = Value::Type;

}  // namespace

Value binary(const std::string& op, const Value& a, const Value& b) {
  if (op == "==") return Value::boolean(equal(a, b));
  if (op == "!=") return Value::boolean(!equal(a, b));
  if (op == "in") return Value::boolean(contains(b, a));
  if (op == "not in") return Value::boolean(!contains(b, a));
  if (op == "~") return Value::string(text_of(a) + text_of(b));
  const auto refuse = [&] { return Unsupported(std::string(type_name(a)) + " " + op + " " + type_name(b)); };
  if (a.is(Type::kString) && b.is(Type::kString)) {
    if (op == "+") {
      if (a.text().size() + b.text().size() > kMaxOutput) throw Unsupported("a text of this size");
      return Value::string(a.text() + b.text());
    }
    if (op == "<") return Value::boolean(a.text() < b.text());
    if (op == ">") return Value::boolean(a.text() > b.text());
    if (op == "<=") return Value::boolean(a.text() <= b.text());
    if (op == ">=") return Value::boolean(a.text() >= b.text());
    throw refuse();
  }
  if (a.is(Type::kList) && b.is(Type::kList) && op == "+") {
    const List &left = a.items(), &right = b.items();
    if (left.size() + right.size() > 1'000'000) throw Unsupported("a list of this size");
    Items both;
    both.reserve(left.size() + right.size());
    for (size_t i = 0; i < left.size(); ++i) both.push_back(left[i]);
    for (size_t i = 0; i < right.size(); ++i) both.push_back(right[i]);
    return Value::list(std::move(both));
  }
  if (!is_number(a) || !is_number(b)) throw refuse();
  if (op == "<") return Value::boolean(as_number(a) < as_number(b));
  if (op == ">") return Value::boolean(as_number(a) > as_number(b));
  if (op == "<=") return Value::boolean(as_number(a) <= as_number(b));
  if (op == ">=") return Value::boolean(as_number(a) >= as_number(b));
  if (a.is(Type::kFloat) || b.is(Type::kFloat) || op == "/") throw refuse();  // would print as Python's floats
  int64_t result = 0;
  bool overflow = false;
  if (op == "+") {
    overflow = __builtin_add_overflow(a.int64(), b.int64(), &result);
  } else if (op == "-") {
    overflow = __builtin_sub_overflow(a.int64(), b.int64(), &result);
  } else if (op == "*") {
    overflow = __builtin_mul_overflow(a.int64(), b.int64(), &result);
  } else {  // // and %, rounded down as Python does
    if (b.int64() == 0 || b.int64() == -1) throw Unsupported("a division by " + std::to_string(b.int64()));
    int64_t quotient = a.int64() / b.int64(), rest = a.int64() % b.int64();
    if (rest != 0 && (rest < 0) != (b.int64() < 0)) {
      --quotient;
      rest += b.int64();
    }
    result = op == "%" ? rest : quotient;
  }
  if (overflow) throw Unsupported("an integer of this size");
  return Value::integer(result);
}

bool contains(const Value& container, const Value& v) {
  switch (container.type()) {
    case Type::kUndefined:
      return false;
    case Type::kString:
      if (!v.is(Type::kString)) throw Unsupported(std::string(type_name(v)) + " in a string");
      return container.text().find(v.text()) != std::string::npos;
    case Type::kList:
      for (size_t i = 0; i < container.items().size(); ++i) {
        if (equal(container.items()[i], v)) return true;
      }
      return false;
    case Type::kDict:
      return v.is(Type::kString) && lookup(container.entries(), v.text());
    default:
      throw Unsupported(std::string("in ") + type_name(container));
  }
}

Value attribute(const Value& object, std::string_view key) {
  if (object.is(Type::kNone)) return {};
  if (object.is(Type::kUndefined)) throw Unsupported("an item of an undefined value");
  if (!object.is(Type::kDict)) return {};  // neither lists nor strings have attributes that are no methods
  const Value* found = lookup(object.entries(), key);
  return found ? *found : Value();
}

Value item(const Value& object, const Value& key) {
  if (object.is(Type::kUndefined) || object.is(Type::kNone)) {
    if (object.is(Type::kNone)) return {};
    throw Unsupported("an item of an undefined value");
  }
  if (object.is(Type::kDict)) {
    return key.is(Type::kString) ? attribute(object, key.text()) : Value();
  }
  if (key.is(Type::kString)) return {};  // neither lists nor strings have attributes that are no methods
  int64_t index = as_index(key);
  if (object.is(Type::kList)) {
    const int64_t size = static_cast<int64_t>(object.items().size());
    if (index < 0) index += size;
    return index >= 0 && index < size ? (object.items())[static_cast<size_t>(index)] : Value();
  }
  if (object.is(Type::kString)) {
    const auto chars = characters(object.text());
    const int64_t size = static_cast<int64_t>(chars.size());
    if (index < 0) index += size;
    return index >= 0 && index < size ? Value::string(std::string(chars[static_cast<size_t>(index)])) : Value();
  }
  throw Unsupported(std::string("an item of ") + type_name(object));
}

Value slice(const Value& object, std::optional<int64_t> low, std::optional<int64_t> high, int64_t stride) {
  if (!object.is(Type::kList) && !object.is(Type::kString))
    throw Unsupported(std::string("a slice of ") + type_name(object));
  std::vector<std::string_view> chars;
  if (object.is(Type::kString)) chars = characters(object.text());
  const auto size = static_cast<int64_t>(object.is(Type::kString) ? chars.size() : object.items().size());
  if (stride == 0) throw Unsupported("a slice with step 0");
  stride = std::clamp(stride, -size - 1, size + 1);
  const auto place = [&](std::optional<int64_t> x, int64_t fallback) {
    if (!x) return fallback;
    const int64_t at = *x < 0 ? *x + size : *x;
    return stride > 0 ? std::clamp<int64_t>(at, 0, size) : std::clamp<int64_t>(at, -1, size - 1);
  };
  const int64_t begin = place(low, stride > 0 ? 0 : size - 1), end = place(high, stride > 0 ? size : -1);
  int64_t count = 0;
  if (stride > 0 && begin < end) count = (end - begin - 1) / stride + 1;
  if (stride < 0 && begin > end) count = (begin - end - 1) / -stride + 1;
  if (object.is(Type::kList)) return Value::list(object.items().slice(begin, stride, static_cast<size_t>(count)));
  std::string text;
  for (int64_t i = 0; i < count; ++i) text += chars[static_cast<size_t>(begin + i * stride)];
  return Value::string(std::move(text));
}

}  // namespace powerinfer::jinja
