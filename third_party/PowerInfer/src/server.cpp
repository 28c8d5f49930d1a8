#include "server.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <map>
#include <mutex>
#include <random>
#include <span>

#include "errors.h"
#include "text_stream.h"

namespace powerinfer {
namespace {

using Clock = std::chrono::steady_clock;

constexpr const char* kJson = "application/json";
constexpr int kHungUp = 499;  // in the metrics only: nobody is there to read it

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

uint64_t random_number() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

std::string request_id(bool chat) {
  char text[48];
  std::snprintf(text, sizeof text, "%s-%016llx%016llx", chat ? "chatcmpl" : "cmpl",
                static_cast<unsigned long long>(random_number()), static_cast<unsigned long long>(random_number()));
  return text;
}

// Takes the same time wherever the two differ.
bool same_secret(const std::string& a, const std::string& b) {
  unsigned char different = a.size() != b.size();
  for (size_t i = 0; i < a.size(); ++i) different |= static_cast<unsigned char>(a[i] ^ b[b.empty() ? 0 : i % b.size()]);
  return different == 0;
}

void set_error(httplib::Response& response, const ApiError& error) {
  response.status = error.status();
  response.set_content(error.body(), kJson);
  if (error.status() == 429 || error.status() == 503) response.set_header("Retry-After", "1");
  if (error.status() == 401) response.set_header("WWW-Authenticate", "Bearer");
}

// Runs a handler; whatever it throws becomes an error response.
template <typename Handler>
void guarded(httplib::Response& response, Handler&& handler) {
  try {
    response.status = 200;
    handler();
  } catch (const ApiError& error) {
    set_error(response, error);
  } catch (const Error& error) {
    set_error(response, ApiError(error.kind() == ErrorKind::kRequest ? 400 : 500, valid_utf8(error.what())));
  } catch (const std::bad_alloc&) {
    set_error(response, ApiError(500, "out of memory"));
  } catch (const std::exception& error) {
    set_error(response, ApiError(500, valid_utf8(error.what())));
  }
}

const std::map<std::string, std::string>& endpoints() {
  static const std::map<std::string, std::string> kMethods = {{"/v1/models", "GET"},
                                                              {"/health", "GET"},
                                                              {"/metrics", "GET"},
                                                              {"/v1/completions", "POST"},
                                                              {"/v1/chat/completions", "POST"},
                                                              {"/tokenize", "POST"},
                                                              {"/detokenize", "POST"}};
  return kMethods;
}

}  // namespace

// The sequences of one HTTP request, from the engine's thread, which puts texts together, to the connection's.
class ApiServer::Job : public std::enable_shared_from_this<ApiServer::Job> {
 public:
  Job(const ApiServer& server, const ApiRequest& request) : server_(server), skip_special_(request.skip_special_tokens) {
    event_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (event_ < 0) throw Error(ErrorKind::kFailed, "no file descriptor left for a request");
  }
  ~Job() { ::close(event_); }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // Throws ApiError; nothing is left in the engine then.
  void submit(const ApiRequest& request, const std::vector<std::vector<int32_t>>& prompts) {
    const uint64_t seed = request.generation.sampling.seed.value_or(random_number());
    sequences_.resize(static_cast<size_t>(request.choices()));
    const bool scored = request.generation.prompt_logprobs >= 0;
    std::shared_ptr<const std::string> echo_text;  // of all choices of one prompt
    for (size_t i = 0; i < sequences_.size(); ++i) {
      const size_t prompt = i / static_cast<size_t>(request.n);
      sequences_[i].text = TextStream(request.stop);
      if (i % static_cast<size_t>(request.n) == 0) {
        usage_.prompt_tokens += prompts[prompt].size();
        if (request.echo) {
          echo_text = std::make_shared<const std::string>(request.prompts[prompt].is_text
                                                              ? request.prompts[prompt].text
                                                              : valid_utf8(server_.tokenizer_.decode(prompts[prompt])));
        }
      }
      sequences_[i].echo = echo_text;
    }
    try {
      for (size_t i = 0; i < sequences_.size(); ++i) {
        const int choice = static_cast<int>(i);
        Generation generation = request.generation;
        generation.prompt = prompts[i / static_cast<size_t>(request.n)];
        generation.sampling.seed = choice_seed(seed, choice % request.n);
        generation.on_token = [self = shared_from_this(), choice](const Token& token) {
          return self->on_token(choice, token);
        };
        if (request.echo && scored) {
          generation.on_prompt = [self = shared_from_this(), choice](const std::vector<Token>& tokens) {
            self->push_echo(choice, tokens);
          };
        }
        const auto number = server_.engine_.submit(std::move(generation));
        if (!number) {
          throw ApiError(429,
                         "the queue of " + std::to_string(server_.options_.queue) + " requests is full: try again later", "",
                         "queue_full");
        }
        numbers_.push_back(*number);
      }
    } catch (...) {
      cancel();
      throw;
    }
  }

  void cancel() {
    abandoned_ = true;
    for (const uint64_t number : numbers_) server_.engine_.cancel(number);
  }

  // The connection's thread: waits for pieces; false where the client hung up.
  bool wait(std::vector<Piece>& pieces) {
    pieces.clear();
    while (pieces.empty()) {
      if (!HttpServer::connection().wait(event_)) return false;
      uint64_t count;
      [[maybe_unused]] const ssize_t got = ::read(event_, &count, sizeof count);
      std::lock_guard lock(mutex_);
      pieces.swap(pieces_);
      if (failed_) {
        Piece& piece = pieces.emplace_back();
        piece.finish = Finish::kError;
        piece.error = "out of memory";
      }
    }
    return true;
  }

  Usage usage() const {
    std::lock_guard lock(mutex_);
    return usage_;
  }
  double seconds() const { return seconds_since(arrived_); }

 private:
  struct Sequence {
    TextStream text;
    std::shared_ptr<const std::string> echo;  // until it is pushed, before the first token
    bool started = false;
    Clock::time_point last;  // token
  };

  void push_echo(int choice, std::vector<Token> tokens) {
    std::shared_ptr<const std::string>& text = sequences_[static_cast<size_t>(choice)].echo;
    Piece piece;
    piece.choice = choice;
    piece.text = *text;
    piece.tokens = std::move(tokens);
    push(std::move(piece));
    text.reset();
  }

  // Nothing may be thrown into the engine: the client would wait for an end that never comes.
  bool on_token(int choice, const Token& token) {
    try {
      return take_token(choice, token);
    } catch (const std::exception&) {
      failed_ = true;
      wake();
      return false;
    }
  }

  bool take_token(int choice, const Token& token) {
    if (abandoned_) return false;
    Sequence& sequence = sequences_[static_cast<size_t>(choice)];
    if (sequence.echo && token.finish != Finish::kError && token.finish != Finish::kCancelled) push_echo(choice, {});
    Piece piece;
    piece.choice = choice;
    piece.finish = token.finish;
    piece.error = token.error;
    if (token.id >= 0) {
      const auto now = Clock::now();
      if (sequence.started) {
        server_.metrics_.next_token(std::chrono::duration<double>(now - sequence.last).count());
      } else {
        server_.metrics_.first_token(std::chrono::duration<double>(now - arrived_).count());
      }
      sequence.started = true;
      sequence.last = now;
      piece.tokens.push_back(token);
      // the token that ends an answer is no part of its text
      if (token.finish != Finish::kStop)
        piece.text = sequence.text.add(server_.tokenizer_.token_bytes(token.id, !skip_special_));
      std::lock_guard lock(mutex_);
      ++usage_.completion_tokens;
    }
    if (sequence.text.stopped()) {
      piece.finish = Finish::kStop;
    } else if (piece.finish != Finish::kNone) {
      piece.text += sequence.text.finish();
    }
    const bool more = piece.finish == Finish::kNone;
    push(std::move(piece));
    return more;
  }

  void push(Piece piece) {
    {
      std::lock_guard lock(mutex_);
      pieces_.push_back(std::move(piece));
    }
    wake();
  }

  void wake() const {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t put = ::write(event_, &one, sizeof one);
  }

  const ApiServer& server_;
  const bool skip_special_;
  const Clock::time_point arrived_ = Clock::now();
  int event_;
  std::vector<uint64_t> numbers_;    // the engine's, of the connection's thread
  std::vector<Sequence> sequences_;  // of the engine's thread once submitted
  std::atomic<bool> abandoned_ = false;
  std::atomic<bool> failed_ = false;  // a part of the answer is lost

  mutable std::mutex mutex_;
  std::vector<Piece> pieces_;
  Usage usage_;
};

ApiServer::ApiServer(HttpServer& http, Engine& engine, const ModelInfo& model, const Tokenizer& tokenizer, ChatTemplate chat,
                     const ServerOptions& options)
    : engine_(engine),
      tokenizer_(tokenizer),
      chat_(std::move(chat)),
      options_(options),
      started_(static_cast<int64_t>(std::time(nullptr))) {
  limits_.model = options.model_name;
  limits_.vocabulary = model.vocabulary;
  limits_.context = model.context;
  limits_.max_choices = std::max(model.slots + options.queue, 1);

  http.set_pre_routing_handler([this](const Request& request, Response& response) { return before(request, response); });
  http.set_error_handler([](const Request&, Response& response) {  // httplib's own errors
    if (!response.body.empty()) return;
    Connection& connection = HttpServer::connection();
    const bool late = connection.timed_out();
    if (late) response.status = 408;
    // what follows may be the rest of this request
    connection.close_after();
    response.set_header("Connection", "close");
    const std::string message = late ? "the request did not come in time" : "malformed HTTP request";
    response.set_content(ApiError(response.status, message).body(), kJson);
  });
  http.set_logger([this](const Request& request, const Response& response) {
    const bool known = endpoints().contains(request.path);
    metrics_.count_request(known ? request.path : "other", response.status);
  });
  http.Get("/health", [this](const Request&, Response& response) {
    response.status = draining_ ? 503 : 200;
    response.set_content(draining_ ? R"({"status":"draining"})" : R"({"status":"ok"})", kJson);
  });
  http.Get("/v1/models", [this](const Request&, Response& response) {
    guarded(response, [&] { response.set_content(models_body(options_.model_name, limits_.context, started_), kJson); });
  });
  http.Get("/metrics", [this](const Request&, Response& response) {
    guarded(response, [&] { response.set_content(metrics(), "text/plain; version=0.0.4; charset=utf-8"); });
  });
  http.Post("/v1/completions", [this](const Request&, Response& response, const Reader& reader) {
    guarded(response, [&] { generate(reader, response, false); });
  });
  http.Post("/v1/chat/completions", [this](const Request&, Response& response, const Reader& reader) {
    guarded(response, [&] { generate(reader, response, true); });
  });
  http.Post("/tokenize", [this](const Request&, Response& response, const Reader& reader) {
    guarded(response, [&] { tokenize(reader, response); });
  });
  http.Post("/detokenize", [this](const Request&, Response& response, const Reader& reader) {
    guarded(response, [&] { detokenize(reader, response); });
  });
}

bool ApiServer::authorized(const Request& request) const {
  if (options_.api_key.empty() || request.path == "/health") return true;
  const std::string value = request.get_header_value("Authorization");
  const std::string scheme = "Bearer ";
  return value.starts_with(scheme) && same_secret(value.substr(scheme.size()), options_.api_key);
}

// Everything that can be refused before a body is read.
httplib::Server::HandlerResponse ApiServer::before(const Request& request, Response& response) {
  const auto check = [&] {
    const auto endpoint = endpoints().find(request.path);
    if (endpoint == endpoints().end()) {
      throw ApiError(404, "no such endpoint: " + request.method + " " + valid_utf8(request.path).substr(0, 200));
    }
    if (!authorized(request))
      throw ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", "", "invalid_api_key");
    const bool allowed = request.method == endpoint->second || (request.method == "HEAD" && endpoint->second == "GET");
    if (!allowed) {
      response.set_header("Allow", endpoint->second);
      throw ApiError(405, request.path + " takes " + endpoint->second + ", not " + request.method);
    }
    const bool chunked = request.has_header("Transfer-Encoding");
    if (request.get_header_value_count("Content-Length") > 1 || (chunked && request.has_header("Content-Length"))) {
      throw ApiError(400, "ambiguous length: one Content-Length or Transfer-Encoding: chunked");
    }
    if (endpoint->second != "POST") {
      if (chunked || request.has_header("Content-Length")) HttpServer::connection().close_after();  // its body is not read
      return;
    }
    if (chunked) {
      std::string coding = request.get_header_value("Transfer-Encoding");
      std::transform(coding.begin(), coding.end(), coding.begin(), [](unsigned char c) { return std::tolower(c); });
      if (coding != "chunked") throw ApiError(400, "Transfer-Encoding must be chunked");
    } else {
      if (!request.has_header("Content-Length")) throw ApiError(411, "Content-Length is missing");
      const std::string length = request.get_header_value("Content-Length");
      if (length.empty() || length.size() > 18 || length.find_first_not_of("0123456789") != std::string::npos) {
        throw ApiError(400, "Content-Length must be a number of bytes");
      }
      if (std::stoull(length) > options_.max_request_bytes) {
        throw ApiError(413, "the request has " + length + " bytes, more than the limit of " +
                                std::to_string(options_.max_request_bytes));
      }
    }
    const std::string type = request.get_header_value("Content-Type");
    if (!type.empty() && !type.starts_with(kJson)) {
      throw ApiError(415, "Content-Type must be application/json");
    }
    if (draining_) throw ApiError(503, "the server is shutting down");
  };
  try {
    check();
    return httplib::Server::HandlerResponse::Unhandled;
  } catch (const ApiError& error) {
    set_error(response, error);
  } catch (const std::exception&) {
    set_error(response, ApiError(500, "out of memory"));
  }
  HttpServer::connection().close_after();  // the body was not read
  response.set_header("Connection", "close");
  return httplib::Server::HandlerResponse::Handled;
}

std::string ApiServer::read_body(const Reader& reader) const {
  std::string body;
  bool too_large = false;
  const bool complete = reader([&](const char* data, size_t size) {
    if (body.size() + size > options_.max_request_bytes) {
      too_large = true;
      return false;
    }
    body.append(data, size);
    return true;
  });
  if (complete) return body;
  HttpServer::connection().close_after();
  if (too_large) {
    throw ApiError(413, "the request has more bytes than the limit of " + std::to_string(options_.max_request_bytes));
  }
  if (HttpServer::connection().timed_out()) throw ApiError(408, "the request's body did not come in time");
  throw ApiError(400, "the request's body is incomplete or malformed");
}

std::vector<int32_t> ApiServer::encode_chat(const ApiRequest& request) const {
  const std::string text = chat_.render(request.messages, request.add_generation_prompt);
  return tokenizer_.encode(text, request.add_special_tokens || chat_.adds_special_tokens(), true);
}

void ApiServer::generate(const Reader& reader, Response& response, bool chat) {
  const std::string body = read_body(reader);
  const ApiRequest request = chat ? parse_chat(body, limits_) : parse_completion(body, limits_);
  std::vector<std::vector<int32_t>> prompts;
  if (chat) {
    prompts.push_back(encode_chat(request));
    engine_.check_prompt(prompts.back(), request.generation.max_tokens);
  } else {
    for (const Prompt& prompt : request.prompts) {
      prompts.push_back(prompt.is_text ? tokenizer_.encode(prompt.text, request.add_special_tokens, true) : prompt.tokens);
      engine_.check_prompt(prompts.back(), request.generation.max_tokens);
    }
  }
  const auto job = std::make_shared<Job>(*this, request);
  try {
    job->submit(request, prompts);
  } catch (const Error&) {
    if (draining_) throw ApiError(503, "the server is shutting down");
    throw;
  }
  try {
    ResponseWriter writer(request, tokenizer_, options_.model_name, request_id(request.chat),
                          static_cast<int64_t>(std::time(nullptr)));
    writer.set_prompts(std::move(prompts));
    if (request.stream) {
      answer_stream(request, job, std::move(writer), response);
    } else {
      answer_whole(request, job, std::move(writer), response);
    }
  } catch (...) {
    job->cancel();
    throw;
  }
}

void ApiServer::answer_whole(const ApiRequest& request, const std::shared_ptr<Job>& job, ResponseWriter writer,
                             Response& response) {
  const bool tokens = request.generation.sampling.logprobs >= 0 || request.return_token_ids;
  std::vector<Piece> whole(static_cast<size_t>(request.choices())), pieces;
  for (size_t left = whole.size(); left > 0;) {
    if (!job->wait(pieces)) {
      job->cancel();
      HttpServer::connection().close_after();
      throw ApiError(kHungUp, "the client hung up");
    }
    for (Piece& piece : pieces) {
      Piece& choice = whole[static_cast<size_t>(piece.choice)];
      choice.choice = piece.choice;
      choice.text += piece.text;
      if (tokens) {
        std::move(piece.tokens.begin(), piece.tokens.end(), std::back_inserter(choice.tokens));
      }
      if (piece.finish == Finish::kNone) continue;
      choice.finish = piece.finish;
      --left;
      if (piece.finish == Finish::kError || piece.finish == Finish::kCancelled) {
        job->cancel();
        if (piece.finish == Finish::kError) throw ApiError(500, valid_utf8(piece.error));
        throw ApiError(503, "the server is shutting down");
      }
    }
  }
  metrics_.request_seconds(job->seconds());
  response.set_content(writer.whole(whole, job->usage()), kJson);
}

void ApiServer::answer_stream(const ApiRequest& request, const std::shared_ptr<Job>& job, ResponseWriter made,
                              Response& response) {
  auto writer = std::make_shared<ResponseWriter>(std::move(made));
  const int choices = request.choices();
  const bool include_usage = request.include_usage;
  const bool tokens = request.generation.sampling.logprobs >= 0 || request.return_token_ids;

  // writes the whole stream; false where the client is gone
  auto write = [this, writer, job, choices, include_usage, tokens](httplib::DataSink& sink) {
    const auto send = [&](const std::string& data) {
      if (data.empty()) return true;
      const std::string event = "data: " + data + "\n\n";
      return sink.write(event.data(), event.size());
    };
    for (int i = 0; i < choices; ++i) {
      if (!send(writer->first_chunk(i))) return false;
    }
    std::vector<Piece> pieces;
    for (int left = choices; left > 0;) {
      if (!job->wait(pieces)) return false;
      for (Piece& piece : pieces) {
        if (piece.finish == Finish::kError || piece.finish == Finish::kCancelled) {
          const bool failed = piece.finish == Finish::kError;
          job->cancel();
          return send(ApiError(failed ? 500 : 503, failed ? valid_utf8(piece.error) : "the server is shutting down")
                          .body()) &&
                 send("[DONE]");
        }
        if (!tokens) piece.tokens.clear();
        if (piece.text.empty() && piece.tokens.empty() && piece.finish == Finish::kNone) continue;
        if (!send(writer->chunk(piece))) return false;
        if (piece.finish != Finish::kNone) --left;
      }
    }
    metrics_.request_seconds(job->seconds());
    return (!include_usage || send(writer->usage_chunk(job->usage()))) && send("[DONE]");
  };
  response.set_header("Cache-Control", "no-cache");
  const auto provide = [write, job](size_t, httplib::DataSink& sink) {
    bool complete = false;
    try {
      complete = write(sink);
    } catch (const std::exception&) {  // out of memory: the stream ends without [DONE]
    }
    if (!complete) {
      job->cancel();
      return false;
    }
    sink.done();
    return true;
  };
  response.set_chunked_content_provider("text/event-stream", provide, [job](bool success) {
    if (!success) job->cancel();  // also where the headers could not be sent
  });
}

void ApiServer::tokenize(const Reader& reader, Response& response) const {
  const ApiRequest request = parse_tokenize(read_body(reader), limits_);
  const std::vector<int32_t> tokens =
      request.chat ? encode_chat(request)
                   : tokenizer_.encode(request.prompts.front().text, request.add_special_tokens, true);
  response.set_content(tokenize_body(tokens, limits_.context), kJson);
}

void ApiServer::detokenize(const Reader& reader, Response& response) const {
  const std::vector<int32_t> tokens = parse_detokenize(read_body(reader), limits_);
  response.set_content(detokenize_body(valid_utf8(tokenizer_.decode(tokens, true))), kJson);
}

std::string ApiServer::metrics() const {
  std::string out;
  const EngineStats stats = engine_.stats();
  const Model::Activity& activity = stats.activity;
  const auto counter = [&](const std::string& name, const std::string& help, double value) {
    write_metric("powerinfer_" + name, "counter", help, value, out);
  };
  const auto gauge = [&](const std::string& name, const std::string& help, double value) {
    write_metric("powerinfer_" + name, "gauge", help, value, out);
  };
  gauge("requests_running", "Sequences in slots", stats.running);
  gauge("requests_waiting", "Sequences in the queue", stats.waiting);
  counter("sequences_total", "Sequences taken", static_cast<double>(stats.requests));
  counter("prompt_tokens_total", "Prompt tokens computed", static_cast<double>(stats.prompt_tokens));
  counter("cached_prompt_tokens_total", "Prompt tokens taken from an earlier request's slot",
          static_cast<double>(stats.cached_prompt_tokens));
  counter("generated_tokens_total", "Tokens generated", static_cast<double>(stats.generated_tokens));
  counter("forward_passes_total", "Forward passes", static_cast<double>(stats.forward_passes));
  counter("prompt_seconds_total", "Time in forward passes with prompt tokens", stats.prompt_seconds);
  counter("decode_seconds_total", "Time in forward passes without prompt tokens", stats.decode_seconds);
  counter("ffn_neurons_total", "Neurons of all sparse FFN passes", static_cast<double>(activity.total));
  counter("ffn_neurons_active_total", "Those of them that were computed", static_cast<double>(activity.active));
  gauge("active_neuron_share", "Share of neurons computed since the start",
        activity.total ? static_cast<double>(activity.active) / static_cast<double>(activity.total) : 0);
  gauge("kv_bytes", "Keys and values held", static_cast<double>(stats.kv_bytes));
  metrics_.write(out);
  return out;
}

}  // namespace powerinfer
