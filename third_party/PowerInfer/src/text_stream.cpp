#include "text_stream.h"

#include <algorithm>
#include <cstdint>

namespace powerinfer {
namespace {

// Length of the well-formed character at the start of `text` (1 to 4), or minus the length of its longest valid beginning
// (at least 1 byte is consumed). `open`: the text ended inside a character that is valid so far.
struct Character {
  size_t bytes;
  bool valid, open;
};

Character next_character(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {1, true, false};
  size_t length;
  uint8_t low = 0x80, high = 0xbf;  // of the second byte
  if (lead >= 0xc2 && lead <= 0xdf) {
    length = 2;
  } else if (lead >= 0xe0 && lead <= 0xef) {
    length = 3;
    if (lead == 0xe0) low = 0xa0;   // shorter forms
    if (lead == 0xed) high = 0x9f;  // surrogates
  } else if (lead >= 0xf0 && lead <= 0xf4) {
    length = 4;
    if (lead == 0xf0) low = 0x90;
    if (lead == 0xf4) high = 0x8f;  // above U+10FFFF
  } else {
    return {1, false, false};
  }
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {i, false, true};
    if (byte(i) < low || byte(i) > high) return {i, false, false};
    low = 0x80;
    high = 0xbf;
  }
  return {length, true, false};
}

}  // namespace

size_t incomplete_utf8(std::string_view text) {
  const size_t most = std::min<size_t>(3, text.size());
  for (size_t back = 1; back <= most; ++back) {
    const std::string_view tail = text.substr(text.size() - back);
    if ((static_cast<uint8_t>(tail[0]) & 0xc0) == 0x80) continue;
    const Character c = next_character(tail);
    return c.open && c.bytes == back ? back : 0;
  }
  return 0;
}

std::string valid_utf8(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  while (!text.empty()) {
    const Character c = next_character(text);
    if (c.valid) {
      result.append(text.substr(0, c.bytes));
    } else {
      result.append("\xef\xbf\xbd");
    }
    text.remove_prefix(c.bytes);
  }
  return result;
}

bool is_valid_utf8(std::string_view text) {
  while (!text.empty()) {
    const Character c = next_character(text);
    if (!c.valid) return false;
    text.remove_prefix(c.bytes);
  }
  return true;
}

size_t utf8_length(std::string_view text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<uint8_t>(c) & 0xc0) != 0x80; }));
}

std::string TextStream::add(std::string_view bytes) {
  if (stopped_) return "";
  pending_.append(bytes);
  size_t found = std::string::npos;
  for (const std::string& stop : stops_) found = std::min(found, pending_.find(stop));
  if (found != std::string::npos) {
    stopped_ = true;
    pending_.resize(found);
    return finish();
  }
  const size_t ready = pending_.size() - held_back();
  std::string piece = valid_utf8(std::string_view(pending_).substr(0, ready));
  pending_.erase(0, ready);
  return piece;
}

std::string TextStream::finish() {
  std::string piece = valid_utf8(pending_);
  pending_.clear();
  return piece;
}

size_t TextStream::held_back() const {
  size_t held = incomplete_utf8(pending_);
  for (const std::string& stop : stops_) {
    for (size_t length = std::min(stop.size() - 1, pending_.size()); length > held; --length) {
      if (std::string_view(pending_).substr(pending_.size() - length) == std::string_view(stop).substr(0, length))
        held = length;
    }
  }
  return held;
}

}  // namespace powerinfer
