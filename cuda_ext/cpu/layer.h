// One layer on the CPU straight from compressed rows, without any XLA in it.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/work_sharing.h"

namespace spdnn::cpu {

struct LayerCall {
  int64_t features = 0, inputs = 0, outputs = 0, edges = 0;
  const float* y = nullptr;         // (features, inputs)
  const int32_t* indptr = nullptr;  // (outputs + 1)
  const int32_t* indices = nullptr;
  const float* values = nullptr;  // (edges), or one
  bool single_value = false;
  const float* bias = nullptr;  // (outputs), or one
  bool single_bias = false;
  float cap = 0;
  float* result = nullptr;  // (features, outputs)
};

// Returns what went wrong, or an empty string.
std::string run_layer(const LayerCall& call, int helpers, const ScheduleTask& schedule);

}  // namespace spdnn::cpu
