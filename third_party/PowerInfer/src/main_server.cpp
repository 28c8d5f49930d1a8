// powerinfer-server: an OpenAI-compatible server for one model file.
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
#include "http.h"
#include "model.h"
#include "server.h"
#include "tokenizer.h"

#ifndef POWERINFER_VERSION
#define POWERINFER_VERSION "unknown"
#endif

namespace powerinfer {
namespace {

constexpr const char* kUsage = R"(usage: powerinfer-server --model FILE [flags]

  --model FILE               GGUF or PWRI model file
  --host ADDRESS             address to listen on (127.0.0.1)
  --port N                   port; 0 takes a free one (8080). A line "listening on http://HOST:PORT" tells when it is ready
  --api-key KEY              asked of every request but /health; also from the environment's POWERINFER_API_KEY
  --served-model-name NAME   the model's name in requests and answers (the file's general.name)
  --chat-template NAME|FILE  chatml, llama2, llama3, vicuna or bamboo, or a Jinja file, in place of the model's
  --threads N                threads of the model (one per physical core)
  --slots N                  sequences computed at once (8)
  --context N                tokens of one sequence, prompt and answer (the model's)
  --batch N                  most tokens in one forward pass (512)
  --kv f16|packed            keys and values: 16 bits, or keys 4 and values 2 bits (f16)
  --dense                    every neuron, also in a file with predictors
  --prompt-ffn dense|sparse  neurons of prompt tokens: every one, or those that the predictor names (dense)
  --activation relu|silu     in place of the file's
  --isa plain|avx2|avx512    instruction set (the best one here)
  --queue N                  requests that may wait for a slot (128); further ones get status 429
  --max-request-bytes N      largest request body (4194304); larger ones get status 413
  --drain-seconds N          time that requests under way have to finish after SIGTERM or SIGINT (30)
  --version                  prints the version
  --help                     prints this text

exit status: 0 stopped by a signal, 1 other errors, 2 flags, 3 model file, 4 address or port, 5 memory
)";

struct Options {
  std::string model_path, host = "127.0.0.1", chat_template;
  int port = 8080, drain_seconds = 30;
  ModelOptions model;
  EngineOptions engine;
  ServerOptions server;
};

Error usage_error(const std::string& message) { return Error(ErrorKind::kUsage, message); }

int64_t parse_integer(const std::string& flag, const std::string& value, int64_t low, int64_t high) {
  char* end = nullptr;
  errno = 0;
  const long long number = std::strtoll(value.c_str(), &end, 10);
  if (value.empty() || *end != 0 || errno != 0 || number < low || number > high) {
    throw usage_error(flag + " must be a number between " + std::to_string(low) + " and " + std::to_string(high) +
                      ", got \"" + value + "\"");
  }
  return number;
}

size_t choose(const std::string& flag, const std::string& value, const std::vector<std::string>& names) {
  std::string all;
  for (size_t i = 0; i < names.size(); ++i) {
    if (value == names[i]) return i;
    all += (i == 0 ? "" : i + 1 == names.size() ? " or " : ", ") + names[i];
  }
  throw usage_error(flag + " must be " + all + ", got \"" + value + "\"");
}

// false: --help or --version was printed
bool parse_flags(int count, char** arguments, Options& options) {
  options.model.slots = 8;
  const char* key = std::getenv("POWERINFER_API_KEY");
  if (key) options.server.api_key = key;

  for (int i = 1; i < count; ++i) {
    std::string flag = arguments[i], value;
    bool has_value = false;
    if (const size_t equals = flag.find('='); flag.starts_with("--") && equals != std::string::npos) {
      value = flag.substr(equals + 1);
      flag.resize(equals);
      has_value = true;
    }
    const auto text = [&]() -> const std::string& {
      if (!has_value) {
        if (i + 1 == count) throw usage_error(flag + " needs a value");
        value = arguments[++i];
        has_value = true;
      }
      return value;
    };
    const auto integer = [&](int64_t low, int64_t high) { return static_cast<int>(parse_integer(flag, text(), low, high)); };
    const auto none = [&] {
      if (has_value) throw usage_error(flag + " takes no value");
    };
    if (flag == "--help" || flag == "-h") {
      std::fputs(kUsage, stdout);
      return false;
    } else if (flag == "--version") {
      std::puts("powerinfer-server " POWERINFER_VERSION);
      return false;
    } else if (flag == "--model") {
      options.model_path = text();
    } else if (flag == "--host") {
      options.host = text();
    } else if (flag == "--port") {
      options.port = integer(0, 65535);
    } else if (flag == "--api-key") {
      options.server.api_key = text();
      if (options.server.api_key.empty()) throw usage_error("--api-key must not be empty");
    } else if (flag == "--served-model-name") {
      options.server.model_name = text();
    } else if (flag == "--chat-template") {
      options.chat_template = text();
    } else if (flag == "--threads") {
      options.model.threads = integer(1, 1024);
    } else if (flag == "--slots") {
      options.model.slots = integer(1, 1024);
    } else if (flag == "--context") {
      options.model.context = integer(1, 1 << 24);
    } else if (flag == "--batch") {
      options.model.batch = integer(2, 1 << 16);
    } else if (flag == "--kv") {
      options.model.kv = choose(flag, text(), {"f16", "packed"}) == 0 ? KvType::kF16 : KvType::kPacked;
    } else if (flag == "--dense") {
      none();
      options.model.decode_ffn = FfnMode::kDense;
    } else if (flag == "--prompt-ffn") {
      options.model.prompt_ffn = choose(flag, text(), {"dense", "sparse"}) == 0 ? FfnMode::kDense : FfnMode::kSparse;
    } else if (flag == "--activation") {
      choose(flag, text(), {"relu", "silu"});
      options.model.activation = value;
    } else if (flag == "--isa") {
      choose(flag, text(), {"plain", "avx2", "avx512"});
      options.model.isa = value;
    } else if (flag == "--queue") {
      options.engine.queue = integer(0, 4096);
    } else if (flag == "--max-request-bytes") {
      options.server.max_request_bytes = static_cast<size_t>(parse_integer(flag, text(), 1, int64_t{1} << 32));
    } else if (flag == "--drain-seconds") {
      options.drain_seconds = integer(0, 86400);
    } else {
      throw usage_error("unknown flag \"" + flag + "\": see --help");
    }
  }
  if (options.model_path.empty()) throw usage_error("--model is missing: see --help");
  if (options.model.batch <= options.model.slots) {
    throw usage_error("--batch (" + std::to_string(options.model.batch) + ") must be larger than --slots (" +
                      std::to_string(options.model.slots) + ")");
  }
  options.engine.batch = options.model.batch;
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
  // each sequence may have a connection of its own, and /health, /metrics and refusals must still get through
  http_options.connections = static_cast<size_t>(model->info().slots + options.engine.queue + 64);
  HttpServer http(http_options);
  const int port = http.bind(options.host, options.port);
  Engine engine(
      *model, [&](int32_t token) { return tokenizer->ends_generation(token); }, options.engine);
  ApiServer api(http, engine, *model, *tokenizer, chat, options.server);

  stop_event = ::eventfd(0, EFD_CLOEXEC);
  std::thread listener([&] { http.run(); });
  const std::string host = options.host.find(':') == std::string::npos ? options.host : "[" + options.host + "]";
  std::printf("listening on http://%s:%d\n", host.c_str(), port);
  std::fflush(stdout);

  uint64_t count;
  while (::read(stop_event, &count, sizeof count) < 0 && errno == EINTR) {
  }
  api.start_draining();
  http.finish_connections();
  if (!engine.drain(std::chrono::seconds(options.drain_seconds))) {
    engine.cancel_all();
    engine.drain(std::chrono::seconds(5));
  }
  http.wait_for_answers(std::chrono::seconds(5));
  http.shut_down();
  listener.join();
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
