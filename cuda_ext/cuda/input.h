// The features that a call is given.
#pragma once

#include <cstdint>

namespace spdnn::cuda {

enum class InputType { kFloat32, kUint8, kPacked };

// The caller's features, one a row: (features, inputs), or (features, ceil(inputs / 32)) words where packed.
struct InputFeatures {
  const void* data = nullptr;
  InputType type = InputType::kFloat32;
  int64_t inputs = 0;
  float per_unit = 1;  // activations are held in units (scale.h)
};

}  // namespace spdnn::cuda
