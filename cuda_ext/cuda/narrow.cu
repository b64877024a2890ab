#include <algorithm>

#include "accumulate.cuh"
#include "narrow.h"
#include "resident_block.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kFeatures = 32;  // of a block: a lane each
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 2;       // of a multiprocessor, at least: one waits while the other computes
constexpr int kActiveWords = 4;  // of as many layers

int64_t shared_bytes(int64_t width) { return 2 * width * kFeatures * static_cast<int64_t>(sizeof(float)); }

// The sum of an output, for the lane's feature.
template <bool kStored>
__device__ __forceinline__ float sum_of(const PlanRun& run, const Unit& unit, const GlobalWords& words, const float* in,
                                        float sum) {
  const int chunks = static_cast<int>(run.edges) / kEdgeChunk;
  const auto indices = words.at<uint2>(run.index_offset);
  const auto values = words.at<float4>(kStored ? run.value_offset : run.index_offset);
  const float value = static_cast<float>(run.value);
  int64_t position = static_cast<int64_t>(unit.slice) * chunks + unit.lane;
  constexpr int kAtOnce = kStored ? 2 : 4;  // chunks, as many as fit the registers
#pragma unroll kAtOnce
  for (int chunk = 0; chunk < chunks; ++chunk, position += unit.width) {
    const uint2 four = indices[position];
    const float4 weights = kStored ? values[position] : make_float4(value, value, value, value);
    sum = fmaf(weights.x, in[index_of(four, 0) * kFeatures], sum);
    sum = fmaf(weights.y, in[index_of(four, 1) * kFeatures], sum);
    sum = fmaf(weights.z, in[index_of(four, 2) * kFeatures], sum);
    sum = fmaf(weights.w, in[index_of(four, 3) * kFeatures], sum);
  }
  return sum;
}

// A warp's outputs of a layer: each sixteenth, through all runs. Returns a bit for each feature that some output of the
// warp makes active.
__device__ __forceinline__ uint32_t compute_layer(const ResidentStep& step, const PlanLayer& layer, const PlanRun* runs,
                                                  const float* in, float* out) {
  const GlobalWords words{step.words};
  const Bounds bounds = step.scale.bounds(layer);
  const float* biases =
      layer.bias_offset < 0 ? nullptr : reinterpret_cast<const float*>(step.words + layer.bias_offset);
  const float shared_bias = static_cast<float>(layer.bias);
  uint32_t active = 0;
  int number = threadIdx.x / 32, first_unit = 0;
  for (int64_t r = 0; r < layer.runs; ++r) {
    const PlanRun run = runs[layer.first_run + r];
    const int groups = static_cast<int>(run.groups);
    for (; number < first_unit + groups; number += kWarps) {
      const Unit unit = Unit::at(number - first_unit, groups, 1);
      const int slot = unit.first_slot(run);
      const float start = (biases ? __ldg(biases + slot) : shared_bias) * step.scale.per_unit;
      float sum[] = {run.value_offset < 0 ? sum_of<false>(run, unit, words, in, start)
                                          : sum_of<true>(run, unit, words, in, start)};
      bounds.clip(sum);
      out[slot * kFeatures] = sum[0];
      active |= __ballot_sync(0xFFFFFFFFu, (__float_as_uint(sum[0]) << 1) != 0);  // -0.0 is zero
    }
    first_unit += groups;
  }
  return active;
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    narrow_kernel(const __grid_constant__ ResidentStep step, int64_t more_than) {
  extern __shared__ __align__(16) float memory[];
  __shared__ uint32_t active_words[kActiveWords];
  const int64_t count = step.count ? *step.count : step.features;
  if (count <= more_than) return;
  const PlanLayer* layers = reinterpret_cast<const PlanLayer*>(step.words + step.layers_word);
  const PlanRun* runs = reinterpret_cast<const PlanRun*>(step.words + step.runs_word);
  const int lane = threadIdx.x % 32;
  const Columns columns{5};
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kFeatures; first < count;
       first += static_cast<int64_t>(gridDim.x) * kFeatures) {
    const Tile tile(step, first, count, columns);
    if (threadIdx.x < kActiveWords) active_words[threadIdx.x] = 0;
    Buffers buffers{memory, memory + step.max_width * kFeatures};
    load_features(step, first, count, layers[step.first_layer].inputs, columns, Activations<1>(buffers.in, columns));
    __syncthreads();
    uint32_t active = 0;
    int64_t width = 0;
    bool prunable = false;
    for (int l = step.first_layer; l < step.end_layer; ++l) {
      const uint32_t mine = compute_layer(step, layers[l], runs, buffers.in + lane, buffers.out + lane);
      uint32_t* word = &active_words[l % kActiveWords];
      if (lane == 0 && mine) atomicOr(word, mine);
      // Read by all before the barrier that ended the last layer, and written again in the next but one.
      if (threadIdx.x == 0) active_words[(l + 2) % kActiveWords] = 0;
      width = layers[l].outputs;
      prunable = layers[l].prunable;
      __syncthreads();
      buffers.swap();
      active = *word & tile.used;
      tile.count(step, l, active);
      if (!active && prunable) break;
    }
    tile.store(step, width, prunable, active, columns, Activations<1>(buffers.in, columns));
    __syncthreads();
  }
}

}  // namespace

int64_t too_few_for_narrow(int64_t width, const DeviceLimits& limits) {
  const bool fits = kBlocks * (shared_bytes(width) + kSharedStatic) <= limits.shared_bytes;
  return fits ? int64_t{kBlocks} * kFeatures * limits.multiprocessors : INT64_MAX;
}

cudaError_t launch_narrow(const ResidentStep& step, int64_t more_than, cudaStream_t stream) {
  const int64_t shared = shared_bytes(step.max_width), tiles = (step.features + kFeatures - 1) / kFeatures;
  int64_t resident_blocks = 0;
  const cudaError_t error = resident_block_count(narrow_kernel, kThreads, shared, &resident_blocks);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(std::min(tiles, resident_blocks));
  narrow_kernel<<<blocks, kThreads, static_cast<size_t>(shared), stream>>>(step, more_than);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
