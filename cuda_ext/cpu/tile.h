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

struct Tile {
  Tile(int64_t floats) : buffer(floats) {}

  Buffer buffer;
  std::vector<int64_t> features;  // the caller's number of each column
};

// Features first .. first + count, which become the columns of `tile`; columns up to `stride` are zero.
void load_tile(const InputFeatures& input, int64_t first, int64_t count, int64_t stride, Tile& tile);

// Copies columns `columns` of `from`, ascending, to columns first, first + 1 .. of `to`, which then ends there. Both may be
// the same tile where `first` is 0.
void move_columns(const Tile& from, const std::vector<int>& columns, int64_t width, int64_t stride, int64_t first,
                  Tile& to);

// Writes column `column` as a row, output j from slot_of[j]; a null slot_of leaves the order as it is.
void store_row(const Tile& tile, int64_t column, int64_t stride, const int32_t* slot_of, int64_t outputs, float* row);

}  // namespace spdnn::cpu
