#include "cpu/tile.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

namespace spdnn::cpu {
namespace {

constexpr int64_t kBlock = 64;  // neurons transposed at a time: their rows of a tile stay in the first-level cache

template <typename Read>
void transpose(Read read, int64_t inputs, int64_t count, int64_t stride, float* tile) {
  for (int64_t block = 0; block < inputs; block += kBlock) {
    const int64_t end = std::min(block + kBlock, inputs);
    for (int64_t column = 0; column < count; ++column) {
      for (int64_t neuron = block; neuron < end; ++neuron) tile[neuron * stride + column] = read(column, neuron);
    }
    for (int64_t neuron = block; neuron < end; ++neuron) {
      std::fill(tile + neuron * stride + count, tile + (neuron + 1) * stride, 0.0f);
    }
  }
}

}  // namespace

Buffer::Buffer(int64_t floats) {
  constexpr int64_t kAlignment = 64;
  const int64_t bytes = (floats * static_cast<int64_t>(sizeof(float)) + kAlignment - 1) / kAlignment * kAlignment;
  data_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, std::max(bytes, kAlignment))));
  if (!data_) throw std::bad_alloc();
}

void Buffer::Free::operator()(float* pointer) const { std::free(pointer); }

void load_tile(const InputFeatures& input, int64_t first, int64_t count, int64_t stride, Tile& tile) {
  tile.features.resize(count);
  for (int64_t column = 0; column < count; ++column) tile.features[column] = first + column;
  const int64_t inputs = input.inputs;
  float* data = tile.buffer.data();
  switch (input.type) {
    case InputType::kFloat32: {
      const float* rows = static_cast<const float*>(input.data) + first * inputs;
      return transpose([&](int64_t column, int64_t neuron) { return rows[column * inputs + neuron]; }, inputs, count,
                       stride, data);
    }
    case InputType::kUint8: {
      const uint8_t* rows = static_cast<const uint8_t*>(input.data) + first * inputs;
      return transpose([&](int64_t column, int64_t neuron) { return static_cast<float>(rows[column * inputs + neuron]); },
                       inputs, count, stride, data);
    }
    case InputType::kPacked: {
      const int64_t words = (inputs + 31) / 32;
      const uint32_t* rows = static_cast<const uint32_t*>(input.data) + first * words;
      return transpose(
          [&](int64_t column, int64_t neuron) {
            return static_cast<float>(rows[column * words + neuron / 32] >> (neuron % 32) & 1u);
          },
          inputs, count, stride, data);
    }
  }
}

void move_columns(const Tile& from, const std::vector<int>& columns, int64_t width, int64_t stride, int64_t first,
                  Tile& to) {
  std::vector<int64_t> features(to.features.begin(), to.features.begin() + first);
  for (int column : columns) features.push_back(from.features[column]);
  to.features = std::move(features);
  const float* source = from.buffer.data();
  float* target = to.buffer.data() + first;
  for (int64_t neuron = 0; neuron < width; ++neuron, source += stride, target += stride) {
    for (size_t k = 0; k < columns.size(); ++k) target[k] = source[columns[k]];
  }
}

void store_row(const Tile& tile, int64_t column, int64_t stride, const int32_t* slot_of, int64_t outputs, float* row) {
  const float* data = tile.buffer.data() + column;
  for (int64_t j = 0; j < outputs; ++j) row[j] = data[(slot_of ? slot_of[j] : j) * stride];
}

}  // namespace spdnn::cpu
