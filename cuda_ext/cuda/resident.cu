#include <algorithm>
#include <type_traits>

#include "accumulate.cuh"
#include "intrinsics.cuh"
#include "launch.h"
#include "resident.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int64_t kSharedStatic = 4096;  // of the kernel
constexpr int kMostFeatures = 32;        // of a block: a bit each in a word

constexpr int kMostThreads = 512;  // 128 registers each
constexpr int kRowOutputs = 16;    // outputs of a row
constexpr int kSumsOfThread = 64;  // rows times outputs times features

constexpr int kStagedLayers = 4;  // one that is computed, and those on their way into shared memory
constexpr int kStagedRuns = 4;    // run records of a layer that are brought along
constexpr int kLayerFields = sizeof(PlanLayer) / sizeof(int64_t);
constexpr int kRunFields = sizeof(PlanRun) / sizeof(int64_t);

int64_t block_bytes(int64_t max_width, int features, int64_t staged_words) {
  return (round_up(max_width * features, 4) + kStagedLayers * staged_words) * static_cast<int64_t>(sizeof(float));
}

// The features of a block at work: a power of two, `columns` of them, of which `lanes` threads have some each.
// Activations lie in shared memory as [neuron][columns], once: a layer's sums stay in registers until all threads are
// through with its inputs.
struct Columns {
  int count_bits;
  int lane_bits;

  __device__ int count() const { return 1 << count_bits; }
  __device__ int lanes() const { return 1 << lane_bits; }
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

  __device__ FeatureColumn(const float* activations, const Columns& columns)
      : first(reinterpret_cast<const char*>(activations + (threadIdx.x & (columns.lanes() - 1)) * kVector)),
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

// Adds the unit's edges to its sums: one multiply-add for each edge, output and feature. Indices and values are a chunk
// ahead, for they may come from device memory.
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
  if (stored) next_values.load(values, position, group_outputs, unit.first_output);
#pragma unroll 1
  while (position < end) {
    const uint2 now = next;
    const auto weights = next_values;
    position += unit.width;
    if (position < end) {
      next = indices[position];
      if (stored) next_values.load(values, position, group_outputs, unit.first_output);
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

// One layer, in place. Returns a bit for each of the thread's features that some output made active.
template <int kVector, int kOutputs, bool kStored>
__device__ __forceinline__ uint32_t compute_layer(const LayerView& view, const Scale& scale, const Columns& columns,
                                                  float* activations) {
  constexpr int kParts = Sums<kVector>::kOutputs / kOutputs;
  const int first = threadIdx.x >> columns.lane_bits, step = blockDim.x >> columns.lane_bits;
  const FeatureColumn<kVector> column(activations, columns);
  Sums<kVector> sums;
  uint32_t active = 0;
  UnitCursor<kOutputs> cursor(view, first, step);
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    sums.template make_room<kOutputs>();
    cursor.next([&](const PlanRun& run, const Unit& unit) {
      float (&newest)[kOutputs][kVector] = reinterpret_cast<float (&)[kOutputs][kVector]>(sums.values[0]);
      add_bias(view, run, unit, scale, newest);
      add_edges<kVector, kOutputs, kStored>(view, run, unit, column, newest);
      active |= clip_all(newest, scale);
    });
  }
  __syncthreads();  // past it nobody reads the layer's inputs
  float* out = activations + (threadIdx.x & (columns.lanes() - 1)) * kVector;
  UnitCursor<kOutputs> again(view, first, step);
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    again.next([&](const PlanRun& run, const Unit& unit) {
      float* target = out + unit.first_slot(run) * columns.count();
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) {
        store_vector<kVector>(target + r * unit.width * columns.count(),
                              sums.values[Sums<kVector>::kOutputs - kOutputs + r]);
      }
    });
    sums.template make_room<kOutputs>();
  }
  return active << (threadIdx.x & (columns.lanes() - 1)) * kVector;
}

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
  uint32_t active_words[2];                     // of two layers: a bit for each feature that is not all zero
};

// Brings the layers to come into shared memory, some of them ahead: while layers are computed in less time than device
// memory takes to answer, as those of narrow networks are, several requests must be on their way.
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

  // Starts with the first layers. A barrier must have let all threads finish with those staged before.
  __device__ void begin() {
    for (int l = step_.first_layer; l < step_.first_layer + kStagedLayers - 1; ++l) {
      start(l, state_.first_positions[l - step_.first_layer]);
    }
    ask(step_.first_layer + kStagedLayers - 1);
  }

  // Starts with the layer that takes the place of the one before `l`, with which all threads are through.
  __device__ void advance(int l) {
    start(l + kStagedLayers - 1, next_);
    ask(l + kStagedLayers);
  }

  // Waits for this thread's part of the next layer; a barrier makes it visible.
  __device__ void wait() const { finish_copies<kStagedLayers - 2>(); }

  __device__ const StagedLayer& record(int l) const { return state_.records[l % kStagedLayers]; }
  __device__ const uint32_t* sections(int l) const { return section_buffer(l); }
  __device__ bool holds(const PlanLayer& layer) const { return layer.words <= step_.staged_words; }
  __device__ const PlanRun* runs() const { return runs_; }

 private:
  __device__ Position position(int l) const {
    return {__ldg(&layers_[l].first_run), __ldg(&layers_[l].first_word), __ldg(&layers_[l].words)};
  }

  // A layer ahead, so that nobody waits for the answer.
  __device__ void ask(int l) {
    if (l < step_.end_layer) next_ = position(l);
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
        for (int64_t word = threadIdx.x * 4; word < position.words; word += blockDim.x * 4) {
          copy_async<16>(section_buffer(l) + word, step_.words + position.first_word + word);
        }
      }
    }
    close_copies();
  }

  // Records are not aligned to 16 bytes.
  __device__ static void copy(void* target, const void* source, int64_t fields) {
    for (int64_t field = threadIdx.x; field < fields; field += blockDim.x) {
      copy_async<8>(static_cast<int64_t*>(target) + field, static_cast<const int64_t*>(source) + field);
    }
  }

  const ResidentStep& step_;
  const PlanLayer* layers_;
  const PlanRun* runs_;
  BlockState& state_;
  uint32_t* sections_;
  Position next_{};
};

// The caller's rows. Neighbouring threads take neighbouring features, so that their stores fall into different banks; a
// thread takes sixteen bytes of a row at a time.
__device__ void load_rows(const InputFeatures& input, int64_t first, int64_t count, const Columns& columns, float* in) {
  const int column = threadIdx.x & (columns.count() - 1), stride = columns.count();
  const int64_t feature = first + column;
  const int chunk_neurons = neurons_in_chunk(input.type);
  const int chunks = static_cast<int>((input.inputs + chunk_neurons - 1) / chunk_neurons);
  for (int chunk = threadIdx.x >> columns.count_bits; chunk < chunks; chunk += blockDim.x >> columns.count_bits) {
    const int first_neuron = chunk * chunk_neurons;
    const int neurons = min(chunk_neurons, static_cast<int>(input.inputs) - first_neuron);
    float* target = in + first_neuron * stride + column;
    if (feature >= count) {
      for (int k = 0; k < neurons; ++k) target[k * stride] = 0.0f;
    } else {
      for_each_of_chunk(input, feature, first_neuron, neurons, chunk, [=](int k, float x) { target[k * stride] = x; });
    }
  }
}

// Features that stand side by side in a tile, as all do unless some were dropped.
template <int kVector>
__device__ void load_neighbours(const ResidentStep& step, int64_t first, int64_t count, int64_t width,
                                const Columns& columns, float* in) {
  const int lane = threadIdx.x & (columns.lanes() - 1);
  const float* source = step.source + tiled_offset(first, 0, width) + lane * kVector;
  for (int64_t neuron = threadIdx.x >> columns.lane_bits; neuron < width; neuron += blockDim.x >> columns.lane_bits) {
    float x[kVector];
    load_vector<kVector>(source + neuron * kTile, x);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (first + lane * kVector + v >= count) x[v] = 0.0f;
    }
    store_vector<kVector>(in + neuron * columns.count() + lane * kVector, x);
  }
}

__device__ void load_scattered(const ResidentStep& step, int64_t first, int64_t count, int64_t width,
                               const Columns& columns, float* in) {
  const int column = threadIdx.x & (columns.count() - 1);
  const int64_t place = first + column;
  const float* source = step.source + (place < count ? tiled_offset(step.slots[place], 0, width) : 0);
  for (int64_t neuron = threadIdx.x >> columns.count_bits; neuron < width; neuron += blockDim.x >> columns.count_bits) {
    in[neuron * columns.count() + column] = place < count ? source[neuron * kTile] : 0.0f;
  }
}

// Brings the block's features into shared memory; columns past the last feature are zero.
template <int kVector>
__device__ void load_features(const ResidentStep& step, int64_t first, int64_t count, int64_t width,
                              const Columns& columns, float* in) {
  if (!step.source) {
    load_rows(step.input, first, count, columns, in);
  } else if (step.slots) {
    load_scattered(step, first, count, width, columns, in);
  } else {
    load_neighbours<kVector>(step, first, count, width, columns, in);
  }
}

__device__ __forceinline__ int64_t id_of(const ResidentStep& step, int64_t place) {
  return step.ids ? step.ids[place] : place;
}

// After the last layer: the answer, in the caller's order.
__device__ void store_results(const ResidentStep& step, int64_t first, uint32_t active, const Columns& columns,
                              const float* out) {
  if (threadIdx.x < columns.count() && (active >> threadIdx.x & 1u)) {
    step.alive[id_of(step, first + threadIdx.x)] = true;
  }
  if (!step.activations) return;
  for (int column = 0; column < columns.count(); ++column) {
    if (!(active >> column & 1u)) continue;
    float* row = step.activations + id_of(step, first + column) * step.outputs;
    for (int64_t j = threadIdx.x; j < step.outputs; j += blockDim.x) {
      row[j] = out[step.slot_of[j] * columns.count() + column] * step.scale.unit;
    }
  }
}

// Between launches: the kept features move together, so that the next launch finds no gaps.
__device__ void store_tile(const ResidentStep& step, int64_t first, int64_t width, uint32_t kept,
                           const Columns& columns, const float* out) {
  __shared__ int32_t first_target;
  if (threadIdx.x == 0) first_target = atomicAdd(step.target_count, __popc(kept));
  __syncthreads();
  const int column = threadIdx.x & (columns.count() - 1);
  if (!(kept >> column & 1u)) return;
  const int64_t target_place = first_target + __popc(kept & ((1u << column) - 1));
  if (threadIdx.x < columns.count()) step.target_ids[target_place] = static_cast<int32_t>(id_of(step, first + column));
  float* target = step.target + tiled_offset(target_place, 0, width);
  for (int64_t neuron = threadIdx.x >> columns.count_bits; neuron < width; neuron += blockDim.x >> columns.count_bits) {
    target[neuron * kTile] = out[neuron * columns.count() + column];
  }
}

// So many that all blocks have work, and `tile` at most: few features are spread over all multiprocessors.
template <int kVector>
__device__ Columns share_of_block(int64_t count, int tile) {
  const int64_t share = (count + gridDim.x - 1) / gridDim.x;
  Columns columns{kVector == 4 ? 2 : kVector - 1, 0};
  while (columns.count() < share && columns.count() < tile) ++columns.count_bits, ++columns.lane_bits;
  return columns;
}

template <int kVector, int kOutputs, bool kStored>
__global__ void __launch_bounds__(kMostThreads, 1)
    resident_kernel(const __grid_constant__ ResidentStep step, int tile) {
  extern __shared__ __align__(16) float activations[];
  __shared__ BlockState state;
  Staging staging(step, state,
                  reinterpret_cast<uint32_t*>(activations + (static_cast<int64_t>(step.max_width) * tile + 3) / 4 * 4));
  const PlanLayer* layers = reinterpret_cast<const PlanLayer*>(step.words + step.layers_word);
  const int64_t count = step.count ? *step.count : step.features;
  const Columns columns = share_of_block<kVector>(count, tile);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * columns.count(); first < count;
       first += static_cast<int64_t>(gridDim.x) * columns.count()) {
    const int64_t present = min(static_cast<int64_t>(columns.count()), count - first);
    const uint32_t used = present == kMostFeatures ? 0xFFFFFFFFu : (1u << present) - 1;
    int32_t members = threadIdx.x < present;  // that the feature of this thread's number stands for
    if (members && step.members) members = step.members[id_of(step, first + threadIdx.x)];
    if (threadIdx.x < 2) state.active_words[threadIdx.x] = 0;
    staging.begin();
    load_features<kVector>(step, first, count, layers[step.first_layer].inputs, columns, activations);
    staging.wait();
    __syncthreads();
    uint32_t active = 0;
    int64_t width = 0;
    bool prunable = false;
    for (int l = step.first_layer; l < step.end_layer; ++l) {
      staging.advance(l);
      const StagedLayer& record = staging.record(l);
      const bool at_hand = staging.holds(record.layer);
      const LayerView view{record, staging.runs(), at_hand ? staging.sections(l) : step.words,
                           at_hand ? record.layer.first_word : 0};
      uint32_t mine = compute_layer<kVector, kOutputs, kStored>(view, step.scale, columns, activations);
      uint32_t* word = &state.active_words[l % 2];
      mine = __reduce_or_sync(0xFFFFFFFFu, mine);
      if (threadIdx.x % 32 == 0 && mine) atomicOr(word, mine);
      // Read by all after the barrier that ended the layer before, and written again after the one that ends this.
      if (threadIdx.x == 0) state.active_words[(l + 1) % 2] = 0;
      width = record.layer.outputs;  // read here: past the barrier another thread may stage over the record
      prunable = record.layer.prunable;
      staging.wait();
      __syncthreads();
      active = *word & used;
      if (threadIdx.x < 32 && step.active && active) {
        const int32_t sum = __reduce_add_sync(0xFFFFFFFFu, active >> threadIdx.x & 1u ? members : 0);
        if (threadIdx.x == 0) atomicAdd(step.active + l, sum);
      }
      if (!active && prunable) break;
    }
    if (!step.target) {
      store_results(step, first, active, columns, activations);
    } else if (const uint32_t kept = prunable ? active : used) {
      store_tile(step, first, width, kept, columns, activations);
    }
    finish_copies<0>();  // of layers that were not reached
    __syncthreads();
  }
}

// What the layers of a launch have in common.
struct Kind {
  int outputs = kMostOutputs;  // of a unit: 1, 4 or 16
  bool stored = false;
  int64_t rows = 1;   // of the layer that has most, of kRowOutputs outputs each
  int64_t words = 0;  // of the longest layer's sections

  static constexpr int kMostOutputs = 16;

  Kind(const PlanView& plan, int64_t first_layer, int64_t end_layer) {
    for (int64_t l = first_layer; l < end_layer; ++l) {
      const PlanLayer& layer = plan.layers[l];
      rows = std::max(rows, (layer.outputs + kRowOutputs - 1) / kRowOutputs);
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

// Threads of a block that holds `features` features; each has `vector` of them, and as many rows as fit its registers.
int64_t threads_for(int64_t rows, int features, int vector) {
  const int64_t rows_of_thread = kSumsOfThread / kRowOutputs / vector;
  return round_up((rows + rows_of_thread - 1) / rows_of_thread * (features / vector), 32);
}

int vector_for(int features) { return std::min(features, 4); }

template <int kVector, int kOutputs, bool kStored>
cudaError_t launch(ResidentStep step, int tile, const Kind& kind, const DeviceLimits& limits, cudaStream_t stream) {
  const int threads = static_cast<int>(std::max<int64_t>(threads_for(kind.rows, tile, kVector), 64));
  const auto kernel = resident_kernel<kVector, kOutputs, kStored>;
  const auto allow = [kernel](int64_t bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  };
  int64_t shared = block_bytes(step.max_width, tile, 0), resident_blocks = 0;
  cudaError_t error = allow(shared);
  if (error != cudaSuccess) return error;
  if ((error = resident_block_count(kernel, threads, shared, &resident_blocks)) != cudaSuccess) return error;
  // Sections are brought along where that costs no block its place.
  step.staged_words = 0;
  const int64_t shared_with_sections = block_bytes(step.max_width, tile, kind.words);
  if (shared_with_sections + kSharedStatic <= limits.block_shared_bytes) {
    int64_t blocks_with_sections = 0;
    if ((error = allow(shared_with_sections)) != cudaSuccess) return error;
    error = resident_block_count(kernel, threads, shared_with_sections, &blocks_with_sections);
    if (error != cudaSuccess) return error;
    if (blocks_with_sections >= resident_blocks) {
      step.staged_words = static_cast<int>(kind.words);
      shared = shared_with_sections;
    }
  }
  const int64_t vectors = (step.features + kVector - 1) / kVector;
  kernel<<<static_cast<unsigned>(std::min(vectors, resident_blocks)), threads, shared, stream>>>(step, tile);
  return cudaGetLastError();
}

template <int kVector>
cudaError_t launch(const ResidentStep& step, int tile, const Kind& kind, const DeviceLimits& limits,
                   cudaStream_t stream) {
  switch (kind.outputs) {
    case 1:
      return (kind.stored ? launch<kVector, 1, true> : launch<kVector, 1, false>)(step, tile, kind, limits, stream);
    case 4:
      return (kind.stored ? launch<kVector, 4, true> : launch<kVector, 4, false>)(step, tile, kind, limits, stream);
    default:
      return launch<kVector, 16, false>(step, tile, kind, limits, stream);
  }
}

}  // namespace

int resident_features(const PlanView& plan, int64_t first_layer, int64_t end_layer, const DeviceLimits& limits) {
  const int64_t width = widest(plan, first_layer, end_layer);
  const Kind kind(plan, first_layer, end_layer);
  for (int features = kMostFeatures; features >= 2; features /= 2) {
    const bool fits = block_bytes(width, features, 0) + kSharedStatic <= limits.block_shared_bytes;
    if (fits && threads_for(kind.rows, features, vector_for(features)) <= kMostThreads) return features;
  }
  return 0;
}

cudaError_t launch_resident(const ResidentStep& step, const PlanView& plan, cudaStream_t stream) {
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  const int tile = resident_features(plan, step.first_layer, step.end_layer, limits);
  if (tile == 0) return cudaErrorInvalidConfiguration;
  const Kind kind(plan, step.first_layer, step.end_layer);
  return (tile == 2 ? launch<2> : launch<4>)(step, tile, kind, limits, stream);
}

}  // namespace spdnn::cuda
