// The part of the Jinja template language that chat templates are written in. What it does not know it refuses, when the
// template is read or, in a branch that is taken, when it is rendered: a rendering is what Jinja would give or none.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
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

struct Value;
using List = std::vector<Value>;
using Dict = std::vector<std::pair<std::string, Value>>;  // in order of insertion

struct Value {
  enum class Type { kUndefined, kNone, kBool, kInt, kFloat, kString, kList, kDict };

  Value() = default;
  static Value none();
  static Value boolean(bool value);
  static Value integer(int64_t value);
  static Value number(double value);
  static Value string(std::string value);
  static Value list(List value);
  static Value dict(Dict value);

  Type type = Type::kUndefined;
  int64_t i = 0;  // kBool too
  double f = 0;
  std::string s;
  std::shared_ptr<List> l;  // shared, as Python's objects are
  std::shared_ptr<Dict> d;
  bool is_namespace = false;  // of a kDict: its values may be set
};

struct Node;

class Template {
 public:
  // Read as Hugging Face does: trim_blocks and lstrip_blocks. Throws Unsupported.
  static Template parse(std::string_view source);
  // Throws Unsupported, Raised.
  std::string render(const Dict& variables) const;

 private:
  std::shared_ptr<const Node> root_;
};

}  // namespace powerinfer::jinja
