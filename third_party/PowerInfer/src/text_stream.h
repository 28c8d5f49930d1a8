// Text of a generated sequence, put together from the bytes of its tokens.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace powerinfer {

// Bytes of the longest incomplete but so far valid UTF-8 character at the end of `text`: 0 to 3.
size_t incomplete_utf8(std::string_view text);
// `text` with every byte that belongs to no UTF-8 character replaced by U+FFFD, one for each longest valid beginning.
std::string valid_utf8(std::string_view text);
bool is_valid_utf8(std::string_view text);
// Characters that begin in `text`.
size_t utf8_length(std::string_view text);

// Gives out only what later tokens cannot change: holds back incomplete characters and what may be the beginning of a stop
// string. The pieces joined are the whole text, up to the first stop string.
class TextStream {
 public:
  explicit TextStream(std::vector<std::string> stops = {}) : stops_(std::move(stops)) {}

  // Valid UTF-8, often empty.
  std::string add(std::string_view bytes);
  // What was held back.
  std::string finish();
  bool stopped() const { return stopped_; }  // a stop string was found: what follows is dropped

 private:
  size_t held_back() const;

  std::vector<std::string> stops_;
  std::string pending_;
  bool stopped_ = false;
};

}  // namespace powerinfer
