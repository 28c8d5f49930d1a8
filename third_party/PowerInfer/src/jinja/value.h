// What a template computes with. Values are cheap to copy: texts, lists and dicts are shared and never changed, but for
// namespaces, whose entries a template sets.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace powerinfer::jinja {

// The template uses what is not known here.
class Unsupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The template refused its input by raise_exception().
class Raised : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Value;
using Items = std::vector<Value>;
using Dict = std::vector<std::pair<std::string, Value>>;  // in order of insertion

// Values that are shared with other lists: a slice copies none.
class List {
 public:
  List() = default;
  explicit List(Items items);

  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  const Value& operator[](size_t i) const;
  // `count` values from `first` on, `stride` apart, which may be negative.
  List slice(int64_t first, int64_t stride, size_t count) const;
  int depth() const { return depth_; }

 private:
  std::shared_ptr<const Items> items_;
  int64_t first_ = 0, stride_ = 1;
  size_t size_ = 0;
  int depth_ = 0;  // of lists and dicts within each other
};

class Value {
 public:
  enum class Type { kUndefined, kNone, kBool, kInt, kFloat, kString, kList, kDict };

  // Unsupported for lists and dicts that are nested too deep: they are compared and destroyed recursively.
  Value() = default;  // undefined
  static Value none();
  static Value boolean(bool value);
  static Value integer(int64_t value);
  static Value number(double value);
  static Value string(std::string value);
  static Value list(List value);
  static Value list(Items value) { return list(List(std::move(value))); }
  static Value dict(Dict value);
  static Value shared_namespace(std::shared_ptr<Dict> entries);

  Type type() const { return type_; }
  bool is(Type type) const { return type_ == type; }
  bool is_namespace() const { return is_namespace_; }  // of a dict: its entries may be set
  int depth() const { return depth_; }

  int64_t int64() const { return std::get<int64_t>(held_); }  // kInt, kBool
  double real() const { return std::get<double>(held_); }     // kFloat
  const std::string& text() const { return *std::get<Text>(held_); }
  const List& items() const { return *std::get<Shared>(held_); }
  const Dict& entries() const { return *std::get<Entries>(held_); }
  Dict& namespace_entries() const { return *std::get<Entries>(held_); }

 private:
  using Text = std::shared_ptr<const std::string>;
  using Shared = std::shared_ptr<const List>;
  using Entries = std::shared_ptr<Dict>;

  Type type_ = Type::kUndefined;
  bool is_namespace_ = false;
  int depth_ = 0;
  std::variant<std::monostate, int64_t, double, Text, Shared, Entries> held_;
};

bool truth(const Value& v);
bool is_number(const Value& v);  // booleans too
double as_number(const Value& v);
int64_t as_index(const Value& v);
bool equal(const Value& a, const Value& b);
const char* type_name(const Value& v);  // "a list"
// As Jinja prints it. Throws Unsupported for what prints as Python's repr.
std::string text_of(const Value& v);
const Value* lookup(const Dict& dict, std::string_view key);
void put(Dict& dict, const std::string& key, Value value);
// What a loop goes over: a list's values, a dict's keys, a text's characters.
List items_of(const Value& v);

}  // namespace powerinfer::jinja
