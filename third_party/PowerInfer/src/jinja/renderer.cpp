#include "jinja/renderer.h"

#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "jinja/functions.h"
#include "jinja/operations.h"
#include "jinja/text.h"

namespace powerinfer::jinja {

namespace {

using Kind = Node::Kind;
using NodePtr = std::shared_ptr<Node>;
using Type = Value::Type;

constexpr int kMaxSteps = 5'000'000;  // evaluations of one rendering
constexpr size_t kMaxNamespaces = 100'000;

class Renderer {
 public:
  explicit Renderer(const Dict& variables) { scopes_.emplace_back(variables.begin(), variables.end()); }
  ~Renderer() {
    for (const auto& entries : namespaces_) entries->clear();  // they may hold each other
  }
  Renderer(const Renderer&) = delete;
  Renderer& operator=(const Renderer&) = delete;

  std::string render(const Node& root) {
    std::string out;
    run(root, out);
    return out;
  }

 private:
  enum class Flow { kNext, kBreak, kContinue };
  using Scope = std::map<std::string, Value, std::less<>>;

  void step() {
    if (++steps_ > kMaxSteps) throw Unsupported("a rendering that takes this long");
  }

  Flow run(const Node& n, std::string& out) {
    step();
    switch (n.kind) {
      case Kind::kData:
        append(out, n.value.text());
        return Flow::kNext;
      case Kind::kPrint: {
        const Value value = evaluate(*n.kids[0]);
        append(out, value.is(Type::kString) ? std::string_view(value.text()) : std::string_view(text_of(value)));
        return Flow::kNext;
      }
      case Kind::kBlock:
        for (const NodePtr& kid : n.kids) {
          if (const Flow flow = run(*kid, out); flow != Flow::kNext) return flow;
        }
        return Flow::kNext;
      case Kind::kIf:
        for (size_t i = 0; i + 1 < n.kids.size(); i += 2) {
          if (truth(evaluate(*n.kids[i]))) return run(*n.kids[i + 1], out);
        }
        return n.kids.size() % 2 == 1 ? run(*n.kids.back(), out) : Flow::kNext;
      case Kind::kFor:
        loop(n, out);
        return Flow::kNext;
      case Kind::kSet: {
        Value value;
        if (n.text == "block") {
          std::string text;
          run(*n.kids[0], text);
          value = Value::string(std::move(text));
        } else {
          value = evaluate(*n.kids[0]);
        }
        if (n.names.size() == 1) {
          scopes_.back()[n.names[0]] = std::move(value);
        } else {
          const Value target = name(n.names[0]);
          if (!target.is(Type::kDict) || !target.is_namespace())
            throw Unsupported("setting an attribute of what is no namespace");
          put(target.namespace_entries(), n.names[1], std::move(value));
        }
        return Flow::kNext;
      }
      case Kind::kBreak:
        return Flow::kBreak;
      case Kind::kContinue:
        return Flow::kContinue;
      default:
        throw Unsupported("a statement of this form");
    }
  }

  void bind(const Node& n, const Value& item) {
    if (n.names.size() == 1) {
      scopes_.back()[n.names[0]] = item;
      return;
    }
    if (!item.is(Type::kList) || item.items().size() != n.names.size())
      throw Unsupported("a loop that takes its items apart");
    for (size_t i = 0; i < n.names.size(); ++i) scopes_.back()[n.names[i]] = item.items()[i];
  }

  void loop(const Node& n, std::string& out) {
    List items = items_of(evaluate(*n.kids[0]));
    if (n.kids[1]) {
      Items kept;
      for (size_t i = 0; i < items.size(); ++i) {
        scopes_.emplace_back();
        bind(n, items[i]);
        if (truth(evaluate(*n.kids[1]))) kept.push_back(items[i]);
        scopes_.pop_back();
      }
      items = List(std::move(kept));
    }
    if (items.empty() && n.kids[3]) {
      scopes_.emplace_back();
      run(*n.kids[3], out);
      scopes_.pop_back();
    }
    const int64_t size = static_cast<int64_t>(items.size());
    for (int64_t i = 0; i < size; ++i) {
      step();
      scopes_.emplace_back();
      bind(n, items[static_cast<size_t>(i)]);
      Dict state = {{"index", Value::integer(i + 1)},
                    {"index0", Value::integer(i)},
                    {"revindex", Value::integer(size - i)},
                    {"revindex0", Value::integer(size - i - 1)},
                    {"first", Value::boolean(i == 0)},
                    {"last", Value::boolean(i + 1 == size)},
                    {"length", Value::integer(size)},
                    {"previtem", i > 0 ? items[static_cast<size_t>(i - 1)] : Value()},
                    {"nextitem", i + 1 < size ? items[static_cast<size_t>(i + 1)] : Value()}};
      scopes_.back()["loop"] = Value::dict(std::move(state));
      const Flow flow = run(*n.kids[2], out);
      scopes_.pop_back();
      if (flow == Flow::kBreak) break;
    }
  }

  Value name(const std::string& text) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(text); found != scope->end()) return found->second;
    }
    return {};
  }

  Value evaluate(const Node& n) {
    step();
    switch (n.kind) {
      case Kind::kLiteral:
        return n.value;
      case Kind::kName:
        return name(n.text);
      case Kind::kList: {
        Items list;
        for (const NodePtr& kid : n.kids) list.push_back(evaluate(*kid));
        return Value::list(std::move(list));
      }
      case Kind::kDict: {
        Dict dict;
        for (size_t i = 0; i < n.kids.size(); i += 2) {
          const Value key = evaluate(*n.kids[i]);
          if (!key.is(Type::kString)) throw Unsupported("a dict whose keys are no strings");
          put(dict, key.text(), evaluate(*n.kids[i + 1]));
        }
        return Value::dict(std::move(dict));
      }
      case Kind::kAttribute:
        return attribute(evaluate(*n.kids[0]), n.text);
      case Kind::kIndex:
        return item(evaluate(*n.kids[0]), evaluate(*n.kids[1]));
      case Kind::kSlice:
        return slice_of(n);
      case Kind::kCall:
        return call(n);
      case Kind::kMethod: {
        const Value object = evaluate(*n.kids[0]);
        return call_method(object, n.text, arguments(n, 1));
      }
      case Kind::kFilter: {
        const Value object = evaluate(*n.kids[0]);
        return apply_filter(object, n.text, arguments(n, 1));
      }
      case Kind::kTest:
        return Value::boolean(test(n));
      case Kind::kNot:
        return Value::boolean(!truth(evaluate(*n.kids[0])));
      case Kind::kMinus: {
        const Value v = evaluate(*n.kids[0]);
        if (v.is(Type::kInt)) return binary("-", Value::integer(0), v);
        if (v.is(Type::kFloat)) return Value::number(-v.real());
        throw Unsupported(std::string("minus ") + type_name(v));
      }
      case Kind::kBinary:
        return binary(n.text, evaluate(*n.kids[0]), evaluate(*n.kids[1]));
      case Kind::kAnd: {
        Value left = evaluate(*n.kids[0]);
        return truth(left) ? evaluate(*n.kids[1]) : left;
      }
      case Kind::kOr: {
        Value left = evaluate(*n.kids[0]);
        return truth(left) ? left : evaluate(*n.kids[1]);
      }
      case Kind::kChoice:
        if (truth(evaluate(*n.kids[0]))) return evaluate(*n.kids[1]);
        return n.kids[2] ? evaluate(*n.kids[2]) : Value();
      default:
        throw Unsupported("an expression of this form");
    }
  }

  Value slice_of(const Node& n) {
    const Value object = evaluate(*n.kids[0]);
    const auto bound = [&](size_t i) -> std::optional<int64_t> {
      if (!n.kids[i]) return std::nullopt;
      const Value v = evaluate(*n.kids[i]);
      if (v.is(Type::kNone)) return std::nullopt;
      return as_index(v);
    };
    const auto low = bound(1), high = bound(2);
    return slice(object, low, high, bound(3).value_or(1));
  }

  Arguments arguments(const Node& n, size_t first) {
    Arguments result;
    for (size_t i = first; i < n.kids.size(); ++i) result.values.push_back(evaluate(*n.kids[i]));
    for (const auto& [key, value] : n.keywords) result.keywords.emplace_back(key, evaluate(*value));
    return result;
  }

  Value call(const Node& n) {
    Arguments a = arguments(n, 0);
    if (n.text != "namespace") return call_function(n.text, a);
    if (!a.values.empty()) throw Unsupported("namespace with these arguments");
    if (namespaces_.size() == kMaxNamespaces) throw Unsupported("this many namespaces");
    namespaces_.push_back(std::make_shared<Dict>(std::move(a.keywords)));
    return Value::shared_namespace(namespaces_.back());
  }

  bool test(const Node& n) {
    const Value v = evaluate(*n.kids[0]);
    if (n.kids.size() > 2 || !n.keywords.empty()) throw Unsupported("the test " + n.text + " with these arguments");
    if (n.kids.size() == 1) return apply_test(v, n.text, nullptr);
    const Value other = evaluate(*n.kids[1]);
    return apply_test(v, n.text, &other);
  }

  std::vector<std::shared_ptr<Dict>> namespaces_;
  std::vector<Scope> scopes_;
  int steps_ = 0;
};

}  // namespace

std::string render(const Node& root, const Dict& variables) { return Renderer(variables).render(root); }

}  // namespace powerinfer::jinja
