// The part of the Jinja template language that chat templates are written in. What it does not know it refuses, when the
// template is read or, in a branch that is taken, when it is rendered: a rendering is what Jinja would give or none.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "jinja/value.h"

namespace powerinfer::jinja {

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
