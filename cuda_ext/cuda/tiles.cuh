// Where features lie on the device, and how they come in and go out.
//
// Between launches activations stand in tiles of 32 features, [tile][neuron][32], so that a warp reads one neuron of 32
// features as one line of 128 bytes. The features in work are the first `count` slots; `ids` names them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "input.h"

namespace spdnn::cuda {

inline constexpr int kTile = 32;

__host__ __device__ inline int64_t tiled_offset(int64_t slot, int64_t neuron, int64_t width) {
  return (slot / kTile * width + neuron) * kTile + slot % kTile;
}

inline int64_t tiled_floats(int64_t features, int64_t width) { return (features + kTile - 1) / kTile * kTile * width; }

__device__ __forceinline__ float feature_at(const InputFeatures& input, int64_t feature, int64_t neuron) {
  switch (input.type) {
    case InputType::kFloat32:
      return static_cast<const float*>(input.data)[feature * input.inputs + neuron];
    case InputType::kUint8:
      return static_cast<const uint8_t*>(input.data)[feature * input.inputs + neuron];
    default:
      break;
  }
  const int64_t row = feature * ((input.inputs + 31) / 32);
  return static_cast<float>(static_cast<const uint32_t*>(input.data)[row + neuron / 32] >> (neuron % 32) & 1u);
}

// Neurons that one load of a row brings.
__device__ __forceinline__ int neurons_in_chunk(InputType type) {
  return type == InputType::kFloat32 ? 4 : type == InputType::kUint8 ? 16 : 32;
}

// Calls visit(k, value) for `neurons` neurons of a row from `first` on, which is a multiple of neurons_in_chunk().
template <typename Visit>
__device__ __forceinline__ void for_each_of_chunk(const InputFeatures& input, int64_t feature, int first, int neurons,
                                                  Visit visit) {
  if (input.type == InputType::kPacked) {
    const int64_t row = feature * ((input.inputs + 31) / 32);
    const uint32_t word = __ldg(static_cast<const uint32_t*>(input.data) + row + first / 32);
    for (int k = 0; k < neurons; ++k) visit(k, static_cast<float>(word >> k & 1u));
    return;
  }
  const int bytes = input.type == InputType::kFloat32 ? 4 : 1;
  if (input.inputs * bytes % 16 != 0) {  // rows are not aligned
    for (int k = 0; k < neurons; ++k) visit(k, feature_at(input, feature, first + k));
    return;
  }
  const char* address = static_cast<const char*>(input.data) + (feature * input.inputs + first) * bytes;
  const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(address));
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  if (input.type == InputType::kFloat32) {
#pragma unroll
    for (int k = 0; k < 4; ++k) visit(k, __uint_as_float(words[k]));
  } else {
#pragma unroll
    for (int k = 0; k < 16; ++k) visit(k, static_cast<float>(words[k / 4] >> (k % 4 * 8) & 0xFFu));
  }
}

}  // namespace spdnn::cuda
