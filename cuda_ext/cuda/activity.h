// Keeps track on the device of which features are still in work, for the kernel families that run one layer a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "input.h"

namespace spdnn::cuda {

struct ActivityStep {
  uint8_t* flags;        // of each feature in work: some output is not zero. Cleared for the next layer.
  const int32_t* count;  // features in work
  const int32_t* ids;    // feature of each slot
  bool prunable;         // features without a flag may go
  int32_t* next_slots;   // where the features that stay stand now
  int32_t* next_ids;
  int32_t* next_count;
  int32_t* active;  // of this layer; may be null
  bool* alive;      // (features), false at the launch; null before the last layer
};

cudaError_t launch_activity(const ActivityStep& step, cudaStream_t stream);

// Starts the lists: all features in work, each in its own slot.
cudaError_t launch_start(int64_t features, int32_t* slots, int32_t* ids, int32_t* count, cudaStream_t stream);

// The caller's rows -> tiles.
cudaError_t launch_read_input(const InputFeatures& input, int64_t features, float* target, cudaStream_t stream);

struct OutputStep {
  const float* source;  // tiles
  int64_t width;        // neurons of `source`
  int64_t outputs;
  const int32_t* ids;
  const int32_t* count;
  const int32_t* slot_of;  // slot of each output neuron
  float* activations;      // (features, outputs)
  int64_t features;        // count at most
};

// Tiles -> the caller's rows, for the features in work.
cudaError_t launch_write_output(const OutputStep& step, cudaStream_t stream);

}  // namespace spdnn::cuda
