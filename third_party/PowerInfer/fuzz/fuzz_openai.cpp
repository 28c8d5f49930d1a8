// Request bodies: the first byte says which endpoint's, or that the rest is a chat template.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "chat.h"
#include "errors.h"
#include "openai.h"
#include "text_stream.h"
#include "toy_model.h"

using namespace powerinfer;

namespace {

const ToyTokenizer kTokenizer;

void whole_answer(const ApiRequest& request) {
  ResponseWriter writer(request, kTokenizer, "toy", "id", 0);
  std::vector<Piece> pieces(static_cast<size_t>(request.choices()));
  for (int i = 0; i < request.choices(); ++i) {
    TextStream stream(request.stop);
    Piece& piece = pieces[static_cast<size_t>(i)];
    piece.choice = i;
    for (const Prompt& prompt : request.prompts) {
      piece.text += stream.add(prompt.text);
      for (const int32_t id : prompt.tokens) piece.text += stream.add(kTokenizer.token_bytes(id, true));
    }
    piece.text += stream.finish();
    if (!is_valid_utf8(piece.text)) std::abort();
  }
  writer.whole(pieces, {});
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  ApiLimits limits;
  limits.vocabulary = kTokenizer.vocabulary_size();
  limits.context = 100;
  limits.max_choices = 8;
  const std::string_view body(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    switch (data[0] % 5) {
      case 0:
        whole_answer(parse_completion(body, limits));
        break;
      case 1: {
        const ApiRequest request = parse_chat(body, limits);
        whole_answer(request);
        ChatTemplate::from_name("chatml", kTokenizer).render(request.messages, true);
        ChatTemplate::from_name("llama2", kTokenizer).render(request.messages, true);
        break;
      }
      case 2:
        parse_tokenize(body, limits);
        break;
      case 3:
        parse_detokenize(body, limits);
        break;
      case 4:
        ChatTemplate::from_source(body, kTokenizer).render({{"user", "a"}, {"assistant", "b"}}, true);
        break;
    }
  } catch (const ApiError& error) {
    if (error.status() < 400 || error.status() > 499 || error.body().empty()) std::abort();
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kRequest) std::abort();
  }
  return 0;
}
