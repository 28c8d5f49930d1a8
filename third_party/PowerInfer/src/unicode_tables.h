// The tables that tools/make_unicode_tables.py writes into unicode_tables.cpp.
#pragma once

#include <array>
#include <cstdint>

namespace powerinfer {

// All code points from `first` up to the next run have the value.
struct CodePointRun {
  uint32_t first;
  uint8_t value;
};

// Canonical decomposition of `code` into `first` and `second`, which is 0 where there is only one.
struct Decomposition {
  uint32_t code, first, second;
  bool composes;  // NFC puts the two together again
};

extern const std::array<CodePointRun, 1799> kClassRuns;     // CodePointClass bits
extern const std::array<CodePointRun, 496> kCombiningRuns;  // canonical combining classes
extern const std::array<Decomposition, 2060> kDecompositions;

}  // namespace powerinfer
