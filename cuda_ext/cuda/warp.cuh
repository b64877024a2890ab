// What the lanes of a warp work out together.
#pragma once

#include <cuda_runtime.h>

namespace spdnn::cuda {

// The sum of the values of this lane and those before it.
template <typename T>
__device__ __forceinline__ T sum_until(T value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    const T before = __shfl_up_sync(0xFFFFFFFFu, value, apart);
    if (lane >= apart) value += before;
  }
  return value;
}

}  // namespace spdnn::cuda
