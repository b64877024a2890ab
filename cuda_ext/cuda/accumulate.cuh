// The arithmetic core of every kernel family: one row group times a few features, one multiply-add for each edge.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "spdnn_layout.h"

namespace spdnn::cuda {

// Four indices that lie side by side in a slice, one load.
template <typename Index>
struct IndexChunk;

template <>
struct IndexChunk<uint16_t> {
  uint2 packed;
  __device__ void load(const uint16_t* address) { packed = __ldg(reinterpret_cast<const uint2*>(address)); }
  __device__ uint32_t operator[](int edge) const {
    const uint32_t word = edge < 2 ? packed.x : packed.y;
    return edge % 2 == 0 ? word & 0xFFFFu : word >> 16;
  }
};

template <>
struct IndexChunk<uint32_t> {
  uint4 packed;
  __device__ void load(const uint32_t* address) { packed = __ldg(reinterpret_cast<const uint4*>(address)); }
  __device__ uint32_t operator[](int edge) const {
    return edge == 0 ? packed.x : edge == 1 ? packed.y : edge == 2 ? packed.z : packed.w;
  }
};

// A value that the compiler must take as given. Outputs of one group with one weight and one bias are equal, and a
// compiler that saw it would compute them once; an uncompressed run multiplies every stored edge.
__device__ __forceinline__ float opaque(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

// Where a unit of work stands in a run: `kOutputs` outputs of one group, from output `first_output` on.
struct Unit {
  int64_t slice;     // first group of the slice
  int width;         // groups in the slice
  int lane;          // group inside the slice
  int first_output;  // inside the group

  // Units count through the groups first, so that neighbouring threads take neighbouring groups.
  __device__ static Unit at(int64_t unit, int64_t groups, int outputs_per_unit) {
    const int64_t group = unit % groups;
    const int64_t slice = group / kSliceGroups * kSliceGroups;
    const int64_t rest = groups - slice;
    return {slice, static_cast<int>(rest < kSliceGroups ? rest : kSliceGroups), static_cast<int>(group - slice),
            static_cast<int>(unit / groups) * outputs_per_unit};
  }

  __device__ int64_t slot(const PlanRun& run, int r) const {
    return run.first_slot + slice * run.group_outputs + static_cast<int64_t>(first_output + r) * width + lane;
  }
};

// Adds the unit's edges to `sums`. `load(index, x)` fetches kVector features of input neuron `index`.
template <int kOutputs, int kVector, bool kStored, typename Index, typename Load>
__device__ __forceinline__ void accumulate(const PlanRun& run, const Unit& unit, const uint32_t* __restrict__ words,
                                           Load load, float (&sums)[kOutputs][kVector]) {
  const Index* indices = reinterpret_cast<const Index*>(words + run.index_offset) + unit.slice * run.edges +
                         unit.lane * kEdgeChunk;
  const float* values = nullptr;
  if constexpr (kStored) {
    values = reinterpret_cast<const float*>(words + run.value_offset) +
             (unit.slice * run.edges + unit.lane * kEdgeChunk) * run.group_outputs + unit.first_output;
  }
  const int stride = unit.width * kEdgeChunk;
  const float shared_value = static_cast<float>(run.value);
  const int chunks = static_cast<int>(run.edges) / kEdgeChunk;
  IndexChunk<Index> next;
  if (chunks > 0) next.load(indices);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const IndexChunk<Index> current = next;
    float x[kEdgeChunk][kVector];
#pragma unroll
    for (int edge = 0; edge < kEdgeChunk; ++edge) load(current[edge], x[edge]);
    indices += stride;
    if (chunk + 1 < chunks) next.load(indices);
#pragma unroll
    for (int edge = 0; edge < kEdgeChunk; ++edge) {
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) {
        const float value = kStored ? __ldg(values + edge * run.group_outputs + r) : shared_value;
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[r][v] = fmaf(value, x[edge][v], sums[r][v]);
      }
    }
    if constexpr (kStored) values += static_cast<int64_t>(stride) * run.group_outputs;
  }
}

// The sums' start: the bias of each output.
template <int kOutputs, int kVector>
__device__ __forceinline__ void start_with_bias(const PlanLayer& layer, const PlanRun& run, const Unit& unit,
                                                const uint32_t* __restrict__ words, float (&sums)[kOutputs][kVector]) {
  const float* bias = layer.bias_offset < 0 ? nullptr : reinterpret_cast<const float*>(words + layer.bias_offset);
#pragma unroll
  for (int r = 0; r < kOutputs; ++r) {
    const float start = bias ? __ldg(bias + unit.slot(run, r)) : static_cast<float>(layer.bias);
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums[r][v] = opaque(start);
  }
}

// Clips the sums to 0 .. cap. Returns a bit for each feature that some output leaves active.
template <int kOutputs, int kVector>
__device__ __forceinline__ uint32_t clip_all(float (&sums)[kOutputs][kVector], float cap) {
  uint32_t bits[kVector] = {};
#pragma unroll
  for (int r = 0; r < kOutputs; ++r) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      sums[r][v] = fminf(fmaxf(sums[r][v], 0.0f), cap);
      bits[v] |= __float_as_uint(sums[r][v]);
    }
  }
  uint32_t active = 0;
#pragma unroll
  for (int v = 0; v < kVector; ++v) active |= static_cast<uint32_t>((bits[v] << 1) != 0) << v;  // -0.0 is zero
  return active;
}

// Calls body(integral constant) with the number of outputs that a unit of the run takes: at most 16, for at 32 the
// sums of four features would not fit the registers.
template <typename Body>
__host__ __device__ __forceinline__ void dispatch_outputs(int64_t group_outputs, Body body) {
  switch (group_outputs) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 8: return body(std::integral_constant<int, 8>{});
    default: return body(std::integral_constant<int, 16>{});
  }
}

}  // namespace spdnn::cuda
