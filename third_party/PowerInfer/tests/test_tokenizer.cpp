#include <doctest/doctest.h>

#include <cmath>
#include <cstring>

#include "errors.h"
#include "pretokenizer.h"
#include "tokenizer.h"
#include "unicode.h"

using namespace powerinfer;

namespace {

using Strings = std::vector<std::string>;
using Ids = std::vector<int32_t>;

// The metadata of a GGUF file, without tensors.
class Metadata {
 public:
  Metadata& string(const std::string& key, const std::string& value) { return entry(key, 8, text(value)); }
  Metadata& number(const std::string& key, uint32_t value) { return entry(key, 4, raw(value)); }
  Metadata& flag(const std::string& key, bool value) { return entry(key, 7, raw(static_cast<uint8_t>(value))); }
  Metadata& strings(const std::string& key, const Strings& values) {
    std::string bytes = raw(uint32_t{8}) + raw(uint64_t{values.size()});
    for (const auto& value : values) bytes += text(value);
    return entry(key, 9, bytes);
  }
  Metadata& ints(const std::string& key, const std::vector<int32_t>& values) { return numbers(key, 5, values); }
  Metadata& floats(const std::string& key, const std::vector<float>& values) { return numbers(key, 6, values); }

  std::string file() const { return "GGUF" + raw(uint32_t{3}) + raw(uint64_t{0}) + raw(uint64_t{entries_.size()}) + join(); }
  std::unique_ptr<Tokenizer> load() const { return load_file(file()); }
  static std::unique_ptr<Tokenizer> load_file(const std::string& file) {
    return Tokenizer::load(GgufFile::parse({reinterpret_cast<const uint8_t*>(file.data()), file.size()}));
  }

 private:
  template <typename T>
  static std::string raw(T value) {
    std::string bytes(sizeof value, '\0');
    std::memcpy(bytes.data(), &value, sizeof value);
    return bytes;
  }
  static std::string text(const std::string& value) { return raw(uint64_t{value.size()}) + value; }
  template <typename T>
  Metadata& numbers(const std::string& key, uint32_t type, const std::vector<T>& values) {
    std::string bytes = raw(type) + raw(uint64_t{values.size()});
    for (const T value : values) bytes += raw(value);
    return entry(key, 9, bytes);
  }
  // A later entry of the same key takes the place of the earlier one.
  Metadata& entry(const std::string& key, uint32_t type, const std::string& value) {
    const std::string bytes = text(key) + raw(type) + value;
    for (auto& [name, old] : entries_) {
      if (name == key) return old = bytes, *this;
    }
    entries_.emplace_back(key, bytes);
    return *this;
  }
  std::string join() const {
    std::string all;
    for (const auto& [name, bytes] : entries_) all += bytes;
    return all;
  }
  std::vector<std::pair<std::string, std::string>> entries_;
};

// 0 <|end|>, 1 <|turn|>, 2 "a", 3 "b", 4 "c", 5 "Ġ" (a space), 6 "ab", 7 "abc", 8 "Ġab", 9 "bc", 10 "<x y>", 11 and 12 the
// two bytes of "é"
Metadata bpe() {
  Metadata m;
  m.string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", "gpt-2");
  m.strings("tokenizer.ggml.tokens",
            {"<|end|>", "<|turn|>", "a", "b", "c", "Ġ", "ab", "abc", "Ġab", "bc", "<x y>", "Ã", "©"});
  m.ints("tokenizer.ggml.token_type", {3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1});
  m.strings("tokenizer.ggml.merges", {"b c", "a b", "Ġ ab", "a bc"});
  m.number("tokenizer.ggml.eos_token_id", 1);
  return m;
}

// 0 <unk>, 1 <s>, 2 </s>, 3 - 258 bytes, 259 "▁", 260 "a", 261 "b", 262 "▁a", 263 "ab", 264 "▁ab", 265 "  " user-defined
Metadata spm() {
  Strings tokens{"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types{2, 3, 3};
  for (int byte = 0; byte < 256; ++byte) {
    const char* digits = "0123456789ABCDEF";
    tokens.push_back(std::string("<0x") + digits[byte / 16] + digits[byte % 16] + ">");
    types.push_back(6);
  }
  for (const char* token : {"▁", "a", "b", "▁a", "ab", "▁ab", "  "}) tokens.push_back(token);
  types.insert(types.end(), {1, 1, 1, 1, 1, 1, 4});
  std::vector<float> scores(tokens.size());
  for (size_t i = 259; i < scores.size(); ++i) scores[i] = -static_cast<float>(i);
  Metadata m;
  m.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", tokens);
  m.ints("tokenizer.ggml.token_type", types).floats("tokenizer.ggml.scores", scores);
  m.number("tokenizer.ggml.bos_token_id", 1).number("tokenizer.ggml.eos_token_id", 2);
  return m;
}

void check_refused(const Metadata& metadata, const std::string& part_of_message) {
  try {
    metadata.load();
    FAIL("no error, but one with: " << part_of_message);
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::kModel);
    CHECK_MESSAGE(std::string(error.what()).find(part_of_message) != std::string::npos, error.what());
  }
}

Strings pieces(PreTokenizer kind, const std::string& text) {
  Strings result;
  uint32_t begin = 0;
  for (const uint32_t end : split_pieces(kind, text)) {
    result.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  CHECK(begin == text.size());
  return result;
}

}  // namespace

TEST_CASE("byte-level BPE merges by rank, then from the left") {
  const auto tokenizer = bpe().load();
  CHECK(tokenizer->encode("abc", true, true) == Ids{7});  // b c first, then a bc
  CHECK(tokenizer->encode("ab abab", true, true) == Ids{6, 8, 6});
  CHECK(tokenizer->encode("", true, true) == Ids{});
  CHECK(tokenizer->encode("\xC3\xA9\xC3", true, true) == Ids{11, 12, 11});
  CHECK(tokenizer->encode("azb", true, true) == Ids{6});  // z has no token: left out before merging
  CHECK(tokenizer->vocabulary_size() == 13);
  CHECK(tokenizer->bos() == -1);
  CHECK(tokenizer->eos() == 1);
}

TEST_CASE("control tokens are taken as such when asked, user-defined ones always") {
  const auto tokenizer = bpe().load();
  CHECK(tokenizer->encode("a<|turn|>b<x y>", false, true) == Ids{2, 1, 3, 10});
  CHECK(tokenizer->encode("a<|turn|>b<x y>", false, false) == Ids{2, 3, 10});  // its characters have no tokens here
  CHECK(tokenizer->token_bytes(1).empty());
  CHECK(tokenizer->token_bytes(1, true) == "<|turn|>");
  CHECK(tokenizer->token_bytes(10) == "<x y>");
  CHECK(tokenizer->ends_generation(1));
  CHECK(tokenizer->ends_generation(0));  // by its text
  CHECK(!tokenizer->ends_generation(2));
  CHECK(!tokenizer->ends_generation(-1));
  CHECK(!tokenizer->ends_generation(1000));
}

TEST_CASE("byte-level tokens are parts of characters; whole texts are UTF-8") {
  const auto tokenizer = bpe().load();
  CHECK(tokenizer->token_bytes(11) + tokenizer->token_bytes(12) == "é");
  CHECK(tokenizer->decode({8, 11, 12, 0, 4}) == " abéc");
  CHECK(tokenizer->decode({11, 2}) ==
        "\xEF\xBF\xBD"
        "a");
  CHECK(tokenizer->decode({2, 0}, true) == "a<|end|>");
  CHECK(tokenizer->token_bytes(-1).empty());
  CHECK(tokenizer->decode({1000, -5, 2}) == "a");
}

TEST_CASE("the beginning and the end of a text get their tokens where the file asks for it") {
  auto m = bpe().number("tokenizer.ggml.bos_token_id", 0).flag("tokenizer.ggml.add_bos_token", true);
  CHECK(m.load()->encode("a", true, true) == Ids{0, 2});
  CHECK(m.load()->encode("a", false, true) == Ids{2});
  CHECK(m.flag("tokenizer.ggml.add_eos_token", true).load()->encode("a", true, true) == Ids{0, 2, 1});
  // Llama 3 and SentencePiece models want the first unless told otherwise
  auto llama3 = bpe().number("tokenizer.ggml.bos_token_id", 0).string("tokenizer.ggml.pre", "llama-bpe");
  CHECK(llama3.load()->encode("a", true, true) == Ids{0, 2});
  CHECK(spm().load()->encode("", true, true) == Ids{1});
  CHECK(spm().flag("tokenizer.ggml.add_bos_token", false).load()->encode("", true, true) == Ids{});
}

TEST_CASE("Llama 3 takes a whole piece that is a token, whatever the merges say") {
  auto m = bpe().strings("tokenizer.ggml.merges", {"a b"});
  CHECK(m.load()->encode("abc", false, true) == Ids{6, 4});
  CHECK(m.string("tokenizer.ggml.pre", "llama3").load()->encode("abc", false, true) == Ids{7});
}

TEST_CASE("files from before tokenizer.ggml.pre are split by their architecture") {
  Metadata m;
  m.string("tokenizer.ggml.model", "gpt2").strings("tokenizer.ggml.tokens", {"1", "11"});
  m.ints("tokenizer.ggml.token_type", {1, 1}).strings("tokenizer.ggml.merges", {"1 1"});
  CHECK(m.load()->encode("1111", false, true) == Ids{1, 1});
  CHECK(m.string("general.architecture", "falcon").load()->encode("1111", false, true) == Ids{1, 0, 0});
}

TEST_CASE("texts are split as each family's expressions do") {
  using enum PreTokenizer;
  CHECK(pieces(kGpt2, "I'll go  to 123 x!!\n\n y ") ==
        Strings{"I", "'ll", " go", " ", " to", " 123", " x", "!!", "\n\n", " y", " "});
  CHECK(pieces(kSmollm, "a 12 b") == Strings{"a", " ", "1", "2", " b"});
  CHECK(pieces(kLlama3, "I'LL (go) 1234\n\n  x") ==
        Strings{"I", "'LL", " (", "go", ")", " ", "123", "4", "\n\n", " ", " x"});
  CHECK(pieces(kLlama3, "'\u017Fo'so") == Strings{"'\u017F", "o", "'s", "o"});  // a long s is an s
  CHECK(pieces(kQwen2, "é12") == Strings{"é", "1", "2"});
  CHECK(pieces(kFalcon, "a-b 12345²") == Strings{"a", "-", "b", " ", "123", "45", "\xC2", "\xB2"});
  for (const auto kind : {kGpt2, kSmollm, kLlama3, kQwen2, kFalcon}) {
    CHECK(pieces(kind, "").empty());
    for (const char* text : {"'", " ", "\n", "\xFF", "'l", "\xF0\x9F\x98", " \xC3", "1"})
      CHECK(pieces(kind, text).size() <= 2);
  }
}

TEST_CASE("malformed byte-level vocabularies are refused") {
  check_refused(Metadata(), "tokenizer.ggml.model");
  check_refused(bpe().string("tokenizer.ggml.model", "t5"), "can be used");
  check_refused(bpe().string("tokenizer.ggml.pre", "tekken"), "known are gpt-2");
  check_refused(bpe().strings("tokenizer.ggml.tokens", {}), "vocabulary of 0");
  check_refused(bpe().strings("tokenizer.ggml.tokens", {"a", "b"}), "13 entries");
  check_refused(bpe().ints("tokenizer.ggml.token_type", std::vector<int32_t>(13, 7)), "type 7");
  check_refused(bpe().ints("tokenizer.ggml.token_type", std::vector<int32_t>(13, -1)), "type -1");
  check_refused(bpe().strings("tokenizer.ggml.merges", {"a z"}), "not in the vocabulary");
  check_refused(bpe().strings("tokenizer.ggml.merges", {"a c"}), "not in the vocabulary");
  check_refused(bpe().strings("tokenizer.ggml.merges", {"ab"}), "not two tokens");
  check_refused(bpe().strings("tokenizer.ggml.merges", {""}), "not two tokens");
  check_refused(bpe().strings("tokenizer.ggml.merges", {" "}), "not in the vocabulary");
  check_refused(bpe().number("tokenizer.ggml.merges", 1), "tokenizer.ggml.merges");
  check_refused(bpe().number("tokenizer.ggml.eos_token_id", 13), "eos_token_id 13");
  check_refused(bpe().number("tokenizer.ggml.eot_token_id", 13), "eot_token_id 13");
  check_refused(bpe().number("tokenizer.ggml.bos_token_id", 0xFFFFFFFF), "bos_token_id");
  check_refused(bpe().flag("tokenizer.ggml.add_bos_token", true), "does not say which");
  check_refused(bpe().strings("tokenizer.ggml.tokens", Strings(13, "\xFF\xFE")), "single byte");
  Metadata missing;
  check_refused(missing.string("tokenizer.ggml.model", "gpt2"), "tokenizer.ggml.tokens");
  check_refused(missing.strings("tokenizer.ggml.tokens", {"a"}), "tokenizer.ggml.token_type");
  check_refused(missing.ints("tokenizer.ggml.token_type", {1}), "tokenizer.ggml.merges");
}

TEST_CASE("SentencePiece BPE merges the highest score, then from the left") {
  const auto tokenizer = spm().load();
  CHECK(tokenizer->encode("ab", false, true) == Ids{264});
  CHECK(tokenizer->encode("bab", false, true) == Ids{259, 261, 263});
  CHECK(tokenizer->encode("a b", false, true) == Ids{262, 259, 261});
  CHECK(tokenizer->encode("\xC3\xA9\xFF", false, true) == Ids{259, 3 + 0xC3, 3 + 0xA9, 3 + 0xFF});
  CHECK(tokenizer->encode("a  ab", false, true) == Ids{262, 265, 263});  // the user-defined one merges with nothing
  CHECK(tokenizer->encode("a</s>b", false, true) == Ids{262, 2, 259, 261});
  CHECK(tokenizer->encode("<s>", false, false) == Ids{259, 3 + '<', 3 + 's', 3 + '>'});
  CHECK(spm().flag("tokenizer.ggml.add_space_prefix", false).load()->encode("ab", false, true) == Ids{263});
}

TEST_CASE("SentencePiece's added space goes, others stay") {
  const auto tokenizer = spm().load();
  CHECK(tokenizer->leading_space());
  CHECK(tokenizer->decode({1, 262, 264, 2}) == "a ab");
  CHECK(tokenizer->decode({259, 262}) == " a");
  CHECK(tokenizer->decode({1, 262}, true) == "<s> a");
  CHECK(tokenizer->decode({3 + 0xC3, 3 + 0xA9, 3 + 0xFF, 260}) ==
        "é\xEF\xBF\xBD"
        "a");
  CHECK(tokenizer->token_bytes(264) == " ab");
  CHECK(tokenizer->token_bytes(3 + 0xFF) == "\xFF");
  CHECK(tokenizer->token_bytes(0).empty());
  CHECK(spm().flag("tokenizer.ggml.add_space_prefix", false).load()->decode({262}) == " a");
}

TEST_CASE("without byte tokens a run of unknown characters is one token; unused pieces fall apart") {
  Metadata m;
  m.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", {"<unk>", "a", "b", "ab", "aba"});
  m.ints("tokenizer.ggml.token_type", {2, 1, 1, 5, 1}).floats("tokenizer.ggml.scores", {0, -9, -9, -1, -2});
  m.flag("tokenizer.ggml.add_space_prefix", false);
  CHECK(m.load()->encode("xyaz", false, true) == Ids{0, 1, 0});
  CHECK(m.load()->encode("ababa", false, true) == Ids{1, 2, 4});
  CHECK(m.load()->encode("bab", false, true) == Ids{2, 1, 2});
}

TEST_CASE("user-defined tokens are found first and merge with nothing") {
  Metadata m;
  m.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", {"<unk>", "a", "b", "ab", "abb", "aab"});
  m.ints("tokenizer.ggml.token_type", {2, 1, 1, 4, 1, 1}).floats("tokenizer.ggml.scores", {0, -9, -9, -1, -2, -2});
  m.flag("tokenizer.ggml.add_space_prefix", false);
  CHECK(m.load()->encode("abb", false, true) == Ids{3, 2});
  CHECK(m.load()->encode("aab", false, true) == Ids{1, 3});
}

TEST_CASE("malformed SentencePiece vocabularies are refused") {
  const std::vector<float> scores(266);
  check_refused(spm().floats("tokenizer.ggml.scores", {1.0f}), "1 entries");
  auto bad = scores;
  bad[7] = std::nanf("");
  check_refused(spm().floats("tokenizer.ggml.scores", bad), "token 7");
  check_refused(spm().ints("tokenizer.ggml.scores", std::vector<int32_t>(266)), "tokenizer.ggml.scores");
  check_refused(spm().number("tokenizer.ggml.unknown_token_id", 266), "unknown_token_id 266");
  check_refused(spm().flag("tokenizer.ggml.remove_extra_whitespaces", true), "not supported");
  Metadata m;
  m.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", {"<0x41>", "a"});
  m.ints("tokenizer.ggml.token_type", {6, 1});
  check_refused(m, "tokenizer.ggml.scores");
  check_refused(m.floats("tokenizer.ggml.scores", {0, 0}), "1 of the 256 bytes");
  check_refused(m.ints("tokenizer.ggml.token_type", {1, 1}), "neither byte tokens nor an unknown token");
  check_refused(m.ints("tokenizer.ggml.token_type", {1, 6}), "not like <0x0A>");
}

TEST_CASE("a vocabulary with any byte damaged is refused or works") {
  for (const auto& whole : {bpe().file(), spm().file()}) {
    for (size_t at = 24; at < whole.size(); ++at) {
      for (const char value : {'\0', '\1', '\7', 'a', '\xFF'}) {
        std::string damaged = whole;
        damaged[at] = value;
        try {
          const auto tokenizer = Metadata::load_file(damaged);
          tokenizer->decode(tokenizer->encode("abc <|end|>\xC3\xA9 <x y>", true, true), true);
        } catch (const Error& error) {
          CHECK(error.kind() == ErrorKind::kModel);
        }
      }
    }
  }
}

TEST_CASE("UTF-8 is decoded strictly") {
  CHECK(decode_utf8("\xF0\x9F\x98\x80", 0).value == 0x1F600);
  CHECK(decode_utf8("a", 0).bytes == 1);
  // continuation alone, overlong, surrogate, above U+10FFFF, cut off
  for (const char* text : {"\x80", "\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xF8\x88", "\xE4\xB8"}) {
    CHECK(decode_utf8(text, 0).value == kInvalid);
    CHECK(decode_utf8(text, 0).bytes == 1);
  }
  CHECK(replace_invalid_utf8("a\xE4\xB8"
                             "b\xFF") ==
        "a\xEF\xBF\xBD"
        "b\xEF\xBF\xBD");
}

TEST_CASE("NFC composes, orders marks and keeps what is no UTF-8") {
  CHECK(nfc("e\u0301") == "é");
  CHECK(nfc("a\u0308\u0323") == "\u1EA1\u0308");
  CHECK(nfc("\u1112\u1161\u11AB") == "\uD55C");
  CHECK(nfc("\u0344") == "\u0308\u0301");
  CHECK(nfc("e\xFF\u0301") == "e\xFF\u0301");
  CHECK(nfc("\u0301e") == "\u0301e");
  CHECK(nfc("e\u0301\u0301") == "é\u0301");
}

TEST_CASE("a megabyte is no matter of minutes") {
  const auto byte_level = bpe().load();
  const auto sentencepiece = spm().load();
  for (const std::string& part : {std::string("ab"), std::string(" "), std::string("'"), std::string("<|"),
                                  std::string("\u0301"), std::string("\xFF"), std::string("\r\n  ")}) {
    std::string text;
    while (text.size() < 1'000'000) text += part;
    byte_level->encode(text, false, true);
    CHECK(sentencepiece->encode(text, false, true).size() > 1000);
    nfc(text);
    for (const auto kind : {PreTokenizer::kLlama3, PreTokenizer::kQwen2, PreTokenizer::kFalcon}) split_pieces(kind, text);
  }
}
