// Chat messages to the text that a model was trained on.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gguf.h"
#include "jinja.h"
#include "tokenizer.h"

namespace powerinfer {

struct Message {
  std::string role;
  std::string content;
};

class ChatTemplate {
 public:
  // The file's tokenizer.chat_template; without one, Vicuna's or Bamboo's where the model's name says that it is one.
  // Never throws for a template that is missing or not known: render does.
  static ChatTemplate from_file(const GgufFile& file, const Tokenizer& tokenizer);
  // A Jinja template.
  static ChatTemplate from_source(std::string_view source, const Tokenizer& tokenizer);
  // "chatml", "llama2", "llama3", "vicuna" or "bamboo".
  static bool is_name(std::string_view name);
  static ChatTemplate from_name(std::string_view name, const Tokenizer& tokenizer);

  // Throws Error(kRequest) where the template refuses the messages, where there is none or where it cannot be rendered here.
  std::string render(const std::vector<Message>& messages, bool add_generation_prompt) const;
  // The text lacks the beginning-of-text token that the tokenizer would add.
  bool adds_special_tokens() const { return adds_special_tokens_; }

 private:
  explicit ChatTemplate(const Tokenizer& tokenizer);

  std::shared_ptr<const jinja::Template> template_;
  std::string missing_;  // why there is no template
  std::string bos_, eos_;
  bool adds_special_tokens_ = false;
};

}  // namespace powerinfer
