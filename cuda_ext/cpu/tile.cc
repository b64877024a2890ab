#include "cpu/tile.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Bits of one neuron stand in as many words as there are columns; gathered first, they become floats by whole vectors.
void unpack(const uint32_t* rows, int64_t inputs, int64_t count, int64_t stride, float* tile) {
  constexpr int64_t kBits = 32;
  const int64_t words = (inputs + kBits - 1) / kBits;
  std::vector<uint32_t> gathered(stride);
  for (int64_t word = 0; word < words; ++word) {
    for (int64_t column = 0; column < count; ++column) gathered[column] = rows[column * words + word];
    const int64_t bits = std::min(kBits, inputs - word * kBits);
    for (int64_t bit = 0; bit < bits; ++bit, tile += stride) {
      for (int64_t column = 0; column < stride; ++column) {
        tile[column] = static_cast<float>(static_cast<int32_t>(gathered[column] >> bit & 1u));
      }
    }
  }
}

}  // namespace

Buffer::Buffer(int64_t floats) {
  constexpr int64_t kCacheLine = 64, kHugePage = int64_t{2} << 20;
  const int64_t wanted = std::max<int64_t>(floats, 1) * static_cast<int64_t>(sizeof(float));
  const int64_t alignment = wanted >= kHugePage ? kHugePage : kCacheLine;
  const int64_t bytes = (wanted + alignment - 1) / alignment * alignment;
  data_.reset(static_cast<float*>(std::aligned_alloc(alignment, bytes)));
  if (!data_) throw std::bad_alloc();
#ifdef __linux__
  // A wide tile's rows lie on more small pages than the processor keeps translations of. Only a hint, hence the
  // rounding down: a last huge page that is used in part would cost memory.
  if (alignment == kHugePage) madvise(data_.get(), wanted / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

void Buffer::Free::operator()(float* pointer) const { std::free(pointer); }

int64_t choose_stride(int64_t neurons, int64_t features, int threads) {
  constexpr int64_t kMaxStride = 64, kMinStride = 16;
  constexpr int64_t kTileMemory = int64_t{16} << 20;  // a thread's share of the last-level cache
  int64_t stride = kMaxStride;
  const auto too_large = [&] { return neurons * stride * static_cast<int64_t>(sizeof(float)) > kTileMemory; };
  const auto too_few = [&] { return features <= (threads - 1) * stride; };
  while (stride > kMinStride && (too_large() || too_few())) stride /= 2;
  return stride;
}

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
      return transpose(
          [&](int64_t column, int64_t neuron) { return static_cast<float>(rows[column * inputs + neuron]); }, inputs,
          count, stride, data);
    }
    case InputType::kPacked: {
      const int64_t words = (inputs + 31) / 32;
      return unpack(static_cast<const uint32_t*>(input.data) + first * words, inputs, count, stride, data);
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

void store_rows(const Tile& tile, const std::vector<int>& columns, int64_t stride, const int32_t* slot_of,
                int64_t outputs, float* result) {
  const float* data = tile.buffer.data();
  for (int64_t block = 0; block < outputs; block += kBlock) {
    const int64_t end = std::min(block + kBlock, outputs);
    for (int column : columns) {
      float* row = result + tile.features[column] * outputs;
      for (int64_t j = block; j < end; ++j) row[j] = data[(slot_of ? slot_of[j] : j) * stride + column];
    }
  }
}

}  // namespace spdnn::cpu
