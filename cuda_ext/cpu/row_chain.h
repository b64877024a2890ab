// A plan's rows on the CPU, all layers in one call, forward and both ways through the derivative, without any XLA.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/work_sharing.h"
#include "layout/plan_rows.h"

namespace spdnn::cpu {

struct ChainCall {
  RowsView rows;
  const uint32_t* words = nullptr;
  int64_t features = 0;
  const float* in = nullptr;  // (features, inputs); (features, outputs) where `transposed`
  float* out = nullptr;       // the reverse
  uint32_t* masks = nullptr;  // (features, mask words)
};

// All layers, and their masks.
std::string run_chain(const ChainCall& call, int helpers, const ScheduleTask& schedule);

// The derivative there, which is linear: all layers without bias, and zero where the masks hold no bit. Transposed, it
// runs from the last layer to the first.
std::string run_chain_derivative(const ChainCall& call, bool transposed, int helpers, const ScheduleTask& schedule);

// Memory beyond the arguments, of both, is two tiles a thread. They return what went wrong, or an empty string.

}  // namespace spdnn::cpu
