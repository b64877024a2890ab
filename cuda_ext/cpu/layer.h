// One layer on the CPU straight from compressed rows, without any XLA in it.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/compressed_rows.h"
#include "cpu/work_sharing.h"

namespace spdnn::cpu {

struct LayerCall {
  CompressedRows rows;
  int64_t features = 0;
  const float* in = nullptr;      // (features, inputs)
  const float* values = nullptr;  // (edges), or one
  bool single_value = false;
  const float* bias = nullptr;  // (outputs), or one
  bool single_bias = false;
  float lower = 0, upper = 0;  // what sums are clipped to
  float* out = nullptr;        // (features, outputs)
};

// Memory beyond the arguments: two tiles a thread, at most 64 MiB, or what 16 features take where that is more (a
// million inputs and outputs together). Returns what went wrong, or an empty string.
std::string run_layer(const LayerCall& call, int helpers, const ScheduleTask& schedule);

}  // namespace spdnn::cpu
