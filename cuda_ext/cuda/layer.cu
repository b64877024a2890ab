#include <algorithm>

#include "layer.h"

namespace spdnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFeatures = 4;  // of a thread: they share the loads of indices and weights

__global__ void __launch_bounds__(kThreads) layer_kernel(const __grid_constant__ LayerCall call) {
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (output >= call.outputs) return;
  const int64_t begin = call.indptr[output], end = call.indptr[output + 1];
  const float bias = call.bias[call.single_bias ? 0 : output];
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kFeatures; first < call.features;
       first += static_cast<int64_t>(gridDim.y) * kFeatures) {
    const int64_t last = call.features - 1;
    float sums[kFeatures] = {};
    for (int64_t edge = begin; edge < end; ++edge) {
      const float* column = call.y + call.indices[edge];
      const float value = call.values[call.single_value ? 0 : edge];
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) sums[f] = fmaf(value, column[min(first + f, last) * call.inputs], sums[f]);
    }
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      if (first + f <= last)
        call.result[(first + f) * call.outputs + output] = fminf(fmaxf(sums[f] + bias, call.lower), call.upper);
    }
  }
}

}  // namespace

cudaError_t run_layer(const LayerCall& call, cudaStream_t stream) {
  if (call.features == 0 || call.outputs == 0) return cudaSuccess;
  const int64_t rows = (call.features + kFeatures - 1) / kFeatures;
  const dim3 grid(static_cast<unsigned>((call.outputs + kThreads - 1) / kThreads),
                  static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
  layer_kernel<<<grid, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
