#include "bundle.h"

#include <algorithm>
#include <cstring>

#include "errors.h"
#include "file_blocks.h"

namespace powerinfer {

namespace {

// A Q4_0 row of the file to codes in lanes and their scales.
void pack_lanes(const uint8_t* row, int width, uint8_t* codes, uint8_t* scales) {
  const int blocks = width / kBlock;
  for (int b = 0; b < blocks; ++b) {
    const auto& block = block_at<BlockQ4_0>(row, b);
    const int group = b / 16, lanes = std::min(16, blocks - 16 * group);
    uint8_t* at = codes + group * 256 + b % 16 * 4;
    for (int c = 0; c < kBlock; ++c) {
      uint8_t& byte = at[c / 8 * 4 * lanes + c % 4];
      byte = static_cast<uint8_t>(byte | q4_code(block.codes, c) << (c / 4 % 2 * 4));
    }
    std::memcpy(scales + 2 * b, block.scale, 2);
  }
}

// A Q4_0 row of the file to codes in columns and their scales.
void pack_columns(const uint8_t* row, int width, uint8_t* codes, uint8_t* scales) {
  for (int c = 0; c < width; ++c) {
    const auto& block = block_at<BlockQ4_0>(row, c / kBlock);
    const int within = c % 128, nibble = within / 32, half = within / 16 % 2, q = within % 16 / 4, p = within % 4;
    uint8_t& byte = codes[c / 128 * 64 + 2 * (8 * q + 4 * half + p) + nibble / 2];
    byte = static_cast<uint8_t>(byte | q4_code(block.codes, c % kBlock) << (nibble % 2 * 4));
    if (c % kBlock == 0) std::memcpy(scales + c / kBlock * 2, block.scale, 2);
  }
}

}  // namespace

BundleLayout::BundleLayout(TensorType type_, int width_, bool gated_) : type(type_), width(width_), gated(gated_) {
  const auto n = static_cast<size_t>(width);
  if (type == TensorType::kQ4_0) {
    const size_t row = n / 2 + n / 16;
    gate_scales = up_scales = n / 2;
    up = gated ? row : 0;
    down = round_up(up + row, 64);
    down_scales = round_up(n, 128) / 2;
    bytes = round_up(down + down_scales + round_up(n, 128) / 16, 64);
  } else {
    const size_t row = n * (type == TensorType::kF16 ? 2 : 4);
    up = gated ? row : 0;
    down = up + row;
    bytes = round_up(down + row, 64);
  }
}

BundleLayout bundle_layout(const GgufFile& file, const GgufTensor* gate, const GgufTensor& up, const GgufTensor& down) {
  const TensorType type = up.type;
  const bool known = type == TensorType::kF32 || type == TensorType::kF16 || type == TensorType::kQ4_0;
  if (!known || down.type != type || (gate && gate->type != type)) {
    throw model_error(file.name() + " has a sparse FFN of " + (gate ? type_name(gate->type) + " (gate), " : "") +
                      type_name(type) + " (" + up.name + ") and " + type_name(down.type) + " (" + down.name +
                      "); all must be F16, all F32 or all Q4_0");
  }
  return BundleLayout(type, static_cast<int>(up.shape[0]), gate != nullptr);
}

Bundles copy_bundles(const BundleLayout& layout, const GgufTensor* gate, const GgufTensor& up, const GgufTensor& down,
                     Memory& memory, ThreadPool& pool, const Copied& copied) {
  Bundles bundles;
  bundles.layout = layout;
  bundles.neurons = static_cast<int>(up.elements() / up.shape[0]);
  uint8_t* out = memory.take(layout.bytes * bundles.neurons);
  const size_t row_bytes = up.bytes / bundles.neurons;
  constexpr int kNeurons = 64;
  pool.run((bundles.neurons + kNeurons - 1) / kNeurons, [&](int chunk, int) {
    for (int i = chunk * kNeurons; i < std::min(bundles.neurons, (chunk + 1) * kNeurons); ++i) {
      uint8_t* at = out + i * layout.bytes;
      if (layout.type == TensorType::kQ4_0) {
        if (gate)
          pack_lanes(gate->data + i * row_bytes, layout.width, at + layout.gate, at + layout.gate + layout.gate_scales);
        pack_lanes(up.data + i * row_bytes, layout.width, at + layout.up, at + layout.up + layout.up_scales);
        pack_columns(down.data + i * row_bytes, layout.width, at + layout.down, at + layout.down + layout.down_scales);
      } else {
        if (gate) std::memcpy(at + layout.gate, gate->data + i * row_bytes, row_bytes);
        std::memcpy(at + layout.up, up.data + i * row_bytes, row_bytes);
        std::memcpy(at + layout.down, down.data + i * row_bytes, row_bytes);
      }
    }
    const int first = chunk * kNeurons, count = std::min(kNeurons, bundles.neurons - first);
    for (const GgufTensor* tensor : {gate, &up, &down}) {
      if (copied && tensor) copied(tensor->data + first * row_bytes, count * row_bytes);
    }
  });
  bundles.data = out;
  return bundles;
}

}  // namespace powerinfer
