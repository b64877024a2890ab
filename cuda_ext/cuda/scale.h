// In what units the kernels hold activations between the caller's input and output.
//
// To clip at 0 and at any cap takes two instructions at half the machine's rate; to clip at 0 and 1 is part of an
// addition. So where the cap is a power of two activations are held divided by it, which changes no bit of what is
// computed but the exponents.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace spdnn::cuda {

struct Scale {
  float cap = INFINITY;  // of activations, in units
  float unit = 1;        // a power of two
  float per_unit = 1;    // 1 / unit

  static Scale of_cap(double cap) {
    constexpr double kLargest = 1 << 16;  // so that no number of common size leaves the range of float
    int exponent = 0;
    const bool power_of_two = std::isfinite(cap) && std::frexp(cap, &exponent) == 0.5;
    if (!power_of_two || cap > kLargest || cap < 1 / kLargest) return {static_cast<float>(cap), 1, 1};
    return {1, static_cast<float>(cap), static_cast<float>(1 / cap)};
  }

#ifdef __CUDACC__
  // Clips all of them; NaN becomes 0. One branch for all: in each one's way, a compiler would issue both.
  template <int kCount>
  __device__ __forceinline__ void clip(float (&values)[kCount]) const {
    if (cap == 1) {
#pragma unroll
      for (float& value : values) value = __saturatef(value);
    } else {
#pragma unroll
      for (float& value : values) value = fminf(fmaxf(value, 0.0f), cap);
    }
  }
#endif
};

}  // namespace spdnn::cuda
