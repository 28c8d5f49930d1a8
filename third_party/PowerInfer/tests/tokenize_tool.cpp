// powerinfer-tokenize FILE.gguf: one JSON value a line on stdin, one JSON object a line on stdout; for tests.
//   "text" or {"text": .., "add_special": false, "parse_special": true}   ->  {"ids": [..], "text": decoded, "streamed": ..}
//   {"hex": bytes in hexadecimal}, which need not be UTF-8                ->  {"ids": [..], "hex": bytes of all tokens}
//   {"ids": [..], "with_special": false}                                  ->  {"text": decoded}
#include <exception>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "errors.h"
#include "tokenizer.h"
#include "unicode.h"

using nlohmann::json;
using namespace powerinfer;

namespace {

std::string join_tokens(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  std::string text;
  for (const int32_t id : ids) text += tokenizer.token_bytes(id);
  if (tokenizer.leading_space() && text.starts_with(' ')) text.erase(0, 1);
  return text;
}

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

std::string to_hex(const std::string& bytes) {
  std::string hex;
  for (const char c : bytes) {
    hex += "0123456789abcdef"[static_cast<uint8_t>(c) >> 4];
    hex += "0123456789abcdef"[c & 15];
  }
  return hex;
}

json answer(const Tokenizer& tokenizer, const json& request) {
  if (request.is_object() && request.contains("ids")) {
    return {{"text", tokenizer.decode(request["ids"], request.value("with_special", false))}};
  }
  const bool hex = request.is_object() && request.contains("hex");
  const json options = request.is_object() ? request : json::object();
  const json& given = hex ? request["hex"] : request.is_object() ? request["text"] : request;
  const std::string text = hex ? from_hex(given) : given.get<std::string>();
  const auto ids = tokenizer.encode(text, options.value("add_special", false), options.value("parse_special", true));
  const std::string streamed = join_tokens(tokenizer, ids);
  if (hex) return {{"ids", ids}, {"hex", to_hex(streamed)}};
  return {{"ids", ids}, {"text", tokenizer.decode(ids)}, {"streamed", replace_invalid_utf8(streamed)}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: powerinfer-tokenize FILE.gguf < lines of JSON\n";
    return static_cast<int>(ErrorKind::kUsage);
  }
  try {
    const auto tokenizer = Tokenizer::load(GgufFile::open(argv[1]));
    for (std::string line; std::getline(std::cin, line);) {
      std::cout << answer(*tokenizer, json::parse(line)).dump() << '\n';
    }
  } catch (const Error& error) {
    std::cerr << "error: " << error.what() << '\n';
    return error.exit_status();
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return static_cast<int>(ErrorKind::kFailed);
  }
}
