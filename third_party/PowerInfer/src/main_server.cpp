// powerinfer-server: an OpenAI-compatible server for one model file.
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <new>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "chat.h"
#include "engine.h"
#include "errors.h"
#include "flags.h"
#include "http.h"
#include "model.h"
#include "server.h"
#include "tokenizer.h"

#ifndef POWERINFER_VERSION
#define POWERINFER_VERSION "unknown"
#endif

namespace powerinfer {
namespace {

struct Options {
  std::string model_path, host = "127.0.0.1", chat_template;
  int port = 8080, drain_seconds = 30, receive_seconds = 30;
  bool print_version = false;
  ModelOptions model;
  EngineOptions engine;
  ServerOptions server;
};

Error usage_error(const std::string& message) { return Error(ErrorKind::kUsage, message); }

void check_range(const std::string& flag, int value, int low, int high) {
  if (value < low || value > high) {
    throw usage_error(flag + " must be between " + std::to_string(low) + " and " + std::to_string(high) + ", got " +
                      std::to_string(value));
  }
}

// True for the second of the two words.
bool second(const std::string& flag, const std::string& value, const std::string& one, const std::string& other) {
  if (value != one && value != other)
    throw usage_error(flag + " must be " + one + " or " + other + ", got \"" + value + "\"");
  return value == other;
}

// false: --help or --version was printed
bool parse_flags(int argc, char** argv, Options& options) {
  options.model.slots = 8;
  if (const char* key = std::getenv("POWERINFER_API_KEY")) options.server.api_key = key;
  std::string kv = "f16", prompt_ffn = "dense";
  bool dense = false;
  int max_request_bytes = static_cast<int>(options.server.max_request_bytes);

  Flags flags("powerinfer-server", "serves a GGUF or PWRI model by OpenAI's protocol");
  flags.add("--model", "FILE", "GGUF or PWRI model file", &options.model_path);
  flags.add("--host", "ADDRESS", "address to listen on (127.0.0.1)", &options.host);
  flags.add("--port", "N", "port (8080); 0: a free one, told by the line \"listening on http://HOST:PORT\"", &options.port);
  flags.add("--api-key", "KEY", "asked of every request but /health; also by POWERINFER_API_KEY", &options.server.api_key);
  flags.add("--served-model-name", "NAME", "the model's name in requests and answers (the file's)",
            &options.server.model_name);
  flags.add("--chat-template", "NAME", "chatml, llama2, llama3, vicuna, bamboo or a Jinja file (the file's template)",
            &options.chat_template);
  flags.add("--threads", "N", "threads of the model (0: one for each physical core)", &options.model.threads);
  flags.add("--slots", "N", "sequences computed at once (8)", &options.model.slots);
  flags.add("--context", "N", "tokens of one sequence, prompt and answer (0: the model's)", &options.model.context);
  flags.add("--batch", "N", "most tokens in one forward pass (512)", &options.model.batch);
  flags.add("--kv", "f16|packed", "keys and values in 16 bits, or keys in 4 and values in 2 bits (f16)", &kv);
  flags.add("--dense", "compute every neuron, also where a file has predictors", &dense);
  flags.add("--prompt-ffn", "dense|sparse", "neurons of prompt tokens: all, or those predicted (dense)", &prompt_ffn);
  flags.add("--activation", "relu|silu|gelu", "in place of the file's activation", &options.model.activation);
  flags.add("--isa", "NAME", "instruction set: plain, avx2 or avx512 (the best one here)", &options.model.isa);
  flags.add("--queue", "N", "sequences that may wait (128); further requests get status 429", &options.engine.queue);
  flags.add("--max-request-bytes", "N", "largest request body (4194304); larger ones get status 413", &max_request_bytes);
  flags.add("--receive-seconds", "N", "time that a request may take to arrive (30)", &options.receive_seconds);
  flags.add("--drain-seconds", "N", "time to finish after SIGTERM or SIGINT (30)", &options.drain_seconds);
  flags.add("--version", "print the version", &options.print_version);
  if (flags.parse(argc, argv)) {
    std::fputs(flags.help().c_str(), stdout);
    std::puts(
        "\nexit status: 0 stopped by a signal, 1 other errors, 2 flags, 3 model file, 4 address or port, 5 memory, "
        "128 + n signal n during loading, or a second one");
    return false;
  }
  if (options.print_version) {
    std::puts("powerinfer-server " POWERINFER_VERSION);
    return false;
  }
  if (options.model_path.empty()) throw usage_error("--model is missing: see --help");
  check_range("--port", options.port, 0, 65535);
  check_range("--threads", options.model.threads, 0, 1024);
  check_range("--slots", options.model.slots, 1, 1024);
  check_range("--context", options.model.context, 0, 1 << 24);
  check_range("--batch", options.model.batch, options.model.slots + 1, 1 << 16);
  check_range("--queue", options.engine.queue, 0, 4096);
  check_range("--max-request-bytes", max_request_bytes, 1, 1 << 30);
  check_range("--receive-seconds", options.receive_seconds, 1, 86400);
  check_range("--drain-seconds", options.drain_seconds, 0, 86400);
  options.model.kv = second("--kv", kv, "f16", "packed") ? KvType::kPacked : KvType::kF16;
  options.model.prompt_ffn = second("--prompt-ffn", prompt_ffn, "dense", "sparse") ? FfnMode::kSparse : FfnMode::kDense;
  if (dense) options.model.decode_ffn = FfnMode::kDense;
  const std::string& isa = options.model.isa;
  if (!isa.empty() && isa != "plain" && isa != "avx2" && isa != "avx512") {
    throw usage_error("--isa must be plain, avx2 or avx512, got \"" + isa + "\"");
  }
  options.engine.batch = options.model.batch;
  options.server.max_request_bytes = static_cast<size_t>(max_request_bytes);
  options.server.queue = options.engine.queue;
  return true;
}

ChatTemplate chat_template(const Options& options, const GgufFile& file, const Tokenizer& tokenizer) {
  if (options.chat_template.empty()) return ChatTemplate::from_file(file, tokenizer);
  if (ChatTemplate::is_name(options.chat_template)) return ChatTemplate::from_name(options.chat_template, tokenizer);
  std::ifstream stream(options.chat_template, std::ios::binary);
  std::ostringstream source;
  source << stream.rdbuf();
  if (!stream || stream.fail()) {
    throw usage_error("--chat-template \"" + options.chat_template +
                      "\" is neither chatml, llama2, llama3, vicuna or bamboo nor a readable file");
  }
  return ChatTemplate::from_source(source.str(), tokenizer);
}

// A mapped page of the model file that cannot be read: the file was truncated, or its disk failed.
void on_bus_error(int) {
  static const char kMessage[] =
      "powerinfer-server: error: the model file cannot be read any more: it was truncated or its disk failed\n";
  [[maybe_unused]] const ssize_t put = ::write(STDERR_FILENO, kMessage, sizeof kMessage - 1);
  ::_exit(static_cast<int>(ErrorKind::kModel));
}

std::atomic<int> stop_event = -1;  // eventfd; -1 while the model is loaded

// The first signal stops the server, a second one, or one during loading, ends the process at once.
void on_stop_signal(int number) {
  if (stop_event < 0) ::_exit(128 + number);
  static volatile std::sig_atomic_t seen = 0;
  if (seen) ::_exit(128 + number);
  seen = 1;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t put = ::write(stop_event, &one, sizeof one);
}

void handle(int number, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigaction(number, &action, nullptr);
}

void serve(Options options) {
  handle(SIGBUS, on_bus_error);
  handle(SIGPIPE, SIG_IGN);
  handle(SIGTERM, on_stop_signal);
  handle(SIGINT, on_stop_signal);

  const GgufFile file = GgufFile::open(options.model_path);
  const std::unique_ptr<Tokenizer> tokenizer = Tokenizer::load(file);
  const ChatTemplate chat = chat_template(options, file, *tokenizer);
  const std::unique_ptr<Model> model = Model::load(file, options.model);
  if (options.server.model_name.empty()) options.server.model_name = model->info().name;

  HttpOptions http_options;
  http_options.receive = std::chrono::seconds(options.receive_seconds);
  // each sequence may have a connection of its own, and /health, /metrics and refusals must still get through
  http_options.connections = static_cast<size_t>(model->info().slots + options.engine.queue + 64);
  HttpServer http(http_options);
  const int port = http.bind(options.host, options.port);
  Engine engine(
      *model, [&](int32_t token) { return tokenizer->ends_generation(token); }, options.engine);
  ApiServer api(http, engine, model->info(), *tokenizer, chat, options.server);

  stop_event = ::eventfd(0, EFD_CLOEXEC);
  std::atomic<bool> ended = false;
  std::thread listener([&] {
    try {
      http.run();
    } catch (const std::exception&) {  // out of memory
    }
    ended = true;
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t put = ::write(stop_event, &one, sizeof one);
  });
  // before it runs, it cannot be stopped
  while (!http.is_running() && !ended) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const std::string host = options.host.find(':') == std::string::npos ? options.host : "[" + options.host + "]";
  if (!ended) std::printf("listening on http://%s:%d\n", host.c_str(), port);
  std::fflush(stdout);

  pollfd stop{stop_event, POLLIN, 0};
  while (::poll(&stop, 1, -1) < 0 && errno == EINTR) {
  }
  const bool failed = ended;
  api.start_draining();
  http.finish_connections();
  if (!engine.drain(std::chrono::seconds(options.drain_seconds))) {
    engine.cancel_all();
    engine.drain(std::chrono::seconds(5));
  }
  http.wait_for_answers(std::chrono::seconds(5));
  http.shut_down();
  listener.join();
  if (failed) throw Error(ErrorKind::kFailed, "no more connections can be accepted: the listening socket failed");
}

}  // namespace
}  // namespace powerinfer

int main(int argc, char** argv) {
  using powerinfer::Error;
  using powerinfer::ErrorKind;
  int status = static_cast<int>(ErrorKind::kFailed);
  std::string message;
  try {
    powerinfer::Options options;
    if (powerinfer::parse_flags(argc, argv, options)) powerinfer::serve(options);
    return 0;
  } catch (const Error& error) {
    status = error.exit_status();
    message = error.what();
  } catch (const std::bad_alloc&) {
    status = static_cast<int>(ErrorKind::kMemory);
    message = "not enough memory";
  } catch (const std::exception& error) {
    message = error.what();
  }
  std::fprintf(stderr, "powerinfer-server: error: %s\n", message.c_str());
  return status;
}
