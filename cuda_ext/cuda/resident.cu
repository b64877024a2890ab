#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "accumulate.cuh"
#include "intrinsics.cuh"
#include "launch.h"
#include "resident.h"
#include "resident_block.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kSumsOfThread = 64;  // outputs times features that a thread has of a layer

// The sums of a thread, first in, first out: registers have no addresses, so what is kept moves up when a part is
// added, and again when one is taken. A few moves beside all multiply-adds of a part, and a loop's body serves all
// parts.
template <int kVector>
struct Sums {
  static constexpr int kOutputs = kSumsOfThread / kVector;
  float values[kOutputs][kVector];

  template <int kPart>
  __device__ __forceinline__ void make_room() {
#pragma unroll
    for (int r = kOutputs - 1; r >= kPart; --r) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) values[r][v] = values[r - kPart][v];
    }
  }
};

// Walks through the units of a thread: `kOutputs` outputs of a group each. Of all units of the layer a thread takes
// each `step`th, so that neighbours read what stands side by side, and each has units of long rows and of short ones.
template <int kOutputs>
class UnitCursor {
 public:
  __device__ UnitCursor(const LayerView& view, int first, int step)
      : view_(view), step_(step), number_(first), runs_(static_cast<int>(view.layer().runs)) {
    units_ = runs_ > 0 ? units_of(view.run(0)) : 0;
  }

  // Calls visit(run, unit) for the next one, if there is one.
  template <typename Visit>
  __device__ __forceinline__ void next(const Visit& visit) {
    while (number_ >= first_unit_ + units_ && run_ + 1 < runs_) {
      first_unit_ += units_;
      units_ = units_of(view_.run(++run_));
    }
    if (number_ < first_unit_ + units_) {
      const PlanRun& run = view_.run(run_);
      visit(run, Unit::at(number_ - first_unit_, static_cast<int>(run.groups), kOutputs));
    }
    number_ += step_;
  }

 private:
  __device__ static int units_of(const PlanRun& run) {
    return static_cast<int>(run.groups) * (static_cast<int>(run.group_outputs) / kOutputs);
  }

  const LayerView& view_;
  int step_;
  int number_;
  int runs_;
  int run_ = 0;
  int first_unit_ = 0;  // of the run
  int units_;
};

// A thread's features of one neuron, in shared memory.
template <int kVector>
struct FeatureColumn {
  const char* first;
  uint32_t stride_bytes;

  __device__ FeatureColumn(const float* data, const Columns& columns)
      : first(reinterpret_cast<const char*>(data)),
        // One multiply-add makes an address of an index, if the compiler does not know that it could shift and add.
        stride_bytes(opaque(static_cast<uint32_t>(columns.count() * sizeof(float)))) {}

  __device__ __forceinline__ void load(uint32_t neuron, float (&x)[kVector]) const {
    load_vector<kVector>(reinterpret_cast<const float*>(first + neuron * stride_bytes), x);
  }
};

// The stored values of one chunk of a unit's edges.
template <int kOutputs>
struct ValueChunk {
  float of[kEdgeChunk][kOutputs];

  __device__ __forceinline__ explicit ValueChunk(float value) {
#pragma unroll
    for (int e = 0; e < kEdgeChunk; ++e) {
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) of[e][r] = value;
    }
  }

  __device__ __forceinline__ float at(int edge, int output) const { return of[edge][output]; }

  // `values` of the run, `position` of the chunk in it.
  __device__ __forceinline__ void load(const float* values, int position, int group_outputs, int first_output) {
    if constexpr (kOutputs == 1) {
      if (group_outputs == 1) {
        const float4 four = reinterpret_cast<const float4*>(values)[position];
        of[0][0] = four.x, of[1][0] = four.y, of[2][0] = four.z, of[3][0] = four.w;
      } else {
#pragma unroll
        for (int e = 0; e < kEdgeChunk; ++e) {
          of[e][0] = values[static_cast<int64_t>(position * kEdgeChunk + e) * group_outputs + first_output];
        }
      }
    } else {
      static_assert(kOutputs == 4, "the values of an edge come in one load");
#pragma unroll
      for (int e = 0; e < kEdgeChunk; ++e) {
        const int64_t first = static_cast<int64_t>(position * kEdgeChunk + e) * group_outputs + first_output;
        const float4 four = *reinterpret_cast<const float4*>(values + first);
        of[e][0] = four.x, of[e][1] = four.y, of[e][2] = four.z, of[e][3] = four.w;
      }
    }
  }
};

// One value for all edges.
struct NoValues {
  float value;

  __device__ __forceinline__ explicit NoValues(float value) : value(value) {}
  __device__ __forceinline__ float at(int, int) const { return value; }
  __device__ __forceinline__ void load(const float*, int, int, int) {}
};

// Adds the unit's edges to its sums: one multiply-add for each edge, output and feature. Indices, and values where they
// take few registers, are a chunk ahead, for they may come from device memory.
template <int kVector, int kOutputs, bool kStored>
__device__ __forceinline__ void add_edges(const LayerView& view, const PlanRun& run, const Unit& unit,
                                          const FeatureColumn<kVector>& column, float (&sums)[kOutputs][kVector]) {
  const int chunks = static_cast<int>(run.edges) / kEdgeChunk;
  if (chunks == 0) return;
  const uint2* indices = view.at<uint2>(run.index_offset);
  const bool stored = kStored && run.value_offset >= 0;
  const float* values = view.at<float>(stored ? run.value_offset : run.index_offset);
  const float shared_value = static_cast<float>(run.value);
  const int group_outputs = static_cast<int>(run.group_outputs);
  std::conditional_t<kStored, ValueChunk<kOutputs>, NoValues> next_values(shared_value);
  int position = unit.slice * chunks + unit.lane;
  const int end = position + chunks * unit.width;
  uint2 next = indices[position];
  constexpr bool kAhead = kOutputs == 1;
  if (kAhead && stored) next_values.load(values, position, group_outputs, unit.first_output);
#pragma unroll 1
  while (position < end) {
    const uint2 now = next;
    if (!kAhead && stored) next_values.load(values, position, group_outputs, unit.first_output);
    const auto weights = next_values;
    position += unit.width;
    if (position < end) {
      next = indices[position];
      if (kAhead && stored) next_values.load(values, position, group_outputs, unit.first_output);
    }
    float x[kEdgeChunk][kVector];
#pragma unroll
    for (int e = 0; e < kEdgeChunk; ++e) column.load(index_of(now, e), x[e]);
#pragma unroll
    for (int e = 0; e < kEdgeChunk; ++e) {
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) {
        const float weight = weights.at(e, r);
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[r][v] = fmaf(weight, x[e][v], sums[r][v]);
      }
    }
  }
}

template <int kVector, int kOutputs>
__device__ __forceinline__ void add_bias(const LayerView& view, const PlanRun& run, const Unit& unit,
                                         const Scale& scale, float (&sums)[kOutputs][kVector]) {
  const PlanLayer& layer = view.layer();
  const float* biases = layer.bias_offset < 0 ? nullptr : view.at<float>(layer.bias_offset) + unit.first_slot(run);
  const float shared_bias = static_cast<float>(layer.bias);
#pragma unroll
  for (int r = 0; r < kOutputs; ++r) {
    const float start = (biases ? biases[r * unit.width] : shared_bias) * scale.per_unit;
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums[r][v] = opaque(start);
  }
}

// One layer, in place: units of kOutputs outputs with the same inputs; without kStored one weight serves all edges of a
// run. Returns a bit for each of the block's features that some output of the thread makes active.
template <int kVector, int kOutputs, bool kStored>
__device__ __forceinline__ uint32_t compute_layer(const LayerView& view, const Scale& scale,
                                                  const Activations<kVector>& activations) {
  constexpr int kMost = Sums<kVector>::kOutputs, kParts = kMost / kOutputs;
  const int lane_bits = activations.columns.count_bits - kVectorBits<kVector>;  // of the lanes that share a unit
  const int column = (threadIdx.x & ((1 << lane_bits) - 1)) * kVector;
  const int first = threadIdx.x >> lane_bits, step = blockDim.x >> lane_bits;
  const FeatureColumn<kVector> features(activations.at(0, column), activations.columns);
  Sums<kVector> sums;
  const Bounds bounds = scale.bounds(view.layer());
  uint32_t active = 0;
  UnitCursor<kOutputs> cursor(view, first, step);
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    sums.template make_room<kOutputs>();
    cursor.next([&](const PlanRun& run, const Unit& unit) {
      float (&newest)[kOutputs][kVector] = reinterpret_cast<float (&)[kOutputs][kVector]>(sums.values[0]);
      add_bias(view, run, unit, scale, newest);
      add_edges<kVector, kOutputs, kStored>(view, run, unit, features, newest);
      active |= clip_all(newest, bounds);
    });
  }
  __syncthreads();  // past it nobody reads the layer's inputs
  UnitCursor<kOutputs> again(view, first, step);
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    again.next([&](const PlanRun& run, const Unit& unit) {
      const int slot = unit.first_slot(run);
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) {
        activations.set_vector(slot + r * unit.width, column, sums.values[kMost - kOutputs + r]);
      }
    });
    sums.template make_room<kOutputs>();
  }
  return active << column;
}

// So many that all blocks have work, and `tile` at most: few features are spread over all multiprocessors.
__device__ inline Columns share_of_block(int64_t count, int fewest, int tile) {
  const int64_t share = (count + gridDim.x - 1) / gridDim.x;
  Columns columns{0};
  while (columns.count() < fewest || (columns.count() < share && columns.count() < tile)) ++columns.count_bits;
  return columns;
}

template <int kVector, int kOutputs, bool kStored>
__global__ void __launch_bounds__(kMostThreads, 1)
    resident_kernel(const __grid_constant__ ResidentStep step, int most) {
  extern __shared__ __align__(16) char memory[];
  __shared__ BlockState state;
  Staging staging(step, state, reinterpret_cast<uint32_t*>(memory + Activations<kVector>::bytes(step.max_width, most)));
  const PlanLayer* layers = reinterpret_cast<const PlanLayer*>(step.words + step.layers_word);
  const int64_t count = step.count ? *step.count : step.features;
  const Columns columns = share_of_block(count, kVector, most);
  const Activations<kVector> activations(reinterpret_cast<float*>(memory), columns);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * columns.count(); first < count;
       first += static_cast<int64_t>(gridDim.x) * columns.count()) {
    const Tile tile(step, first, count, columns);
    if (threadIdx.x < kStagedLayers) state.active_words[threadIdx.x] = 0;
    staging.begin();
    load_features(step, first, count, layers[step.first_layer].inputs, columns, activations);
    staging.wait();
    __syncthreads();
    uint32_t active = 0;
    int64_t width = 0;
    bool prunable = false;
    for (int l = step.first_layer; l < step.end_layer; ++l) {
      staging.advance(l);
      const StagedLayer& record = staging.record(l);
      uint32_t mine = compute_layer<kVector, kOutputs, kStored>(staging.view(l), step.scale, activations);
      uint32_t* word = &state.active_words[l % kStagedLayers];
      mine = __reduce_or_sync(0xFFFFFFFFu, mine);
      if (threadIdx.x % 32 == 0 && mine) atomicOr(word, mine);
      // Read by all before the barrier that ended the last layer, and written again in the next but one.
      if (threadIdx.x == 0) state.active_words[(l + 2) % kStagedLayers] = 0;
      width = record.layer.outputs;  // read here: past the barrier another thread may stage over the record
      prunable = record.layer.prunable;
      staging.wait();
      __syncthreads();
      active = *word & tile.used;
      tile.count(step, l, active);
      if (!active && prunable) break;
    }
    tile.store(step, width, prunable, active, columns, activations);
    staging.end();
    __syncthreads();
  }
}

// What the layers of a launch have in common.
struct Kind {
  int outputs = kMostOutputs;  // of a unit: 1, 4 or 16
  bool stored = false;
  int64_t most_outputs = 1;  // of a layer
  int64_t words = 0;         // of the longest layer's sections

  static constexpr int kMostOutputs = 16;

  Kind(const PlanView& plan, int64_t first_layer, int64_t end_layer) {
    for (int64_t l = first_layer; l < end_layer; ++l) {
      const PlanLayer& layer = plan.layers[l];
      most_outputs = std::max(most_outputs, layer.outputs);
      words = std::max(words, layer.words);
      for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
        const PlanRun& run = plan.runs[r];
        stored |= run.value_offset >= 0;
        while (run.group_outputs < outputs) outputs /= 4;
      }
    }
    if (stored) outputs = std::min(outputs, 4);
  }
};

// How a block holds the features of a launch.
struct Choice {
  int features = 0;  // 0: not even the fewest fit
  int threads = 0;
};

int vector_for(int features) { return std::min(features, 4); }

// So many threads that a block's share of its multiprocessor's threads is its share of the shared memory: a wide input
// is read by all of them, though few outputs may follow.
int64_t threads_for_share(int64_t bytes, const DeviceLimits& limits) {
  return std::clamp<int64_t>(kMostThreads * bytes / limits.block_shared_bytes / 32 * 32, 64, kMostThreads);
}

// So many blocks on a multiprocessor, with `fewest` features each. Returns none where these do not fit.
Choice choose(const Kind& kind, int64_t width, int blocks, int fewest, const DeviceLimits& limits) {
  for (int features = kMostFeatures; features >= fewest; features /= 2) {
    const int64_t outputs_of_thread = kSumsOfThread / vector_for(features), lanes = features / vector_for(features);
    const int64_t threads = round_up((kind.most_outputs + outputs_of_thread - 1) / outputs_of_thread * lanes, 32);
    const int64_t bytes = Activations<4>::bytes(width, features) + kSharedStatic;
    if (blocks * bytes <= limits.block_shared_bytes && blocks * threads <= kMostThreads) {
      return {features, static_cast<int>(std::max(threads, threads_for_share(bytes, limits)))};
    }
  }
  return {};
}

// Two blocks, where outputs share what they read: while one waits at a barrier, or for its features, the other
// multiplies. Outputs alone need as many features as fit to share their weights.
Choice choose(const PlanView& plan, int64_t first_layer, int64_t end_layer, const DeviceLimits& limits) {
  const Kind kind(plan, first_layer, end_layer);
  const int64_t width = widest(plan, first_layer, end_layer);
  if (kind.outputs > 1) {
    if (const Choice choice = choose(kind, width, 2, 4, limits); choice.features > 0) return choice;
  }
  return choose(kind, width, 1, 2, limits);
}

template <int kVector, int kOutputs, bool kStored>
cudaError_t launch(ResidentStep step, const Choice& choice, const Kind& kind, const DeviceLimits& limits,
                   cudaStream_t stream) {
  const auto kernel = resident_kernel<kVector, kOutputs, kStored>;
  const int tile = choice.features, threads = choice.threads;
  int64_t shared = Activations<kVector>::bytes(step.max_width, tile), resident_blocks = 0;
  cudaError_t error = resident_block_count(kernel, threads, shared, &resident_blocks);
  if (error != cudaSuccess) return error;
  // Sections are brought along where that costs no block its place.
  step.staged_words = 0;
  const int64_t shared_with_sections = shared + kStagedLayers * kind.words * static_cast<int64_t>(sizeof(uint32_t));
  if (shared_with_sections + kSharedStatic <= limits.block_shared_bytes) {
    int64_t blocks_with_sections = 0;
    error = resident_block_count(kernel, threads, shared_with_sections, &blocks_with_sections);
    if (error != cudaSuccess) return error;
    if (blocks_with_sections >= resident_blocks) {
      step.staged_words = static_cast<int>(kind.words);
      shared = shared_with_sections;
    }
  }
  const int64_t shares = (step.features + kVector - 1) / kVector;
  kernel<<<static_cast<unsigned>(std::min(shares, resident_blocks)), threads, shared, stream>>>(step, tile);
  return cudaGetLastError();
}

template <int kVector>
cudaError_t launch(const ResidentStep& step, const Choice& choice, const Kind& kind, const DeviceLimits& limits,
                   cudaStream_t stream) {
  switch (kind.outputs) {
    case 1:
      return (kind.stored ? launch<kVector, 1, true> : launch<kVector, 1, false>)(step, choice, kind, limits, stream);
    case 4:
      return (kind.stored ? launch<kVector, 4, true> : launch<kVector, 4, false>)(step, choice, kind, limits, stream);
    default:
      return launch<kVector, 16, false>(step, choice, kind, limits, stream);
  }
}

}  // namespace

int resident_features(const PlanView& plan, int64_t first_layer, int64_t end_layer, const DeviceLimits& limits) {
  return choose(plan, first_layer, end_layer, limits).features;
}

cudaError_t launch_resident(const ResidentStep& step, const PlanView& plan, cudaStream_t stream) {
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  const Choice choice = choose(plan, step.first_layer, step.end_layer, limits);
  if (choice.features == 0) return cudaErrorInvalidConfiguration;
  const Kind kind(plan, step.first_layer, step.end_layer);
  return (choice.features == 2 ? launch<2> : launch<4>)(step, choice, kind, limits, stream);
}

}  // namespace spdnn::cuda
