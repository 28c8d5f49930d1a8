// A test double of the model's forward pass and of the tokenizer: no neural network. Its logits are a function of the tokens
// of the sequence and of whether each of them came as a prompt token, and it checks how the scheduler uses it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "model.h"
#include "tokenizer.h"

namespace powerinfer {

class ToyModel : public Model {
 public:
  ToyModel(int vocabulary, int context, int slots, int batch);

  const ModelInfo& info() const override { return info_; }
  // Throws std::logic_error for steps that break the interface's rules.
  void forward(const std::vector<Step>& steps) override;
  int truncate(int slot, int count) override;
  Activity activity() const override { return {}; }
  uint64_t kv_bytes() const override { return 0; }

  // The logits after a sequence of which `prompt` leading tokens came as prompt.
  std::vector<float> logits(const std::vector<int32_t>& tokens, size_t prompt) const;
  // The tokens that greedy decoding gives after `prompt`.
  std::vector<int32_t> greedy(std::vector<int32_t> prompt, int count) const;

  std::function<void(const std::vector<Step>&)> on_forward;  // may throw: the pass fails then
  std::chrono::microseconds pass_time{0};
  bool loses_all = false;         // truncate keeps nothing, as a packed cache may
  int decoded_beside_prompt = 0;  // passes with both kinds of steps
  int largest_prompt_beside = 0;  // most prompt tokens of such a pass
  int prompt_tokens = 0;

 private:
  struct Held {
    int32_t token;
    bool prompt;
  };
  void row(const std::vector<Held>& held, size_t count, float* out) const;

  ModelInfo info_;
  int batch_;
  std::vector<std::vector<Held>> slots_;
};

// One token for each byte, then a few special ones.
class ToyTokenizer : public Tokenizer {
 public:
  static constexpr int32_t kBos = 256, kEos = 257, kImEnd = 258;

  std::vector<int32_t> encode(std::string_view text, bool add_special, bool parse_special) const override;
  std::string token_bytes(int32_t token, bool with_special) const override;
  std::string decode(const std::vector<int32_t>& tokens, bool with_special) const override;
  int32_t vocabulary_size() const override { return 260; }
  int32_t bos() const override { return kBos; }
  int32_t eos() const override { return kEos; }
  bool ends_generation(int32_t token) const override { return token == kEos || token == kImEnd; }
  bool leading_space() const override { return false; }
};

}  // namespace powerinfer
