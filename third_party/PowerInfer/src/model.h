// A model in memory and its forward pass: what the scheduler and the benchmark call.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "buffers.h"
#include "gguf.h"

namespace powerinfer {

enum class KvType { kF16, kPacked };     // kPacked: keys 4 bits, values 2 bits, newest and first tokens exact
enum class FfnMode { kSparse, kDense };  // how a PWRI file's FFN is computed

struct ModelOptions {
  int threads = 0;  // 0: one for each physical core that this process may use
  int slots = 1;    // sequences at once
  int context = 0;  // tokens of one sequence, prompt and answer; 0: the model's own
  int batch = 512;  // most tokens in one forward pass
  KvType kv = KvType::kF16;
  FfnMode decode_ffn = FfnMode::kSparse;
  FfnMode prompt_ffn = FfnMode::kDense;  // dense: every neuron, the activation applied
  std::string activation;                // "relu", "silu" or "gelu" in place of the file's; "" as the file says
  size_t hidden_bytes = kHiddenBytes;    // bounds the buffers that are as wide as the FFN
  std::string isa;                       // "plain", "avx2", "avx512": instruction set; "" the best one here
};

struct ModelInfo {
  std::string name;          // general.name or the file's name
  std::string architecture;  // llama, bamboo, falcon, opt
  std::string activation;    // relu, silu or gelu
  std::string isa;
  bool sparse = false;  // has predictors (PWRI)
  int layers = 0, width = 0, heads = 0, kv_heads = 0, head_size = 0, ffn = 0, vocabulary = 0;
  int context = 0;  // tokens of one sequence
  int slots = 0, threads = 0;
  uint64_t weight_bytes = 0;
  // What decoding one token reads: every byte of the first, the active neurons' share of the second.
  uint64_t matrix_bytes = 0, ffn_bytes = 0;
  uint64_t neuron_bytes = 0;        // of one neuron's bundle
  uint64_t kv_bytes_per_token = 0;  // of a long sequence
};

// The next tokens of one sequence in one forward pass.
struct Step {
  int slot;      // 0 .. slots - 1
  int position;  // of the first token: the number of tokens that the slot holds
  const int32_t* tokens;
  int count;
  bool prompt;              // prompt tokens go through prompt_ffn, others through decode_ffn
  float* logits = nullptr;  // [vocabulary] of the last token, or [count, vocabulary] with all_logits; nullptr: none
  bool all_logits = false;
};

class Model {
 public:
  // Throws Error(kModel) for a file that cannot be run, Error(kMemory), Error(kUsage) for options that cannot hold.
  static std::unique_ptr<Model> load(const GgufFile& file, const ModelOptions& options);
  virtual ~Model() = default;

  virtual const ModelInfo& info() const = 0;
  // One pass over all steps (at most one for each slot, at most `batch` tokens together). The logits of a token do not
  // depend on what else is in the pass, on how its prompt was cut into passes, nor on the number of threads.
  virtual void forward(const std::vector<Step>& steps) = 0;
  // Forgets a slot's tokens from `count` on, or all of them where a packed cache no longer has what the others need; returns
  // how many it still holds: `count` or 0.
  virtual int truncate(int slot, int count) = 0;

  // Since the start: neurons computed and neurons there were, over sparse passes.
  struct Activity {
    uint64_t active = 0, total = 0;
  };
  virtual Activity activity() const = 0;
  virtual uint64_t kv_bytes() const = 0;  // held by the slots now
};

}  // namespace powerinfer
