// A template's source to pieces: its text, and the tokens of its tags.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace powerinfer::jinja {

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

// With trim_blocks and lstrip_blocks, as Hugging Face reads templates. Throws Unsupported.
std::vector<Piece> pieces_of(std::string_view source);

}  // namespace powerinfer::jinja
