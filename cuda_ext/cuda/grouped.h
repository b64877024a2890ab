// Kernel family `grouped`: one layer from device memory to device memory, a warp for a row group times 128 features.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "input.h"
#include "plan_view.h"

namespace spdnn::cuda {

struct GroupedStep {
  const uint32_t* words;
  float cap;
  const float* source;          // tiles
  const int32_t* slots;         // slot in `source` of each feature in work; the identity where none was dropped
  const int32_t* count;         // features in work
  const int32_t* source_count;  // features in `source`: more than `count` where some were dropped
  float* target;                // tiles
  uint8_t* flags;               // of each feature in work: set where some output is not zero; zero at the launch
  int64_t features;             // count at most
};

cudaError_t launch_grouped(const GroupedStep& step, const PlanLayer& layer, const PlanRun* runs, cudaStream_t stream);

}  // namespace spdnn::cuda
