#include <algorithm>

#include "accumulate.cuh"
#include "intrinsics.cuh"
#include "launch.h"
#include "staged.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = kStagedRows / kWarps;           // outputs of a warp
constexpr int kLanes = 32;                            // features of a work item
constexpr int kPieces = kLanes * sizeof(float) / 16;  // copies of 16 bytes that bring an input of 32 features

// One input more than a stage has: padding edges read zeros there.
constexpr int kBufferFloats = (kStagedInputs + 1) * kLanes;

// The sections of a stage.
struct StageSections {
  const uint32_t* map;
  int map_count;
  const uint32_t* chunk_begin;
  const uint2* indices;  // of a chunk
  const float4* values;  // of a chunk; not there in a single-valued layer

  __device__ StageSections(const uint32_t* words, const PlanLayer& layer, uint32_t number) {
    const StagedStage& stage = reinterpret_cast<const StagedStage*>(words + layer.stage_offset)[number];
    const uint32_t* staged = words + layer.staged_offset;
    map = staged + __ldg(&stage.map_offset);
    map_count = static_cast<int>(__ldg(&stage.map_count));
    chunk_begin = staged + __ldg(&stage.chunk_offset);
    indices = reinterpret_cast<const uint2*>(staged + __ldg(&stage.index_offset));
    values = reinterpret_cast<const float4*>(staged + __ldg(&stage.value_offset));
  }
};

// Brings the stage's inputs of 32 features into shared memory, [position in the map][32].
__device__ __forceinline__ void load_stage(const StageSections& stage, const float* tile, float* inputs) {
  const int piece = threadIdx.x % kPieces;
  for (int k = threadIdx.x / kPieces; k < stage.map_count; k += kThreads / kPieces) {
    const int64_t neuron = __ldg(stage.map + k);
    copy_async<16>(inputs + k * kLanes + piece * 4, tile + neuron * kTile + piece * 4);
  }
}

// The same where a lane's feature stands anywhere, or nowhere (null).
__device__ __forceinline__ void load_scattered_stage(const StageSections& stage, const float* column, float* inputs) {
  const int lane = threadIdx.x % 32;
  for (int k = threadIdx.x / 32; k < stage.map_count; k += kWarps) {
    const int64_t neuron = __ldg(stage.map + k);
    inputs[k * kLanes + lane] = column ? __ldg(column + neuron * kTile) : 0.0f;
  }
}

// Adds the stage's edges to the sums of the warp's rows. Edges of neighbouring rows lie side by side, so that a chunk
// is asked for while the one before is multiplied, across rows.
template <bool kStored>
__device__ __forceinline__ void add_stage(const StageSections& stage, float value, const float* inputs,
                                          float (&sums)[kRows]) {
  const int lane = threadIdx.x % 32;
  const uint32_t* rows = stage.chunk_begin + threadIdx.x / 32 * kRows;
  const uint32_t row_end = __ldg(rows + min(lane, kRows - 1) + 1);  // lane r holds that of row r
  const uint32_t end = __shfl_sync(0xFFFFFFFFu, row_end, kRows - 1);
  uint32_t chunk = __ldg(rows);
  if (chunk == end) return;
  uint2 indices = __ldg(stage.indices + chunk);
  float4 values = kStored ? __ldg(stage.values + chunk) : make_float4(value, value, value, value);
  const float* column = inputs + lane;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const uint32_t last = __shfl_sync(0xFFFFFFFFu, row_end, r);
    while (chunk < last) {
      float x[kEdgeChunk];
#pragma unroll
      for (int edge = 0; edge < kEdgeChunk; ++edge) x[edge] = column[index_of(indices, edge) * kLanes];
      sums[r] = fmaf(values.x, x[0], sums[r]);
      sums[r] = fmaf(values.y, x[1], sums[r]);
      sums[r] = fmaf(values.z, x[2], sums[r]);
      sums[r] = fmaf(values.w, x[3], sums[r]);
      if (++chunk < end) {
        indices = __ldg(stage.indices + chunk);
        if constexpr (kStored) values = __ldg(stage.values + chunk);
      }
    }
  }
}

// A work item is a block of outputs times 32 features, a lane for each feature. Items count through the blocks of the
// same features first, so that those stay in the L2 cache.
template <bool kStored>
__global__ void __launch_bounds__(kThreads)
    staged_kernel(const __grid_constant__ LayerStep step, const __grid_constant__ PlanLayer layer, uint32_t buffers) {
  extern __shared__ __align__(16) float inputs[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t* first_stages = step.words + layer.staged_offset;
  const uint32_t blocks = static_cast<uint32_t>((layer.outputs + kStagedRows - 1) / kStagedRows);
  const int64_t count = step.features_in_work();
  const bool scattered = step.is_scattered(count);
  const uint32_t tiles = static_cast<uint32_t>((count + kLanes - 1) / kLanes);
  if (warp < static_cast<int>(buffers)) inputs[warp * kBufferFloats + kStagedInputs * kLanes + lane] = 0.0f;
  uint32_t tile = blockIdx.x / blocks, block = blockIdx.x % blocks;
  for (; tile < tiles; tile += gridDim.x / blocks, block += gridDim.x % blocks) {
    if (block >= blocks) {
      block -= blocks;
      if (++tile >= tiles) break;
    }
    const int64_t place = static_cast<int64_t>(tile) * kLanes + lane;
    const int64_t first_slot = static_cast<int64_t>(block) * kStagedRows + warp * kRows;
    const bool neighbours = !scattered && static_cast<int64_t>(tile + 1) * kLanes <= count;
    const float* column = step.source + tiled_offset(place - lane, 0, layer.inputs) + lane;
    if (scattered && place < count) column = step.source + tiled_offset(step.slots[place], 0, layer.inputs);
    if (place >= count) column = nullptr;
    float sums[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool stored_bias = layer.bias_offset >= 0 && first_slot + r < layer.outputs;
      const float bias = stored_bias
                             ? __ldg(reinterpret_cast<const float*>(step.words + layer.bias_offset) + first_slot + r)
                             : static_cast<float>(layer.bias);
      sums[r] = bias * step.scale.per_unit;
    }
    const uint32_t first_stage = __ldg(first_stages + block), last_stage = __ldg(first_stages + block + 1);
    const auto load = [&](uint32_t s) {
      if (s < last_stage) {
        const StageSections stage(step.words, layer, s);
        float* buffer = inputs + s % buffers * kBufferFloats;
        neighbours ? load_stage(stage, column - lane, buffer) : load_scattered_stage(stage, column, buffer);
      }
      close_copies();
    };
    load(first_stage);
    for (uint32_t s = first_stage; s < last_stage; ++s) {
      if (buffers == 2) {
        load(s + 1);
        finish_copies<1>();
      } else {
        finish_copies<0>();
      }
      __syncthreads();
      const StageSections stage(step.words, layer, s);
      add_stage<kStored>(stage, static_cast<float>(layer.staged_value), inputs + s % buffers * kBufferFloats, sums);
      __syncthreads();  // all are through with the buffer
      if (buffers == 1) load(s + 1);
    }
    step.bounds.clip(sums);
    uint32_t bits = 0;
    float* target = step.target + tiled_offset(place, first_slot, layer.outputs);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first_slot + r >= layer.outputs) break;
      target[r * kTile] = sums[r];
      bits |= __float_as_uint(sums[r]);
    }
    const bool active = (bits << 1) != 0;  // -0.0 is zero
    if (active && place < count && step.flags[place] != step.flag) step.flags[place] = step.flag;
  }
}

template <bool kStored>
cudaError_t launch(const LayerStep& step, const PlanLayer& layer, cudaStream_t stream) {
  const auto kernel = staged_kernel<kStored>;
  DeviceLimits limits;
  cudaError_t error = read_device_limits(&limits);
  if (error != cudaSuccess) return error;
  constexpr int kBufferBytes = kBufferFloats * sizeof(float);
  const int buffers = 2 * kBufferBytes <= limits.block_shared_bytes ? 2 : 1;  // with two, one is filled meanwhile
  const int shared = buffers * kBufferBytes;
  int64_t resident_blocks = 0;
  if ((error = resident_block_count(kernel, kThreads, shared, &resident_blocks)) != cudaSuccess) return error;
  const int64_t tiles = (step.features + kLanes - 1) / kLanes;
  const int64_t items = tiles * ((layer.outputs + kStagedRows - 1) / kStagedRows);
  if (items == 0) return cudaSuccess;
  kernel<<<static_cast<unsigned>(std::min(items, resident_blocks)), kThreads, shared, stream>>>(step, layer, buffers);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_staged(const LayerStep& step, const PlanLayer& layer, cudaStream_t stream) {
  return layer.staged_single_valued ? launch<false>(step, layer, stream) : launch<true>(step, layer, stream);
}

}  // namespace spdnn::cuda
