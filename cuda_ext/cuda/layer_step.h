// What the kernel families that run one layer a launch are given.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "input.h"
#include "scale.h"

namespace spdnn::cuda {

struct LayerStep {
  const uint32_t* words;
  Scale scale;
  Bounds bounds;
  const float* source;        // tiles; null where `narrow_source` is the input
  const void* narrow_source;  // those, as launch_read_input() leaves them
  InputType narrow_type;
  const int32_t* slots;         // slot in `source` of each feature in work; null: its own number
  const int32_t* count;         // features in work; null: all
  const int32_t* source_count;  // features in `source`, more than `count` where some were dropped; null: all
  float* target;                // tiles, where each feature stands at its own number
  uint8_t* flags;               // of each feature in work: set to `flag` where some output is not zero
  uint8_t flag;                 // none of the flags is that at the launch
  int64_t features;             // all of them

#ifdef __CUDACC__
  __device__ uint32_t features_in_work() const { return count ? *count : features; }

  // Whether some features do not stand at their own number.
  __device__ bool is_scattered(uint32_t in_work) const {
    return slots && static_cast<uint32_t>(source_count ? *source_count : features) != in_work;
  }
#endif
};

}  // namespace spdnn::cuda
