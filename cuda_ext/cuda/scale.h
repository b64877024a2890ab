// In what units the kernels hold activations between the caller's input and output, and how they clip them.
//
// To clip at any two bounds takes two instructions at half the machine's rate; to clip at 0 and 1 is part of an
// addition. So where layers clip at 0 and a power of two, activations are held divided by it, which changes no bit of
// what is computed but the exponents. One unit serves all layers: the first such layer decides, and the others' bounds
// are divided by it, too.
#pragma once

#include <cuda_runtime.h>

#include <cfloat>
#include <cmath>

#include "layout/plan_view.h"

namespace spdnn::cuda {

// What a layer's sums are clipped to, in units.
struct Bounds {
  float lower, upper;

#ifdef __CUDACC__
  // Clips all of them; NaN becomes `lower`. One branch for all: in each one's way, a compiler would issue both.
  template <int kCount>
  __device__ __forceinline__ void clip(float (&values)[kCount]) const {
    if (lower == 0 && upper == 1) {
#pragma unroll
      for (float& value : values) value = __saturatef(value);
    } else {
#pragma unroll
      for (float& value : values) value = fminf(fmaxf(value, lower), upper);
    }
  }
#endif
};

struct Scale {
  float unit = 1;      // a power of two
  float per_unit = 1;  // 1 / unit

  static Scale of_plan(const PlanView& plan) {
    for (int64_t l = 0; l < plan.header->layers; ++l) {
      const PlanLayer& layer = plan.layers[l];
      if (layer.lower == 0 && may_be_unit(layer.upper)) return {layer.upper, 1 / layer.upper};
    }
    return {};
  }

  __host__ __device__ Bounds bounds(const PlanLayer& layer) const {
    return {finite(layer.lower * per_unit), finite(layer.upper * per_unit)};
  }

 private:
  // `finite_bound`, where the device runs it, too.
  __host__ __device__ static float finite(float bound) {
    constexpr float kLargest = FLT_MAX;
    return fminf(fmaxf(bound, -kLargest), kLargest);
  }

  static bool may_be_unit(float upper) {
    constexpr float kLargest = 1 << 16;  // so that no number of common size leaves the range of float
    int exponent = 0;
    return upper >= 1 / kLargest && upper <= kLargest && std::frexp(upper, &exponent) == 0.5f;
  }
};

}  // namespace spdnn::cuda
