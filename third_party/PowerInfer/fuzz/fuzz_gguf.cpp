// A model file: the container, and the tokenizer where the container opens.
#include <cstddef>
#include <cstdint>

#include "chat.h"
#include "errors.h"
#include "gguf.h"
#include "tokenizer.h"

using namespace powerinfer;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const GgufFile file = GgufFile::parse({data, size});
    const auto tokenizer = Tokenizer::load(file);
    const auto tokens = tokenizer->encode("Hello, w\xc3\xb6rld 123\n\xff", true, true);
    tokenizer->decode(tokens);
    ChatTemplate::from_file(file, *tokenizer).render({{"user", "Hello"}}, true);
  } catch (const Error&) {
  }
  return 0;
}
