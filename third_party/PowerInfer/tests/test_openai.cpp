#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include "openai.h"
#include "text_stream.h"
#include "toy_model.h"

using namespace powerinfer;
using nlohmann::json;

namespace {

ApiLimits limits() {
  ApiLimits result;
  result.model = "toy";
  result.vocabulary = 260;
  result.context = 100;
  result.max_choices = 8;
  return result;
}

ApiRequest completion(json body) {
  if (!body.contains("prompt")) body["prompt"] = "a";
  return parse_completion(body.dump(), limits());
}
ApiRequest chat(json body) {
  if (!body.contains("messages")) body["messages"] = json::array({{{"role", "user"}, {"content", "a"}}});
  return parse_chat(body.dump(), limits());
}

// What a body is refused with.
json refusal(const std::function<void()>& parse, int status = 400) {
  try {
    parse();
  } catch (const ApiError& error) {
    CHECK(error.status() == status);
    const json body = json::parse(error.body());
    CHECK(body["error"]["message"].get<std::string>().size() > 5);
    CHECK(body["error"].contains("type"));
    CHECK(body["error"].contains("code"));
    return body["error"]["param"];
  }
  FAIL("accepted");
  return nullptr;
}

}  // namespace

TEST_CASE("a completion with every field") {
  const ApiRequest r = completion({{"model", "toy"},
                                   {"prompt", {"one", "two"}},
                                   {"max_tokens", 7},
                                   {"n", 3},
                                   {"echo", true},
                                   {"logprobs", 2},
                                   {"stream", true},
                                   {"stream_options", {{"include_usage", true}}},
                                   {"stop", {"x", "yz"}},
                                   {"stop_token_ids", {5, 6}},
                                   {"ignore_eos", true},
                                   {"seed", -1},
                                   {"temperature", 0.5},
                                   {"top_k", 4},
                                   {"top_p", 0.9},
                                   {"min_p", 0.1},
                                   {"presence_penalty", 1},
                                   {"frequency_penalty", -0.5},
                                   {"repetition_penalty", 1.1},
                                   {"logit_bias", {{"7", -100}, {"8", 2.5}}},
                                   {"best_of", 3},
                                   {"user", "me"},
                                   {"suffix", nullptr}});
  CHECK(!r.chat);
  REQUIRE(r.prompts.size() == 2);
  CHECK(r.prompts[1].text == "two");
  CHECK(r.choices() == 6);
  CHECK(r.echo);
  CHECK(r.stream);
  CHECK(r.include_usage);
  CHECK(r.stop == std::vector<std::string>{"x", "yz"});
  CHECK(r.generation.stop_tokens == std::vector<int32_t>{5, 6});
  CHECK(r.generation.ignore_eos);
  CHECK(r.generation.max_tokens == 7);
  CHECK(r.generation.prompt_logprobs == 2);
  const SamplingParams& s = r.generation.sampling;
  CHECK(s.seed == static_cast<uint64_t>(-1));
  CHECK(s.temperature == 0.5f);
  CHECK(s.top_k == 4);
  CHECK(s.top_p == 0.9f);
  CHECK(s.min_p == 0.1f);
  CHECK(s.presence_penalty == 1.0f);
  CHECK(s.frequency_penalty == -0.5f);
  CHECK(s.repetition_penalty == 1.1f);
  CHECK(s.logit_bias.at(7) == -100.0f);
  CHECK(s.logprobs == 2);
}

TEST_CASE("prompts: text, token ids, lists of both; defaults") {
  CHECK(completion({}).generation.max_tokens == 16);
  CHECK(completion({}).generation.sampling.temperature == 1.0f);
  CHECK(completion({{"max_tokens", 5.0}}).generation.max_tokens == 5);
  CHECK(completion({{"top_k", -1}}).generation.sampling.top_k == 0);
  CHECK(completion({{"prompt", {1, 2, 259}}}).prompts.at(0).tokens == std::vector<int32_t>{1, 2, 259});
  CHECK(completion({{"prompt", json::array({json::array({1}), json::array({2, 3})})}}).prompts.at(1).tokens ==
        std::vector<int32_t>{2, 3});
  CHECK(completion({{"stop", "x"}}).stop.size() == 1);
  CHECK(completion({{"stop", nullptr}}).stop.empty());
  const ApiRequest c = chat({});
  CHECK(c.generation.max_tokens == 100);
  CHECK(!c.has_max_tokens);
  CHECK(!c.add_special_tokens);
}

TEST_CASE("chat: contents, limits and logprobs") {
  const ApiRequest r = chat({{"messages",
                              {{{"role", "system"}, {"content", "s"}},
                               {{"role", "user"},
                                {"name", "x"},
                                {"content", {{{"type", "text"}, {"text", "a"}}, {{"type", "text"}, {"text", "b"}}}}},
                               {{"role", "assistant"}, {"content", ""}, {"tool_calls", json::array()}}}},
                             {"max_completion_tokens", 9},
                             {"logprobs", true},
                             {"top_logprobs", 3},
                             {"tools", json::array()},
                             {"tool_choice", "auto"},
                             {"response_format", {{"type", "text"}}}});
  REQUIRE(r.messages.size() == 3);
  CHECK(r.messages[1].content == "a\nb");
  CHECK(r.generation.max_tokens == 9);
  CHECK(r.generation.sampling.logprobs == 3);
  CHECK(chat({{"logprobs", true}}).generation.sampling.logprobs == 0);
}

TEST_CASE("bad values name their field") {
  const std::vector<std::pair<const char*, json>> bad = {{"temperature", -1},
                                                         {"temperature", "hot"},
                                                         {"temperature", true},
                                                         {"top_p", 1.1},
                                                         {"top_k", 1.5},
                                                         {"top_k", -2},
                                                         {"min_p", -0.1},
                                                         {"n", 0},
                                                         {"n", 9},
                                                         {"n", "two"},
                                                         {"max_tokens", -1},
                                                         {"max_tokens", 1e30},
                                                         {"max_tokens", 18446744073709551615ull},
                                                         {"presence_penalty", 3},
                                                         {"frequency_penalty", -3},
                                                         {"repetition_penalty", 0},
                                                         {"repetition_penalty", 1e-45},
                                                         {"repetition_penalty", 101},
                                                         {"seed", 1e300},
                                                         {"seed", "x"},
                                                         {"logit_bias", {{"300", 1}}},
                                                         {"logit_bias", {{"-1", 1}}},
                                                         {"logit_bias", {{"a", 1}}},
                                                         {"logit_bias", {{"1", 101}}},
                                                         {"logit_bias", {{"1", nullptr}}},
                                                         {"logit_bias", json::array({1})},
                                                         {"stop", 5},
                                                         {"stop", ""},
                                                         {"stop", json(17, "x")},
                                                         {"stop", json::array({"a", 1})},
                                                         {"stop", std::string(2000, 'x')},
                                                         {"stop_token_ids", {260}},
                                                         {"stop_token_ids", 3},
                                                         {"stream", 1},
                                                         {"stream_options", {{"include_usage", true}}},
                                                         {"ignore_eos", "yes"},
                                                         {"response_format", {{"type", "json_object"}}},
                                                         {"response_format", "text"},
                                                         {"min_tokens", 1},
                                                         {"use_beam_search", true},
                                                         {"temprature", 0.5},
                                                         {"guided_json", json::object()}};
  for (const auto& entry : bad) {
    const std::string field = entry.first;  // clang 14 captures no structured bindings
    const json& value = entry.second;
    CAPTURE(field);
    CAPTURE(value.dump());
    CHECK(refusal([&] { completion({{field, value}}); }) == field);
    CHECK(refusal([&] { chat({{field, value}}); }) == field);
  }
  for (const auto& [name, body] : std::vector<std::pair<const char*, json>>{{"prompt", json::array()},
                                                                            {"prompt", 5},
                                                                            {"prompt", {"a", 5}},
                                                                            {"prompt", {1, "a"}},
                                                                            {"prompt", {1.5}},
                                                                            {"prompt", {260}},
                                                                            {"prompt", {-1}},
                                                                            {"prompt", json::array({json::array()})},
                                                                            {"prompt", json(9, "a")},
                                                                            {"logprobs", 21},
                                                                            {"logprobs", true},
                                                                            {"best_of", 2},
                                                                            {"suffix", "x"},
                                                                            {"messages", json::array()},
                                                                            {"tools", json::array()}}) {
    const std::string field = name;
    const json& value = body;
    CAPTURE(field);
    CAPTURE(value.dump());
    CHECK(refusal([&] { completion({{field, value}}); }) == field);
  }
  for (const auto& [name, body] : std::vector<std::pair<const char*, json>>{{"messages", json::array()},
                                                                            {"messages", "hi"},
                                                                            {"max_tokens", 0},
                                                                            {"tools", json::array({json::object()})},
                                                                            {"tool_choice", "required"},
                                                                            {"top_logprobs", 2},
                                                                            {"logprobs", 2},
                                                                            {"modalities", {"audio"}},
                                                                            {"reasoning_effort", "low"},
                                                                            {"prompt", "x"}}) {
    const std::string field = name;
    const json& value = body;
    CAPTURE(field);
    CHECK(refusal([&] { chat({{field, value}}); }) == field);
  }
  CHECK(refusal([] { completion({{"prompt", {"a", "b", "c"}}, {"n", 3}}); }) == "n");
  CHECK(refusal([] { completion({{"model", "other"}}); }, 404) == "model");
  CHECK(refusal([] { parse_completion("{}", limits()); }) == "prompt");
  CHECK(refusal([] { parse_chat("{}", limits()); }) == "messages");
  CHECK(refusal([] { chat({{"max_tokens", 3}, {"max_completion_tokens", 4}}); }) == "max_tokens");
}

TEST_CASE("messages that are none") {
  for (const json& message : std::vector<json>{1,
                                               json::object(),
                                               {{"role", "user"}},
                                               {{"role", "user"}, {"content", nullptr}},
                                               {{"role", "user"}, {"content", 3}},
                                               {{"role", "tool"}, {"content", "x"}},
                                               {{"role", 1}, {"content", "x"}},
                                               {{"role", "user"}, {"content", {1}}},
                                               {{"role", "user"}, {"content", {{{"type", "image_url"}}}}},
                                               {{"role", "user"}, {"content", {{{"type", "text"}}}}},
                                               {{"role", "assistant"}, {"content", "x"}, {"tool_calls", {1}}},
                                               {{"role", "user"}, {"content", "x"}, {"weight", 0}}}) {
    CAPTURE(message.dump());
    CHECK(refusal([&] { chat({{"messages", json::array({message})}}); }).get<std::string>().starts_with("messages[0]"));
  }
}

TEST_CASE("bodies that are no JSON objects") {
  for (const std::string& body : std::vector<std::string>{
           "", " ", "null", "[]", "\"x\"", "{", "{]", "{\"prompt\":}", "{\"prompt\":\"\\ud800\"}", "{\"prompt\":\"\xff\"}",
           "{\"temperature\":1e999,\"prompt\":\"a\"}", "{\"temperature\":NaN}", std::string("{\"a\0\":1}", 8), "{} {}",
           std::string(100000, '['), "{\"prompt\":" + std::string(100000, '[') + std::string(100000, ']') + "}",
           "{\"prompt\":" + std::string(33, '[') + "1" + std::string(33, ']') + "}"}) {
    CAPTURE(body.substr(0, 50));
    refusal([&] { parse_completion(body, limits()); });
    refusal([&] { parse_chat(body, limits()); });
    refusal([&] { parse_tokenize(body, limits()); });
    refusal([&] { parse_detokenize(body, limits()); });
  }
  // brackets within strings do not count
  CHECK(completion({{"prompt", std::string(1000, '[') + "\"\\"}}).prompts[0].text.size() == 1002);
}

TEST_CASE("responses in OpenAI's shape") {
  const ToyTokenizer tokenizer;
  const ApiRequest request = completion({{"logprobs", 1}, {"n", 2}});
  ResponseWriter writer(request, tokenizer, "toy", "cmpl-1", 1234);
  Piece piece;
  piece.choice = 1;
  piece.text = "h\xc3\xa9";
  piece.finish = Finish::kLength;
  piece.tokens.resize(4);
  const int32_t ids[4] = {'h', 0xc3, 0xa9, ToyTokenizer::kEos};
  for (int i = 0; i < 4; ++i) {
    piece.tokens[i].id = ids[i];
    piece.tokens[i].logprob = -0.5f;
    piece.tokens[i].top = {{'x', -0.25f}};
  }
  const json body = json::parse(writer.whole({Piece{}, piece}, {3, 4}));
  CHECK(body["object"] == "text_completion");
  CHECK(body["id"] == "cmpl-1");
  CHECK(body["created"] == 1234);
  CHECK(body["usage"] == json{{"prompt_tokens", 3}, {"completion_tokens", 4}, {"total_tokens", 7}});
  const json& choice = body["choices"][1];
  CHECK(choice["index"] == 1);
  CHECK(choice["text"] == "h\u00e9");
  CHECK(choice["finish_reason"] == "length");
  CHECK(choice["logprobs"]["tokens"] == json::array({"h", "bytes:\\xc3", "bytes:\\xa9", "</s>"}));
  CHECK(choice["logprobs"]["token_logprobs"] == json::array({-0.5, -0.5, -0.5, -0.5}));
  CHECK(choice["logprobs"]["top_logprobs"][0] == json{{"x", -0.25}, {"h", -0.5}});
  CHECK(choice["logprobs"]["text_offset"] == json::array({0, 1, 2, 2}));

  const ApiRequest talk = chat({{"stream", true}, {"stream_options", {{"include_usage", true}}}, {"logprobs", true}});
  ResponseWriter chunks(talk, tokenizer, "toy", "chatcmpl-1", 1234);
  const json first = json::parse(chunks.first_chunk(0));
  CHECK(first["object"] == "chat.completion.chunk");
  CHECK(first["choices"][0]["delta"] == json{{"role", "assistant"}, {"content", ""}});
  CHECK(first["usage"].is_null());
  piece.choice = 0;
  piece.finish = Finish::kStop;
  const json last = json::parse(chunks.chunk(piece));
  CHECK(last["choices"][0]["delta"]["content"] == "h\u00e9");
  CHECK(last["choices"][0]["finish_reason"] == "stop");
  CHECK(last["choices"][0]["logprobs"]["content"][1]["bytes"] == json::array({0xc3}));
  CHECK(last["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["token"] == "x");
  const json usage = json::parse(chunks.usage_chunk({5, 6}));
  CHECK(usage["choices"].empty());
  CHECK(usage["usage"]["total_tokens"] == 11);
}

TEST_CASE("token ids beside texts, and in place of them in logprobs") {
  const ToyTokenizer tokenizer;
  const ApiRequest request = completion(
      {{"prompt", {"a", "b"}}, {"n", 2}, {"logprobs", 1}, {"return_token_ids", true}, {"return_tokens_as_token_ids", true}});
  Piece piece;
  piece.choice = 3;
  piece.tokens.resize(1);
  piece.tokens[0].id = 'h';
  piece.tokens[0].logprob = -0.5f;
  ResponseWriter writer(request, tokenizer, "toy", "cmpl-1", 1234);
  writer.set_prompts({{'a'}, {1, 'b'}});
  const json choice = json::parse(writer.whole({Piece{}, Piece{}, Piece{}, piece}, {}))["choices"][3];
  CHECK(choice["token_ids"] == json::array({'h'}));
  CHECK(choice["prompt_token_ids"] == json::array({1, 'b'}));
  CHECK(choice["logprobs"]["tokens"] == json::array({"token_id:104"}));
  CHECK(choice["logprobs"]["top_logprobs"][0] == json{{"token_id:104", -0.5}});
  // in a stream the prompt comes once
  CHECK(json::parse(writer.chunk(piece))["choices"][0].contains("prompt_token_ids"));
  const json later = json::parse(writer.chunk(piece))["choices"][0];
  CHECK(!later.contains("prompt_token_ids"));
  CHECK(later["token_ids"] == json::array({'h'}));

  const ApiRequest talk = chat({{"return_token_ids", true}});
  ResponseWriter chat_writer(talk, tokenizer, "toy", "chatcmpl-1", 1234);
  chat_writer.set_prompts({{'a'}});
  piece.choice = 0;
  CHECK(json::parse(chat_writer.first_chunk(0))["prompt_token_ids"] == json::array({'a'}));
  const json body = json::parse(chat_writer.whole({piece}, {}));
  CHECK(body["prompt_token_ids"] == json::array({'a'}));
  CHECK(body["choices"][0]["token_ids"] == json::array({'h'}));
}

TEST_CASE("errors in OpenAI's shape, whatever is in their message") {
  const json error = json::parse(ApiError(429, "full \"\xff\n", "", "queue_full").body())["error"];
  CHECK(error["type"] == "rate_limit_error");
  CHECK(error["code"] == "queue_full");
  CHECK(error["param"].is_null());
}

TEST_CASE("UTF-8: what is complete, what is not, what is none") {
  CHECK(incomplete_utf8("a") == 0);
  CHECK(incomplete_utf8("a\xe2\x82") == 2);
  CHECK(incomplete_utf8("\xf0\x9f\x98") == 3);
  CHECK(incomplete_utf8("\xe2\x82\xac") == 0);
  CHECK(incomplete_utf8("\x82\x82") == 0);
  CHECK(incomplete_utf8("\xc0") == 0);      // begins nothing
  CHECK(incomplete_utf8("\xed\xa0") == 0);  // a surrogate
  CHECK(valid_utf8("a\xff\xe2\x82z\xf0\x9f\x98") == "a\ufffd\ufffdz\ufffd");
  CHECK(valid_utf8("\xed\xa0\x80") == "\ufffd\ufffd\ufffd");
  CHECK(valid_utf8("\xf4\x8f\xbf\xbf") == "\U0010ffff");
  CHECK(is_valid_utf8("\u20ac"));
  CHECK(!is_valid_utf8("\xe2\x82"));
  CHECK(utf8_length("h\u00e9\U0001f600") == 3);
}

TEST_CASE("a stream gives out whole characters, its pieces are the text") {
  const std::string text = "h\u00e9\u20ac\U0001f600!";
  TextStream stream;
  std::string all;
  for (const char c : text) {
    const std::string piece = stream.add(std::string(1, c));
    CHECK(is_valid_utf8(piece));
    all += piece;
  }
  CHECK(all + stream.finish() == text);
  TextStream cut;
  CHECK(cut.add("a\xe2\x82") == "a");
  CHECK(cut.finish() == "\ufffd");
  TextStream broken;
  CHECK(broken.add("\xe2"
                   "b") ==
        "\ufffd"
        "b");
}

TEST_CASE("stop strings across tokens") {
  const auto run = [](std::vector<std::string> stops, const std::vector<std::string>& tokens) {
    TextStream stream(std::move(stops));
    std::string all;
    for (const std::string& token : tokens) {
      all += stream.add(token);
      if (stream.stopped()) break;
    }
    return all + stream.finish() + (stream.stopped() ? "|" : "");
  };
  CHECK(run({"stop"}, {"a s", "to", "p b"}) == "a |");
  CHECK(run({"stop"}, {"a sto", "ne"}) == "a stone");
  CHECK(run({"stop"}, {"a sto"}) == "a sto");
  CHECK(run({"aab"}, {"a", "a", "a", "b"}) == "a|");
  CHECK(run({"xy", "y"}, {"axy"}) == "a|");
  CHECK(run({"abc", "b"}, {"a", "b"}) == "a|");
  CHECK(run({"\u20ac"}, {"1\xe2", "\x82", "\xac"}) == "1|");
  CHECK(run({"\n\n"}, {"a\n", "b\n", "\nc"}) == "a\nb|");
  CHECK(run({}, {"a", "b"}) == "ab");
  // nothing is held back longer than it may be the beginning of a stop string
  TextStream stream({"stop"});
  CHECK(stream.add("this st") == "this ");
  CHECK(stream.add("ar") == "star");
}

TEST_CASE("seeds of choices") {
  CHECK(choice_seed(5, 0) == 5);
  CHECK(choice_seed(5, 1) != choice_seed(5, 2));
}
