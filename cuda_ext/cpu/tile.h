// A tile of features, [neuron][stride], and how features come into one and go out of one.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace spdnn::cpu {

enum class InputType { kFloat32, kUint8, kPacked };

// The caller's features, one a row.
struct InputFeatures {
  const void* data = nullptr;
  InputType type = InputType::kFloat32;
  int64_t inputs = 0;
};

// 64-byte aligned memory, uninitialised.
class Buffer {
 public:
  explicit Buffer(int64_t floats);
  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* pointer) const;
  };
  std::unique_ptr<float[], Free> data_;
};

// What a column of a tile stands for.
struct Column {
  int64_t feature;      // the caller's number of the feature it holds
  int64_t members = 1;  // that feature and those found equal to it
};

struct Tile {
  explicit Tile(int64_t floats) : buffer(floats) {}

  Buffer buffer;
  std::vector<Column> columns;
};

// The stride for two tiles of `neurons` rows together: as many features as the caches hold, but tiles enough for all
// threads. At least one vector of AVX-512, whatever the width.
int64_t choose_stride(int64_t neurons, int64_t features, int threads);

// Features first .. first + count, which become the columns of `tile`; columns up to `stride` are zero.
void load_tile(const InputFeatures& input, int64_t first, int64_t count, int64_t stride, Tile& tile);

// `count` rows of `width` floats, which become the columns of `tile`; columns up to `stride` are zero.
void transpose_rows(const float* rows, int64_t width, int64_t count, int64_t stride, float* tile);

// Copies columns `columns` of `from`, ascending, to columns first, first + 1 .. of `to`, which then ends there. Both
// may be the same tile where `first` is 0.
void move_columns(const Tile& from, const std::vector<int>& columns, int64_t width, int64_t stride, int64_t first,
                  Tile& to);

// Which columns differ from column `reference` in some of the first `width` neurons: (stride) zero or not. -0.0 is 0.0.
void compare_columns(const Tile& tile, int reference, int64_t width, int64_t stride, uint32_t* differs);

// Writes columns `columns` as rows of `result` (features, outputs), each where its feature stands; output j comes from
// slot_of[j], a null slot_of leaves the order as it is.
void store_rows(const Tile& tile, const std::vector<int>& columns, int64_t stride, const int32_t* slot_of,
                int64_t outputs, float* result);

}  // namespace spdnn::cpu
