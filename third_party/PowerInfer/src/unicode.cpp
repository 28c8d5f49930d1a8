#include "unicode.h"

#include <algorithm>
#include <array>
#include <span>
#include <unordered_map>
#include <vector>

#include "unicode_tables.h"

namespace powerinfer {

namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

uint8_t run_value(std::span<const CodePointRun> runs, uint32_t code_point) {
  const auto after = std::upper_bound(runs.begin(), runs.end(), code_point,
                                      [](uint32_t value, const CodePointRun& run) { return value < run.first; });
  return std::prev(after)->value;  // the first run starts at 0
}

uint8_t combining_class(uint32_t code_point) {
  return code_point < 0x300 || code_point == kInvalid ? 0 : run_value(kCombiningRuns, code_point);
}

// Bytes that a character starting with `lead` has, 0 where none starts so; its second byte must be in [low, high].
struct Lead {
  uint32_t bytes;
  uint8_t low = 0x80, high = 0xBF;
};

Lead lead_byte(uint8_t lead) {
  if (lead < 0x80) return {1};
  if (lead >= 0xC2 && lead <= 0xDF) return {2};
  if (lead == 0xE0) return {3, 0xA0, 0xBF};
  if (lead == 0xED) return {3, 0x80, 0x9F};
  if (lead >= 0xE1 && lead <= 0xEF) return {3};
  if (lead == 0xF0) return {4, 0x90, 0xBF};
  if (lead >= 0xF1 && lead <= 0xF3) return {4};
  if (lead == 0xF4) return {4, 0x80, 0x8F};
  return {0};
}

// How many bytes from `position` on belong to one character; `whole` says whether they are all of it.
struct Prefix {
  uint32_t bytes;
  bool whole;
};

Prefix character_prefix(std::string_view text, size_t position) {
  const Lead lead = lead_byte(static_cast<uint8_t>(text[position]));
  if (lead.bytes == 0) return {1, false};
  for (uint32_t i = 1; i < lead.bytes; ++i) {
    if (position + i == text.size()) return {i, false};
    const auto byte = static_cast<uint8_t>(text[position + i]);
    if (byte < (i == 1 ? lead.low : 0x80) || byte > (i == 1 ? lead.high : 0xBF)) return {i, false};
  }
  return {lead.bytes, true};
}

// Hangul syllables are composed by arithmetic: leading consonant, vowel, trailing consonant.
constexpr uint32_t kSyllables = 0xAC00, kLeads = 0x1100, kVowels = 0x1161, kTrails = 0x11A7;
constexpr uint32_t kLeadCount = 19, kVowelCount = 21, kTrailCount = 28;
constexpr uint32_t kSyllableCount = kLeadCount * kVowelCount * kTrailCount;

struct Character {
  uint32_t code;  // kInvalid: the byte
  uint8_t combining;
  uint8_t byte;
};

void append_decomposed(std::vector<Character>& to, uint32_t code) {
  if (code - kSyllables < kSyllableCount) {
    const uint32_t index = code - kSyllables, trail = index % kTrailCount;
    to.push_back({kLeads + index / (kVowelCount * kTrailCount), 0, 0});
    to.push_back({kVowels + index / kTrailCount % kVowelCount, 0, 0});
    if (trail) to.push_back({kTrails + trail, 0, 0});
    return;
  }
  const auto found = std::lower_bound(kDecompositions.begin(), kDecompositions.end(), code,
                                      [](const Decomposition& entry, uint32_t value) { return entry.code < value; });
  if (found == kDecompositions.end() || found->code != code) {
    to.push_back({code, combining_class(code), 0});
    return;
  }
  append_decomposed(to, found->first);
  if (found->second) append_decomposed(to, found->second);
}

// 0 where the two do not compose.
uint32_t compose(uint32_t first, uint32_t second) {
  static const auto compositions = [] {
    std::unordered_map<uint64_t, uint32_t> made;
    for (const Decomposition& entry : kDecompositions) {
      if (entry.composes) made.emplace(uint64_t{entry.first} << 32 | entry.second, entry.code);
    }
    return made;
  }();
  if (first - kLeads < kLeadCount && second - kVowels < kVowelCount) {
    return kSyllables + ((first - kLeads) * kVowelCount + second - kVowels) * kTrailCount;
  }
  if (first - kSyllables < kSyllableCount && (first - kSyllables) % kTrailCount == 0 && second > kTrails &&
      second < kTrails + kTrailCount) {
    return first + second - kTrails;
  }
  const auto found = compositions.find(uint64_t{first} << 32 | second);
  return found == compositions.end() ? 0 : found->second;
}

}  // namespace

CodePoint decode_utf8(std::string_view text, size_t position) {
  const Prefix prefix = character_prefix(text, position);
  if (!prefix.whole) return {kInvalid, 1};
  const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(text[position + i])); };
  switch (prefix.bytes) {
    case 1:
      return {byte(0), 1};
    case 2:
      return {(byte(0) & 0x1F) << 6 | (byte(1) & 0x3F), 2};
    case 3:
      return {(byte(0) & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F), 3};
    default:
      return {(byte(0) & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F), 4};
  }
}

void append_utf8(std::string& text, uint32_t code_point) {
  const auto put = [&](uint32_t byte) { text += static_cast<char>(byte); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | code_point >> 6);
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | code_point >> 12);
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | code_point >> 18);
    put(0x80 | (code_point >> 12 & 0x3F));
    put(0x80 | (code_point >> 6 & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

uint8_t code_point_class(uint32_t code_point) {
  static const auto ascii = [] {
    std::array<uint8_t, 128> made;
    for (uint32_t c = 0; c < made.size(); ++c) made[c] = run_value(kClassRuns, c);
    return made;
  }();
  if (code_point < ascii.size()) return ascii[code_point];
  return code_point == kInvalid ? 0 : run_value(kClassRuns, code_point);
}

std::string nfc(std::string_view text) {
  // nothing below U+0300 changes, whose first byte is 0xCC
  if (std::all_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0xCC; })) return std::string(text);
  std::vector<Character> characters;
  characters.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const CodePoint point = decode_utf8(text, at);
    if (point.value == kInvalid) {
      characters.push_back({kInvalid, 0, static_cast<uint8_t>(text[at])});
    } else {
      append_decomposed(characters, point.value);
    }
    at += point.bytes;
  }
  // marks in the order of their classes between two characters of class 0
  for (auto begin = characters.begin(); begin != characters.end();) {
    auto end = std::find_if(begin, characters.end(), [](const Character& c) { return c.combining == 0; });
    std::stable_sort(begin, end, [](const Character& a, const Character& b) { return a.combining < b.combining; });
    begin = end == characters.end() ? end : end + 1;
  }
  std::vector<Character> composed;
  composed.reserve(characters.size());
  size_t starter = SIZE_MAX;  // in `composed`
  for (const Character& character : characters) {
    if (starter != SIZE_MAX && character.code != kInvalid) {
      // a mark is blocked from its starter by another one of its class or a higher one between them
      const bool adjacent = starter + 1 == composed.size();
      const bool blocked = !adjacent && composed.back().combining >= character.combining;
      const uint32_t whole = blocked ? 0 : compose(composed[starter].code, character.code);
      if (whole) {
        composed[starter].code = whole;
        continue;
      }
    }
    if (character.combining == 0) starter = character.code == kInvalid ? SIZE_MAX : composed.size();
    composed.push_back(character);
  }
  std::string result;
  result.reserve(text.size());
  for (const Character& character : composed) {
    if (character.code == kInvalid) {
      result += static_cast<char>(character.byte);
    } else {
      append_utf8(result, character.code);
    }
  }
  return result;
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Prefix prefix = character_prefix(text, at);
    result += prefix.whole ? text.substr(at, prefix.bytes) : kReplacement;
    at += prefix.bytes;
  }
  return result;
}

}  // namespace powerinfer
