// Where features lie on the device, and how they come in and go out.
//
// Between launches activations stand in tiles of 128 features, [tile][neuron][128], so that a warp reads one neuron of
// 128 features, 4 a lane, as 512 bytes that lie side by side: what device memory gives fast in any order of neurons. A
// first layer's bytes and bits are kept as they came, in tiles of the same order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "input.h"

namespace spdnn::cuda {

inline constexpr int kTile = 128;

__host__ __device__ inline int64_t tiled_offset(int64_t slot, int64_t neuron, int64_t width) {
  return (slot / kTile * width + neuron) * kTile + slot % kTile;
}

inline int64_t tiled_floats(int64_t features, int64_t width) { return (features + kTile - 1) / kTile * kTile * width; }

__device__ __forceinline__ float feature_at(const InputFeatures& input, int64_t feature, int64_t neuron) {
  switch (input.type) {
    case InputType::kFloat32:
      return static_cast<const float*>(input.data)[feature * input.inputs + neuron] * input.per_unit;
    case InputType::kUint8:
      return static_cast<const uint8_t*>(input.data)[feature * input.inputs + neuron] * input.per_unit;
    default:
      break;
  }
  const int64_t row = feature * ((input.inputs + 31) / 32);
  const bool bit = static_cast<const uint32_t*>(input.data)[row + neuron / 32] >> (neuron % 32) & 1u;
  return bit ? input.per_unit : 0.0f;
}

// Neurons that one load of a row brings.
__device__ __forceinline__ int neurons_in_chunk(InputType type) {
  return type == InputType::kFloat32 ? 4 : type == InputType::kUint8 ? 16 : 32;
}

// Bytes 0 to 255 as numbers times a power of two, by a float whose last bits they are: conversions proper are slow.
__device__ __forceinline__ float float_of_byte(uint32_t byte, float factor) {
  return fmaf(__uint_as_float(0x4B000000u | byte), factor, -8388608.0f * factor);  // 2^23
}

// Four rows of four bytes become four columns of them.
__device__ __forceinline__ void transpose_bytes(uint32_t (&words)[4]) {
  const uint32_t low[2] = {__byte_perm(words[0], words[1], 0x5140), __byte_perm(words[2], words[3], 0x5140)};
  const uint32_t high[2] = {__byte_perm(words[0], words[1], 0x7362), __byte_perm(words[2], words[3], 0x7362)};
  words[0] = __byte_perm(low[0], low[1], 0x5410);
  words[1] = __byte_perm(low[0], low[1], 0x7632);
  words[2] = __byte_perm(high[0], high[1], 0x5410);
  words[3] = __byte_perm(high[0], high[1], 0x7632);
}

// Four features side by side in a tile of bytes, or of bits: the caller's input, not yet in units.
struct FourBytes {
  const uint32_t* column;  // of the first neuron
  float per_unit;

  __device__ FourBytes(const void* tiles, int64_t slot, int64_t width, float per_unit)
      : column(static_cast<const uint32_t*>(tiles) + tiled_offset(slot, 0, width) / 4), per_unit(per_unit) {}

  __device__ __forceinline__ void load(uint32_t neuron, float (&x)[4]) const {
    const uint32_t bytes = __ldg(column + static_cast<int64_t>(neuron) * (kTile / 4));
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = float_of_byte(bytes >> 8 * k & 0xFFu, per_unit);
  }
};

struct FourBits {
  const uint32_t* column;
  int shift;
  float per_unit;

  __device__ FourBits(const void* tiles, int64_t slot, int64_t width, float per_unit)
      : column(static_cast<const uint32_t*>(tiles) + tiled_offset(slot, 0, width) / 32),
        shift(static_cast<int>(slot % 32)),
        per_unit(per_unit) {}

  __device__ __forceinline__ void load(uint32_t neuron, float (&x)[4]) const {
    const uint32_t bits = __ldg(column + static_cast<int64_t>(neuron) * (kTile / 32)) >> shift;
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = __uint_as_float((bits >> k & 1u) * __float_as_uint(per_unit));
  }
};

// Rotates a chunk of 16 bytes down by so many bytes.
__device__ __forceinline__ void rotate(uint32_t (&words)[4], uint32_t bytes) {
  for (uint32_t step = 1; step <= 2; step *= 2) {
    const bool moves = bytes / 4 & step;
    const uint32_t before[4] = {words[0], words[1], words[2], words[3]};
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) words[k] = moves ? before[(k + step) % 4] : before[k];
  }
  const uint32_t first = words[0], shift = bytes % 4 * 8;
#pragma unroll
  for (int k = 0; k < 4; ++k) words[k] = __funnelshift_r(words[k], k < 3 ? words[k + 1] : first, shift);
}

// Calls visit(k, value) for `neurons` neurons of a row from `first` on, which is a multiple of neurons_in_chunk().
// Where whole chunks can be loaded it begins with neuron `start` of them and goes round: threads that begin apart store
// into different banks of shared memory.
template <typename Visit>
__device__ __forceinline__ void for_each_of_chunk(const InputFeatures& input, int64_t feature, int first, int neurons,
                                                  uint32_t start, Visit visit) {
  if (input.type == InputType::kPacked) {
    const int64_t row = feature * ((input.inputs + 31) / 32);
    const uint32_t word = __ldg(static_cast<const uint32_t*>(input.data) + row + first / 32);
    const uint32_t bits = __funnelshift_r(word, word, start);
    for (uint32_t k = 0; k < 32; ++k) {
      const int neuron = static_cast<int>((k + start) % 32);
      if (neuron < neurons) visit(neuron, __uint_as_float((bits >> k & 1u) * __float_as_uint(input.per_unit)));
    }
    return;
  }
  const int bytes = input.type == InputType::kFloat32 ? 4 : 1;
  if (input.inputs * bytes % 16 != 0) {  // rows are not aligned
    for (int k = 0; k < neurons; ++k) visit(k, feature_at(input, feature, first + k));
    return;
  }
  const char* address = static_cast<const char*>(input.data) + (feature * input.inputs + first) * bytes;
  const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(address));
  uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  rotate(words, start % (16 / bytes) * bytes);
  if (input.type == InputType::kFloat32) {
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k)
      visit(static_cast<int>((k + start) % 4), __uint_as_float(words[k]) * input.per_unit);
  } else {
#pragma unroll
    for (uint32_t k = 0; k < 16; ++k) {
      visit(static_cast<int>((k + start) % 16), float_of_byte(words[k / 4] >> (k % 4 * 8) & 0xFFu, input.per_unit));
    }
  }
}

}  // namespace spdnn::cuda
