#include "buffers.h"

#include <algorithm>
#include <initializer_list>

#include "kernels.h"
#include "memory.h"

namespace powerinfer {

namespace {

constexpr int kSlabNeurons = 32;  // slabs of neurons are multiples of it
constexpr int kSlabTokens = 8;    // slabs of tokens are, where they can be

template <typename T>
uint64_t bytes_of(std::initializer_list<const std::vector<T>*> buffers) {
  uint64_t sum = 0;
  for (const std::vector<T>* buffer : buffers) sum += buffer->capacity() * sizeof(T);
  return sum;
}

}  // namespace

int even_slab(int total, int most, int unit) {
  const int pieces = std::max(1, (total + most - 1) / most);
  return std::min(most, static_cast<int>(round_up((total + pieces - 1) / pieces, unit)));
}

void TokenNeurons::reserve(int ffn) {
  ids.reserve(static_cast<size_t>(ffn) + 16);  // what Kernels::compact may overwrite
  h.reserve(ffn);
  rows.reserve(ffn);
  weights.reserve(ffn);
  group_begin.reserve(ffn / kCoefficientNeurons + 2);
}

size_t TokenNeurons::bytes(int ffn) {
  TokenNeurons token;
  token.reserve(ffn);
  return bytes_of({&token.h, &token.weights}) + bytes_of({&token.ids}) + bytes_of({&token.rows}) +
         bytes_of({&token.group_begin});
}

FfnBuffers::FfnBuffers(const BufferShape& shape) : ffn(shape.ffn) {
  const auto wide = static_cast<size_t>(shape.ffn), batch = static_cast<size_t>(shape.batch);
  // of one token: what gate has to hold in turn
  const size_t token = std::max(wide, ActivationLayout(shape.ffn).bytes / sizeof(float));
  size_t hidden = std::min(batch * token, shape.hidden_bytes / (2 * sizeof(float)));
  hidden = std::max({hidden, token, batch * kSlabNeurons});
  if (shape.rank) {
    // as many as decode together, in any case
    const size_t fit = shape.hidden_bytes / 2 / TokenNeurons::bytes(shape.ffn);
    sparse_tokens = static_cast<int>(std::min(std::max<size_t>(shape.slots, fit), batch));
    hidden = std::max(hidden, sparse_tokens * wide);
    predictor.resize(static_cast<size_t>(sparse_tokens) * shape.rank + 16);
    predictor_activations.resize(sparse_tokens * ActivationLayout(std::max(shape.width, shape.rank)).bytes);
  }
  dense_tokens = static_cast<int>(std::min(batch, hidden / token));
  if (dense_tokens > kSlabTokens) dense_tokens -= dense_tokens % kSlabTokens;
  // 16 more: stores of whole vectors
  gate.resize(hidden + 16);
  up.resize(hidden + 16);
}

uint64_t FfnBuffers::bytes() const {
  const uint64_t list = sparse_tokens ? sparse_tokens * (TokenNeurons::bytes(ffn) + sizeof(TokenNeurons)) : 0;
  return bytes_of({&gate, &up, &predictor}) + bytes_of({&predictor_activations}) + list;
}

int FfnBuffers::slab_neurons(int n) const {
  const size_t fit = (gate.size() - 16) / n / kSlabNeurons * kSlabNeurons;
  return even_slab(ffn, static_cast<int>(std::min(fit, round_up(ffn, kSlabNeurons))), kSlabNeurons);
}

PassBuffers::PassBuffers(const BufferShape& shape) : ffn(shape) {
  const auto n = static_cast<size_t>(shape.batch);
  const size_t width = shape.width, q_size = static_cast<size_t>(shape.heads) * shape.head_size;
  const size_t kv_size = static_cast<size_t>(shape.kv_heads) * shape.head_size;
  for (auto* buffer : {&x, &normed}) buffer->resize(n * width);
  if (shape.parallel) layer_input.resize(n * width), ffn_normed.resize(n * width);
  q.resize(n * std::max(q_size, round_up(width, 128)));
  for (auto* buffer : {&k, &v}) buffer->resize(n * kv_size);
  if (shape.fused_qkv) qkv.resize(n * (q_size + 2 * kv_size));
  for (auto* buffer : {&cosine, &sine}) buffer->resize(n * (shape.rope_size / 2));
  activations.resize(n * ActivationLayout(std::max(shape.width, static_cast<int>(q_size))).bytes);
  logits.reserve(kLogitsTogether * shape.vocabulary);
  ffn.out = q.data();
  ffn.activations = activations.data();
}

uint64_t PassBuffers::bytes() const {
  return bytes_of({&x, &normed, &layer_input, &ffn_normed, &q, &k, &v, &qkv, &cosine, &sine, &logits}) +
         bytes_of({&activations}) + ffn.bytes();
}

}  // namespace powerinfer
