#include "cpu/tile.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace spdnn::cpu {
namespace {

constexpr int64_t kBlock = 64;  // neurons transposed at a time: their rows of a tile stay in the first-level cache
constexpr int kSide = 4;        // of the square that is transposed in registers

typedef float Row __attribute__((vector_size(kSide * sizeof(float)), aligned(alignof(float)), may_alias));

// Elements a, b of x and c, d of y.
template <int a, int b, int c, int d>
inline Row pick(Row x, Row y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, a, b, kSide + c, kSide + d);
#else
  typedef int32_t Places __attribute__((vector_size(kSide * sizeof(int32_t))));
  return __builtin_shuffle(x, y, Places{a, b, kSide + c, kSide + d});
#endif
}

inline void transpose_square(const float* const (&from)[kSide], float* const (&to)[kSide]) {
  Row rows[kSide];
  for (int k = 0; k < kSide; ++k) rows[k] = *reinterpret_cast<const Row*>(from[k]);
  const Row low01 = pick<0, 1, 0, 1>(rows[0], rows[1]), low23 = pick<0, 1, 0, 1>(rows[2], rows[3]);
  const Row high01 = pick<2, 3, 2, 3>(rows[0], rows[1]), high23 = pick<2, 3, 2, 3>(rows[2], rows[3]);
  const Row columns[kSide] = {pick<0, 2, 0, 2>(low01, low23), pick<1, 3, 1, 3>(low01, low23),
                              pick<0, 2, 0, 2>(high01, high23), pick<1, 3, 1, 3>(high01, high23)};
  for (int k = 0; k < kSide; ++k) *reinterpret_cast<Row*>(to[k]) = columns[k];
}

struct Range {
  int64_t first, end;
};

// to(column)[row] = from(row)[column], where both return the first element of a row.
template <typename From, typename To>
void transpose(Range rows, Range columns, const From& from, const To& to) {
  for (int64_t c = columns.first; c < columns.end; c += kSide) {
    const int64_t end = std::min(c + kSide, columns.end);
    int64_t r = rows.first;
    for (; c + kSide == end && r + kSide <= rows.end; r += kSide) {
      transpose_square({from(r) + c, from(r + 1) + c, from(r + 2) + c, from(r + 3) + c},
                       {to(c) + r, to(c + 1) + r, to(c + 2) + r, to(c + 3) + r});
    }
    for (; r < rows.end; ++r) {
      for (int64_t k = c; k < end; ++k) to(k)[r] = from(r)[k];
    }
  }
}

// Values of `kBits` bits. Those of one neuron stand in as many words as there are columns; gathered first, they become
// floats by whole vectors.
template <int kBits>
void unpack(const char* rows, int64_t row_bytes, int64_t inputs, int64_t count, int64_t stride, float* tile) {
  constexpr int64_t kWordBytes = sizeof(uint32_t), kValues = 32 / kBits;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  std::vector<uint32_t> gathered(stride);
  for (int64_t first = 0; first < inputs; first += kValues) {
    const int64_t byte = first / kValues * kWordBytes;
    for (int64_t column = 0; column < count; ++column) {
      const char* word = rows + column * row_bytes + byte;
      if (byte + kWordBytes <= row_bytes) {
        std::memcpy(&gathered[column], word, kWordBytes);  // of a size that the compiler knows: one load
      } else {
        std::memcpy(&gathered[column], word, row_bytes - byte);
      }
    }
    const int64_t values = std::min(kValues, inputs - first);
    for (int64_t value = 0; value < values; ++value, tile += stride) {
      for (int64_t column = 0; column < stride; ++column) {
        tile[column] = static_cast<float>(static_cast<int32_t>(gathered[column] >> (value * kBits) & kMask));
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

void transpose_rows(const float* rows, int64_t width, int64_t count, int64_t stride, float* tile) {
  const auto feature = [&](int64_t column) { return rows + column * width; };
  const auto neuron_row = [&](int64_t neuron) { return tile + neuron * stride; };
  for (int64_t block = 0; block < width; block += kBlock) {
    const Range neurons{block, std::min(block + kBlock, width)};
    transpose({0, count}, neurons, feature, neuron_row);
    for (int64_t neuron = neurons.first; neuron < neurons.end; ++neuron) {
      std::fill(neuron_row(neuron) + count, neuron_row(neuron + 1), 0.0f);
    }
  }
}

void load_tile(const InputFeatures& input, int64_t first, int64_t count, int64_t stride, Tile& tile) {
  tile.columns.resize(count);
  for (int64_t column = 0; column < count; ++column) tile.columns[column] = {first + column};
  const int64_t inputs = input.inputs;
  float* data = tile.buffer.data();
  switch (input.type) {
    case InputType::kFloat32:
      return transpose_rows(static_cast<const float*>(input.data) + first * inputs, inputs, count, stride, data);
    case InputType::kUint8:
      return unpack<8>(static_cast<const char*>(input.data) + first * inputs, inputs, inputs, count, stride, data);
    case InputType::kPacked: {
      const int64_t row_bytes = (inputs + 31) / 32 * static_cast<int64_t>(sizeof(uint32_t));
      return unpack<1>(static_cast<const char*>(input.data) + first * row_bytes, row_bytes, inputs, count, stride,
                       data);
    }
  }
}

void move_columns(const Tile& from, const std::vector<int>& columns, int64_t width, int64_t stride, int64_t first,
                  Tile& to) {
  std::vector<Column> moved(to.columns.begin(), to.columns.begin() + first);
  for (int column : columns) moved.push_back(from.columns[column]);
  to.columns = std::move(moved);
  const float* source = from.buffer.data();
  float* target = to.buffer.data() + first;
  for (int64_t neuron = 0; neuron < width; ++neuron, source += stride, target += stride) {
    for (size_t k = 0; k < columns.size(); ++k) target[k] = source[columns[k]];
  }
}

void compare_columns(const Tile& tile, int reference, int64_t width, int64_t stride, uint32_t* differs) {
  std::fill_n(differs, stride, 0u);
  const float* row = tile.buffer.data();
  for (int64_t neuron = 0; neuron < width; ++neuron, row += stride) {
    const float x = row[reference];
    for (int64_t column = 0; column < stride; ++column) differs[column] |= row[column] != x;
  }
}

void store_rows(const Tile& tile, const std::vector<int>& columns, int64_t stride, const int32_t* slot_of,
                int64_t outputs, float* result) {
  const auto output_row = [&](int64_t j) { return tile.buffer.data() + (slot_of ? slot_of[j] : j) * stride; };
  const auto feature = [&](int64_t column) { return result + tile.columns[column].feature * outputs; };
  for (int64_t block = 0; block < outputs; block += kBlock) {
    const Range neurons{block, std::min(block + kBlock, outputs)};
    for (size_t k = 0; k < columns.size();) {
      Range side_by_side{columns[k], columns[k] + 1};
      while (++k < columns.size() && columns[k] == side_by_side.end) ++side_by_side.end;
      transpose(neurons, side_by_side, output_row, feature);
    }
  }
}

}  // namespace spdnn::cpu
