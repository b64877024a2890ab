// The arithmetic core of every kernel family: one row group times a few features, one multiply-add for each edge.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "intrinsics.cuh"
#include "scale.h"
#include "spdnn_layout.h"

namespace spdnn::cuda {

// Where a layer's sections are read: device memory, or a copy of them in shared memory.
struct GlobalWords {
  const uint32_t* words;  // of the whole plan

  template <typename T>
  __device__ T load(int64_t word, int64_t element) const {
    return __ldg(reinterpret_cast<const T*>(words + word) + element);
  }
};

struct SharedWords {
  const uint32_t* words;  // of the layer
  int64_t first_word;     // the plan's word that stands first

  template <typename T>
  __device__ T load(int64_t word, int64_t element) const {
    return reinterpret_cast<const T*>(words + (word - first_word))[element];
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

// The values of one edge for the outputs of a unit, in loads as wide as may be.
template <int kOutputs, typename Words>
__device__ __forceinline__ void load_values(const Words& words, int64_t word, int64_t element,
                                            float (&values)[kOutputs]) {
  if constexpr (kOutputs % 4 == 0) {
#pragma unroll
    for (int r = 0; r < kOutputs; r += 4) {
      const float4 four = words.template load<float4>(word, (element + r) / 4);
      values[r] = four.x, values[r + 1] = four.y, values[r + 2] = four.z, values[r + 3] = four.w;
    }
  } else if constexpr (kOutputs == 2) {
    const float2 two = words.template load<float2>(word, element / 2);
    values[0] = two.x, values[1] = two.y;
  } else {
    values[0] = words.template load<float>(word, element);
  }
}

// Adds the unit's edges to `sums`. `load(index, x)` fetches kVector features of input neuron `index`. With kAhead, a
// chunk's features are fetched while the chunk before is multiplied, which takes more registers.
template <int kOutputs, int kVector, bool kStored, bool kAhead, typename Index, typename Words, typename Load>
__device__ __forceinline__ void accumulate(const PlanRun& run, const Unit& unit, const Words& words, const Load& load,
                                           float (&sums)[kOutputs][kVector]) {
  using Chunk = IndexChunk<Index>;
  const int chunks = static_cast<int>(run.edges) / kEdgeChunk;
  if (chunks == 0) return;
  const int64_t first_chunk = static_cast<int64_t>(unit.slice) * chunks + unit.lane;
  const float shared_value = static_cast<float>(run.value);
  const int group_outputs = static_cast<int>(run.group_outputs);
  int64_t next_chunk = first_chunk;
  auto load_chunk = [&] {
    const Chunk chunk = words.template load<Chunk>(run.index_offset, next_chunk);
    next_chunk += unit.width;
    return chunk;
  };
  auto load_features = [&](const Chunk& indices, float (&features)[kEdgeChunk][kVector]) {
#pragma unroll
    for (int edge = 0; edge < kEdgeChunk; ++edge) load(index_of(indices, edge), features[edge]);
  };
  int64_t next_value = first_chunk * kEdgeChunk * group_outputs + unit.first_output;
  auto multiply = [&](const float (&features)[kEdgeChunk][kVector]) {
#pragma unroll
    for (int edge = 0; edge < kEdgeChunk; ++edge) {
      float values[kOutputs];
      if constexpr (kStored) load_values(words, run.value_offset, next_value + edge * group_outputs, values);
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          sums[r][v] = fmaf(kStored ? values[r] : shared_value, features[edge][v], sums[r][v]);
        }
      }
    }
    next_value += static_cast<int64_t>(unit.width * kEdgeChunk * group_outputs);
  };
  Chunk next = load_chunk();
  if constexpr (!kAhead) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      float x[kEdgeChunk][kVector];
      load_features(next, x);
      if (chunk + 1 < chunks) next = load_chunk();
      multiply(x);
    }
  } else {
    float x[2][kEdgeChunk][kVector];
    load_features(next, x[0]);
    if (chunks > 1) next = load_chunk();
    int chunk = 0;
    for (; chunk + 2 <= chunks; chunk += 2) {
      load_features(next, x[1]);
      if (chunk + 2 < chunks) next = load_chunk();
      multiply(x[0]);
      if (chunk + 2 < chunks) {
        load_features(next, x[0]);
        if (chunk + 3 < chunks) next = load_chunk();
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
#pragma unroll
  for (int r = 0; r < kOutputs; ++r) {
    const float start = layer.bias_offset < 0 ? static_cast<float>(layer.bias)
                                              : words.template load<float>(layer.bias_offset, slot + r * unit.width);
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums[r][v] = opaque(start * scale.per_unit);
  }
}

// Clips the sums to 0 .. cap. Returns a bit for each feature that some output leaves active.
template <int kOutputs, int kVector>
__device__ __forceinline__ uint32_t clip_all(float (&sums)[kOutputs][kVector], const Scale& scale) {
  uint32_t bits[kVector] = {};
#pragma unroll
  for (int r = 0; r < kOutputs; ++r) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      sums[r][v] = scale.clip(sums[r][v]);
      bits[v] |= __float_as_uint(sums[r][v]);
    }
  }
  uint32_t active = 0;
#pragma unroll
  for (int v = 0; v < kVector; ++v) active |= static_cast<uint32_t>((bits[v] << 1) != 0) << v;  // -0.0 is zero
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
