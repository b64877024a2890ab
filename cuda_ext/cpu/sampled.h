// The sampled product on the CPU, the derivative of a layer in its weights, without any XLA in it.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/compressed_rows.h"
#include "cpu/work_sharing.h"

namespace spdnn::cpu {

struct SampledCall {
  CompressedRows rows;
  int64_t features = 0;
  const float* in = nullptr;   // (features, inputs)
  const float* out = nullptr;  // (features, outputs)
  float* result = nullptr;     // (edges): of each edge, the sum over features of in[., index] * out[., row]
};

// Sums go from feature to feature in their order, whatever the threads. Memory beyond the arguments: as much as `in`
// and `out`. Returns what went wrong, or an empty string.
std::string run_sampled(const SampledCall& call, int helpers, const ScheduleTask& schedule);

}  // namespace spdnn::cpu
