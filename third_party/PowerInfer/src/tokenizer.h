// Text to token ids and back, from the vocabulary that a GGUF file carries.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gguf.h"

namespace powerinfer {

class Tokenizer {
 public:
  // The tokenizer that `tokenizer.ggml.model` names: "llama" (SentencePiece's BPE over scores) or "gpt2" (byte-level BPE,
  // split as `tokenizer.ggml.pre` says). Throws Error(kModel) for another one or for a malformed vocabulary.
  static std::unique_ptr<Tokenizer> load(const GgufFile& file);
  virtual ~Tokenizer() = default;

  // Ids of UTF-8 text; bytes that are no UTF-8 are taken one by one and never refused. What the vocabulary has no token for
  // becomes what the reference makes of it: SentencePiece's unknown token, and nothing in byte-level BPE (some vocabularies
  // lack some control characters' bytes). Throws Error(kRequest) for a text of more than 512 MB.
  // add_special: put the beginning-of-text token in front where the model wants one (and the end token after it likewise).
  // parse_special: take the text of control tokens ("<|im_start|>") as those tokens, not as text.
  virtual std::vector<int32_t> encode(std::string_view text, bool add_special, bool parse_special) const = 0;

  // The bytes that a token adds to a text, which may be a part of a UTF-8 character; control tokens add none unless
  // `with_special`. SentencePiece's leading space is not removed here: see decode.
  virtual std::string token_bytes(int32_t token, bool with_special = false) const = 0;

  // Text of whole sequences, with the space removed that SentencePiece put in front; always UTF-8: a character that is not
  // whole becomes U+FFFD. Ids that are not in the vocabulary add nothing.
  virtual std::string decode(const std::vector<int32_t>& tokens, bool with_special = false) const = 0;

  virtual int32_t vocabulary_size() const = 0;
  virtual int32_t bos() const = 0;  // -1 where the model has none
  virtual int32_t eos() const = 0;
  // Ends a generated turn: eos, eot and what else the file names (<|im_end|>, <|eot_id|>, </s>, ...).
  virtual bool ends_generation(int32_t token) const = 0;
  // Removed in front of a text decoded token by token, once (SentencePiece's added space).
  virtual bool leading_space() const = 0;
};

}  // namespace powerinfer
