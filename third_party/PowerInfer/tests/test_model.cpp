#include "model.h"

#include <doctest/doctest.h>

#include <fstream>
#include <functional>
#include <limits>

#include "errors.h"
#include "gguf.h"
#include "model_file.h"

using namespace powerinfer;
using namespace powerinfer::testing;

namespace {

const char* const kArchitectures[] = {"llama", "bamboo", "falcon", "opt"};

std::vector<ModelShape> shapes() {
  std::vector<ModelShape> all;
  for (const char* architecture : kArchitectures) {
    for (const bool sparse : {true, false}) {
      for (const TensorType type : {TensorType::kF16, TensorType::kF32, TensorType::kQ4_0}) {
        ModelShape shape;
        shape.architecture = architecture, shape.sparse = sparse, shape.type = type;
        // dense Q4_0 has rows as long as the ffn
        shape.ffn = type == TensorType::kQ4_0 ? 96 : 88;
        if (shape.architecture == "falcon") shape.kv_heads = 1;
        if (shape.architecture == "opt") shape.kv_heads = shape.heads;
        all.push_back(shape);
      }
    }
  }
  return all;
}

std::string describe(const ModelShape& s) {
  return s.architecture + (s.sparse ? " sparse " : " dense ") + type_name(s.type);
}

std::unique_ptr<Model> load(const std::vector<uint8_t>& bytes, ModelOptions options = {}) {
  if (options.threads == 0) options.threads = 1;
  if (options.batch == 512) options.batch = std::max(32, options.slots);
  return Model::load(GgufFile::parse(bytes), options);
}

std::vector<int32_t> token_ids(int count, int vocabulary, uint32_t seed = 5) {
  Random random(seed);
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = random.below(vocabulary);
  return ids;
}

// Every token's logits; `pieces` tokens at a time, from the slot's position on.
std::vector<float> run(Model& model, const std::vector<int32_t>& ids, const std::vector<int>& pieces, bool prompt = true,
                       int slot = 0, int position = 0) {
  const auto vocabulary = static_cast<size_t>(model.info().vocabulary);
  std::vector<float> logits(ids.size() * vocabulary);
  size_t at = 0;
  for (size_t i = 0; at < ids.size(); ++i) {
    const int count = std::min<int>(pieces[i % pieces.size()], static_cast<int>(ids.size() - at));
    model.forward(
        {{slot, position + static_cast<int>(at), ids.data() + at, count, prompt, logits.data() + at * vocabulary, true}});
    at += count;
  }
  return logits;
}

double relative_error(const std::vector<float>& got, const std::vector<float>& want) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(static_cast<double>(got[i]) - want[i], 2);
    size += std::pow(static_cast<double>(want[i]), 2);
  }
  return std::sqrt(difference / size);
}

uint64_t peak_memory_mib() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    uint64_t kib = 0;
    if (word == "VmHWM:" && status >> kib) return kib >> 10;
  }
  return 0;
}

// Loads and, where that works, runs a model that may be damaged: nothing but an Error(kModel), kMemory or, of a context or a
// batch that the file makes impossible, kUsage may come of it. Whether it loaded.
bool survives(const std::vector<uint8_t>& bytes) {
  try {
    ModelOptions options;
    options.threads = 1, options.batch = 4;
    const auto model = Model::load(GgufFile::parse(bytes), options);
    std::vector<float> logits(model->info().vocabulary);
    const int32_t tokens[] = {0, model->info().vocabulary / 2, model->info().vocabulary - 1};
    const int count = std::min(3, model->info().context);
    model->forward({{0, 0, tokens, count, true, logits.data(), false}});
    if (model->info().context > count) model->forward({{0, count, tokens, 1, false, logits.data(), false}});
    return true;
  } catch (const Error& error) {
    const bool expected = error.kind() == ErrorKind::kModel || error.kind() == ErrorKind::kMemory;
    CAPTURE(error.what());
    CHECK(expected);
    return false;
  }
}

// The message of the Error(kModel) that loading these bytes gives.
std::string refusal(const ModelFile& file) {
  const auto bytes = file.bytes();
  try {
    load(bytes);
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::kModel);
    CHECK(std::string(error.what()).find('\n') == std::string::npos);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("logits do not depend on passes, threads, slots, instruction sets or what a slot held before") {
  for (const ModelShape& shape : shapes()) {
    CAPTURE(describe(shape));
    const auto bytes = make_model(shape).bytes();
    const auto ids = token_ids(29, shape.vocabulary), others = token_ids(29, shape.vocabulary, 6);
    for (const bool prompt : {true, false}) {
      CAPTURE(prompt);
      const auto model = load(bytes);
      const auto whole = run(*model, ids, {29}, prompt);
      for (const float logit : whole) REQUIRE(std::isfinite(logit));

      for (const std::vector<int>& pieces : {std::vector<int>{1}, {7}, {5, 1, 13, 2}, {16}}) {
        model->truncate(0, 0);
        CHECK(first_difference(run(*model, ids, pieces, prompt), whole) == -1);
      }
      // other tokens in the slot, then cut back to a common beginning
      const auto vocabulary = static_cast<size_t>(shape.vocabulary);
      model->truncate(0, 0);
      auto mixed = ids;
      std::copy(others.begin() + 11, others.end(), mixed.begin() + 11);
      run(*model, mixed, {29}, prompt);
      CHECK(model->truncate(0, 11) == 11);
      CHECK(first_difference(run(*model, {ids.begin() + 11, ids.end()}, {4}, prompt, 0, 11),
                             {whole.begin() + 11 * vocabulary, whole.end()}) == -1);

      for (const int threads : {2, 4}) {
        ModelOptions options;
        options.threads = threads;
        CHECK(first_difference(run(*load(bytes, options), ids, {29}, prompt), whole) == -1);
        CHECK(first_difference(run(*load(bytes, options), ids, {1}, prompt), whole) == -1);
      }
      for (const Kernels* kernels : all_kernels()) {
        ModelOptions options;
        options.isa = isa_name(kernels->isa);
        CHECK(first_difference(run(*load(bytes, options), ids, {29}, prompt), whole) == -1);
      }
      // three slots at once, at different positions, in prompts and decoding at the same time
      ModelOptions options;
      options.slots = 3, options.threads = 2;
      const auto many = load(bytes, options);
      const auto other_logits = run(*many, others, {29}, true, 1);
      many->truncate(1, 0);
      run(*many, {others.begin(), others.begin() + 3}, {3}, true, 1);
      run(*many, {others.begin(), others.begin() + 5}, {5}, true, 2);
      std::vector<float> got(whole.size()), theirs(vocabulary), also(vocabulary);
      int at = 0;
      for (int step = 0; at < 29; ++step) {
        const int count = std::min(1 + step % 3, 29 - at);
        many->forward({{1, 3 + step, &others[3 + step], 1, true, theirs.data(), false},
                       {0, at, &ids[at], count, prompt, got.data() + at * vocabulary, true},
                       {2, 5 + step, &others[5 + step], 1, false, also.data(), false}});
        CHECK(first_difference(theirs, {other_logits.begin() + (3 + step) * vocabulary,
                                        other_logits.begin() + (4 + step) * vocabulary}) == -1);
        at += count;
      }
      CHECK(first_difference(got, whole) == -1);
    }
  }
}

TEST_CASE("logits do not depend on the slabs that the FFN is computed in") {
  for (const ModelShape& shape : shapes()) {
    CAPTURE(describe(shape));
    const auto bytes = make_model(shape).bytes();
    const auto ids = token_ids(29, shape.vocabulary);
    for (const bool prompt : {true, false}) {
      CAPTURE(prompt);
      const auto whole = run(*load(bytes), ids, {29}, prompt);
      for (const size_t hidden_bytes : {size_t{0}, size_t{12} << 10}) {
        ModelOptions options;
        options.hidden_bytes = hidden_bytes;
        CAPTURE(hidden_bytes);
        CHECK(run(*load(bytes, options), ids, {29}, prompt) == whole);
      }
    }
  }
}

TEST_CASE("sparse is dense where the predictor is exact") {
  for (const ModelShape& shape : shapes()) {
    if (!shape.sparse) continue;
    CAPTURE(describe(shape));
    const auto bytes = make_model(shape).bytes();
    const auto ids = token_ids(29, shape.vocabulary);
    const auto sparse = load(bytes);
    const auto got = run(*sparse, ids, {1}, false);
    const auto activity = sparse->activity();
    CHECK(activity.total == uint64_t{29} * shape.layers * shape.ffn);
    CHECK(activity.active < activity.total * 3 / 4);
    CHECK(activity.active > activity.total / 4);

    ModelOptions dense;
    dense.decode_ffn = FfnMode::kDense;
    CHECK(first_difference(run(*load(bytes, dense), ids, {1}, false), got) == -1);
    ModelOptions sparse_prompt;
    sparse_prompt.prompt_ffn = FfnMode::kSparse;
    CHECK(first_difference(run(*load(bytes, sparse_prompt), ids, {13}, true), got) == -1);
    // prompts compute every neuron; in Q4_0 by other sums
    const auto prompt = run(*load(bytes), ids, {29}, true);
    if (shape.type == TensorType::kQ4_0) {
      CHECK(relative_error(prompt, got) < 1e-2);
    } else {
      CHECK(first_difference(prompt, got) == -1);
    }
  }
}

TEST_CASE("a neuron that the predictor leaves out is missing") {
  ModelShape shape;
  auto file = make_model(shape);
  const auto ids = token_ids(8, shape.vocabulary);
  const auto want = run(*load(file.bytes()), ids, {1}, false);
  file.values["powerinfer.sparse_threshold"] = 1e9f;
  const auto model = load(file.bytes());
  CHECK(relative_error(run(*model, ids, {1}, false), want) > 0.05);
  CHECK(model->activity().active == 0);
  // a score at the threshold counts as active
  file.values["powerinfer.sparse_threshold"] = 0.0f;
  for (int layer = 0; layer < shape.layers; ++layer) {
    auto& fc2 = file.tensors["blk." + std::to_string(layer) + ".fc2.weight"].bytes;
    std::fill(fc2.begin(), fc2.end(), 0);
  }
  CHECK(first_difference(run(*load(file.bytes()), ids, {1}, false), want) == -1);
}

TEST_CASE("the packed cache, too, does not depend on passes, threads and slots") {
  ModelShape shape;
  shape.width = 128, shape.heads = 2, shape.kv_heads = 1, shape.context = 256;
  const auto bytes = make_model(shape).bytes();
  const auto ids = token_ids(200, shape.vocabulary);
  ModelOptions options;
  options.kv = KvType::kPacked;
  const auto model = load(bytes, options);
  const auto whole = run(*model, ids, {32}, true);
  for (const std::vector<int>& pieces : {std::vector<int>{1}, {7, 19}}) {
    model->truncate(0, 0);
    CHECK(first_difference(run(*model, ids, pieces, true), whole) == -1);
  }
  options.threads = 3;
  CHECK(first_difference(run(*load(bytes, options), ids, {32}, true), whole) == -1);
  for (const Kernels* kernels : all_kernels()) {
    options.isa = isa_name(kernels->isa);
    CHECK(first_difference(run(*load(bytes, options), ids, {32}, true), whole) == -1);
  }
}

TEST_CASE("a pass that does not hold together is refused, and changes nothing") {
  ModelShape shape;
  ModelOptions options;
  options.slots = 2;
  const auto model = load(make_model(shape).bytes(), options);
  const auto ids = token_ids(64, shape.vocabulary);
  const auto want = run(*model, ids, {20}, true);
  model->truncate(0, 0);
  run(*model, {ids.begin(), ids.begin() + 10}, {10});
  const std::vector<int32_t> outside{0, shape.vocabulary}, negative{-1};
  const std::vector<std::vector<Step>> refused{
      {{0, 9, ids.data(), 1, true}},  // not the next position
      {{0, 11, ids.data(), 1, true}},
      {{0, 10, ids.data(), 0, true}},  // no tokens
      {{0, 10, ids.data(), -3, true}},
      {{2, 0, ids.data(), 1, true}},  // no such slot
      {{-1, 0, ids.data(), 1, true}},
      {{0, 10, ids.data(), 1, true}, {0, 10, ids.data(), 1, true}},   // a slot twice
      {{0, 10, ids.data(), 33, true}},                                // more than the batch
      {{0, 10, ids.data(), 20, true}, {1, 0, ids.data(), 20, true}},  // the two together
      {{0, 10, ids.data(), std::numeric_limits<int>::max(), true}},
      {{0, 10, outside.data(), 2, true}},  // ids outside the vocabulary
      {{1, 0, ids.data(), 1, true}, {0, 10, negative.data(), 1, true}},
  };
  for (const auto& steps : refused) CHECK_THROWS_AS(model->forward(steps), Error);
  model->forward({});
  const auto rest = run(*model, {ids.begin() + 10, ids.begin() + 64}, {20}, true, 0, 10);
  CHECK(first_difference(rest, {want.begin() + 10L * shape.vocabulary, want.end()}) == -1);
  // the context is full
  CHECK_THROWS_AS(model->forward({{0, 64, ids.data(), 1, true}}), Error);
  CHECK(model->truncate(1, 5) == 0);
}

TEST_CASE("options that cannot hold are usage errors") {
  ModelShape shape;
  const auto bytes = make_model(shape).bytes();
  const auto kind = [&](const std::function<void(ModelOptions&)>& change) {
    ModelOptions options;
    options.threads = 1, options.batch = 8;
    change(options);
    try {
      Model::load(GgufFile::parse(bytes), options);
    } catch (const Error& error) {
      return error.kind();
    }
    return ErrorKind::kFailed;
  };
  CHECK(kind([](ModelOptions& o) { o.threads = -1; }) == ErrorKind::kUsage);
  CHECK(kind([](ModelOptions& o) { o.threads = 2000; }) == ErrorKind::kUsage);
  CHECK(kind([](ModelOptions& o) { o.slots = 0; }) == ErrorKind::kUsage);
  CHECK(kind([](ModelOptions& o) { o.slots = 9; }) == ErrorKind::kUsage);
  CHECK(kind([](ModelOptions& o) { o.batch = 0; }) == ErrorKind::kUsage);
  CHECK(kind([](ModelOptions& o) { o.batch = 1 << 20; }) == ErrorKind::kUsage);
  CHECK(kind([](ModelOptions& o) { o.context = 65; }) == ErrorKind::kUsage);
  CHECK(kind([](ModelOptions& o) { o.context = -1; }) == ErrorKind::kUsage);
  CHECK(kind([](ModelOptions& o) { o.isa = "sse"; }) == ErrorKind::kUsage);
  CHECK(kind([](ModelOptions& o) { o.activation = "silu"; }) == ErrorKind::kUsage);
  CHECK(kind([](ModelOptions& o) { o.activation = "tanh"; }) == ErrorKind::kUsage);
  CHECK(kind([](ModelOptions& o) { o.kv = KvType::kPacked; }) == ErrorKind::kUsage);  // heads of 16
}

TEST_CASE("a model without one of its tensors is refused by name") {
  for (const ModelShape& shape : shapes()) {
    if (shape.type != TensorType::kF16) continue;
    CAPTURE(describe(shape));
    const ModelFile whole = make_model(shape);
    CHECK(refusal(whole).empty());
    for (const auto& entry : whole.tensors) {
      const std::string& name = entry.first;
      if (name == "output.weight") continue;  // the embedding takes its place
      CAPTURE(name);
      ModelFile file = whole;
      file.tensors.erase(name);
      const std::string message = refusal(file);
      CHECK(message.find(name) != std::string::npos);
    }
  }
}

TEST_CASE("tensors of another shape or type are refused by name") {
  for (const ModelShape& shape : shapes()) {
    if (shape.type != TensorType::kF16) continue;
    CAPTURE(describe(shape));
    const ModelFile whole = make_model(shape);
    for (const auto& entry : whole.tensors) {
      const std::string& name = entry.first;
      CAPTURE(name);
      const auto& have = entry.second.shape;
      std::vector<std::vector<uint64_t>> wrong;
      for (size_t d = 0; d < have.size(); ++d) {
        // the embedding's rows are the vocabulary, fc1's the rank, the positions' the context: any number of them may do
        for (const uint64_t n : {uint64_t{0}, have[d] - 1, uint64_t{1}, have[d] + 32, uint64_t{1} << 39}) {
          wrong.push_back(have);
          wrong.back()[d] = n;
        }
      }
      wrong.push_back({0}), wrong.push_back({0, 0}), wrong.push_back({have[0], 0}), wrong.push_back({have[0]});
      wrong.push_back({have[0], have.back(), 2});
      if (have.size() == 2) wrong.push_back({have[1], have[0]});
      if (have.size() == 2) wrong.push_back({have[0] * have[1]});
      for (const auto& dimensions : wrong) {
        ModelFile file = whole;
        auto& changed = file.tensors[name];
        changed.shape = dimensions;
        uint64_t elements = 1;
        for (const uint64_t n : dimensions) elements *= n;
        if (elements > 1 << 20) elements = 0;  // the file ends inside it
        changed.bytes.resize(elements * block_size(changed.type).bytes);
        const bool any_rows = name == "position_embd.weight" || name == "token_embd.weight" || name.ends_with("fc1.weight");
        if (dimensions == have || any_rows) {
          survives(file.bytes());
        } else {
          CHECK(!survives(file.bytes()));
        }
      }
      for (const uint32_t type : {2u, 3u, 8u, 12u, 14u, 10u, 24u, 26u, 27u, 28u, 30u, 99u}) {
        ModelFile file = whole;
        auto& changed = file.tensors[name];
        changed.type = static_cast<TensorType>(type);
        changed.bytes.resize(changed.bytes.size() * 4);
        survives(file.bytes());
        if (have.size() == 1 || type == 12 || type >= 24) CHECK(!survives(file.bytes()));
      }
    }
  }
}

TEST_CASE("weights that nothing reads are refused") {
  for (const char* name : {"blk.0.attn_q.bias", "blk.1.ffn_up.bias", "blk.2.attn_norm.weight", "blk.0.attn_q_norm.weight",
                           "blk.0.ffn_gate_inp.weight", "blk.0.ffn_down.weight"}) {
    ModelFile file = make_model({});
    file.tensors[name] = file.tensors["blk.0.attn_norm.weight"];
    CHECK(refusal(file).find(name) != std::string::npos);
  }
  ModelFile file = make_model({});
  file.tensors["blk.0.attn_rot_embd.weight"] = file.tensors["blk.0.attn_norm.weight"];
  file.tensors["other"] = file.tensors["blk.0.attn_norm.weight"];
  CHECK(refusal(file).empty());
}

TEST_CASE("numbers that cannot be are refused, or run") {
  const uint64_t before = peak_memory_mib();
  const std::vector<ModelFile::Value> absurd{
      uint32_t{0},
      uint32_t{1},
      uint32_t{2},
      uint32_t{3},
      uint32_t{7},
      uint32_t{31},
      uint32_t{32},
      uint32_t{33},
      uint32_t{96},
      uint32_t{1024},
      uint32_t{1 << 16},
      uint32_t{1 << 20},
      uint32_t{1 << 24},
      uint32_t{1} << 31,
      uint32_t{0xffffffff},
      uint64_t{1} << 32,
      ~uint64_t{0},
      int32_t{-1},
      std::string("sixteen"),
      0.5f,
      std::numeric_limits<float>::quiet_NaN(),
  };
  for (const char* architecture : kArchitectures) {
    for (const bool sparse : {true, false}) {
      ModelShape shape;
      shape.architecture = architecture, shape.sparse = sparse, shape.kv_heads = shape.architecture == "opt" ? 4 : 1;
      const ModelFile whole = make_model(shape);
      std::vector<std::string> keys;
      for (const auto& [key, value] : whole.values) keys.push_back(key);
      const std::string prefix = shape.architecture + ".";
      for (const char* key : {"attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
                              "rope.scale_linear", "rope.scaling.factor"}) {
        keys.push_back(prefix + key);
      }
      keys.push_back("general.alignment"), keys.push_back("general.name"), keys.push_back("powerinfer.activation");
      for (const std::string& key : keys) {
        CAPTURE(architecture);
        CAPTURE(key);
        for (const auto& value : absurd) {
          ModelFile file = whole;
          file.values[key] = value;
          survives(file.bytes());
        }
        const bool optional = key.find("head_count_kv") != std::string::npos || key.find("epsilon") != std::string::npos;
        ModelFile file = whole;
        file.values.erase(key);
        if (!whole.values.contains(key) || optional || key == "powerinfer.sparse_threshold" ||
            key == prefix + "rope.freq_base") {
          survives(file.bytes());
        } else {
          CHECK(refusal(file).find(key) != std::string::npos);
        }
      }
      for (const char* key : {"block_count", "embedding_length", "feed_forward_length", "attention.head_count"}) {
        for (const uint32_t value : {0u, 1u << 31, 0xffffffffu}) {
          ModelFile file = whole;
          file.values[prefix + key] = value;
          CHECK(refusal(file).find(key) != std::string::npos);
        }
      }
      ModelFile file = whole;
      file.values[prefix + "block_count"] = uint32_t{1};
      CHECK(refusal(file).find("blk.1.") != std::string::npos);
      file = whole;
      file.values["general.architecture"] = std::string("gpt2");
      CHECK(refusal(file).find("\"gpt2\"; llama, bamboo, falcon and opt") != std::string::npos);
      file = whole;
      file.values[prefix + "rope.scaling.type"] = std::string("yarn");
      if (shape.architecture != "opt") CHECK(refusal(file).find("yarn") != std::string::npos);
    }
  }
  CHECK(peak_memory_mib() < before + 300);
}

TEST_CASE("a KV cache beyond the address space is refused") {
  ModelShape shape;
  shape.type = TensorType::kF32, shape.sparse = false;
  ModelFile file = make_model(shape);
  file.values["llama.context_length"] = uint32_t{1 << 24};
  const auto bytes = file.bytes();
  ModelOptions options;
  options.threads = 1, options.slots = 1024, options.batch = 1024;
  // 2 layers, 1024 x 2^24 tokens, 2 x 2 heads of 16 halves: 2^42 bytes, which the system may promise or not
  try {
    Model::load(GgufFile::parse(bytes), options);
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::kMemory);
  }
}

TEST_CASE("files with flipped bytes and bits give an error or a model that runs") {
  Random random(77);
  const uint64_t before = peak_memory_mib();
  int loaded = 0, tried = 0;
  for (const char* architecture : kArchitectures) {
    for (const bool sparse : {true, false}) {
      for (const TensorType type : {TensorType::kF16, TensorType::kQ4_0}) {
        ModelShape shape{architecture, sparse, type, 1, 32, 2, 1, 32, 20, 16};
        if (shape.architecture == "opt") shape.kv_heads = 2;
        const ModelFile file = make_model(shape);
        const auto bytes = file.bytes();
        uint64_t data = 0;
        for (const auto& [name, tensor] : file.tensors) data += (tensor.bytes.size() + 31) / 32 * 32;
        const auto header = static_cast<int>(bytes.size() - data);
        REQUIRE(survives(bytes));
        for (int round = 0; round < 250; ++round, ++tried) {
          auto damaged = bytes;
          const int flips = 1 + random.below(3);
          for (int flip = 0; flip < flips; ++flip) {
            const int at = random.below(10) ? random.below(header) : random.below(static_cast<int>(bytes.size()));
            switch (random.below(3)) {
              case 0:
                damaged[at] ^= static_cast<uint8_t>(1 << random.below(8));
                break;
              case 1:
                damaged[at] = static_cast<uint8_t>(random.below(256));
                break;
              default:
                damaged[at] = random.below(2) ? 0xff : 0;
                break;
            }
          }
          if (random.below(20) == 0) damaged.resize(random.below(static_cast<int>(bytes.size())));
          damaged.shrink_to_fit();
          loaded += survives(damaged);
        }
      }
    }
  }
  // both happen
  CHECK(loaded > tried / 20);
  CHECK(loaded < tried * 19 / 20);
  CHECK(peak_memory_mib() < before + 300);
}
