// powerinfer-render: one JSON object a line on stdin, {"template": .., "messages": [..], "add_generation_prompt": true}; one
// a line on stdout, {"text": ..} or {"error": ..}; for tests. "name" in place of "template" takes a named format. The tokens
// that begin and end a text are <s> and </s>.
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "chat.h"
#include "errors.h"
#include "toy_model.h"

using nlohmann::json;
using namespace powerinfer;

int main() {
  const ToyTokenizer tokenizer;
  for (std::string line; std::getline(std::cin, line);) {
    const json request = json::parse(line);
    json answer;
    try {
      const ChatTemplate chat = request.contains("name")
                                    ? ChatTemplate::from_name(request["name"].get<std::string>(), tokenizer)
                                    : ChatTemplate::from_source(request["template"].get<std::string>(), tokenizer);
      std::vector<Message> messages;
      for (const json& message : request["messages"]) messages.push_back({message["role"], message["content"]});
      answer["text"] = chat.render(messages, request["add_generation_prompt"]);
    } catch (const Error& error) {
      answer["error"] = error.what();
    }
    std::cout << answer.dump() << "\n";
  }
}
