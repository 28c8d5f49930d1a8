#include "toy_model.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <thread>

namespace powerinfer {
namespace {

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdULL;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

void require(bool holds, const char* what) {
  if (!holds) throw std::logic_error(what);
}

}  // namespace

ToyModel::ToyModel(int vocabulary, int context, int slots, int batch) : batch_(batch), slots_(static_cast<size_t>(slots)) {
  info_.name = "toy";
  info_.vocabulary = vocabulary;
  info_.context = context;
  info_.slots = slots;
}

void ToyModel::forward(const std::vector<Step>& steps) {
  require(!steps.empty(), "a pass without steps");
  std::set<int> seen;
  int total = 0, prompt = 0, decode = 0;
  for (const Step& step : steps) {
    require(step.slot >= 0 && step.slot < info_.slots, "a slot that is none");
    require(seen.insert(step.slot).second, "two steps of one slot");
    require(step.count > 0, "an empty step");
    require(step.position == static_cast<int>(slots_[static_cast<size_t>(step.slot)].size()),
            "a position that does not follow");
    require(step.position + step.count <= info_.context, "more tokens than the context");
    require(step.prompt || step.count == 1, "several decoded tokens of one sequence");
    for (int i = 0; i < step.count; ++i) require(step.tokens[i] >= 0 && step.tokens[i] < info_.vocabulary, "no such token");
    total += step.count;
    (step.prompt ? prompt : decode) += step.count;
  }
  require(total <= batch_, "more tokens than the batch");
  prompt_tokens += prompt;
  if (decode > 0 && prompt > 0) {
    ++decoded_beside_prompt;
    largest_prompt_beside = std::max(largest_prompt_beside, prompt);
  }
  if (pass_time.count() > 0) std::this_thread::sleep_for(pass_time);
  if (on_forward) on_forward(steps);
  for (const Step& step : steps) {
    auto& held = slots_[static_cast<size_t>(step.slot)];
    for (int i = 0; i < step.count; ++i) {
      held.push_back({step.tokens[i], step.prompt});
      const bool wanted = step.logits && (step.all_logits || i + 1 == step.count);
      if (wanted)
        row(held, held.size(),
            step.logits + (step.all_logits ? static_cast<size_t>(i) * static_cast<size_t>(info_.vocabulary) : 0));
    }
  }
}

int ToyModel::truncate(int slot, int count) {
  auto& held = slots_.at(static_cast<size_t>(slot));
  require(count >= 0 && static_cast<size_t>(count) <= held.size(), "truncated to more than there is");
  if (loses_all) count = 0;
  held.resize(static_cast<size_t>(count));
  return count;
}

void ToyModel::row(const std::vector<Held>& held, size_t count, float* out) const {
  uint64_t hash = 1;
  for (size_t i = 0; i < count; ++i) hash = mix(hash * 3 + static_cast<uint64_t>(held[i].token) * 2 + held[i].prompt);
  for (int v = 0; v < info_.vocabulary; ++v) {
    out[v] = static_cast<float>(mix(hash + static_cast<uint64_t>(v) * 0x9e3779b97f4a7c15ULL) >> 40) * (8.0f / (1 << 24));
  }
}

std::vector<float> ToyModel::logits(const std::vector<int32_t>& tokens, size_t prompt) const {
  std::vector<Held> held;
  for (size_t i = 0; i < tokens.size(); ++i) held.push_back({tokens[i], i < prompt});
  std::vector<float> out(static_cast<size_t>(info_.vocabulary));
  row(held, held.size(), out.data());
  return out;
}

std::vector<int32_t> ToyModel::greedy(std::vector<int32_t> prompt, int count) const {
  const size_t prompt_size = prompt.size();
  std::vector<int32_t> result;
  for (int i = 0; i < count; ++i) {
    const std::vector<float> row = logits(prompt, prompt_size);
    const auto token = static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
    result.push_back(token);
    prompt.push_back(token);
  }
  return result;
}

std::vector<int32_t> ToyTokenizer::encode(std::string_view text, bool add_special, bool parse_special) const {
  std::vector<int32_t> tokens;
  if (add_special) tokens.push_back(kBos);
  while (!text.empty()) {
    if (parse_special && text.starts_with("<s>")) {
      tokens.push_back(kBos);
      text.remove_prefix(3);
    } else {
      tokens.push_back(static_cast<uint8_t>(text[0]));
      text.remove_prefix(1);
    }
  }
  return tokens;
}

std::string ToyTokenizer::token_bytes(int32_t token, bool with_special) const {
  if (token < 256) return std::string(1, static_cast<char>(token));
  if (!with_special) return "";
  return token == kBos ? "<s>" : token == kEos ? "</s>" : token == kImEnd ? "<|im_end|>" : "<unk>";
}

std::string ToyTokenizer::decode(const std::vector<int32_t>& tokens, bool with_special) const {
  std::string text;
  for (const int32_t token : tokens) text += token_bytes(token, with_special);
  return text;
}

}  // namespace powerinfer
