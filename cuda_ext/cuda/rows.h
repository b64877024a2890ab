// Between the caller's rows and tiles, for the kernel families that run one layer a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "input.h"

namespace spdnn::cuda {

// The caller's rows -> tiles (tiles.cuh), of floats in units.
cudaError_t launch_read_input(const InputFeatures& input, int64_t features, float* target, cudaStream_t stream);

// The same for rows of bytes or bits, which stay what they are.
cudaError_t launch_read_narrow_input(const InputFeatures& input, int64_t features, void* target, cudaStream_t stream);

struct OutputStep {
  const float* source;  // tiles
  int64_t width;        // neurons of `source`
  float unit;           // of activations there (scale.h)
  int64_t outputs;
  const int32_t* ids;      // null: their own numbers
  const int32_t* count;    // features in work; null: all
  const int32_t* slot_of;  // slot of each output neuron
  float* activations;      // (features, outputs)
  int64_t features;        // all of them
};

// Tiles -> the caller's rows, for the features in work.
cudaError_t launch_write_output(const OutputStep& step, cudaStream_t stream);

}  // namespace spdnn::cuda
