#include "jinja/lexer.h"

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <utility>

#include "jinja/text.h"
#include "jinja/value.h"

namespace powerinfer::jinja {

namespace {

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

}  // namespace

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

}  // namespace powerinfer::jinja
