// powerinfer-bench: speed of a model and of the memory under it, logits and likelihoods of given tokens.

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>
#include <vector>

#include "errors.h"
#include "flags.h"
#include "kernels.h"
#include "memory.h"
#include "model.h"
#include "threads.h"

namespace powerinfer {

namespace {

double cpu_seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Most memory that this program has held: getrusage would count what its parent held when it was started.
uint64_t peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    uint64_t kib = 0;
    if (word == "VmHWM:" && status >> kib) return kib << 10;
  }
  return 0;
}

struct Timer {
  std::chrono::steady_clock::time_point wall = std::chrono::steady_clock::now();
  double cpu = cpu_seconds();

  nlohmann::json rate(double count) const {
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - wall).count();
    return {{"per_second", count / seconds}, {"per_cpu_second", count / (cpu_seconds() - cpu)}, {"seconds", seconds}};
  }

  // What has passed since another timer began does not count.
  void leave_out(const Timer& other) {
    wall += std::chrono::steady_clock::now() - other.wall;
    cpu += cpu_seconds() - other.cpu;
  }
};

std::vector<int32_t> read_tokens(const std::string& path) {
  std::ifstream file(path);
  std::vector<int32_t> tokens;
  for (int32_t token; file >> token;) tokens.push_back(token);
  if (!file.eof() || tokens.empty())
    throw Error(ErrorKind::kUsage, path + " is no file of token ids, numbers with spaces between");
  return tokens;
}

// Forward passes over the tokens as a prompt, or one by one; each token's logits to `use`, whose time does not count.
template <typename Use>
nlohmann::json run_tokens(Model& model, const std::vector<int32_t>& tokens, int together, bool prompt, Use use) {
  const auto vocabulary = static_cast<size_t>(model.info().vocabulary);
  std::vector<float> logits(vocabulary * together);
  model.truncate(0, 0);
  Timer timer;
  for (size_t at = 0; at < tokens.size(); at += together) {
    const int count = static_cast<int>(std::min<size_t>(together, tokens.size() - at));
    model.forward({{0, static_cast<int>(at), tokens.data() + at, count, prompt, logits.data(), true}});
    const Timer using_them;
    for (int t = 0; t < count; ++t) use(at + t, logits.data() + t * vocabulary);
    timer.leave_out(using_them);
  }
  return timer.rate(static_cast<double>(tokens.size()));
}

double log_likelihood(const float* logits, size_t vocabulary, int32_t token) {
  const float largest = *std::max_element(logits, logits + vocabulary);
  double total = 0;
  for (size_t i = 0; i < vocabulary; ++i) total += std::exp(static_cast<double>(logits[i] - largest));
  return logits[token] - largest - std::log(total);
}

// Bytes a second of reading the whole of a piece of memory, and a tenth of its rows, picked at random and in ascending
// order.
nlohmann::json memory_speed(int threads, size_t row_bytes) {
  constexpr size_t kBytes = size_t{1} << 30, kPiece = size_t{1} << 20, kRows = 64;
  if (row_bytes < 32 || row_bytes % 2 || row_bytes > kPiece) {
    throw Error(ErrorKind::kUsage,
                "--row-bytes is " + std::to_string(row_bytes) + "; even numbers from 32 to 2^20 are possible");
  }
  ThreadPool pool(threads);
  Memory memory(kBytes, "the measurement of its speed");
  pool.run(kBytes / kPiece, [&](int piece, int) { std::fill_n(memory.data() + piece * kPiece, kPiece, 1); });
  const size_t rows = kBytes / row_bytes;
  std::vector<uint32_t> picked;
  std::mt19937 random(1);
  for (uint32_t row = 0; row < rows; ++row) {
    if (random() % 10 == 0) picked.push_back(row);
  }
  const Kernels& best = kernels(detect_isa());
  const auto width = static_cast<int>(row_bytes / 2);
  const std::vector<float> ones(width, 1.0f);
  std::vector<double> wall[2], cpu[2];  // of reading, of gathering
  const auto time = [&](int which, size_t count, auto work) {
    Timer timer;
    pool.run(static_cast<int>(count / kRows), work);
    const auto rate = timer.rate(static_cast<double>(count / kRows * kRows * row_bytes));
    wall[which].push_back(rate["per_second"]);
    cpu[which].push_back(rate["per_cpu_second"]);
  };
  for (int round = 0; round < 5; ++round) {
    time(0, rows, [&](int chunk, int) {
      float y[kRows];
      best.rows_f16(memory.data() + chunk * kRows * row_bytes, row_bytes, kRows, width, ones.data(), width, 1, y, kRows);
    });
    time(1, picked.size(), [&](int chunk, int) {
      float y[kRows];
      const uint8_t* pointers[kRows];
      for (size_t i = 0; i < kRows; ++i) pointers[i] = memory.data() + picked[chunk * kRows + i] * row_bytes;
      best.gather_f16(pointers, kRows, width, ones.data(), y);
    });
  }
  const auto best_of = [](const std::vector<double>& rates) { return *std::max_element(rates.begin(), rates.end()); };
  return {{"read_per_second", best_of(wall[0])},
          {"read_per_cpu_second", best_of(cpu[0])},
          {"gather_per_second", best_of(wall[1])},
          {"gather_per_cpu_second", best_of(cpu[1])},
          {"row_bytes", row_bytes}};
}

struct Options {
  ModelOptions model;
  std::string path, tokens, logits, kv = "f16";
  int prompt = 0, decode = 32, concurrent = 1, repeat = 3, row_bytes = 0, together = 0;
  bool dense = false, sparse_prompt = false, likelihood = false;
};

void check_length(int64_t tokens, const ModelInfo& info) {
  if (tokens > info.context) {
    throw Error(ErrorKind::kUsage,
                std::to_string(tokens) + " tokens do not fit in a context of " + std::to_string(info.context));
  }
}

void check_options(const Options& options) {
  const auto check = [](const char* flag, int value, int least, int most) {
    if (value < least || value > most) {
      throw Error(ErrorKind::kUsage, std::string(flag) + " is " + std::to_string(value) + "; " + std::to_string(least) +
                                         " to " + std::to_string(most) + " are possible");
    }
  };
  check("--prompt", options.prompt, 0, 1 << 24);
  check("--decode", options.decode, 0, 1 << 24);
  check("--repeat", options.repeat, 1, 1 << 20);
  check("--together", options.together, 0, options.model.batch);
  check("--row-bytes", options.row_bytes, 0, 1 << 20);
  if (options.row_bytes % 2)
    throw Error(ErrorKind::kUsage,
                "--row-bytes is " + std::to_string(options.row_bytes) + "; fp16 numbers take an even number of bytes");
}

nlohmann::json speed(Model& model, const Options& options) {
  check_length(int64_t{std::max(options.prompt, 1)} + options.decode, model.info());
  nlohmann::json result;
  const int vocabulary = model.info().vocabulary, slots = options.concurrent;
  std::mt19937 random(2);
  std::vector<int32_t> prompt(std::max(options.prompt, 1));
  for (int32_t& token : prompt) token = static_cast<int32_t>(random() % vocabulary);
  std::vector<float> logits(static_cast<size_t>(vocabulary) * slots);
  std::vector<nlohmann::json> prompts, decodes;
  for (int round = 0; round < options.repeat; ++round) {
    for (int slot = 0; slot < slots; ++slot) model.truncate(slot, 0);
    Timer timer;
    for (int slot = 0; slot < slots; ++slot) {
      for (int at = 0; at < static_cast<int>(prompt.size()); at += options.model.batch) {
        const int count = std::min<int>(options.model.batch, static_cast<int>(prompt.size()) - at);
        model.forward({{slot, at, prompt.data() + at, count, true, logits.data(), false}});
      }
    }
    if (options.prompt) prompts.push_back(timer.rate(static_cast<double>(prompt.size()) * slots));
    std::vector<int32_t> next(slots);
    Timer decode;
    for (int step = 0; step < options.decode; ++step) {
      std::vector<Step> steps;
      for (int slot = 0; slot < slots; ++slot) {
        next[slot] = static_cast<int32_t>(random() % vocabulary);
        steps.push_back({slot, static_cast<int>(prompt.size()) + step, &next[slot], 1, false,
                         logits.data() + static_cast<size_t>(slot) * vocabulary, false});
      }
      model.forward(steps);
    }
    if (options.decode) decodes.push_back(decode.rate(static_cast<double>(options.decode) * slots));
  }
  result["prompt"] = prompts;
  result["decode"] = decodes;
  return result;
}

nlohmann::json run(const Options& options) {
  nlohmann::json result;
  if (options.row_bytes) {
    const int threads = options.model.threads ? options.model.threads : usable_cores();
    result["memory"] = memory_speed(threads, options.row_bytes);
    if (options.path.empty()) return result;
  }
  if (options.path.empty()) throw Error(ErrorKind::kUsage, "--model is missing");
  const auto model = Model::load(GgufFile::open(options.path), options.model);
  const ModelInfo& info = model->info();
  result["model"] = {{"architecture", info.architecture},
                     {"sparse", info.sparse},
                     {"isa", info.isa},
                     {"threads", info.threads},
                     {"weight_bytes", info.weight_bytes},
                     {"activation", info.activation},
                     {"kv_bytes_per_token", info.kv_bytes_per_token},
                     {"matrix_bytes", info.matrix_bytes},
                     {"ffn_bytes", info.ffn_bytes},
                     {"neuron_bytes", info.neuron_bytes}};
  if (options.tokens.empty()) {
    result.update(speed(*model, options));
  } else {
    const auto tokens = read_tokens(options.tokens);
    for (const int32_t token : tokens) {
      if (token < 0 || token >= info.vocabulary) {
        throw Error(ErrorKind::kUsage, options.tokens + " has the token id " + std::to_string(token) +
                                           "; the model's are 0 to " + std::to_string(info.vocabulary - 1));
      }
    }
    check_length(static_cast<int64_t>(tokens.size()), info);
    const int together = options.together ? options.together : options.model.batch;
    std::ofstream out;
    if (!options.logits.empty()) {
      out.open(options.logits, std::ios::binary);
      if (!out.is_open()) throw Error(ErrorKind::kFailed, "cannot write " + options.logits);
    }
    double total = 0;
    const auto use = [&](size_t t, const float* logits) {
      if (out.is_open()) out.write(reinterpret_cast<const char*>(logits), static_cast<std::streamsize>(info.vocabulary) * 4);
      if (t + 1 < tokens.size()) total += log_likelihood(logits, info.vocabulary, tokens[t + 1]);
    };
    result["run"] = run_tokens(*model, tokens, together, options.together != 1, use);
    if (tokens.size() > 1) {
      const double nll = -total / static_cast<double>(tokens.size() - 1);
      char hex[64];
      std::snprintf(hex, sizeof hex, "%a", nll);
      result["nll"] = nll;
      result["nll_bits"] = hex;
      result["perplexity"] = std::exp(nll);
    }
    if (out.is_open() && !out.flush()) throw Error(ErrorKind::kFailed, "cannot write " + options.logits);
  }
  const Model::Activity activity = model->activity();
  if (activity.total) result["active_share"] = static_cast<double>(activity.active) / static_cast<double>(activity.total);

  result["peak_rss_bytes"] = peak_memory();
  return result;
}

int main_bench(int argc, char** argv) {
  Options options;
  ModelOptions& model = options.model;
  Flags flags("powerinfer-bench", "measures a model; prints one JSON object");
  flags.add("--model", "FILE", "GGUF or PowerInfer (PWRI) file", &options.path);
  flags.add("--threads", "N", "threads; 0: one for each core", &model.threads);
  flags.add("--isa", "NAME", "plain, avx2 or avx512; the best one here if not given", &model.isa);
  flags.add("--prompt", "N", "tokens of the prompt (default 0)", &options.prompt);
  flags.add("--decode", "N", "tokens to decode (default 32)", &options.decode);
  flags.add("--concurrent", "N", "sequences at once (default 1)", &options.concurrent);
  flags.add("--repeat", "N", "rounds (default 3)", &options.repeat);
  flags.add("--batch", "N", "most tokens of one forward pass (default 512)", &model.batch);
  flags.add("--context", "N", "tokens of one sequence; 0: the model's", &model.context);
  flags.add("--activation", "NAME", "relu, silu or gelu in place of the file's", &model.activation);
  flags.add("--kv", "TYPE", "f16 or packed", &options.kv);
  flags.add("--dense", "compute every neuron of a sparse model", &options.dense);
  flags.add("--sparse-prompt", "use the predictor for prompts, too", &options.sparse_prompt);
  flags.add("--tokens", "FILE", "token ids to run instead of measuring speed; prints their mean negative log-likelihood",
            &options.tokens);
  flags.add("--logits", "FILE", "with --tokens: every token's logits, fp32", &options.logits);
  flags.add("--together", "N", "with --tokens: tokens of one pass; 1: as decoding does (default: the batch)",
            &options.together);
  flags.add("--row-bytes", "N", "measure the memory, gathering rows of so many bytes", &options.row_bytes);
  if (flags.parse(argc, argv)) {
    std::cout << flags.help();
    return 0;
  }
  if (options.kv != "f16" && options.kv != "packed") {
    throw Error(ErrorKind::kUsage, "--kv takes f16 or packed, got \"" + options.kv + "\"");
  }
  check_options(options);
  model.kv = options.kv == "f16" ? KvType::kF16 : KvType::kPacked;
  model.slots = options.concurrent;
  if (options.dense) model.decode_ffn = FfnMode::kDense;
  if (options.sparse_prompt) model.prompt_ffn = FfnMode::kSparse;
  std::cout << run(options).dump() << "\n";
  return 0;
}

}  // namespace

}  // namespace powerinfer

int main(int argc, char** argv) {
  try {
    return powerinfer::main_bench(argc, argv);
  } catch (const powerinfer::Error& error) {
    std::cerr << "powerinfer-bench: " << error.what() << "\n";
    return error.exit_status();
  } catch (const std::bad_alloc&) {
    std::cerr << "powerinfer-bench: out of memory\n";
    return static_cast<int>(powerinfer::ErrorKind::kMemory);
  } catch (const std::exception& error) {
    std::cerr << "powerinfer-bench: " << error.what() << "\n";
    return 1;
  }
}
