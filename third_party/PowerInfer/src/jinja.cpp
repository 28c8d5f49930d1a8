#include "jinja.h"

#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/renderer.h"

namespace powerinfer::jinja {

namespace {

constexpr size_t kMaxSource = 256 << 10;

}  // namespace

Template Template::parse(std::string_view source) {
  if (source.size() > kMaxSource) throw Unsupported("a template of this size");
  Template result;
  result.root_ = jinja::parse(pieces_of(source));
  return result;
}

std::string Template::render(const Dict& variables) const { return jinja::render(*root_, variables); }

}  // namespace powerinfer::jinja
