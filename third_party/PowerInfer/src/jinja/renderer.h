// Runs a template's tree.
#pragma once

#include <string>

#include "jinja/parser.h"
#include "jinja/value.h"

namespace powerinfer::jinja {

// Throws Unsupported, also for what takes too long or grows too large; Raised.
std::string render(const Node& root, const Dict& variables);

}  // namespace powerinfer::jinja
