#include "jinja/value.h"

#include <algorithm>

#include "jinja/text.h"

namespace powerinfer::jinja {

namespace {

using Type = Value::Type;

constexpr int kMaxDepth = 1000;

int one_deeper(int depth) {
  if (depth >= kMaxDepth) throw Unsupported("values nested this deep");
  return depth + 1;
}

}  // namespace

List::List(Items items) : items_(std::make_shared<const Items>(std::move(items))), size_(items_->size()) {
  for (const Value& item : *items_) depth_ = std::max(depth_, item.depth());
  depth_ = one_deeper(depth_);
}

const Value& List::operator[](size_t i) const {
  return (*items_)[static_cast<size_t>(first_ + static_cast<int64_t>(i) * stride_)];
}

List List::slice(int64_t first, int64_t stride, size_t count) const {
  List part = *this;
  part.first_ = first_ + first * stride_;
  part.stride_ = stride_ * stride;
  part.size_ = count;
  return part;
}

Value Value::none() {
  Value v;
  v.type_ = Type::kNone;
  return v;
}
Value Value::boolean(bool value) {
  Value v;
  v.type_ = Type::kBool;
  v.held_ = static_cast<int64_t>(value);
  return v;
}
Value Value::integer(int64_t value) {
  Value v;
  v.type_ = Type::kInt;
  v.held_ = value;
  return v;
}
Value Value::number(double value) {
  Value v;
  v.type_ = Type::kFloat;
  v.held_ = value;
  return v;
}
Value Value::string(std::string value) {
  Value v;
  v.type_ = Type::kString;
  v.held_ = std::make_shared<const std::string>(std::move(value));
  return v;
}
Value Value::list(List value) {
  Value v;
  v.type_ = Type::kList;
  v.depth_ = value.depth();
  v.held_ = std::make_shared<const List>(std::move(value));
  return v;
}
Value Value::dict(Dict value) {
  Value v;
  v.type_ = Type::kDict;
  for (const auto& item : value) v.depth_ = std::max(v.depth_, item.second.depth());
  v.depth_ = one_deeper(v.depth_);
  v.held_ = std::make_shared<Dict>(std::move(value));
  return v;
}
Value Value::shared_namespace(std::shared_ptr<Dict> entries) {
  Value v;
  v.type_ = Type::kDict;
  v.is_namespace_ = true;
  v.depth_ = 1;  // whoever shares it empties it: it may hold itself
  v.held_ = std::move(entries);
  return v;
}

bool truth(const Value& v) {
  switch (v.type()) {
    case Type::kUndefined:
    case Type::kNone:
      return false;
    case Type::kBool:
    case Type::kInt:
      return v.int64() != 0;
    case Type::kFloat:
      return v.real() != 0;
    case Type::kString:
      return !v.text().empty();
    case Type::kList:
      return !v.items().empty();
    case Type::kDict:
      return v.is_namespace() || !v.entries().empty();
  }
  return false;
}

bool is_number(const Value& v) { return v.is(Type::kInt) || v.is(Type::kFloat) || v.is(Type::kBool); }
double as_number(const Value& v) { return v.is(Type::kFloat) ? v.real() : static_cast<double>(v.int64()); }

int64_t as_index(const Value& v) {
  if (!v.is(Type::kInt) && !v.is(Type::kBool)) throw Unsupported(std::string("an index that is ") + type_name(v));
  return v.int64();
}

const char* type_name(const Value& v) {
  static const char* kNames[] = {"an undefined value", "none",     "a boolean", "an integer",
                                 "a number",           "a string", "a list",    "a dict"};
  return kNames[static_cast<int>(v.type())];
}

bool equal(const Value& a, const Value& b) {
  if (is_number(a) && is_number(b)) {
    return a.is(Type::kFloat) || b.is(Type::kFloat) ? as_number(a) == as_number(b) : a.int64() == b.int64();
  }
  if (a.type() != b.type()) return false;
  switch (a.type()) {
    case Type::kString:
      return a.text() == b.text();
    case Type::kList: {
      const List &left = a.items(), &right = b.items();
      if (left.size() != right.size()) return false;
      for (size_t i = 0; i < left.size(); ++i) {
        if (!equal(left[i], right[i])) return false;
      }
      return true;
    }
    case Type::kDict:
      throw Unsupported("a comparison of dicts");
    default:
      return true;
  }
}

std::string text_of(const Value& v) {
  switch (v.type()) {
    case Type::kUndefined:
      return "";
    case Type::kNone:
      return "None";
    case Type::kBool:
      return v.int64() ? "True" : "False";
    case Type::kInt:
      return std::to_string(v.int64());
    case Type::kString:
      return v.text();
    default:
      throw Unsupported(std::string("printing ") + type_name(v));
  }
}

const Value* lookup(const Dict& dict, std::string_view key) {
  const auto found = std::find_if(dict.begin(), dict.end(), [&](const auto& item) { return item.first == key; });
  return found == dict.end() ? nullptr : &found->second;
}

void put(Dict& dict, const std::string& key, Value value) {
  for (auto& item : dict) {
    if (item.first == key) {
      item.second = std::move(value);
      return;
    }
  }
  dict.emplace_back(key, std::move(value));
}

List items_of(const Value& v) {
  Items items;
  switch (v.type()) {
    case Type::kUndefined:
      return {};
    case Type::kList:
      return v.items();
    case Type::kDict:
      for (const auto& item : v.entries()) items.push_back(Value::string(item.first));
      return List(std::move(items));
    case Type::kString:
      for (const auto c : characters(v.text())) items.push_back(Value::string(std::string(c)));
      return List(std::move(items));
    default:
      throw Unsupported(std::string("a loop over ") + type_name(v));
  }
}

}  // namespace powerinfer::jinja
