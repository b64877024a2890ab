#include "resident.h"

#include <algorithm>
#include <type_traits>

#include "accumulate.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kSharedBytes = 227 * 1024;         // of one multiprocessor of compute capability 9.0, for blocks
constexpr int64_t kSharedReservedPerBlock = 1024;    // by the driver
constexpr int64_t kSharedStatic = 64;                // the activity words
constexpr int kWantedBlocks = 3;                     // per multiprocessor: one loads while others compute

int64_t buffer_bytes(int64_t max_width, int features) { return 2 * max_width * features * sizeof(float); }

// A block's features, as threads share them out: each thread has `kVector` features of one row group.
template <int kFeatures>
struct Shape {
  static constexpr int kVector = kFeatures < 4 ? kFeatures : 4;
  static constexpr int kLanes = kFeatures / kVector;  // threads that share a row group
};

template <int kVector>
__device__ __forceinline__ void load_vector(const float* address, float (&x)[kVector]) {
  if constexpr (kVector == 4) {
    const float4 v = *reinterpret_cast<const float4*>(address);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else if constexpr (kVector == 2) {
    const float2 v = *reinterpret_cast<const float2*>(address);
    x[0] = v.x, x[1] = v.y;
  } else {
    x[0] = *address;
  }
}

template <int kVector>
__device__ __forceinline__ void store_vector(float* address, const float (&x)[kVector]) {
  if constexpr (kVector == 4) {
    *reinterpret_cast<float4*>(address) = make_float4(x[0], x[1], x[2], x[3]);
  } else if constexpr (kVector == 2) {
    *reinterpret_cast<float2*>(address) = make_float2(x[0], x[1]);
  } else {
    *address = x[0];
  }
}

// One run of one layer from `in` to `out`, both [neuron][kFeatures]. Returns a bit for each of the thread's features
// that some output made active.
template <int kFeatures, int kOutputs, bool kStored>
__device__ __forceinline__ uint32_t compute_run(const PlanLayer& layer, const PlanRun& run,
                                                const uint32_t* __restrict__ words, float cap, const float* in,
                                                float* out) {
  constexpr int kVector = Shape<kFeatures>::kVector, kLanes = Shape<kFeatures>::kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t units = run.groups * (run.group_outputs / kOutputs);
  uint32_t active = 0;
  for (int64_t u = threadIdx.x / kLanes; u < units; u += blockDim.x / kLanes) {
    const Unit unit = Unit::at(u, run.groups, kOutputs);
    float sums[kOutputs][kVector];
    start_with_bias(layer, run, unit, words, sums);
    const float* column = in + lane * kVector;
    accumulate<kOutputs, kVector, kStored, uint16_t>(
        run, unit, words,
        [&](uint32_t index, float(&x)[kVector]) { load_vector<kVector>(column + index * kFeatures, x); }, sums);
    active |= clip_all(sums, cap);
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) {
      store_vector<kVector>(out + unit.slot(run, r) * kFeatures + lane * kVector, sums[r]);
    }
  }
  return active << (lane * kVector);
}

template <int kFeatures>
__device__ __forceinline__ uint32_t compute_layer(const PlanLayer& layer, const PlanRun* runs,
                                                  const uint32_t* __restrict__ words, float cap, const float* in,
                                                  float* out) {
  uint32_t active = 0;
  for (int64_t r = 0; r < layer.runs; ++r) {
    const PlanRun run = runs[layer.first_run + r];
    dispatch_outputs(run.group_outputs, [&](auto outputs) {
      constexpr int kOutputs = decltype(outputs)::value;
      active |= run.value_offset < 0 ? compute_run<kFeatures, kOutputs, false>(layer, run, words, cap, in, out)
                                     : compute_run<kFeatures, kOutputs, true>(layer, run, words, cap, in, out);
    });
  }
  return active;
}

// Brings the tile's features into shared memory; columns past the last feature are zero.
template <int kFeatures>
__device__ void load_tile(const ResidentStep& step, int64_t first_slot, int64_t count, int64_t width, float* in) {
  if (step.source) {
    constexpr int kVector = Shape<kFeatures>::kVector, kLanes = Shape<kFeatures>::kLanes;
    const int lane = threadIdx.x % kLanes;
    const float* source = step.source + tiled_offset(first_slot, 0, width) + lane * kVector;
    for (int64_t neuron = threadIdx.x / kLanes; neuron < width; neuron += blockDim.x / kLanes) {
      float x[kVector];
      load_vector<kVector>(source + neuron * kTile, x);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (first_slot + lane * kVector + v >= count) x[v] = 0.0f;
      }
      store_vector<kVector>(in + neuron * kFeatures + lane * kVector, x);
    }
    return;
  }
  // Rows of the caller's: a thread stays with one feature, so that its loads follow one another in memory.
  const int column = threadIdx.x % kFeatures;
  const int64_t feature = first_slot + column;
  const int threads = blockDim.x / kFeatures;
  const int64_t share = (width + threads - 1) / threads;
  const int64_t begin = threadIdx.x / kFeatures * share, end = min(begin + share, width);
  for (int64_t neuron = begin; neuron < end; ++neuron) {
    in[neuron * kFeatures + column] = feature < count ? step.input.at(feature, neuron) : 0.0f;
  }
}

// After the last layer: the answer, in the caller's order.
template <int kFeatures>
__device__ void store_results(const ResidentStep& step, int64_t first_slot, int64_t outputs, uint32_t active,
                              const float* out) {
  if (threadIdx.x < kFeatures && (active >> threadIdx.x & 1u)) {
    const int64_t slot = first_slot + threadIdx.x;
    step.alive[step.ids ? step.ids[slot] : slot] = true;
  }
  if (!step.activations) return;
  for (int column = 0; column < kFeatures; ++column) {
    if (!(active >> column & 1u)) continue;
    const int64_t slot = first_slot + column;
    float* row = step.activations + (step.ids ? step.ids[slot] : slot) * outputs;
    for (int64_t j = threadIdx.x; j < outputs; j += blockDim.x) row[j] = out[step.slot_of[j] * kFeatures + column];
  }
}

// Between launches: the kept features move together, so that the next launch finds no gaps.
template <int kFeatures>
__device__ void store_tile(const ResidentStep& step, int64_t first_slot, int64_t width, uint32_t kept,
                           const float* out) {
  __shared__ int32_t first_target;
  if (threadIdx.x == 0) first_target = atomicAdd(step.target_count, __popc(kept));
  __syncthreads();
  const int column = threadIdx.x % kFeatures;
  if (!(kept >> column & 1u)) return;
  const int64_t target_slot = first_target + __popc(kept & ((1u << column) - 1));
  if (threadIdx.x < kFeatures) {
    const int64_t slot = first_slot + column;
    step.target_ids[target_slot] = static_cast<int32_t>(step.ids ? step.ids[slot] : slot);
  }
  float* target = step.target + tiled_offset(target_slot, 0, width);
  for (int64_t neuron = threadIdx.x / kFeatures; neuron < width; neuron += blockDim.x / kFeatures) {
    target[neuron * kTile] = out[neuron * kFeatures + column];
  }
}

template <int kFeatures>
__global__ void __launch_bounds__(kMaxThreads, 2) resident_kernel(const __grid_constant__ ResidentStep step) {
  extern __shared__ __align__(16) float buffers[];
  __shared__ uint32_t active_words[2];
  const PlanLayer* layers = reinterpret_cast<const PlanLayer*>(step.words + step.layers_word);
  const PlanRun* runs = reinterpret_cast<const PlanRun*>(step.words + step.runs_word);
  const int64_t count = step.count ? *step.count : step.features;
  for (int64_t first_slot = static_cast<int64_t>(blockIdx.x) * kFeatures; first_slot < count;
       first_slot += static_cast<int64_t>(gridDim.x) * kFeatures) {
    float *in = buffers, *out = buffers + static_cast<int64_t>(step.max_width) * kFeatures;
    const int64_t columns = min(static_cast<int64_t>(kFeatures), count - first_slot);
    const uint32_t used = columns == 32 ? 0xFFFFFFFFu : (1u << columns) - 1;
    if (threadIdx.x < 2) active_words[threadIdx.x] = 0;
    load_tile<kFeatures>(step, first_slot, count, layers[step.first_layer].inputs, in);
    __syncthreads();
    uint32_t active = 0;
    int64_t width = 0;
    for (int l = step.first_layer; l < step.end_layer; ++l) {
      const PlanLayer layer = layers[l];
      uint32_t* word = &active_words[l & 1];
      const uint32_t mine = __reduce_or_sync(
          0xFFFFFFFFu, compute_layer<kFeatures>(layer, runs, step.words, step.cap, in, out));
      if (threadIdx.x % 32 == 0 && mine) atomicOr(word, mine);
      __syncthreads();
      active = *word & used;
      if (threadIdx.x == 0) {
        active_words[~l & 1] = 0;  // last read before the barrier above, next written after the one below
        if (step.active && active) atomicAdd(step.active + l, __popc(active));
      }
      width = layer.outputs;
      float* swap = in;
      in = out, out = swap;
      __syncthreads();
      if (!active && layer.prunable) break;
    }
    const bool last = step.target == nullptr;
    if (last) {
      store_results<kFeatures>(step, first_slot, width, active, in);
    } else {
      const uint32_t kept = layers[step.end_layer - 1].prunable ? active : used;
      if (kept) store_tile<kFeatures>(step, first_slot, width, kept, in);
    }
    __syncthreads();
  }
}

template <int kFeatures>
cudaError_t launch(const ResidentStep& step, const PlanView& plan, cudaStream_t stream) {
  int64_t units = 1;
  for (int l = step.first_layer; l < step.end_layer; ++l) {
    for (int64_t r = 0; r < plan.layers[l].runs; ++r) {
      const PlanRun& run = plan.runs[plan.layers[l].first_run + r];
      units = std::max(units, run.groups * std::max<int64_t>(1, run.group_outputs / 16));
    }
  }
  const int64_t wanted = (units * Shape<kFeatures>::kLanes + 31) / 32 * 32;
  const int threads = static_cast<int>(std::min<int64_t>(kMaxThreads, std::max<int64_t>(wanted, 64)));
  const int64_t shared = buffer_bytes(step.max_width, kFeatures);
  cudaError_t error = cudaFuncSetAttribute(resident_kernel<kFeatures>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  int device = 0, multiprocessors = 0, blocks = 0;
  if ((error = cudaGetDevice(&device)) != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) {
    return error;
  }
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, resident_kernel<kFeatures>, threads, shared);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (step.features + kFeatures - 1) / kFeatures;
  const int64_t grid = std::min<int64_t>(tiles, static_cast<int64_t>(multiprocessors) * std::max(blocks, 1));
  resident_kernel<kFeatures><<<static_cast<unsigned>(grid), threads, shared, stream>>>(step);
  return cudaGetLastError();
}

}  // namespace

int resident_features(int64_t max_width) {
  int fits = 0;
  for (const int features : {1, 2, 4, 8, 16, 32}) {
    const int64_t bytes = buffer_bytes(max_width, features) + kSharedReservedPerBlock + kSharedStatic;
    if (bytes > kSharedBytes) break;
    if (features > 8 && bytes * kWantedBlocks > kSharedBytes) break;
    fits = features;
  }
  return fits;
}

cudaError_t launch_resident(const ResidentStep& step, const PlanView& plan, cudaStream_t stream) {
  switch (resident_features(step.max_width)) {
    case 1: return launch<1>(step, plan, stream);
    case 2: return launch<2>(step, plan, stream);
    case 4: return launch<4>(step, plan, stream);
    case 8: return launch<8>(step, plan, stream);
    case 16: return launch<16>(step, plan, stream);
    case 32: return launch<32>(step, plan, stream);
    default: return cudaErrorInvalidConfiguration;
  }
}

}  // namespace spdnn::cuda
