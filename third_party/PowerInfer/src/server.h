// The HTTP endpoints: OpenAI's completions and chat completions, models, health, metrics, tokenize and detokenize.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "chat.h"
#include "engine.h"
#include "http.h"
#include "metrics.h"
#include "openai.h"
#include "tokenizer.h"

namespace powerinfer {

struct ServerOptions {
  std::string model_name;
  std::string api_key;  // "": none
  size_t max_request_bytes = 4 << 20;
  int queue = 128;  // the engine's
};

class ApiServer {
 public:
  // `http`, `engine` and `tokenizer` must outlive the server.
  ApiServer(HttpServer& http, Engine& engine, const ModelInfo& model, const Tokenizer& tokenizer, ChatTemplate chat,
            const ServerOptions& options);

  // From now on: 503 for new requests and /health.
  void start_draining() { draining_ = true; }

 private:
  class Job;
  using Request = httplib::Request;
  using Response = httplib::Response;
  using Reader = httplib::ContentReader;

  httplib::Server::HandlerResponse before(const Request& request, Response& response);
  bool authorized(const Request& request) const;
  std::string read_body(const Reader& reader) const;
  std::vector<int32_t> encode_chat(const ApiRequest& request) const;

  void generate(const Reader& reader, Response& response, bool chat);
  void answer_whole(const ApiRequest& request, const std::shared_ptr<Job>& job, ResponseWriter writer, Response& response);
  void answer_stream(const ApiRequest& request, const std::shared_ptr<Job>& job, ResponseWriter writer, Response& response);
  void tokenize(const Reader& reader, Response& response) const;
  void detokenize(const Reader& reader, Response& response) const;
  std::string metrics() const;

  Engine& engine_;
  const Tokenizer& tokenizer_;
  const ChatTemplate chat_;
  const ServerOptions options_;
  const int64_t started_;
  ApiLimits limits_;
  std::atomic<bool> draining_ = false;
  mutable Metrics metrics_;
};

}  // namespace powerinfer
