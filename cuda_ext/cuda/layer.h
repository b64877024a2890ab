// One layer straight from compressed rows, for `spdnn_layer`.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spdnn::cuda {

struct LayerCall {
  int64_t features, inputs, outputs;
  const float* y;         // (features, inputs)
  const int32_t* indptr;  // (outputs + 1)
  const int32_t* indices;
  const float* values;
  bool single_value;
  const float* bias;
  bool single_bias;
  float lower, upper;  // what sums are clipped to
  float* result;       // (features, outputs)
};

cudaError_t run_layer(const LayerCall& call, cudaStream_t stream);

}  // namespace spdnn::cuda
