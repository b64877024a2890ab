// One layer on the CPU straight from compressed rows, without any XLA in it.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/work_sharing.h"

namespace spdnn::cpu {

// Row pointers of either width: JAX makes int64 into int32 unless told otherwise.
struct RowOffsets {
  const void* data = nullptr;
  bool is_64_bit = false;

  int64_t operator[](int64_t row) const {
    return is_64_bit ? static_cast<const int64_t*>(data)[row] : static_cast<const int32_t*>(data)[row];
  }
};

struct LayerCall {
  int64_t features = 0, inputs = 0, outputs = 0, edges = 0;
  const float* y = nullptr;  // (features, inputs)
  RowOffsets indptr;         // (outputs + 1)
  const int32_t* indices = nullptr;
  const float* values = nullptr;  // (edges), or one
  bool single_value = false;
  const float* bias = nullptr;  // (outputs), or one
  bool single_bias = false;
  float lower = 0, upper = 0;  // what sums are clipped to
  float* result = nullptr;     // (features, outputs)
};

// Memory beyond the arguments: two tiles a thread, at most 64 MiB, or what 16 features take where that is more (a
// million inputs and outputs together). Returns what went wrong, or an empty string.
std::string run_layer(const LayerCall& call, int helpers, const ScheduleTask& schedule);

}  // namespace spdnn::cpu
