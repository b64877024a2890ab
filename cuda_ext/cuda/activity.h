// Keeps track on the device of which features are still in work, for the kernel families that run one layer a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spdnn::cuda {

struct ActivityStep {
  const uint8_t* flags;    // of each feature in work: `flag` where some output is not zero
  uint8_t flag;            // of this step (layer_step.h)
  const int32_t* count;    // features in work; null: all
  int64_t features;        // all of them
  const int32_t* slots;    // where they stand; null: each at its own number
  const int32_t* ids;      // which they are; null: their own numbers
  const int32_t* members;  // how many features each one stands for; null: itself
  bool prunable;           // features without a flag may go
  int32_t* next_slots;     // where the features that stay stand
  int32_t* next_ids;
  int32_t* next_count;
  int32_t* active;  // of this layer, zero at the launch; may be null
  bool* alive;      // (features), false at the launch; null before the last layer
};

cudaError_t launch_activity(const ActivityStep& step, cudaStream_t stream);

}  // namespace spdnn::cuda
