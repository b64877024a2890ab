// Where features lie on the device, and how they come in and go out.
//
// Between launches activations stand in tiles of 32 features, [tile][neuron][32], so that a warp reads one neuron of 32
// features as one line of 128 bytes. The features in work are the first `count` slots; `ids` names them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spdnn::cuda {

inline constexpr int kTile = 32;

enum class InputType { kFloat32, kUint8, kPacked };

__host__ __device__ inline int64_t tiled_offset(int64_t slot, int64_t neuron, int64_t width) {
  return (slot / kTile * width + neuron) * kTile + slot % kTile;
}

inline int64_t tiled_floats(int64_t features, int64_t width) {
  return (features + kTile - 1) / kTile * kTile * width;
}

// The caller's features, one a row.
struct InputFeatures {
  const void* data;
  InputType type;
  int64_t inputs;

  __device__ float at(int64_t feature, int64_t neuron) const {
    if (type == InputType::kFloat32) return static_cast<const float*>(data)[feature * inputs + neuron];
    if (type == InputType::kUint8) return static_cast<const uint8_t*>(data)[feature * inputs + neuron];
    const uint32_t word = static_cast<const uint32_t*>(data)[feature * ((inputs + 31) / 32) + neuron / 32];
    return static_cast<float>(word >> (neuron % 32) & 1u);
  }
};

}  // namespace spdnn::cuda
