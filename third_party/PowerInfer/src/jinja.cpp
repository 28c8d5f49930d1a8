#include "jinja.h"

#include <algorithm>
#include <cmath>
#include <ctime>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace powerinfer::jinja {

// Expressions and statements alike.
struct Node {
  enum class Kind {
    kLiteral,    // value
    kName,       // text
    kList,       // kids
    kDict,       // kids: key, value, key, value, ...
    kAttribute,  // kids[0].text
    kIndex,      // kids[0][kids[1]]
    kSlice,      // kids[0][kids[1]:kids[2]:kids[3]], each may be null
    kCall,       // text(kids, keywords)
    kMethod,     // kids[0].text(kids[1..], keywords)
    kFilter,     // kids[0] | text(kids[1..], keywords)
    kTest,       // kids[0] is text(kids[1..])
    kNot,
    kMinus,
    kBinary,  // text: the operator
    kAnd,
    kOr,
    kChoice,  // kids[1] if kids[0] else kids[2] (may be null)
    kData,    // value.s
    kPrint,   // kids[0]
    kBlock,   // kids in turn
    kFor,     // for names in kids[0] if kids[1]: kids[2], else kids[3]
    kIf,      // kids: condition, block, condition, block, ..., last block
    kSet,     // names[0] (with names[1]: its attribute) = kids[0]; with text "block": the text of kids[0]
    kBreak,
    kContinue,
  };
  Kind kind;
  std::string text;
  Value value;
  std::vector<std::string> names;
  std::vector<std::shared_ptr<Node>> kids;
  std::vector<std::pair<std::string, std::shared_ptr<Node>>> keywords;
};

Value Value::none() {
  Value v;
  v.type = Type::kNone;
  return v;
}
Value Value::boolean(bool value) {
  Value v;
  v.type = Type::kBool;
  v.i = value;
  return v;
}
Value Value::integer(int64_t value) {
  Value v;
  v.type = Type::kInt;
  v.i = value;
  return v;
}
Value Value::number(double value) {
  Value v;
  v.type = Type::kFloat;
  v.f = value;
  return v;
}
Value Value::string(std::string value) {
  Value v;
  v.type = Type::kString;
  v.s = std::move(value);
  return v;
}
Value Value::list(List value) {
  Value v;
  v.type = Type::kList;
  v.l = std::make_shared<List>(std::move(value));
  return v;
}
Value Value::dict(Dict value) {
  Value v;
  v.type = Type::kDict;
  v.d = std::make_shared<Dict>(std::move(value));
  return v;
}

namespace {

using Kind = Node::Kind;
using Type = Value::Type;
using NodePtr = std::shared_ptr<Node>;

constexpr int kMaxNesting = 400;  // of rules: about 80 expressions or 400 blocks
constexpr int kMaxLinks = 500;    // operators, filters and indices in one tag
constexpr size_t kMaxSource = 256 << 10;
constexpr int kMaxSteps = 5'000'000;  // evaluations of one rendering
constexpr size_t kMaxOutput = 64 << 20;

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

// ---- UTF-8 ----

std::vector<std::string_view> characters(std::string_view text) {
  std::vector<std::string_view> result;
  for (size_t i = 0; i < text.size();) {
    size_t length = 1;
    while (i + length < text.size() && (static_cast<unsigned char>(text[i + length]) & 0xc0) == 0x80) ++length;
    result.push_back(text.substr(i, length));
    i += length;
  }
  return result;
}

std::string utf8(uint32_t code) {
  std::string out;
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xc0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 63));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xe0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 63));
    out += static_cast<char>(0x80 | (code & 63));
  } else {
    out += static_cast<char>(0xf0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 63));
    out += static_cast<char>(0x80 | (code >> 6 & 63));
    out += static_cast<char>(0x80 | (code & 63));
  }
  return out;
}

// What Python's str.strip() removes.
bool is_space(std::string_view c) {
  static const std::set<std::string_view> kSpaces = {
      " ",      "\t",     "\n",     "\v",     "\f",     "\r",     "\x1c",   "\x1d",   "\x1e",   "\x1f",
      "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
      "\u2007", "\u2008", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};
  return kSpaces.contains(c);
}

// `set`: the characters to remove; nullopt: white space.
std::string strip(std::string_view text, bool left, bool right, const std::optional<std::string>& set = std::nullopt) {
  const auto chars = characters(text);
  const auto removed = [&](std::string_view c) {
    if (!set) return is_space(c);
    const auto all = characters(*set);
    return std::find(all.begin(), all.end(), c) != all.end();
  };
  size_t begin = 0, end = chars.size();
  while (left && begin < end && removed(chars[begin])) ++begin;
  while (right && end > begin && removed(chars[end - 1])) --end;
  std::string result;
  for (size_t i = begin; i < end; ++i) result += chars[i];
  return result;
}

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

// ---- lexer ----

struct Token {
  enum class Type { kName, kString, kInt, kFloat, kOperator, kEnd };
  Type type = Type::kEnd;
  std::string text;
};

// A piece of a template: text, or the tokens of a {{ }} or {% %}.
struct Piece {
  enum class Type { kData, kPrint, kTag };
  Type type;
  std::string data;
  std::vector<Token> tokens;
};

std::string unescape(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\' || i + 1 == text.size()) {
      out += text[i];
      continue;
    }
    const char c = text[++i];
    const auto hex = [&](size_t digits) {
      uint32_t code = 0;
      for (size_t k = 0; k < digits; ++k) {
        if (++i >= text.size() || !std::isxdigit(static_cast<unsigned char>(text[i])))
          throw Unsupported("a bad escape in a string");
        code = code * 16 + static_cast<uint32_t>(std::stoi(std::string(1, text[i]), nullptr, 16));
      }
      if (code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) throw Unsupported("a bad escape in a string");
      return utf8(code);
    };
    switch (c) {
      case 'n':
        out += '\n';
        break;
      case 't':
        out += '\t';
        break;
      case 'r':
        out += '\r';
        break;
      case 'b':
        out += '\b';
        break;
      case 'f':
        out += '\f';
        break;
      case 'v':
        out += '\v';
        break;
      case 'a':
        out += '\a';
        break;
      case '\\':
        out += '\\';
        break;
      case '\'':
        out += '\'';
        break;
      case '"':
        out += '"';
        break;
      case '\n':
        break;
      case 'x':
        out += hex(2);
        break;
      case 'u':
        out += hex(4);
        break;
      case 'U':
        out += hex(8);
        break;
      default:
        if ((c >= '0' && c <= '7') || c == 'N') throw Unsupported(std::string("the escape \\") + c + " in a string");
        out += '\\';
        out += c;
    }
  }
  return out;
}

bool starts_name(char c) { return std::isalpha(static_cast<unsigned char>(c)) || c == '_'; }

// Tokens up to the closing delimiter, whose position is left in `at`.
std::vector<Token> tokens_until(std::string_view source, size_t& at, std::string_view close) {
  std::vector<Token> tokens;
  int brackets = 0;
  for (;;) {
    while (at < source.size() && std::isspace(static_cast<unsigned char>(source[at]))) ++at;
    if (at >= source.size()) throw Unsupported("a tag that is not closed");
    const std::string_view rest = source.substr(at);
    if (brackets == 0) {
      if (rest.starts_with(close)) break;
      if ((rest[0] == '-' || rest[0] == '+') && rest.substr(1).starts_with(close)) break;
    }
    const char c = rest[0];
    Token token;
    if (starts_name(c)) {
      size_t length = 1;
      while (length < rest.size() && (starts_name(rest[length]) || std::isdigit(static_cast<unsigned char>(rest[length]))))
        ++length;
      token = {Token::Type::kName, std::string(rest.substr(0, length))};
      at += length;
    } else if (std::isdigit(static_cast<unsigned char>(c))) {
      size_t length = 1;
      bool real = false;
      while (length < rest.size()) {
        if (std::isdigit(static_cast<unsigned char>(rest[length]))) {
          ++length;
        } else if (!real && rest[length] == '.' && length + 1 < rest.size() &&
                   std::isdigit(static_cast<unsigned char>(rest[length + 1]))) {
          real = true;
          ++length;
        } else {
          break;
        }
      }
      if (length > 18 || (length < rest.size() && starts_name(rest[length]))) throw Unsupported("a number of this form");
      token = {real ? Token::Type::kFloat : Token::Type::kInt, std::string(rest.substr(0, length))};
      at += length;
    } else if (c == '"' || c == '\'') {
      size_t length = 1;
      while (length < rest.size() && rest[length] != c) length += rest[length] == '\\' ? 2 : 1;
      if (length >= rest.size()) throw Unsupported("a string that is not closed");
      token = {Token::Type::kString, unescape(rest.substr(1, length - 1))};
      at += length + 1;
    } else {
      static const char* kOperators[] = {"==", "!=", "<=", ">=", "//", "**", "+", "-", "*", "/", "%", "~", "<",
                                         ">",  "=",  "(",  ")",  "[",  "]",  "{", "}", ",", ".", ":", "|"};
      const auto* found =
          std::find_if(std::begin(kOperators), std::end(kOperators), [&](const char* op) { return rest.starts_with(op); });
      if (found == std::end(kOperators)) throw Unsupported(std::string("the character ") + c);
      token = {Token::Type::kOperator, *found};
      if (c == '(' || c == '[' || c == '{') ++brackets;
      if (c == ')' || c == ']' || c == '}') --brackets;
      at += token.text.size();
    }
    tokens.push_back(std::move(token));
  }
  tokens.push_back({});
  return tokens;
}

std::vector<Piece> pieces_of(std::string_view given) {
  std::string source;
  for (size_t i = 0; i < given.size(); ++i) {  // newlines as \n, one at the end dropped
    if (given[i] == '\r') {
      source += '\n';
      if (i + 1 < given.size() && given[i + 1] == '\n') ++i;
    } else {
      source += given[i];
    }
  }
  if (source.ends_with('\n')) source.pop_back();
  const std::string_view all = source;

  std::vector<Piece> pieces;
  size_t at = 0;
  bool line_starts = true;  // where the text before the next tag begins
  bool strip_next = false;  // the last tag ended with a minus
  while (at < all.size()) {
    size_t open = at;
    while ((open = all.find('{', open)) != std::string_view::npos && open + 1 < all.size() && all[open + 1] != '{' &&
           all[open + 1] != '%' && all[open + 1] != '#') {
      ++open;
    }
    const bool last = open == std::string_view::npos || open + 1 >= all.size();
    std::string_view data = all.substr(at, last ? std::string_view::npos : open - at);
    if (strip_next) {
      size_t skip = 0;
      while (skip < data.size() && std::isspace(static_cast<unsigned char>(data[skip]))) ++skip;
      data.remove_prefix(skip);
      if (skip > 0) line_starts = false;
    }
    if (last) {
      if (!data.empty()) pieces.push_back({Piece::Type::kData, std::string(data), {}});
      break;
    }
    const char kind = all[open + 1];
    at = open + 2;
    const char sign = at < all.size() ? all[at] : '\0';
    if (sign == '-') {
      while (!data.empty() && std::isspace(static_cast<unsigned char>(data.back()))) data.remove_suffix(1);
    } else if (sign != '+' && kind != '{') {
      const size_t newline = data.rfind('\n');
      const size_t line = newline == std::string_view::npos ? 0 : newline + 1;
      const bool blank = std::all_of(data.begin() + static_cast<ptrdiff_t>(line), data.end(),
                                     [](char c) { return std::isspace(static_cast<unsigned char>(c)); });
      if ((line > 0 || line_starts) && blank) data = data.substr(0, line);
    }
    if (sign == '-' || (sign == '+' && kind != '{')) ++at;
    if (!data.empty()) pieces.push_back({Piece::Type::kData, std::string(data), {}});

    const std::string close = kind == '{' ? "}}" : kind == '%' ? "%}" : "#}";
    Piece piece{kind == '{' ? Piece::Type::kPrint : Piece::Type::kTag, "", {}};
    if (kind == '#') {
      const size_t end = all.find(close, at);
      if (end == std::string_view::npos) throw Unsupported("a comment that is not closed");
      at = end > at && (all[end - 1] == '-' || all[end - 1] == '+') ? end - 1 : end;
    } else {
      piece.tokens = tokens_until(all, at, close);
    }
    const char end_sign = all[at];
    if (end_sign == '-' || end_sign == '+') ++at;
    at += 2;
    strip_next = end_sign == '-';
    line_starts = false;
    if (kind != '{' && end_sign != '-' && end_sign != '+' && at < all.size() && all[at] == '\n') {
      ++at;
      line_starts = true;
    }
    if (kind != '#') pieces.push_back(std::move(piece));
  }
  return pieces;
}

// ---- parser ----

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

// ---- values ----

bool truth(const Value& v) {
  switch (v.type) {
    case Type::kUndefined:
    case Type::kNone:
      return false;
    case Type::kBool:
    case Type::kInt:
      return v.i != 0;
    case Type::kFloat:
      return v.f != 0;
    case Type::kString:
      return !v.s.empty();
    case Type::kList:
      return !v.l->empty();
    case Type::kDict:
      return v.is_namespace || !v.d->empty();
  }
  return false;
}

bool is_number(const Value& v) { return v.type == Type::kInt || v.type == Type::kFloat || v.type == Type::kBool; }
double as_number(const Value& v) { return v.type == Type::kFloat ? v.f : static_cast<double>(v.i); }

const char* type_name(const Value& v) {
  static const char* kNames[] = {"an undefined value", "none",     "a boolean", "an integer",
                                 "a number",           "a string", "a list",    "a dict"};
  return kNames[static_cast<int>(v.type)];
}

bool equal(const Value& a, const Value& b) {
  if (is_number(a) && is_number(b)) {
    return a.type == Type::kFloat || b.type == Type::kFloat ? as_number(a) == as_number(b) : a.i == b.i;
  }
  if (a.type != b.type) return false;
  switch (a.type) {
    case Type::kString:
      return a.s == b.s;
    case Type::kList:
      return std::equal(a.l->begin(), a.l->end(), b.l->begin(), b.l->end(), equal);
    case Type::kDict:
      throw Unsupported("a comparison of dicts");
    default:
      return true;
  }
}

std::string text_of(const Value& v) {
  switch (v.type) {
    case Type::kUndefined:
      return "";
    case Type::kNone:
      return "None";
    case Type::kBool:
      return v.i ? "True" : "False";
    case Type::kInt:
      return std::to_string(v.i);
    case Type::kString:
      return v.s;
    default:
      throw Unsupported(std::string("printing ") + type_name(v));
  }
}

const Value* lookup(const Dict& dict, std::string_view key) {
  const auto found = std::find_if(dict.begin(), dict.end(), [&](const auto& item) { return item.first == key; });
  return found == dict.end() ? nullptr : &found->second;
}

int64_t as_index(const Value& v) {
  if (v.type != Type::kInt && v.type != Type::kBool) throw Unsupported(std::string("an index that is ") + type_name(v));
  return v.i;
}

// ---- rendering ----

class Renderer {
 public:
  explicit Renderer(const Dict& variables) { scopes_.emplace_back(variables.begin(), variables.end()); }

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

  static void append(std::string& out, std::string_view text) {
    if (out.size() + text.size() > kMaxOutput) throw Unsupported("a rendering of this size");
    out += text;
  }

  Flow run(const Node& n, std::string& out) {
    step();
    switch (n.kind) {
      case Kind::kData:
        append(out, n.value.s);
        return Flow::kNext;
      case Kind::kPrint:
        append(out, text_of(evaluate(*n.kids[0])));
        return Flow::kNext;
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
          if (target.type != Type::kDict || !target.is_namespace)
            throw Unsupported("setting an attribute of what is no namespace");
          put(*target.d, n.names[1], std::move(value));
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

  static void put(Dict& dict, const std::string& key, Value value) {
    for (auto& item : dict) {
      if (item.first == key) {
        item.second = std::move(value);
        return;
      }
    }
    dict.emplace_back(key, std::move(value));
  }

  List items_of(const Value& v) {
    switch (v.type) {
      case Type::kUndefined:
        return {};
      case Type::kList:
        return *v.l;
      case Type::kDict: {
        List keys;
        for (const auto& item : *v.d) keys.push_back(Value::string(item.first));
        return keys;
      }
      case Type::kString: {
        List chars;
        for (const auto c : characters(v.s)) chars.push_back(Value::string(std::string(c)));
        return chars;
      }
      default:
        throw Unsupported(std::string("a loop over ") + type_name(v));
    }
  }

  void bind(const Node& n, const Value& item) {
    if (n.names.size() == 1) {
      scopes_.back()[n.names[0]] = item;
      return;
    }
    if (item.type != Type::kList || item.l->size() != n.names.size()) throw Unsupported("a loop that takes its items apart");
    for (size_t i = 0; i < n.names.size(); ++i) scopes_.back()[n.names[i]] = (*item.l)[i];
  }

  void loop(const Node& n, std::string& out) {
    List items = items_of(evaluate(*n.kids[0]));
    if (n.kids[1]) {
      List kept;
      for (Value& item : items) {
        scopes_.emplace_back();
        bind(n, item);
        const bool keep = truth(evaluate(*n.kids[1]));
        scopes_.pop_back();
        if (keep) kept.push_back(std::move(item));
      }
      items = std::move(kept);
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
        List list;
        for (const NodePtr& kid : n.kids) list.push_back(evaluate(*kid));
        return Value::list(std::move(list));
      }
      case Kind::kDict: {
        Dict dict;
        for (size_t i = 0; i < n.kids.size(); i += 2) {
          const Value key = evaluate(*n.kids[i]);
          if (key.type != Type::kString) throw Unsupported("a dict whose keys are no strings");
          put(dict, key.s, evaluate(*n.kids[i + 1]));
        }
        return Value::dict(std::move(dict));
      }
      case Kind::kAttribute:
        return item(evaluate(*n.kids[0]), Value::string(n.text));
      case Kind::kIndex:
        return item(evaluate(*n.kids[0]), evaluate(*n.kids[1]));
      case Kind::kSlice:
        return slice(n);
      case Kind::kCall:
        return call(n);
      case Kind::kMethod:
        return method(n);
      case Kind::kFilter:
        return filter(n);
      case Kind::kTest:
        return Value::boolean(test(n));
      case Kind::kNot:
        return Value::boolean(!truth(evaluate(*n.kids[0])));
      case Kind::kMinus: {
        const Value v = evaluate(*n.kids[0]);
        if (v.type == Type::kInt) return Value::integer(-v.i);
        if (v.type == Type::kFloat) return Value::number(-v.f);
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

  static Value item(const Value& object, const Value& key) {
    if (object.type == Type::kUndefined || object.type == Type::kNone) {
      if (object.type == Type::kNone) return {};
      throw Unsupported("an item of an undefined value");
    }
    if (object.type == Type::kDict) {
      if (key.type != Type::kString) return {};
      const Value* found = lookup(*object.d, key.s);
      return found ? *found : Value();
    }
    if (key.type == Type::kString) return {};  // neither lists nor strings have attributes that are no methods
    int64_t index = as_index(key);
    if (object.type == Type::kList) {
      const int64_t size = static_cast<int64_t>(object.l->size());
      if (index < 0) index += size;
      return index >= 0 && index < size ? (*object.l)[static_cast<size_t>(index)] : Value();
    }
    if (object.type == Type::kString) {
      const auto chars = characters(object.s);
      const int64_t size = static_cast<int64_t>(chars.size());
      if (index < 0) index += size;
      return index >= 0 && index < size ? Value::string(std::string(chars[static_cast<size_t>(index)])) : Value();
    }
    throw Unsupported(std::string("an item of ") + type_name(object));
  }

  Value slice(const Node& n) {
    const Value object = evaluate(*n.kids[0]);
    const auto bound = [&](size_t i) -> std::optional<int64_t> {
      if (!n.kids[i]) return std::nullopt;
      const Value v = evaluate(*n.kids[i]);
      if (v.type == Type::kNone) return std::nullopt;
      return as_index(v);
    };
    if (object.type != Type::kList && object.type != Type::kString)
      throw Unsupported(std::string("a slice of ") + type_name(object));
    const List all = items_of(object);
    const int64_t size = static_cast<int64_t>(all.size());
    const auto low = bound(1), high = bound(2);
    const int64_t stride = bound(3).value_or(1);
    if (stride == 0) throw Unsupported("a slice with step 0");
    const auto place = [&](std::optional<int64_t> x, int64_t fallback) {
      if (!x) return fallback;
      const int64_t at = *x < 0 ? *x + size : *x;
      return stride > 0 ? std::clamp<int64_t>(at, 0, size) : std::clamp<int64_t>(at, -1, size - 1);
    };
    const int64_t begin = place(low, stride > 0 ? 0 : size - 1), end = place(high, stride > 0 ? size : -1);
    List part;
    for (int64_t i = begin; stride > 0 ? i < end : i > end; i += stride) part.push_back(all[static_cast<size_t>(i)]);
    if (object.type == Type::kList) return Value::list(std::move(part));
    std::string text;
    for (const Value& c : part) text += c.s;
    return Value::string(std::move(text));
  }

  static Value binary(const std::string& op, const Value& a, const Value& b) {
    if (op == "==") return Value::boolean(equal(a, b));
    if (op == "!=") return Value::boolean(!equal(a, b));
    if (op == "in") return Value::boolean(contains(b, a));
    if (op == "not in") return Value::boolean(!contains(b, a));
    if (op == "~") return Value::string(text_of(a) + text_of(b));
    const auto refuse = [&] { return Unsupported(std::string(type_name(a)) + " " + op + " " + type_name(b)); };
    if (a.type == Type::kString && b.type == Type::kString) {
      if (op == "+") {
        if (a.s.size() + b.s.size() > kMaxOutput) throw Unsupported("a text of this size");
        return Value::string(a.s + b.s);
      }
      if (op == "<") return Value::boolean(a.s < b.s);
      if (op == ">") return Value::boolean(a.s > b.s);
      if (op == "<=") return Value::boolean(a.s <= b.s);
      if (op == ">=") return Value::boolean(a.s >= b.s);
      throw refuse();
    }
    if (a.type == Type::kList && b.type == Type::kList && op == "+") {
      List list = *a.l;
      list.insert(list.end(), b.l->begin(), b.l->end());
      if (list.size() > 1'000'000) throw Unsupported("a list of this size");
      return Value::list(std::move(list));
    }
    if (!is_number(a) || !is_number(b)) throw refuse();
    if (op == "<") return Value::boolean(as_number(a) < as_number(b));
    if (op == ">") return Value::boolean(as_number(a) > as_number(b));
    if (op == "<=") return Value::boolean(as_number(a) <= as_number(b));
    if (op == ">=") return Value::boolean(as_number(a) >= as_number(b));
    if (a.type == Type::kFloat || b.type == Type::kFloat || op == "/") throw refuse();  // would print as Python's floats
    int64_t result = 0;
    bool overflow = false;
    if (op == "+") {
      overflow = __builtin_add_overflow(a.i, b.i, &result);
    } else if (op == "-") {
      overflow = __builtin_sub_overflow(a.i, b.i, &result);
    } else if (op == "*") {
      overflow = __builtin_mul_overflow(a.i, b.i, &result);
    } else {  // // and %, rounded down as Python does
      if (b.i == 0 || b.i == -1) throw Unsupported("a division by " + std::to_string(b.i));
      int64_t quotient = a.i / b.i, rest = a.i % b.i;
      if (rest != 0 && (rest < 0) != (b.i < 0)) {
        --quotient;
        rest += b.i;
      }
      result = op == "%" ? rest : quotient;
    }
    if (overflow) throw Unsupported("an integer of this size");
    return Value::integer(result);
  }

  static bool contains(const Value& container, const Value& v) {
    switch (container.type) {
      case Type::kUndefined:
        return false;
      case Type::kString:
        if (v.type != Type::kString) throw Unsupported(std::string(type_name(v)) + " in a string");
        return container.s.find(v.s) != std::string::npos;
      case Type::kList:
        return std::any_of(container.l->begin(), container.l->end(), [&](const Value& x) { return equal(x, v); });
      case Type::kDict:
        return v.type == Type::kString && lookup(*container.d, v.s);
      default:
        throw Unsupported(std::string("in ") + type_name(container));
    }
  }

  // ---- functions ----

  struct Arguments {
    List values;
    Dict keywords;

    void at_most(size_t count, std::initializer_list<std::string_view> names, const std::string& what) const {
      bool fine = values.size() <= count;
      for (const auto& keyword : keywords)
        fine = fine && std::find(names.begin(), names.end(), keyword.first) != names.end();
      if (!fine) throw Unsupported(what + " with these arguments");
    }
    std::string text(size_t i, const std::string& what) const {
      if (i >= values.size() || values[i].type != Type::kString) throw Unsupported(what + " with these arguments");
      return values[i].s;
    }
  };

  Arguments arguments(const Node& n, size_t first) {
    Arguments result;
    for (size_t i = first; i < n.kids.size(); ++i) result.values.push_back(evaluate(*n.kids[i]));
    for (const auto& [key, value] : n.keywords) result.keywords.emplace_back(key, evaluate(*value));
    return result;
  }

  Value call(const Node& n) {
    const Arguments a = arguments(n, 0);
    if (n.text == "raise_exception") {
      a.at_most(1, {}, n.text);
      throw Raised(a.values.empty() ? "the chat template refuses these messages" : text_of(a.values[0]));
    }
    if (n.text == "namespace") {
      if (!a.values.empty()) throw Unsupported("namespace with these arguments");
      Value result = Value::dict(a.keywords);
      result.is_namespace = true;
      return result;
    }
    if (n.text == "dict") {
      if (!a.values.empty()) throw Unsupported("dict with these arguments");
      return Value::dict(a.keywords);
    }
    if (n.text == "range") {
      a.at_most(3, {}, n.text);
      if (a.values.empty()) throw Unsupported("range with these arguments");
      const int64_t begin = a.values.size() > 1 ? as_index(a.values[0]) : 0;
      const int64_t end = as_index(a.values[a.values.size() > 1 ? 1 : 0]);
      const int64_t stride = a.values.size() > 2 ? as_index(a.values[2]) : 1;
      if (stride == 0) throw Unsupported("range with step 0");
      List list;
      for (int64_t i = begin; stride > 0 ? i < end : i > end; i += stride) {
        if (list.size() >= 100'000) throw Unsupported("a range of this size");
        list.push_back(Value::integer(i));
      }
      return Value::list(std::move(list));
    }
    if (n.text == "strftime_now") {
      a.at_most(1, {}, n.text);
      const std::time_t now = std::time(nullptr);
      std::tm local{};
      localtime_r(&now, &local);
      char text[256];
      const size_t length = std::strftime(text, sizeof text, a.text(0, n.text).c_str(), &local);
      return Value::string(std::string(text, length));
    }
    throw Unsupported("the function " + n.text);
  }

  static std::string ascii_case(const std::string& text, const std::string& how) {
    if (!is_ascii(text)) throw Unsupported(how + " of text that is not ASCII");
    std::string out = text;
    bool after_letter = false;
    for (size_t i = 0; i < out.size(); ++i) {
      const auto c = static_cast<unsigned char>(out[i]);
      const bool up = how == "upper" || (how == "title" && !after_letter) || (how == "capitalize" && i == 0);
      out[i] = static_cast<char>(up ? std::toupper(c) : std::tolower(c));
      after_letter = std::isalpha(c) != 0;
    }
    return out;
  }

  static std::string replace(const std::string& text, const std::string& from, const std::string& to) {
    if (from.empty()) throw Unsupported("replace of an empty text");
    std::string out;
    size_t at = 0;
    for (size_t found; (found = text.find(from, at)) != std::string::npos; at = found + from.size()) {
      append(out, std::string_view(text).substr(at, found - at));
      append(out, to);
    }
    append(out, std::string_view(text).substr(at));
    return out;
  }

  Value method(const Node& n) {
    const Value object = evaluate(*n.kids[0]);
    const Arguments a = arguments(n, 1);
    const std::string& m = n.text;
    if (!a.keywords.empty()) throw Unsupported(m + " with these arguments");
    if (object.type == Type::kString) {
      const std::string& s = object.s;
      if (m == "strip" || m == "lstrip" || m == "rstrip") {
        a.at_most(1, {}, m);
        std::optional<std::string> set;
        if (!a.values.empty()) set = a.text(0, m);
        return Value::string(strip(s, m != "rstrip", m != "lstrip", set));
      }
      if (m == "upper" || m == "lower" || m == "title" || m == "capitalize") {
        a.at_most(0, {}, m);
        return Value::string(ascii_case(s, m));
      }
      if (m == "startswith" || m == "endswith") {
        a.at_most(1, {}, m);
        const std::string part = a.text(0, m);
        return Value::boolean(m == "startswith" ? s.starts_with(part) : s.ends_with(part));
      }
      if (m == "replace") {
        a.at_most(2, {}, m);
        return Value::string(replace(s, a.text(0, m), a.text(1, m)));
      }
      if (m == "split") {
        a.at_most(2, {}, m);
        const std::string by = a.text(0, m);
        int64_t most = a.values.size() > 1 ? as_index(a.values[1]) : -1;
        if (by.empty()) throw Unsupported("split by an empty text");
        List parts;
        size_t at = 0;
        for (size_t found; most != 0 && (found = s.find(by, at)) != std::string::npos; at = found + by.size(), --most) {
          parts.push_back(Value::string(s.substr(at, found - at)));
        }
        parts.push_back(Value::string(s.substr(at)));
        return Value::list(std::move(parts));
      }
    }
    if (object.type == Type::kDict) {
      if (m == "get") {
        a.at_most(2, {}, m);
        const Value* found = lookup(*object.d, a.text(0, m));
        return found ? *found : a.values.size() > 1 ? a.values[1] : Value::none();
      }
      if (m == "items" || m == "keys" || m == "values") {
        a.at_most(0, {}, m);
        List list;
        for (const auto& [key, value] : *object.d) {
          if (m == "items") {
            list.push_back(Value::list({Value::string(key), value}));
          } else {
            list.push_back(m == "keys" ? Value::string(key) : value);
          }
        }
        return Value::list(std::move(list));
      }
    }
    throw Unsupported("the method " + m + " of " + type_name(object));
  }

  Value filter(const Node& n) {
    const Value object = evaluate(*n.kids[0]);
    const Arguments a = arguments(n, 1);
    const std::string& f = n.text;
    if (f == "default" || f == "d") {
      a.at_most(2, {"default_value", "boolean"}, f);
      const Value* named = lookup(a.keywords, "boolean");
      const bool falsy = a.values.size() > 1 ? truth(a.values[1]) : named && truth(*named);
      const bool missing = object.type == Type::kUndefined || (falsy && !truth(object));
      if (!missing) return object;
      const Value* fallback = lookup(a.keywords, "default_value");
      return !a.values.empty() ? a.values[0] : fallback ? *fallback : Value::string("");
    }
    if (!a.keywords.empty()) throw Unsupported("the filter " + f + " with these arguments");
    if (f == "trim") {
      a.at_most(1, {}, f);
      std::optional<std::string> set;
      if (!a.values.empty()) set = a.text(0, f);
      return Value::string(strip(text_of(object), true, true, set));
    }
    if (f == "upper" || f == "lower" || f == "capitalize") return Value::string(ascii_case(text_of(object), f));
    if (f == "string") return Value::string(text_of(object));
    if (f == "safe") return object;
    if (f == "length" || f == "count") {
      if (object.type == Type::kDict) return Value::integer(static_cast<int64_t>(object.d->size()));
      return Value::integer(static_cast<int64_t>(items_of(object).size()));
    }
    if (f == "first" || f == "last") {
      const List list = items_of(object);
      return list.empty() ? Value() : f == "first" ? list.front() : list.back();
    }
    if (f == "list") return Value::list(items_of(object));
    if (f == "reverse" && object.type == Type::kList) {
      return Value::list(List(object.l->rbegin(), object.l->rend()));
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

  bool test(const Node& n) {
    const Value v = evaluate(*n.kids[0]);
    const std::string& t = n.text;
    if (n.kids.size() > 2 || !n.keywords.empty()) throw Unsupported("the test " + t + " with these arguments");
    if (n.kids.size() == 2) {
      const Value other = evaluate(*n.kids[1]);
      if (t == "equalto" || t == "eq" || t == "sameas") return equal(v, other);
      if (t == "in") return contains(other, v);
      throw Unsupported("the test " + t);
    }
    if (t == "defined") return v.type != Type::kUndefined;
    if (t == "undefined") return v.type == Type::kUndefined;
    if (t == "none") return v.type == Type::kNone;
    if (t == "string") return v.type == Type::kString;
    if (t == "mapping") return v.type == Type::kDict && !v.is_namespace;
    if (t == "sequence" || t == "iterable") {
      return v.type == Type::kString || v.type == Type::kList || v.type == Type::kDict || v.type == Type::kUndefined;
    }
    if (t == "number") return is_number(v);
    if (t == "integer") return v.type == Type::kInt;
    if (t == "float") return v.type == Type::kFloat;
    if (t == "boolean") return v.type == Type::kBool;
    if (t == "true") return v.type == Type::kBool && v.i;
    if (t == "false") return v.type == Type::kBool && !v.i;
    if (t == "odd" || t == "even") {
      if (v.type != Type::kInt) throw Unsupported("the test " + t + " of " + type_name(v));
      return (v.i % 2 != 0) == (t == "odd");
    }
    throw Unsupported("the test " + t);
  }

  std::vector<Scope> scopes_;
  int steps_ = 0;
};

}  // namespace

Template Template::parse(std::string_view source) {
  if (source.size() > kMaxSource) throw Unsupported("a template of this size");
  Template result;
  result.root_ = Parser(pieces_of(source)).whole();
  return result;
}

std::string Template::render(const Dict& variables) const { return Renderer(variables).render(*root_); }

}  // namespace powerinfer::jinja
