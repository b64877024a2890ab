// What a block of the resident family does beside computing: features come into shared memory, and layers beside them;
// results go out.
#pragma once

#include <algorithm>

#include "intrinsics.cuh"
#include "launch.h"
#include "resident.h"
#include "tiles.cuh"

namespace spdnn::cuda {

inline constexpr int64_t kSharedStatic = 4096;  // of the kernel
inline constexpr int kMostFeatures = 32;        // of a block: a bit each in a word
inline constexpr int kMostThreads = 512;        // 128 registers each

inline constexpr int kStagedLayers = 4;  // one that is computed, and those on their way into shared memory
inline constexpr int kStagedRuns = 4;    // run records of a layer that are brought along
inline constexpr int kLayerFields = sizeof(PlanLayer) / sizeof(int64_t);
inline constexpr int kRunFields = sizeof(PlanRun) / sizeof(int64_t);

// The features of a block at work: a power of two.
struct Columns {
  int count_bits;

  __device__ int count() const { return 1 << count_bits; }
};

// A layer's records, as shared memory holds them.
struct alignas(16) StagedLayer {
  PlanLayer layer;
  PlanRun runs[kStagedRuns];
};

// A layer's records and sections, wherever they are read: in device memory, or a copy of them in shared memory.
struct LayerView {
  const StagedLayer& staged;
  const PlanRun* all_runs;
  const uint32_t* words;  // the plan's word number `first_word`
  int64_t first_word;

  __device__ const PlanLayer& layer() const { return staged.layer; }
  __device__ const PlanRun& run(int r) const {
    return r < kStagedRuns ? staged.runs[r] : all_runs[staged.layer.first_run + r];
  }

  template <typename T>
  __device__ const T* at(int64_t word) const {
    return reinterpret_cast<const T*>(words + (word - first_word));
  }
};

// Where a layer's records and sections lie.
struct Position {
  int64_t first_run;
  int64_t first_word;
  int64_t words;
};

// What a block keeps in shared memory beside its features.
struct alignas(16) BlockState {
  StagedLayer records[kStagedLayers];
  Position first_positions[kStagedLayers - 1];  // of the layers that every tile starts with
  uint32_t active_words[kStagedLayers];         // of as many layers: a bit for each feature that is not all zero
};

// Brings the layers to come into shared memory, some of them ahead: while layers are computed in less time than device
// memory takes to answer, as those of narrow networks are, several requests must be on their way. The block's last warp
// does it for all: it is the first to be without work where a layer has little.
class Staging {
 public:
  __device__ Staging(const ResidentStep& step, BlockState& state, uint32_t* sections)
      : step_(step),
        layers_(reinterpret_cast<const PlanLayer*>(step.words + step.layers_word)),
        runs_(reinterpret_cast<const PlanRun*>(step.words + step.runs_word)),
        state_(state),
        sections_(sections) {
    const int first = threadIdx.x;
    if (first < kStagedLayers - 1 && step.first_layer + first < step.end_layer) {
      state_.first_positions[first] = position(step.first_layer + first);
    }
    __syncthreads();
  }

  __device__ static bool is_mine() { return threadIdx.x / 32 == (blockDim.x - 1) / 32; }

  // Starts with the first layers. A barrier must have let all threads finish with those staged before.
  __device__ void begin() {
    if (!is_mine()) return;
    for (int l = step_.first_layer; l < step_.first_layer + kStagedLayers - 1; ++l) {
      start(l, state_.first_positions[l - step_.first_layer]);
    }
    ask(step_.first_layer + kStagedLayers - 1);
  }

  // Starts with the layer that takes the place of the one before `l`, with which all threads are through.
  __device__ void advance(int l) {
    if (!is_mine()) return;
    start(l + kStagedLayers - 1, asked());
    ask(l + kStagedLayers);
  }

  // Waits for the next layer and the one after it; a barrier makes them visible to all.
  __device__ void wait() const {
    if (is_mine()) finish_copies<kStagedLayers - 3>();
  }

  // Waits for layers that were not reached.
  __device__ void end() const {
    if (is_mine()) finish_copies<0>();
  }

  __device__ const StagedLayer& record(int l) const { return state_.records[l % kStagedLayers]; }

  __device__ LayerView view(int l) const {
    const StagedLayer& layer = record(l);
    if (layer.layer.words <= step_.staged_words) return {layer, runs_, section_buffer(l), layer.layer.first_word};
    return {layer, runs_, step_.words, 0};
  }

 private:
  __device__ Position position(int l) const {
    return {__ldg(&layers_[l].first_run), __ldg(&layers_[l].first_word), __ldg(&layers_[l].words)};
  }

  // A layer ahead, so that nobody waits for the answer: a field of the position to a lane, for registers are scarce.
  __device__ void ask(int l) {
    if (l >= step_.end_layer) return;
    const int lane = threadIdx.x % 32;
    const PlanLayer& layer = layers_[l];
    next_ = __ldg(lane == 0 ? &layer.first_run : lane == 1 ? &layer.first_word : &layer.words);
  }

  __device__ Position asked() const {
    constexpr unsigned kAll = 0xFFFFFFFFu;
    return {__shfl_sync(kAll, next_, 0), __shfl_sync(kAll, next_, 1), __shfl_sync(kAll, next_, 2)};
  }

  __device__ uint32_t* section_buffer(int l) const {
    return sections_ + static_cast<int64_t>(l % kStagedLayers) * step_.staged_words;
  }

  __device__ void start(int l, const Position& position) {
    if (l < step_.end_layer) {
      StagedLayer& record = state_.records[l % kStagedLayers];
      copy(&record.layer, layers_ + l, kLayerFields);
      copy(record.runs, runs_ + position.first_run,
           min(static_cast<int64_t>(kStagedRuns), step_.runs - position.first_run) * kRunFields);
      if (position.words <= step_.staged_words) {
        for (int64_t word = threadIdx.x % 32 * 4; word < position.words; word += 32 * 4) {
          copy_async<16>(section_buffer(l) + word, step_.words + position.first_word + word);
        }
      }
    }
    close_copies();
  }

  // Records are not aligned to 16 bytes.
  __device__ static void copy(void* target, const void* source, int64_t fields) {
    for (int64_t field = threadIdx.x % 32; field < fields; field += 32) {
      copy_async<8>(static_cast<int64_t*>(target) + field, static_cast<const int64_t*>(source) + field);
    }
  }

  const ResidentStep& step_;
  const PlanLayer* layers_;
  const PlanRun* runs_;
  BlockState& state_;
  uint32_t* sections_;
  int64_t next_ = 0;  // the lane's field of what was asked for
};

// Features of a thread: one, two or four.
template <int kVector>
inline constexpr int kVectorBits = kVector == 4 ? 2 : kVector - 1;

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

// The features of a block in shared memory: [neuron][columns].
template <int kFeaturesOfThread>
struct Activations {
  static constexpr int kVector = kFeaturesOfThread;
  float* data;
  Columns columns;

  __host__ __device__ static int64_t bytes(int64_t width, int tile) {
    return (width * tile * static_cast<int64_t>(sizeof(float)) + 15) / 16 * 16;
  }

  __device__ Activations(float* data, const Columns& columns) : data(data), columns(columns) {}

  __device__ float* at(int neuron, int column) const { return data + (neuron << columns.count_bits) + column; }
  __device__ void set(int neuron, int column, float x) const { *at(neuron, column) = x; }
  __device__ void set_vector(int neuron, int column, const float (&x)[kVector]) const {
    store_vector<kVector>(at(neuron, column), x);
  }
  __device__ float get(int neuron, int column) const { return *at(neuron, column); }
};

// The caller's rows. Neighbouring threads take neighbouring features, so that their stores fall into different banks; a
// thread takes sixteen bytes of a row at a time.
template <typename Activations>
__device__ void load_rows(const InputFeatures& input, int64_t first, int64_t count, const Columns& columns,
                          const Activations& in) {
  const int column = threadIdx.x & (columns.count() - 1);
  const int64_t feature = first + column;
  const int chunk_neurons = neurons_in_chunk(input.type);
  const int chunks = static_cast<int>((input.inputs + chunk_neurons - 1) / chunk_neurons);
  for (int chunk = threadIdx.x >> columns.count_bits; chunk < chunks; chunk += blockDim.x >> columns.count_bits) {
    const int first_neuron = chunk * chunk_neurons;
    const int neurons = min(chunk_neurons, static_cast<int>(input.inputs) - first_neuron);
    if (feature >= count) {
      for (int k = 0; k < neurons; ++k) in.set(first_neuron + k, column, 0.0f);
    } else {
      for_each_of_chunk(input, feature, first_neuron, neurons, chunk,
                        [&](int k, float x) { in.set(first_neuron + k, column, x); });
    }
  }
}

// Features that stand side by side in a tile, as all do unless some were dropped: so many a thread, from one load.
template <typename Activations>
__device__ void load_neighbours(const ResidentStep& step, int64_t first, int64_t count, int64_t width,
                                const Columns& columns, const Activations& in) {
  constexpr int kVector = Activations::kVector;
  const int vectors = columns.count() / kVector, column = threadIdx.x % vectors * kVector;
  const float* source = step.source + tiled_offset(first, 0, width) + column;
  const int present = static_cast<int>(min(count - first, static_cast<int64_t>(kMostFeatures))) - column;
  for (int64_t neuron = threadIdx.x / vectors; neuron < width; neuron += blockDim.x / vectors) {
    const float* address = source + neuron * kTile;
    float x[kVector];
    if (present >= kVector) {
      load_vector<kVector>(address, x);
    } else {  // past the last feature nobody wrote
#pragma unroll
      for (int v = 0; v < kVector; ++v) x[v] = v < present ? address[v] : 0.0f;
    }
    in.set_vector(static_cast<int>(neuron), column, x);
  }
}

template <typename Activations>
__device__ void load_scattered(const ResidentStep& step, int64_t first, int64_t count, int64_t width,
                               const Columns& columns, const Activations& in) {
  const int column = threadIdx.x & (columns.count() - 1);
  const int64_t place = first + column;
  const float* source = step.source + (place < count ? tiled_offset(step.slots[place], 0, width) : 0);
  for (int64_t neuron = threadIdx.x >> columns.count_bits; neuron < width; neuron += blockDim.x >> columns.count_bits) {
    in.set(static_cast<int>(neuron), column, place < count ? source[neuron * kTile] : 0.0f);
  }
}

// Brings the block's features into shared memory; columns past the last feature are zero.
template <typename Activations>
__device__ void load_features(const ResidentStep& step, int64_t first, int64_t count, int64_t width,
                              const Columns& columns, const Activations& in) {
  if (!step.source) {
    load_rows(step.input, first, count, columns, in);
  } else if (step.slots) {
    load_scattered(step, first, count, width, columns, in);
  } else {
    load_neighbours(step, first, count, width, columns, in);
  }
}

__device__ __forceinline__ int64_t id_of(const ResidentStep& step, int64_t place) {
  return step.ids ? step.ids[place] : place;
}

// After the last layer: the answer, in the caller's order.
template <typename Activations>
__device__ void store_results(const ResidentStep& step, int64_t first, uint32_t active, const Columns& columns,
                              const Activations& out) {
  if (threadIdx.x < columns.count() && (active >> threadIdx.x & 1u)) {
    step.alive[id_of(step, first + threadIdx.x)] = true;
  }
  if (!step.activations) return;
  for (int column = 0; column < columns.count(); ++column) {
    if (!(active >> column & 1u)) continue;
    float* row = step.activations + id_of(step, first + column) * step.outputs;
    for (int64_t j = threadIdx.x; j < step.outputs; j += blockDim.x) {
      row[j] = out.get(step.slot_of[j], column) * step.scale.unit;
    }
  }
}

// Between launches: the kept features move together, so that the next launch finds no gaps.
template <typename Activations>
__device__ void store_tile(const ResidentStep& step, int64_t first, int64_t width, uint32_t kept,
                           const Columns& columns, const Activations& out) {
  __shared__ int32_t first_target;
  if (threadIdx.x == 0) first_target = atomicAdd(step.target_count, __popc(kept));
  __syncthreads();
  const int column = threadIdx.x & (columns.count() - 1);
  if (!(kept >> column & 1u)) return;
  const int64_t target_place = first_target + __popc(kept & ((1u << column) - 1));
  if (threadIdx.x < columns.count()) step.target_ids[target_place] = static_cast<int32_t>(id_of(step, first + column));
  float* target = step.target + tiled_offset(target_place, 0, width);
  for (int64_t neuron = threadIdx.x >> columns.count_bits; neuron < width; neuron += blockDim.x >> columns.count_bits) {
    target[neuron * kTile] = out.get(static_cast<int>(neuron), column);
  }
}

// The features of a block, twice: a layer is computed from one copy into the other.
struct Buffers {
  float* in;
  float* out;

  __device__ void swap() {
    float* other = in;
    in = out, out = other;
  }
};

// The features that a block has at work, from place `first` on.
struct Tile {
  int64_t first;
  uint32_t used;    // a bit for each column that holds one
  int32_t members;  // that the feature of this thread's number stands for; 0 where there is none

  __device__ Tile(const ResidentStep& step, int64_t first, int64_t count, const Columns& columns) : first(first) {
    const int64_t present = min(static_cast<int64_t>(columns.count()), count - first);
    used = present == kMostFeatures ? 0xFFFFFFFFu : (1u << present) - 1;
    members = threadIdx.x < present;
    if (members && step.members) members = step.members[id_of(step, first + threadIdx.x)];
  }

  // Counts those that are active after layer l, if that was asked for; for the block's first warp to do.
  __device__ void count(const ResidentStep& step, int l, uint32_t active) const {
    if (threadIdx.x >= 32 || !step.active || !active) return;
    const int32_t sum = __reduce_add_sync(0xFFFFFFFFu, active >> threadIdx.x & 1u ? members : 0);
    if (threadIdx.x == 0) atomicAdd(step.active + l, sum);
  }

  // After the launch's last layer, which is so wide.
  template <typename Activations>
  __device__ void store(const ResidentStep& step, int64_t width, bool prunable, uint32_t active, const Columns& columns,
                        const Activations& out) const {
    if (!step.target) {
      store_results(step, first, active, columns, out);
    } else if (const uint32_t kept = prunable ? active : used) {
      store_tile(step, first, width, kept, columns, out);
    }
  }
};

}  // namespace spdnn::cuda
