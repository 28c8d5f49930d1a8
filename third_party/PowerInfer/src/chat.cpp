#include "chat.h"

#include <algorithm>
#include <cctype>
#include <map>

#include "errors.h"
#include "text_stream.h"

namespace powerinfer {
namespace {

// The families' formats, for files without a template.
// Vicuna 1.1: as FastChat joins its turns. Bamboo: its authors name Vicuna's and ChatML (Tiiny-AI/PowerInfer issue 164).
const std::map<std::string, std::string, std::less<>>& named_templates() {
  static const std::string kVicuna =
      "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set turns = messages[1:] -%}"
      "{%- else -%}{%- set system = \"A chat between a curious user and an artificial intelligence assistant. The assistant "
      "gives helpful, detailed, and polite answers to the user's questions.\" -%}{%- set turns = messages -%}{%- endif -%}"
      "{{ bos_token + system + ' ' }}"
      "{%- for turn in turns -%}"
      "{%- if turn.role == 'user' -%}{{ 'USER: ' + turn.content + ' ' }}"
      "{%- elif turn.role == 'assistant' -%}{{ 'ASSISTANT: ' + turn.content + eos_token }}"
      "{%- else -%}{{ raise_exception('only user and assistant messages may follow the first one') }}{%- endif -%}"
      "{%- endfor -%}"
      "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}";
  static const std::map<std::string, std::string, std::less<>> kTemplates = {
      {"chatml",
       "{%- for turn in messages -%}{{ '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' }}{%- endfor -%}"
       "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"},
      {"llama2",
       "{%- if messages[0].role == 'system' -%}{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}"
       "{%- set turns = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
       "{%- for turn in turns -%}"
       "{%- if turn.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
       "{{ raise_exception('user and assistant messages must alternate, a user message first') }}{%- endif -%}"
       "{%- if turn.role == 'user' -%}"
       "{{ bos_token + '[INST] ' + ((system if loop.first else '') + turn.content).strip() + ' [/INST]' }}"
       "{%- else -%}{{ ' ' + turn.content.strip() + ' ' + eos_token }}{%- endif -%}{%- endfor -%}"},
      {"llama3",
       "{{ bos_token }}{%- for turn in messages -%}"
       "{{ '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' + turn.content.strip() + '<|eot_id|>' }}{%- endfor "
       "-%}"
       "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"},
      {"vicuna", kVicuna},
      {"bamboo", kVicuna}};
  return kTemplates;
}

std::string lower(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return out;
}

}  // namespace

ChatTemplate::ChatTemplate(const Tokenizer& tokenizer) {
  if (tokenizer.bos() >= 0) bos_ = tokenizer.token_bytes(tokenizer.bos(), true);
  if (tokenizer.eos() >= 0) eos_ = tokenizer.token_bytes(tokenizer.eos(), true);
}

ChatTemplate ChatTemplate::from_file(const GgufFile& file, const Tokenizer& tokenizer) {
  if (const std::string_view source = file.get_string("tokenizer.chat_template", ""); !source.empty()) {
    return from_source(source, tokenizer);
  }
  const std::string name = lower(file.get_string("general.name", file.name()));
  if (name.find("vicuna") != std::string::npos) return from_name("vicuna", tokenizer);
  const bool bamboo = name.find("bamboo") != std::string::npos || file.get_string("general.architecture", "") == "bamboo";
  if (bamboo && name.find("dpo") != std::string::npos) return from_name("bamboo", tokenizer);
  ChatTemplate result(tokenizer);
  result.missing_ =
      "the model file has no chat template: start the server with --chat-template, or send the prompt to /v1/completions";
  return result;
}

ChatTemplate ChatTemplate::from_source(std::string_view source, const Tokenizer& tokenizer) {
  ChatTemplate result(tokenizer);
  try {
    result.template_ = std::make_shared<const jinja::Template>(jinja::Template::parse(source));
  } catch (const jinja::Unsupported& error) {
    result.missing_ = error.what();
    result.missing_ = "the model's chat template is not rendered here (it uses " + valid_utf8(result.missing_) +
                      "): render it elsewhere and send the text or its tokens to /v1/completions, as vllm-powerquant's "
                      "SparseEngine.chat does";
  }
  return result;
}

bool ChatTemplate::is_name(std::string_view name) { return named_templates().contains(name); }

ChatTemplate ChatTemplate::from_name(std::string_view name, const Tokenizer& tokenizer) {
  ChatTemplate result = from_source(named_templates().find(name)->second, tokenizer);
  result.adds_special_tokens_ = name == "chatml";
  return result;
}

std::string ChatTemplate::render(const std::vector<Message>& messages, bool add_generation_prompt) const {
  using jinja::Value;
  if (!template_) throw request_error(missing_);
  jinja::Items list;
  for (const Message& message : messages) {
    list.push_back(Value::dict({{"role", Value::string(message.role)}, {"content", Value::string(message.content)}}));
  }
  const jinja::Dict variables = {{"messages", Value::list(std::move(list))},
                                 {"add_generation_prompt", Value::boolean(add_generation_prompt)},
                                 {"bos_token", Value::string(bos_)},
                                 {"eos_token", Value::string(eos_)},
                                 {"tools", Value::none()},
                                 {"documents", Value::none()}};
  try {
    return template_->render(variables);
  } catch (const jinja::Raised& error) {
    throw request_error("the model's chat template refuses these messages: " + valid_utf8(error.what()));
  } catch (const jinja::Unsupported& error) {
    throw request_error("the model's chat template is not rendered here for these messages (it uses " +
                        valid_utf8(error.what()) +
                        "): render it elsewhere and send the text or its tokens to /v1/completions, as vllm-powerquant's "
                        "SparseEngine.chat does");
  }
}

}  // namespace powerinfer
