#include "errors.h"
#include "vocabulary.h"

namespace powerinfer {

std::unique_ptr<Tokenizer> load_spm_tokenizer(const GgufFile& file) {
  throw model_error(file.name() + " has a SentencePiece vocabulary, which cannot be used yet");
}

}  // namespace powerinfer
