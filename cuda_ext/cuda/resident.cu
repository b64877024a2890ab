#include <algorithm>
#include <type_traits>

#include "accumulate.cuh"
#include "intrinsics.cuh"
#include "launch.h"
#include "resident.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int64_t kSharedBytes = 227 * 1024;       // of one multiprocessor of compute capability 9.0, for blocks
constexpr int64_t kSharedReservedPerBlock = 1024;  // by the driver
constexpr int64_t kSharedStatic = 1024;            // of the kernel
constexpr int kWantedBlocks = 3;                   // per multiprocessor: one loads while others compute

constexpr int kLayerFields = sizeof(PlanLayer) / sizeof(int64_t);
constexpr int kRunFields = sizeof(PlanRun) / sizeof(int64_t);
constexpr int kStagedRuns = 4;  // run records of a layer that are brought along

// Of one of the two buffers; a multiple of 16 bytes.
__host__ __device__ int64_t buffer_floats(int64_t max_width, int features) {
  return (max_width * features + 3) / 4 * 4;
}

int64_t block_bytes(int64_t max_width, int features, int64_t staged_words) {
  return (2 * buffer_floats(max_width, features) + 2 * staged_words) * static_cast<int64_t>(sizeof(float));
}

// Blocks of so much shared memory that one multiprocessor holds.
int64_t blocks_that_fit(int64_t bytes) { return kSharedBytes / (bytes + kSharedStatic + kSharedReservedPerBlock); }

// A block's features, as threads share them out: each thread has `kVector` features of one row group. Two, and not
// four, keep the registers free for four warps a scheduler, without which the multiply-adds wait for one another.
template <int kFeatures>
struct Shape {
  static constexpr int kVector = kFeatures < 2 ? 1 : 2;
  static constexpr int kLanes = kFeatures / kVector;  // threads that share a row group
  static constexpr int kMaxThreads = kFeatures < 8 ? 512 : 256;
  static constexpr int kMinBlocks = kFeatures < 8 ? 1 : 2;
};

template <int kVector>
__device__ __forceinline__ void load_vector(const float* address, float (&x)[kVector]) {
  if constexpr (kVector == 2) {
    const float2 v = *reinterpret_cast<const float2*>(address);
    x[0] = v.x, x[1] = v.y;
  } else {
    x[0] = *address;
  }
}

template <int kVector>
__device__ __forceinline__ void store_vector(float* address, const float (&x)[kVector]) {
  if constexpr (kVector == 2) {
    *reinterpret_cast<float2*>(address) = make_float2(x[0], x[1]);
  } else {
    *address = x[0];
  }
}

// One run of one layer from `in` to `out`, both [neuron][kFeatures]. Returns a bit for each of the thread's features
// that some output made active.
template <int kFeatures, int kOutputs, bool kStored, typename Words>
__device__ __forceinline__ uint32_t compute_run(const PlanLayer& layer, const PlanRun& run, const Words& words,
                                                float cap, const float* in, float* out) {
  constexpr int kVector = Shape<kFeatures>::kVector, kLanes = Shape<kFeatures>::kLanes;
  const int lane = threadIdx.x % kLanes;
  const int groups = static_cast<int>(run.groups);
  const int units = groups * (static_cast<int>(run.group_outputs) / kOutputs);
  const float* column = in + lane * kVector;
  uint32_t active = 0;
  for (int u = threadIdx.x / kLanes; u < units; u += blockDim.x / kLanes) {
    const Unit unit = Unit::at(u, groups, kOutputs);
    float sums[kOutputs][kVector];
    start_with_bias(layer, run, unit, words, sums);
    accumulate<kOutputs, kVector, kStored, !kStored, uint16_t>(
        run, unit, words,
        [=](uint32_t index, float (&x)[kVector]) { load_vector<kVector>(column + index * kFeatures, x); }, sums);
    active |= clip_all(sums, cap);
    float* target = out + unit.first_slot(run) * kFeatures + lane * kVector;
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) store_vector<kVector>(target + r * unit.width * kFeatures, sums[r]);
  }
  return active << (lane * kVector);
}

// A layer's records and, where they fit, its sections, brought into shared memory while the layer before is computed.
struct StagedLayer {
  PlanLayer layer;
  PlanRun runs[kStagedRuns];
};

__device__ __forceinline__ bool is_staged(const ResidentStep& step, const PlanLayer& layer) {
  return layer.words <= step.staged_words;
}

template <int kFeatures, typename Words>
__device__ __forceinline__ uint32_t compute_layer(const StagedLayer& staged, const PlanRun* runs, const Words& words,
                                                  float cap, const float* in, float* out) {
  uint32_t active = 0;
  const PlanLayer& layer = staged.layer;
  for (int r = 0; r < static_cast<int>(layer.runs); ++r) {
    const PlanRun& run = r < kStagedRuns ? staged.runs[r] : runs[layer.first_run + r];
    const auto compute = [&](auto stored) {
      constexpr bool kStored = decltype(stored)::value;
      dispatch_outputs<kStored>(run.group_outputs, [&](auto outputs) {
        active |= compute_run<kFeatures, decltype(outputs)::value, kStored>(layer, run, words, cap, in, out);
      });
    };
    if (run.value_offset < 0) {
      compute(std::false_type{});
    } else {
      compute(std::true_type{});
    }
  }
  return active;
}

// Starts to bring layer `l` along; `finish_copies` and a barrier make it visible. `first_run` is its first run.
__device__ __forceinline__ void start_staging(const ResidentStep& step, int l, int64_t first_run, int64_t first_word,
                                              int64_t words, StagedLayer* staged, uint32_t* sections) {
  const int64_t* layer_fields = reinterpret_cast<const int64_t*>(step.words + step.layers_word) + l * kLayerFields;
  const int64_t* run_fields = reinterpret_cast<const int64_t*>(step.words + step.runs_word) + first_run * kRunFields;
  for (int field = threadIdx.x; field < kLayerFields; field += blockDim.x) {
    reinterpret_cast<int64_t*>(&staged->layer)[field] = __ldg(layer_fields + field);
  }
  const int64_t fields = min(static_cast<int64_t>(kStagedRuns), step.runs - first_run) * kRunFields;
  for (int field = threadIdx.x; field < fields; field += blockDim.x) {
    reinterpret_cast<int64_t*>(staged->runs)[field] = __ldg(run_fields + field);
  }
  if (words > step.staged_words) return;
  for (int64_t word = threadIdx.x * 4; word < words; word += blockDim.x * 4) {
    copy_async(sections + word, step.words + first_word + word);
  }
}

// The caller's rows. Neighbouring threads take neighbouring features, so that their stores fall into different banks; a
// thread takes sixteen bytes of a row at a time.
template <int kFeatures>
__device__ void load_rows(const InputFeatures& input, int64_t first, int64_t count, float* in) {
  const int column = threadIdx.x % kFeatures;
  const int64_t feature = first + column;
  const int chunk_neurons = neurons_in_chunk(input.type);
  const int chunks = static_cast<int>((input.inputs + chunk_neurons - 1) / chunk_neurons);
  for (int chunk = threadIdx.x / kFeatures; chunk < chunks; chunk += blockDim.x / kFeatures) {
    const int first_neuron = chunk * chunk_neurons;
    const int neurons = min(chunk_neurons, static_cast<int>(input.inputs) - first_neuron);
    float* target = in + first_neuron * kFeatures + column;
    if (feature >= count) {
      for (int k = 0; k < neurons; ++k) target[k * kFeatures] = 0.0f;
    } else {
      for_each_of_chunk(input, feature, first_neuron, neurons, [=](int k, float x) { target[k * kFeatures] = x; });
    }
  }
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
  load_rows<kFeatures>(step.input, first_slot, count, in);
}

// After the last layer: the answer, in the caller's order.
template <int kFeatures>
__device__ void store_results(const ResidentStep& step, int64_t first_slot, uint32_t active, const float* out) {
  if (threadIdx.x < kFeatures && (active >> threadIdx.x & 1u)) {
    const int64_t slot = first_slot + threadIdx.x;
    step.alive[step.ids ? step.ids[slot] : slot] = true;
  }
  if (!step.activations) return;
  for (int column = 0; column < kFeatures; ++column) {
    if (!(active >> column & 1u)) continue;
    const int64_t slot = first_slot + column;
    float* row = step.activations + (step.ids ? step.ids[slot] : slot) * step.outputs;
    for (int64_t j = threadIdx.x; j < step.outputs; j += blockDim.x) row[j] = out[step.slot_of[j] * kFeatures + column];
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
__global__ void __launch_bounds__(Shape<kFeatures>::kMaxThreads, Shape<kFeatures>::kMinBlocks)
    resident_kernel(const __grid_constant__ ResidentStep step) {
  extern __shared__ __align__(16) float buffers[];
  __shared__ StagedLayer staged[2];
  __shared__ uint32_t active_words[2];
  const PlanRun* runs = reinterpret_cast<const PlanRun*>(step.words + step.runs_word);
  const PlanLayer* layers = reinterpret_cast<const PlanLayer*>(step.words + step.layers_word);
  const int64_t buffer = buffer_floats(step.max_width, kFeatures);
  uint32_t* sections = reinterpret_cast<uint32_t*>(buffers + 2 * buffer);
  const int64_t count = step.count ? *step.count : step.features;
  for (int64_t first_slot = static_cast<int64_t>(blockIdx.x) * kFeatures; first_slot < count;
       first_slot += static_cast<int64_t>(gridDim.x) * kFeatures) {
    float *in = buffers, *out = buffers + buffer;
    const int64_t columns = min(static_cast<int64_t>(kFeatures), count - first_slot);
    const uint32_t used = columns == 32 ? 0xFFFFFFFFu : (1u << columns) - 1;
    if (threadIdx.x < 2) active_words[threadIdx.x] = 0;
    {
      const int l = step.first_layer;
      const PlanLayer& first = layers[l];
      start_staging(step, l, first.first_run, first.first_word, first.words, &staged[l & 1],
                    sections + (l & 1) * step.staged_words);
    }
    load_tile<kFeatures>(step, first_slot, count, layers[step.first_layer].inputs, in);
    finish_copies();
    __syncthreads();
    uint32_t active = 0;
    int64_t width = 0;
    for (int l = step.first_layer; l < step.end_layer; ++l) {
      const StagedLayer& current = staged[l & 1];
      const PlanLayer& layer = current.layer;
      if (l + 1 < step.end_layer) {
        start_staging(step, l + 1, layer.first_run + layer.runs, layer.first_word + layer.words, layer.next_words,
                      &staged[~l & 1], sections + (~l & 1) * step.staged_words);
      }
      uint32_t* word = &active_words[l & 1];
      uint32_t mine;
      if (is_staged(step, layer)) {
        const SharedWords words{sections + (l & 1) * step.staged_words, layer.first_word};
        mine = compute_layer<kFeatures>(current, runs, words, step.cap, in, out);
      } else {
        mine = compute_layer<kFeatures>(current, runs, GlobalWords{step.words}, step.cap, in, out);
      }
      mine = __reduce_or_sync(0xFFFFFFFFu, mine);
      if (threadIdx.x % 32 == 0 && mine) atomicOr(word, mine);
      finish_copies();
      __syncthreads();
      active = *word & used;
      if (threadIdx.x == 0) {
        active_words[~l & 1] = 0;  // last read before the barrier above, next written after the one below
        if (step.active && active) atomicAdd(step.active + l, __popc(active));
      }
      width = layer.outputs;
      const bool dead = !active && layer.prunable;
      float* swap = in;
      in = out, out = swap;
      __syncthreads();
      if (dead) break;
    }
    const bool last = step.target == nullptr;
    if (last) {
      store_results<kFeatures>(step, first_slot, active, in);
    } else {
      const uint32_t kept = layers[step.end_layer - 1].prunable ? active : used;
      if (kept) store_tile<kFeatures>(step, first_slot, width, kept, in);
    }
    __syncthreads();
  }
}

template <int kFeatures>
cudaError_t launch(ResidentStep step, const PlanView& plan, cudaStream_t stream) {
  int64_t units = 1, words = 0;
  for (int l = step.first_layer; l < step.end_layer; ++l) {
    words = std::max(words, plan.layers[l].words);
    for (int64_t r = 0; r < plan.layers[l].runs; ++r) {
      const PlanRun& run = plan.runs[plan.layers[l].first_run + r];
      units = std::max(units, run.groups * (run.group_outputs / outputs_of_unit(run)));
    }
  }
  const int64_t wanted = (units * Shape<kFeatures>::kLanes + 31) / 32 * 32;
  const int threads = static_cast<int>(std::min<int64_t>(Shape<kFeatures>::kMaxThreads, std::max<int64_t>(wanted, 64)));
  // Sections are brought along where that costs no block its place.
  const bool staged = blocks_that_fit(block_bytes(step.max_width, kFeatures, words)) >=
                      blocks_that_fit(block_bytes(step.max_width, kFeatures, 0));
  step.staged_words = staged ? static_cast<int>(words) : 0;
  const int64_t shared = block_bytes(step.max_width, kFeatures, step.staged_words);
  const auto kernel = resident_kernel<kFeatures>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  const int64_t tiles = (step.features + kFeatures - 1) / kFeatures;
  int64_t resident_blocks = 0;
  if ((error = resident_block_count(kernel, threads, shared, &resident_blocks)) != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(std::min(tiles, resident_blocks)), threads, shared, stream>>>(step);
  return cudaGetLastError();
}

}  // namespace

int resident_features(int64_t max_width) {
  int fits = 0;
  for (const int features : {1, 2, 4, 8, 16, 32}) {
    const int64_t blocks = blocks_that_fit(block_bytes(max_width, features, 0));
    if (blocks < (features > 4 ? kWantedBlocks : 1)) break;
    fits = features;
  }
  return fits;
}

cudaError_t launch_resident(const ResidentStep& step, const PlanView& plan, cudaStream_t stream) {
  switch (step.tile) {
    case 1:
      return launch<1>(step, plan, stream);
    case 2:
      return launch<2>(step, plan, stream);
    case 4:
      return launch<4>(step, plan, stream);
    case 8:
      return launch<8>(step, plan, stream);
    case 16:
      return launch<16>(step, plan, stream);
    case 32:
      return launch<32>(step, plan, stream);
    default:
      return cudaErrorInvalidConfiguration;
  }
}

}  // namespace spdnn::cuda
