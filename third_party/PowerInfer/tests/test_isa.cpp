#include <doctest/doctest.h>

#include "errors.h"
#include "isa.h"

using namespace powerinfer;

TEST_CASE("instruction sets have names, and those this CPU lacks are refused") {
  CHECK(parse_isa("") == detect_isa());
  CHECK(parse_isa("plain") == Isa::kPlain);
  for (const Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512}) {
    const std::string name(isa_name(isa));
    if (isa <= detect_isa())
      CHECK(parse_isa(name) == isa);
    else
      CHECK_THROWS_AS(parse_isa(name), Error);
  }
  CHECK_THROWS_WITH(parse_isa("sse"), "instruction set must be plain, avx2 or avx512, got 'sse'");
}
