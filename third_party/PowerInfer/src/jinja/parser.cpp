#include "jinja/parser.h"

#include <set>
#include <string_view>

namespace powerinfer::jinja {

namespace {

using Kind = Node::Kind;
using NodePtr = std::shared_ptr<Node>;

constexpr int kMaxNesting = 400;  // of rules: about 80 expressions or 400 blocks
constexpr int kMaxLinks = 500;    // operators, filters and indices in one tag

NodePtr node(Kind kind, std::vector<NodePtr> kids = {}, std::string text = "") {
  auto result = std::make_shared<Node>();
  result->kind = kind;
  result->kids = std::move(kids);
  result->text = std::move(text);
  return result;
}

NodePtr literal(Value value) {
  auto result = node(Kind::kLiteral);
  result->value = std::move(value);
  return result;
}

class Parser {
 public:
  explicit Parser(std::vector<Piece> pieces) : pieces_(std::move(pieces)) {}

  NodePtr whole() {
    NodePtr block = this->block({});
    if (at_ < pieces_.size()) throw Unsupported("the tag " + pieces_[at_].tokens[0].text);
    return block;
  }

 private:
  // Statements up to a tag of the given names, which is left to be read.
  NodePtr block(const std::set<std::string>& ends) {
    Nested nested(*this);
    NodePtr result = node(Kind::kBlock);
    for (; at_ < pieces_.size();) {
      Piece& piece = pieces_[at_];
      if (piece.type == Piece::Type::kData) {
        NodePtr data = node(Kind::kData);
        data->value = Value::string(std::move(piece.data));
        result->kids.push_back(data);
        ++at_;
      } else if (piece.type == Piece::Type::kPrint) {
        start(piece);
        result->kids.push_back(node(Kind::kPrint, {expression()}));
        finish();
      } else {
        if (ends.contains(piece.tokens[0].text)) return result;
        result->kids.push_back(statement());
      }
    }
    if (!ends.empty()) throw Unsupported("a block that is not closed");
    return result;
  }

  NodePtr statement() {
    start(pieces_[at_]);
    const std::string name = take_name();
    if (name == "if") return if_statement();
    if (name == "for") return for_statement();
    if (name == "set") return set_statement();
    if (name == "break" || name == "continue") {
      if (loops_ == 0) throw Unsupported("a " + name + " outside a loop");
      finish();
      return node(name == "break" ? Kind::kBreak : Kind::kContinue);
    }
    if (name == "generation") {  // marks the assistant's text, for training
      finish();
      NodePtr inner = block({"endgeneration"});
      end_tag("endgeneration");
      return inner;
    }
    throw Unsupported("the tag " + name);
  }

  NodePtr if_statement() {
    NodePtr result = node(Kind::kIf, {expression()});
    finish();
    for (;;) {
      result->kids.push_back(block({"elif", "else", "endif"}));
      start(pieces_.at(at_));
      const std::string name = take_name();
      if (name == "elif") {
        result->kids.push_back(expression());
        finish();
      } else if (name == "else") {
        finish();
        result->kids.push_back(block({"endif"}));
        end_tag("endif");
        return result;
      } else {
        finish();
        return result;
      }
    }
  }

  NodePtr for_statement() {
    NodePtr result = node(Kind::kFor);
    const bool bracket = accept("(");
    do result->names.push_back(take_name());
    while (accept(","));
    if (bracket) expect(")");
    if (take_name() != "in") throw Unsupported("a for without in");
    result->kids.push_back(or_expression());  // "if" after it is the loop's filter
    result->kids.push_back(accept_name("if") ? expression() : nullptr);
    if (accept_name("recursive")) throw Unsupported("a recursive loop");
    finish();
    ++loops_;
    result->kids.push_back(block({"else", "endfor"}));
    --loops_;
    start(pieces_.at(at_));
    if (take_name() == "else") {
      finish();
      result->kids.push_back(block({"endfor"}));
      end_tag("endfor");
    } else {
      finish();
      result->kids.push_back(nullptr);
    }
    return result;
  }

  NodePtr set_statement() {
    NodePtr result = node(Kind::kSet);
    result->names.push_back(take_name());
    if (accept(".")) result->names.push_back(take_name());
    if (accept("=")) {
      result->kids.push_back(expression());
      if (peek(",")) throw Unsupported("a set of several values");
      finish();
    } else {
      finish();
      result->text = "block";
      const int outside = std::exchange(loops_, 0);
      result->kids.push_back(block({"endset"}));
      loops_ = outside;
      end_tag("endset");
    }
    return result;
  }

  void end_tag(const std::string& name) {
    if (at_ >= pieces_.size()) throw Unsupported("a block that is not closed");
    start(pieces_[at_]);
    if (take_name() != name) throw Unsupported("a block that is not closed by " + name);
    finish();
  }

  // ---- expressions, loosest first ----

  NodePtr expression() {
    Nested nested(*this);
    NodePtr value = or_expression();
    while (accept_name("if")) {
      NodePtr condition = or_expression();
      NodePtr otherwise = accept_name("else") ? expression() : nullptr;
      value = link(node(Kind::kChoice, {condition, value, otherwise}));
    }
    return value;
  }

  NodePtr or_expression() {
    NodePtr left = and_expression();
    while (accept_name("or")) left = link(node(Kind::kOr, {left, and_expression()}));
    return left;
  }

  NodePtr and_expression() {
    NodePtr left = not_expression();
    while (accept_name("and")) left = link(node(Kind::kAnd, {left, not_expression()}));
    return left;
  }

  NodePtr not_expression() {
    Nested nested(*this);
    if (accept_name("not")) return node(Kind::kNot, {not_expression()});
    return comparison();
  }

  NodePtr comparison() {
    NodePtr left = sum();
    NodePtr result;
    for (;;) {
      std::string op;
      for (const char* candidate : {"==", "!=", "<=", ">=", "<", ">"}) {
        if (op.empty() && accept(candidate)) op = candidate;
      }
      if (op.empty() && accept_name("in")) op = "in";
      if (op.empty() && peek_name("not") && tokens_[index_ + 1].text == "in") {
        index_ += 2;
        op = "not in";
      }
      if (op.empty()) return result ? result : left;
      NodePtr right = sum();
      NodePtr one = link(node(Kind::kBinary, {left, right}, op));
      result = result ? node(Kind::kAnd, {result, one}) : one;  // a < b < c
      left = right;
    }
  }

  NodePtr sum() {
    NodePtr left = joined();
    for (;;) {
      if (accept("+")) {
        left = link(node(Kind::kBinary, {left, joined()}, "+"));
      } else if (accept("-")) {
        left = link(node(Kind::kBinary, {left, joined()}, "-"));
      } else {
        return left;
      }
    }
  }

  NodePtr joined() {
    NodePtr left = product();
    while (accept("~")) left = link(node(Kind::kBinary, {left, product()}, "~"));
    return left;
  }

  NodePtr product() {
    NodePtr left = unary();
    for (;;) {
      std::string op;
      for (const char* candidate : {"//", "*", "/", "%"}) {
        if (op.empty() && accept(candidate)) op = candidate;
      }
      if (op.empty()) return left;
      left = link(node(Kind::kBinary, {left, unary()}, op));
    }
  }

  // A sign binds less than a filter's argument but its operand takes no filter of its own: -x|f is (-x)|f.
  NodePtr unary(bool with_filter = true) {
    Nested nested(*this);
    NodePtr value;
    if (accept("-")) {
      value = node(Kind::kMinus, {unary(false)});
    } else if (accept("+")) {
      value = unary(false);
    } else {
      value = postfix(primary());
    }
    return with_filter ? filters(value) : value;
  }

  NodePtr filters(NodePtr value) {
    for (;;) {
      if (accept("|")) {
        NodePtr filter = link(node(Kind::kFilter, {value}, take_name()));
        if (peek(".")) throw Unsupported("the filter " + filter->text + ".");
        if (accept("(")) arguments(*filter);
        value = filter;
      } else if (accept_name("is")) {
        const bool negated = accept_name("not");
        NodePtr test = link(node(Kind::kTest, {value}, take_name()));
        if (accept("(")) {
          arguments(*test);
        } else if (!at_end() && !peek_name("else") && !peek_name("or") && !peek_name("and") && !peek_name("is") &&
                   !peek_name("if") && (tokens_[index_].type != Token::Type::kOperator)) {
          test->kids.push_back(postfix(primary()));
        }
        value = negated ? node(Kind::kNot, {test}) : test;
      } else if (accept("(")) {
        throw Unsupported("a call of this form");
      } else {
        return value;
      }
    }
  }

  NodePtr postfix(NodePtr value) {
    for (;;) {
      if (accept(".")) {
        if (tokens_[index_].type != Token::Type::kName) throw Unsupported("an attribute of this form");
        const std::string name = take_name();
        if (accept("(")) {
          NodePtr call = link(node(Kind::kMethod, {value}, name));
          arguments(*call);
          value = call;
        } else {
          value = link(node(Kind::kAttribute, {value}, name));
        }
      } else if (accept("[")) {
        NodePtr bounds[3];
        bool slice = false;
        size_t part = 0;
        while (!peek("]")) {
          if (accept(":")) {
            slice = true;
            if (++part > 2) throw Unsupported("a slice of this form");
          } else {
            if (bounds[part]) throw Unsupported("an index of this form");
            bounds[part] = expression();
          }
        }
        expect("]");
        if (!slice && !bounds[0]) throw Unsupported("an empty index");
        value = link(slice ? node(Kind::kSlice, {value, bounds[0], bounds[1], bounds[2]})
                           : node(Kind::kIndex, {value, bounds[0]}));
      } else if (peek("(") && value->kind == Kind::kName) {
        expect("(");
        NodePtr call = node(Kind::kCall, {}, value->text);
        arguments(*call);
        value = call;
      } else {
        return value;
      }
    }
  }

  void arguments(Node& call) {
    while (!accept(")")) {
      if (tokens_[index_].type == Token::Type::kName && tokens_[index_ + 1].text == "=" &&
          tokens_[index_ + 1].type == Token::Type::kOperator) {
        std::string name = take_name();
        expect("=");
        call.keywords.emplace_back(std::move(name), expression());
      } else {
        call.kids.push_back(expression());
      }
      if (!peek(")")) expect(",");
    }
  }

  NodePtr primary() {
    Nested nested(*this);
    const Token token = tokens_[index_];
    switch (token.type) {
      case Token::Type::kString: {
        std::string text;
        while (tokens_[index_].type == Token::Type::kString) text += tokens_[index_++].text;
        return literal(Value::string(std::move(text)));
      }
      case Token::Type::kInt:
        ++index_;
        return literal(Value::integer(std::stoll(token.text)));
      case Token::Type::kFloat:
        ++index_;
        return literal(Value::number(std::stod(token.text)));
      case Token::Type::kName: {
        ++index_;
        if (token.text == "true" || token.text == "True") return literal(Value::boolean(true));
        if (token.text == "false" || token.text == "False") return literal(Value::boolean(false));
        if (token.text == "none" || token.text == "None") return literal(Value::none());
        NodePtr name = node(Kind::kName, {}, token.text);
        return name;
      }
      case Token::Type::kOperator:
        if (accept("(")) {
          NodePtr inner = expression();
          if (peek(",")) {
            NodePtr list = node(Kind::kList, {inner});
            while (accept(",")) {
              if (!peek(")")) list->kids.push_back(expression());
            }
            inner = list;
          }
          expect(")");
          return inner;
        }
        if (accept("[")) {
          NodePtr list = node(Kind::kList);
          while (!accept("]")) {
            list->kids.push_back(expression());
            if (!peek("]")) expect(",");
          }
          return list;
        }
        if (accept("{")) {
          NodePtr dict = node(Kind::kDict);
          while (!accept("}")) {
            dict->kids.push_back(expression());
            expect(":");
            dict->kids.push_back(expression());
            if (!peek("}")) expect(",");
          }
          return dict;
        }
        [[fallthrough]];
      default:
        throw Unsupported("an expression of this form" + (token.text.empty() ? "" : ": " + token.text));
    }
  }

  // ---- tokens ----

  // Nothing in a template may exhaust the stack.
  struct Nested {
    explicit Nested(Parser& parser) : depth(parser.depth_) {
      if (++depth > kMaxNesting) throw Unsupported("expressions nested this deep");
    }
    ~Nested() { --depth; }
    int& depth;
  };

  // Chains are as deep as nested expressions once they are parsed.
  NodePtr link(NodePtr value) {
    if (++links_ > kMaxLinks) throw Unsupported("an expression of this length");
    return value;
  }

  void start(Piece& piece) {
    if (piece.type == Piece::Type::kData) throw Unsupported("a block that is not closed");
    tokens_ = std::move(piece.tokens);
    index_ = 0;
    links_ = 0;
    ++at_;
  }
  void finish() {
    if (!at_end()) throw Unsupported("a tag of this form: ... " + tokens_[index_].text);
  }
  bool at_end() const { return tokens_[index_].type == Token::Type::kEnd; }
  bool peek(std::string_view op) const {
    return tokens_[index_].type == Token::Type::kOperator && tokens_[index_].text == op;
  }
  bool peek_name(std::string_view name) const {
    return tokens_[index_].type == Token::Type::kName && tokens_[index_].text == name;
  }
  bool accept(std::string_view op) { return peek(op) && ++index_; }
  bool accept_name(std::string_view name) { return peek_name(name) && ++index_; }
  void expect(std::string_view op) {
    if (!accept(op)) throw Unsupported("a tag of this form: ... " + tokens_[index_].text);
  }
  std::string take_name() {
    if (tokens_[index_].type != Token::Type::kName) throw Unsupported("a tag of this form: ... " + tokens_[index_].text);
    return tokens_[index_++].text;
  }

  std::vector<Piece> pieces_;
  size_t at_ = 0;
  std::vector<Token> tokens_{Token{}};
  size_t index_ = 0;
  int depth_ = 0;
  int links_ = 0;
  int loops_ = 0;
};

}  // namespace

std::shared_ptr<const Node> parse(std::vector<Piece> pieces) { return Parser(std::move(pieces)).whole(); }

}  // namespace powerinfer::jinja
