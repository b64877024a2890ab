// The arithmetic core of every kernel family: one row group times a few features, one multiply-add for each edge.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "intrinsics.cuh"
#include "layout/spdnn_layout.h"
#include "scale.h"

namespace spdnn::cuda {

// Where a layer's sections are read: device memory, or a copy of them in shared memory. `Offset` counts elements.
struct GlobalWords {
  using Offset = int64_t;
  const uint32_t* words;  // of the whole plan

  template <typename T>
  struct View {
    const T* data;
    __device__ T operator[](int64_t element) const { return __ldg(data + element); }
  };

  template <typename T>
  __device__ View<T> at(int64_t word) const {
    return {reinterpret_cast<const T*>(words + word)};
  }
};

struct SharedWords {
  using Offset = int;
  const uint32_t* words;  // of the layer
  int64_t first_word;     // the plan's word that stands first

  template <typename T>
  __device__ const T* at(int64_t word) const {
    return reinterpret_cast<const T*>(words + static_cast<int>(word - first_word));
  }
};

// Four indices that lie side by side in a slice, one load.
template <typename Index>
using IndexChunk = std::conditional_t<std::is_same_v<Index, uint16_t>, uint2, uint4>;

__device__ __forceinline__ uint32_t index_of(const uint2& chunk, int edge) {
  const uint32_t word = edge < 2 ? chunk.x : chunk.y;
  return edge % 2 == 0 ? word & 0xFFFFu : word >> 16;
}

__device__ __forceinline__ uint32_t index_of(const uint4& chunk, int edge) {
  return edge == 0 ? chunk.x : edge == 1 ? chunk.y : edge == 2 ? chunk.z : chunk.w;
}

// Where a unit of work stands in a run: some outputs of one group, from output `first_output` on. Units count through
// the groups first, so that neighbouring threads take neighbouring groups.
struct Unit {
  int slice;         // first group of the slice
  int width;         // groups in the slice
  int lane;          // group inside the slice
  int first_output;  // inside the group

  __device__ static Unit at(int unit, int groups, int outputs_per_unit) {
    int first_output = 0;
    for (; unit >= groups; unit -= groups) first_output += outputs_per_unit;
    const int slice = unit / kSliceGroups * kSliceGroups;
    return {slice, min(kSliceGroups, groups - slice), unit - slice, first_output};
  }

  // Slot of output `first_output`; the next output's is `width` further.
  __device__ int first_slot(const PlanRun& run) const {
    return static_cast<int>(run.first_slot) + slice * static_cast<int>(run.group_outputs) + first_output * width + lane;
  }
};

// The stored values of a chunk's edges for the outputs of a unit, in loads of 16 bytes. `position` is the chunk's in
// the run. Groups of one or two outputs have the values of a chunk side by side.
template <int kOutputs, typename View, typename Offset>
__device__ __forceinline__ void load_values(const View& values, Offset position, int group_outputs, int first_output,
                                            float (&result)[kEdgeChunk][kOutputs]) {
  if constexpr (kOutputs < 4) {
    float* flat = result[0];
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      const float4 four = values[position * kOutputs + k];
      flat[4 * k] = four.x, flat[4 * k + 1] = four.y, flat[4 * k + 2] = four.z, flat[4 * k + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int edge = 0; edge < kEdgeChunk; ++edge) {
      const Offset first = (position * kEdgeChunk + edge) * (group_outputs / 4) + first_output / 4;
#pragma unroll
      for (int r = 0; r < kOutputs; r += 4) {
        const float4 four = values[first + r / 4];
        result[edge][r] = four.x, result[edge][r + 1] = four.y, result[edge][r + 2] = four.z,
        result[edge][r + 3] = four.w;
      }
    }
  }
}

// Adds the unit's edges to `sums`. `load(index, x)` fetches kVector features of input neuron `index`. With kAhead, a
// chunk's features are fetched while the chunk before is multiplied, which takes more registers.
template <int kOutputs, int kVector, bool kStored, bool kAhead, typename Index, typename Words, typename Load>
__device__ __forceinline__ void accumulate(const PlanRun& run, const Unit& unit, const Words& words, const Load& load,
                                           float (&sums)[kOutputs][kVector]) {
  using Chunk = IndexChunk<Index>;
  using Offset = typename Words::Offset;
  const int chunks = static_cast<int>(run.edges) / kEdgeChunk;
  if (chunks == 0) return;
  const float shared_value = static_cast<float>(run.value);
  const int group_outputs = static_cast<int>(run.group_outputs);
  const auto indices = words.template at<Chunk>(run.index_offset);
  const auto values = words.template at<float4>(kStored ? run.value_offset : run.index_offset);
  Offset position = static_cast<Offset>(unit.slice) * chunks + unit.lane;  // of the chunk to be multiplied
  auto load_features = [&](const Chunk& chunk, float (&features)[kEdgeChunk][kVector]) {
#pragma unroll
    for (int edge = 0; edge < kEdgeChunk; ++edge) load(index_of(chunk, edge), features[edge]);
  };
  auto multiply = [&](const float (&features)[kEdgeChunk][kVector]) {
    float stored[kEdgeChunk][kOutputs];
    if constexpr (kStored) load_values(values, position, group_outputs, unit.first_output, stored);
    position += unit.width;
#pragma unroll
    for (int edge = 0; edge < kEdgeChunk; ++edge) {
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          sums[r][v] = fmaf(kStored ? stored[edge][r] : shared_value, features[edge][v], sums[r][v]);
        }
      }
    }
  };
  Chunk next = indices[position];
  Offset next_position = position + unit.width;
  auto load_next = [&] {
    next = indices[next_position];
    next_position += unit.width;
  };
  if constexpr (!kAhead) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float x[kEdgeChunk][kVector];
      load_features(next, x);
      if (chunk + 1 < chunks) load_next();
      multiply(x);
    }
  } else {
    float x[2][kEdgeChunk][kVector];
    load_features(next, x[0]);
    if (chunks > 1) load_next();
    int chunk = 0;
    for (; chunk + 2 <= chunks; chunk += 2) {
      load_features(next, x[1]);
      if (chunk + 2 < chunks) load_next();
      multiply(x[0]);
      if (chunk + 2 < chunks) {
        load_features(next, x[0]);
        if (chunk + 3 < chunks) load_next();
      }
      multiply(x[1]);
    }
    if (chunk < chunks) multiply(x[0]);
  }
}

// The sums' start: the bias of each output.
template <int kOutputs, int kVector, typename Words>
__device__ __forceinline__ void start_with_bias(const PlanLayer& layer, const PlanRun& run, const Unit& unit,
                                                const Words& words, const Scale& scale,
                                                float (&sums)[kOutputs][kVector]) {
  const int slot = unit.first_slot(run);
  if (layer.bias_offset < 0) {
    const float start = static_cast<float>(layer.bias) * scale.per_unit;
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[r][v] = opaque(start);
    }
    return;
  }
  const auto biases = words.template at<float>(layer.bias_offset);
#pragma unroll
  for (int r = 0; r < kOutputs; ++r) {
    const float start = biases[slot + r * unit.width] * scale.per_unit;
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums[r][v] = opaque(start);
  }
}

// Clips the sums. Returns a bit for each feature that some output leaves active.
template <int kOutputs, int kVector>
__device__ __forceinline__ uint32_t clip_all(float (&sums)[kOutputs][kVector], const Bounds& bounds) {
  bounds.clip(reinterpret_cast<float (&)[kOutputs * kVector]>(sums));
  uint32_t active = 0;
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    uint32_t bits = 0;
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) bits |= __float_as_uint(sums[r][v]);
    active |= static_cast<uint32_t>((bits << 1) != 0) << v;  // -0.0 is zero
  }
  return active;
}

// Outputs of a group that a unit of work takes at most: the sums of four features, and the values where they are
// stored, are to fit the registers.
template <bool kStored>
constexpr int kMostOutputs = kStored ? 8 : 16;

inline int outputs_of_unit(const PlanRun& run) {
  const int most = run.value_offset < 0 ? kMostOutputs<false> : kMostOutputs<true>;
  return run.group_outputs < most ? static_cast<int>(run.group_outputs) : most;
}

// Calls body(integral constant) with the number of outputs that a unit of the run takes.
template <bool kStored, typename Body>
__device__ __forceinline__ void dispatch_outputs(int64_t group_outputs, const Body& body) {
  switch (group_outputs) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 8:
      return body(std::integral_constant<int, 8>{});
    default:
      return body(std::integral_constant<int, kMostOutputs<kStored>>{});
  }
}

}  // namespace spdnn::cuda
