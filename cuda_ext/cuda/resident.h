// Kernel family `resident`: several layers in one launch, the features of a block held in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "input.h"
#include "launch.h"
#include "layout/plan_view.h"
#include "scale.h"

namespace spdnn::cuda {

struct ResidentStep {
  const uint32_t* words;
  int64_t layers_word;  // where the plan holds its PlanLayer records
  int64_t runs_word;    // ... and its PlanRun records
  int64_t runs;
  int first_layer;
  int end_layer;
  int max_width;     // of all layers in the step, inputs and outputs
  int staged_words;  // room for a layer's sections in shared memory; layers that take more are read where they are
  Scale scale;

  InputFeatures input;     // read where `source` is null
  const float* source;     // tiles
  const int32_t* slots;    // slot in `source` of each feature in work; null: its own number
  const int32_t* ids;      // feature in each place; null: its own number
  const int32_t* members;  // how many features each one stands for; null: itself
  const int32_t* count;    // features in work; null: all
  int64_t features;

  float* target;  // tiles; null after the last layer
  int32_t* target_ids;
  int32_t* target_count;   // zero at the launch
  int32_t* active;         // (layers), zero at the launch; may be null
  bool* alive;             // (features), false at the launch; after the last layer
  float* activations;      // (features, outputs), zero at the launch; after the last layer, null where not wanted
  const int32_t* slot_of;  // slot of each output neuron
  int64_t outputs;         // output neurons: more than the last layer has where equal ones were merged
};

// Features that a block holds of these layers: a power of two, or 0 where not even one fits.
int resident_features(const PlanView& plan, int64_t first_layer, int64_t end_layer, const DeviceLimits& limits);

cudaError_t launch_resident(const ResidentStep& step, const PlanView& plan, cudaStream_t stream);

}  // namespace spdnn::cuda
