#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>

#include "openai.h"
#include "text_stream.h"

namespace powerinfer {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 32;
constexpr size_t kMaxStops = 16, kMaxStopBytes = 1024;
constexpr int kMaxLogprobs = 20;

ApiError bad(const std::string& param, const std::string& message) { return ApiError(400, message, param); }

// Depth is checked on the text: the parser and its values recurse.
void check_depth(std::string_view body) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < body.size(); ++i) {
    const char c = body[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > kMaxDepth) throw ApiError(400, "the request is nested more than " + std::to_string(kMaxDepth) + " deep");
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
}

json parse_object(std::string_view body) {
  check_depth(body);
  json value;
  try {
    value = json::parse(body);
  } catch (const json::exception& error) {
    std::string reason = error.what();  // "[json.exception...] parse error at line 1, column 2: ... - reason"
    if (const size_t end = reason.find("] "); end != std::string::npos) reason.erase(0, end + 2);
    throw ApiError(400, "the request body is not valid JSON: " + valid_utf8(reason).substr(0, 300));
  }
  if (!value.is_object())
    throw ApiError(400, "the request body must be a JSON object, not " + std::string(value.type_name()));
  return value;
}

std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

// The fields of a request. Each one that is asked for is known; `finish` refuses the others.
class Fields {
 public:
  explicit Fields(const json& object) : object_(object) {}

  // nullptr where it is missing or null
  const json* find(const std::string& name) {
    known_.insert(name);
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  bool boolean(const std::string& name, bool fallback) {
    const json* value = find(name);
    if (!value) return fallback;
    if (!value->is_boolean()) throw bad(name, name + " must be true or false, got " + shown(*value));
    return value->get<bool>();
  }

  double number(const std::string& name, double fallback, double low, double high) {
    const json* value = find(name);
    if (!value) return fallback;
    if (!value->is_number()) throw bad(name, name + " must be a number, got " + shown(*value));
    const double x = value->get<double>();
    if (!(x >= low && x <= high)) throw bad(name, name + " must be " + range(low, high) + ", got " + shown(*value));
    return x;
  }

  int64_t integer(const std::string& name, int64_t fallback, int64_t low, int64_t high) {
    const json* value = find(name);
    return value ? integer(name, *value, low, high) : fallback;
  }

  static int64_t integer(const std::string& name, const json& value, int64_t low, int64_t high) {
    bool fits = false;
    int64_t x = 0;
    if (value.is_number_unsigned()) {
      const uint64_t u = value.get<uint64_t>();
      fits = u <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
      x = static_cast<int64_t>(u);
    } else if (value.is_number_integer()) {
      fits = true;
      x = value.get<int64_t>();
    } else if (value.is_number_float()) {
      const double d = value.get<double>();  // 5.0 is an integer to many clients
      fits = std::abs(d) < 9e15 && d == std::floor(d);
      if (fits) x = static_cast<int64_t>(d);
      if (std::abs(d) < 9e15 && !fits) throw bad(name, name + " must be an integer, got " + shown(value));
    } else {
      throw bad(name, name + " must be an integer, got " + shown(value));
    }
    if (!fits || x < low || x > high) {
      const double top = high == std::numeric_limits<int64_t>::max() ? INFINITY : static_cast<double>(high);
      throw bad(name, name + " must be " + range(static_cast<double>(low), top) + ", got " + shown(value));
    }
    return x;
  }

  std::string string(const std::string& name, const std::string& fallback) {
    const json* value = find(name);
    if (!value) return fallback;
    if (!value->is_string()) throw bad(name, name + " must be a string, got " + shown(*value));
    return value->get<std::string>();
  }

  // A field that may be there only with a value that asks for nothing.
  template <typename... Values>
  void refuse(const std::string& name, const Values&... harmless) {
    const json* value = find(name);
    if (!value || ((*value == json(harmless)) || ...)) return;
    throw bad(name, name + " is not supported" + (value->is_structured() ? "" : ", got " + shown(*value)));
  }
  void refuse_unless_empty(const std::string& name) {
    const json* value = find(name);
    if (value && !(value->is_structured() && value->empty())) throw bad(name, name + " is not supported");
  }

  // Refuses fields that nobody asked for: a misspelt one would silently change the answer.
  void finish() const {
    static const std::set<std::string> kIgnored = {"user",
                                                   "metadata",
                                                   "store",
                                                   "service_tier",
                                                   "safety_identifier",
                                                   "prompt_cache_key",
                                                   "prompt_cache_retention",
                                                   "parallel_tool_calls",
                                                   "request_id",
                                                   "spaces_between_special_tokens"};
    for (const auto& item : object_.items()) {
      if (known_.contains(item.key()) || kIgnored.contains(item.key())) continue;
      const std::string name = valid_utf8(item.key()).substr(0, 60);
      throw bad(name, "unknown field: " + valid_utf8(name));
    }
  }

 private:
  static std::string range(double low, double high) {
    const auto plain = [](double x) {
      char text[32];
      std::snprintf(text, sizeof text, "%.10g", x);
      return std::string(text);
    };
    if (std::isinf(high)) return plain(low) + " or more";
    return "between " + plain(low) + " and " + plain(high);
  }

  const json& object_;
  std::set<std::string> known_;
};

int32_t token_id(const std::string& name, const json& value, const ApiLimits& limits) {
  if (!value.is_number_integer()) throw bad(name, name + ": token ids must be integers, got " + shown(value));
  const bool fits = value.is_number_unsigned() ? value.get<uint64_t>() < static_cast<uint64_t>(limits.vocabulary) : false;
  if (!fits) {
    throw bad(name,
              name + ": token id " + shown(value) + " is outside the vocabulary of " + std::to_string(limits.vocabulary));
  }
  return value.get<int32_t>();
}

std::vector<int32_t> token_ids(const std::string& name, const json& array, const ApiLimits& limits) {
  std::vector<int32_t> ids;
  ids.reserve(array.size());
  for (const json& value : array) ids.push_back(token_id(name, value, limits));
  return ids;
}

Prompt one_prompt(const json& value, const ApiLimits& limits) {
  Prompt prompt;
  if (value.is_string()) {
    prompt.text = value.get<std::string>();
  } else if (value.is_array() && !value.empty()) {
    prompt.is_text = false;
    prompt.tokens = token_ids("prompt", value, limits);
  } else {
    throw bad("prompt", "a prompt must be a string or a list of token ids that is not empty");
  }
  return prompt;
}

std::vector<Prompt> prompts(Fields& fields, const ApiLimits& limits) {
  const json* value = fields.find("prompt");
  if (!value) throw bad("prompt", "prompt is missing");
  std::vector<Prompt> result;
  if (value->is_array() && !value->empty() && (value->front().is_string() || value->front().is_array())) {
    if (value->size() > static_cast<size_t>(limits.max_choices)) {
      throw bad("prompt", "at most " + std::to_string(limits.max_choices) + " prompts in a request, got " +
                              std::to_string(value->size()));
    }
    for (const json& item : *value) {
      if (item.type() != value->front().type()) throw bad("prompt", "prompt mixes strings and lists of token ids");
      result.push_back(one_prompt(item, limits));
    }
  } else {
    result.push_back(one_prompt(*value, limits));
  }
  return result;
}

std::string content_text(const json& content, const std::string& where) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) throw bad(where, where + " must be a string or a list of text parts");
  std::string text;
  bool first = true;
  for (const json& part : content) {
    if (!part.is_object() || !part.contains("type") || !part["type"].is_string()) {
      throw bad(where, where + ": each part must be an object with a type");
    }
    if (part["type"] != "text") throw bad(where, where + ": only text parts are supported, got type " + shown(part["type"]));
    if (!part.contains("text") || !part["text"].is_string()) throw bad(where, where + ": a text part must have a text");
    if (!first) text += '\n';
    first = false;
    text += part["text"].get<std::string>();
  }
  return text;
}

std::vector<Message> messages(const json& value) {
  if (!value.is_array() || value.empty()) throw bad("messages", "messages must be a list that is not empty");
  std::vector<Message> result;
  for (size_t i = 0; i < value.size(); ++i) {
    const std::string where = "messages[" + std::to_string(i) + "]";
    if (!value[i].is_object()) throw bad(where, where + " must be an object");
    const json& item = value[i];
    if (!item.contains("role") || !item["role"].is_string()) throw bad(where + ".role", where + ".role must be a string");
    static const std::set<std::string> kRoles = {"system", "developer", "user", "assistant"};
    Message message;
    message.role = item["role"].get<std::string>();
    if (!kRoles.contains(message.role)) {
      throw bad(where + ".role", where + ".role must be system, developer, user or assistant, got " + shown(item["role"]));
    }
    for (const auto& [key, field] : item.items()) {
      if (key == "role" || key == "content" || key == "name" || field.is_null()) continue;
      if ((key == "tool_calls" || key == "annotations") && field.is_array() && field.empty()) continue;
      throw bad(where, where + ": " + valid_utf8(valid_utf8(key).substr(0, 60)) + " is not supported");
    }
    if (!item.contains("content") || item["content"].is_null()) throw bad(where + ".content", where + ".content is missing");
    message.content = content_text(item["content"], where + ".content");
    result.push_back(std::move(message));
  }
  return result;
}

std::vector<std::string> stops(Fields& fields) {
  const json* value = fields.find("stop");
  std::vector<std::string> result;
  if (!value) return result;
  const auto add = [&](const json& item) {
    if (!item.is_string()) throw bad("stop", "stop must be a string or a list of strings, got " + shown(item));
    std::string text = item.get<std::string>();
    if (text.empty()) throw bad("stop", "a stop string must not be empty");
    if (text.size() > kMaxStopBytes) {
      throw bad("stop",
                "a stop string may have " + std::to_string(kMaxStopBytes) + " bytes, got " + std::to_string(text.size()));
    }
    result.push_back(std::move(text));
  };
  if (value->is_array()) {
    if (value->size() > kMaxStops) {
      throw bad("stop", "at most " + std::to_string(kMaxStops) + " stop strings, got " + std::to_string(value->size()));
    }
    for (const json& item : *value) add(item);
  } else {
    add(*value);
  }
  return result;
}

void check_model(Fields& fields, const ApiLimits& limits) {
  const std::string model = fields.string("model", limits.model);
  if (!limits.model.empty() && model != limits.model) {
    throw ApiError(404, "the model " + shown(model) + " does not exist: this server has " + shown(limits.model), "model",
                   "model_not_found");
  }
}

// What completions and chat have in common.
void parse_common(Fields& fields, const ApiLimits& limits, ApiRequest& request) {
  check_model(fields, limits);
  Generation& generation = request.generation;
  SamplingParams& sampling = generation.sampling;
  const int64_t most_int = std::numeric_limits<int32_t>::max();

  sampling.temperature = static_cast<float>(fields.number("temperature", 1, 0, 100));
  sampling.top_p = static_cast<float>(fields.number("top_p", 1, 0, 1));
  sampling.top_k = static_cast<int>(std::max<int64_t>(fields.integer("top_k", 0, -1, most_int), 0));  // -1: all as well
  sampling.min_p = static_cast<float>(fields.number("min_p", 0, 0, 1));
  sampling.presence_penalty = static_cast<float>(fields.number("presence_penalty", 0, -2, 2));
  sampling.frequency_penalty = static_cast<float>(fields.number("frequency_penalty", 0, -2, 2));
  sampling.repetition_penalty = static_cast<float>(fields.number("repetition_penalty", 1, 0.01, 100));
  if (fields.find("seed")) {
    sampling.seed = static_cast<uint64_t>(
        fields.integer("seed", 0, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()));
  }
  if (const json* bias = fields.find("logit_bias")) {
    if (!bias->is_object()) throw bad("logit_bias", "logit_bias must be an object of token ids and numbers");
    for (const auto& [key, value] : bias->items()) {
      const bool digits = !key.empty() && key.size() < 10 && key.find_first_not_of("0123456789") == std::string::npos;
      const int64_t token = digits ? std::stoll(key) : -1;
      if (token < 0 || token >= limits.vocabulary) {
        throw bad("logit_bias",
                  "logit_bias: " + shown(key.substr(0, 40)) + " is no token id below " + std::to_string(limits.vocabulary));
      }
      if (!value.is_number() || !(std::abs(value.get<double>()) <= 100)) {
        throw bad("logit_bias", "logit_bias values must be numbers between -100 and 100, got " + shown(value));
      }
      sampling.logit_bias[static_cast<int32_t>(token)] = value.get<float>();
    }
  }
  request.stop = stops(fields);
  if (const json* ids = fields.find("stop_token_ids")) {
    if (!ids->is_array()) throw bad("stop_token_ids", "stop_token_ids must be a list of token ids");
    generation.stop_tokens = token_ids("stop_token_ids", *ids, limits);
  }
  generation.ignore_eos = fields.boolean("ignore_eos", false);
  request.skip_special_tokens = fields.boolean("skip_special_tokens", true);
  request.return_token_ids = fields.boolean("return_token_ids", false);
  request.tokens_as_ids = fields.boolean("return_tokens_as_token_ids", false);
  request.n = static_cast<int>(fields.integer("n", 1, 1, limits.max_choices));
  request.stream = fields.boolean("stream", false);
  if (const json* options = fields.find("stream_options")) {
    if (!options->is_object()) throw bad("stream_options", "stream_options must be an object");
    if (!request.stream) throw bad("stream_options", "stream_options is only allowed when stream is true");
    Fields inner(*options);
    request.include_usage = inner.boolean("include_usage", false);
    inner.refuse("include_obfuscation", false);
    inner.refuse("continuous_usage_stats", false);
    inner.finish();
  }

  fields.refuse("min_tokens", 0);
  fields.refuse("use_beam_search", false);
  fields.refuse("length_penalty", 1);
  fields.refuse("include_stop_str_in_output", false);
  fields.refuse("priority", 0);
  fields.refuse("prompt_logprobs");
  fields.refuse("truncate_prompt_tokens");
  fields.refuse_unless_empty("bad_words");
  fields.refuse_unless_empty("logits_processors");
  if (const json* format = fields.find("response_format")) {
    if (!format->is_object() || !format->contains("type") || (*format)["type"] != "text") {
      throw bad("response_format", "response_format is not supported other than {\"type\": \"text\"}");
    }
  }
}

void check_choices(const ApiRequest& request, const ApiLimits& limits) {
  const int64_t choices =
      static_cast<int64_t>(request.n) * static_cast<int64_t>(std::max<size_t>(request.prompts.size(), 1));
  if (choices > limits.max_choices) {
    throw bad("n", "n times the number of prompts must be at most " + std::to_string(limits.max_choices) + ", got " +
                       std::to_string(choices));
  }
}

}  // namespace

ApiRequest parse_completion(std::string_view body, const ApiLimits& limits) {
  const json object = parse_object(body);
  Fields fields(object);
  ApiRequest request;
  parse_common(fields, limits, request);
  request.prompts = prompts(fields, limits);
  request.add_special_tokens = fields.boolean("add_special_tokens", true);
  request.echo = fields.boolean("echo", false);
  request.generation.sampling.logprobs = static_cast<int>(fields.integer("logprobs", -1, 0, kMaxLogprobs));
  if (request.echo && request.return_token_ids) {
    throw bad("return_token_ids", "return_token_ids is not supported together with echo");
  }
  if (request.echo) request.generation.prompt_logprobs = request.generation.sampling.logprobs;
  request.has_max_tokens = fields.find("max_tokens") != nullptr;
  request.generation.max_tokens = static_cast<int>(fields.integer("max_tokens", 16, 0, std::numeric_limits<int32_t>::max()));
  if (const json* best_of = fields.find("best_of"); best_of && *best_of != json(request.n)) {
    throw bad("best_of", "best_of is not supported");
  }
  fields.refuse("suffix", "");
  fields.finish();
  check_choices(request, limits);
  return request;
}

ApiRequest parse_chat(std::string_view body, const ApiLimits& limits) {
  const json object = parse_object(body);
  Fields fields(object);
  ApiRequest request;
  request.chat = true;
  parse_common(fields, limits, request);
  const json* list = fields.find("messages");
  if (!list) throw bad("messages", "messages is missing");
  request.messages = messages(*list);
  request.add_generation_prompt = fields.boolean("add_generation_prompt", true);
  request.add_special_tokens = fields.boolean("add_special_tokens", false);

  const int64_t most = std::numeric_limits<int32_t>::max();
  const int64_t max_tokens = fields.integer("max_tokens", -1, 1, most);
  const int64_t max_completion_tokens = fields.integer("max_completion_tokens", -1, 1, most);
  if (max_tokens >= 0 && max_completion_tokens >= 0 && max_tokens != max_completion_tokens) {
    throw bad("max_tokens", "max_tokens and max_completion_tokens differ: give one of them");
  }
  request.has_max_tokens = max_tokens >= 0 || max_completion_tokens >= 0;
  request.generation.max_tokens =
      request.has_max_tokens ? static_cast<int>(std::max(max_tokens, max_completion_tokens)) : limits.context;

  const bool logprobs = fields.boolean("logprobs", false);
  const int top = static_cast<int>(fields.integer("top_logprobs", -1, 0, kMaxLogprobs));
  if (top >= 0 && !logprobs) throw bad("top_logprobs", "top_logprobs needs logprobs to be true");
  if (logprobs) request.generation.sampling.logprobs = std::max(top, 0);

  fields.refuse("echo", false);
  fields.refuse("continue_final_message", false);
  fields.refuse("chat_template");
  fields.refuse_unless_empty("chat_template_kwargs");
  fields.refuse_unless_empty("documents");
  fields.refuse_unless_empty("tools");
  fields.refuse_unless_empty("functions");
  fields.refuse("tool_choice", "none", "auto");
  fields.refuse("function_call", "none", "auto");
  fields.refuse("modalities", json::array({"text"}));
  fields.refuse("audio");
  fields.refuse("prediction");
  fields.refuse("reasoning_effort");
  fields.refuse("verbosity");
  fields.refuse("web_search_options");
  fields.finish();
  check_choices(request, limits);
  return request;
}

ApiRequest parse_tokenize(std::string_view body, const ApiLimits& limits) {
  const json object = parse_object(body);
  Fields fields(object);
  ApiRequest request;
  check_model(fields, limits);
  if (const json* list = fields.find("messages")) {
    if (fields.find("prompt")) throw bad("prompt", "give prompt or messages, not both");
    request.chat = true;
    request.messages = messages(*list);
    request.add_generation_prompt = fields.boolean("add_generation_prompt", true);
    request.add_special_tokens = fields.boolean("add_special_tokens", false);
  } else {
    const json* prompt = fields.find("prompt");
    if (!prompt || !prompt->is_string()) throw bad("prompt", "prompt must be a string");
    request.prompts = {one_prompt(*prompt, limits)};
    request.add_special_tokens = fields.boolean("add_special_tokens", true);
  }
  fields.refuse("return_token_strs", false);
  fields.finish();
  return request;
}

std::vector<int32_t> parse_detokenize(std::string_view body, const ApiLimits& limits) {
  const json object = parse_object(body);
  Fields fields(object);
  check_model(fields, limits);
  const json* tokens = fields.find("tokens");
  if (!tokens || !tokens->is_array()) throw bad("tokens", "tokens must be a list of token ids");
  fields.finish();
  return token_ids("tokens", *tokens, limits);
}

uint64_t choice_seed(uint64_t seed, int choice) { return seed ^ (static_cast<uint64_t>(choice) * 0xd1342543de82ef95ULL); }

}  // namespace powerinfer
