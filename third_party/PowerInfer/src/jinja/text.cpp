#include "jinja/text.h"

#include <algorithm>
#include <cctype>
#include <set>

#include "jinja/value.h"

namespace powerinfer::jinja {

namespace {

// What Python's str.strip() removes.
bool is_space(std::string_view c) {
  static const std::set<std::string_view> kSpaces = {
      " ",      "\t",     "\n",     "\v",     "\f",     "\r",     "\x1c",   "\x1d",   "\x1e",   "\x1f",
      "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
      "\u2007", "\u2008", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000"};
  return kSpaces.contains(c);
}

// Where the first and the last character of a text that is not empty end and begin.
size_t first_end(std::string_view text) {
  size_t end = 1;
  while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) ++end;
  return end;
}
size_t last_begin(std::string_view text) {
  size_t begin = text.size() - 1;
  while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xc0) == 0x80) --begin;
  return begin;
}

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; });
}

}  // namespace

std::vector<std::string_view> characters(std::string_view text) {
  std::vector<std::string_view> result;
  while (!text.empty()) {
    result.push_back(text.substr(0, first_end(text)));
    text.remove_prefix(result.back().size());
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

std::string strip(std::string_view text, bool left, bool right, std::optional<std::string_view> set) {
  const auto all = characters(set.value_or(std::string_view()));
  const auto removed = [&](std::string_view c) {
    return set ? std::find(all.begin(), all.end(), c) != all.end() : is_space(c);
  };
  while (left && !text.empty() && removed(text.substr(0, first_end(text)))) text.remove_prefix(first_end(text));
  while (right && !text.empty() && removed(text.substr(last_begin(text)))) text = text.substr(0, last_begin(text));
  return std::string(text);
}

std::string ascii_case(const std::string& text, const std::string& how) {
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

std::string replace(const std::string& text, const std::string& from, const std::string& to) {
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

void append(std::string& out, std::string_view text) {
  if (out.size() + text.size() > kMaxOutput) throw Unsupported("a rendering of this size");
  out += text;
}

}  // namespace powerinfer::jinja
