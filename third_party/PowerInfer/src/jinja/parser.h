// Pieces of a template to the tree that is rendered.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "jinja/lexer.h"
#include "jinja/value.h"

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
    kData,    // value.text()
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

// Throws Unsupported.
std::shared_ptr<const Node> parse(std::vector<Piece> pieces);

}  // namespace powerinfer::jinja
