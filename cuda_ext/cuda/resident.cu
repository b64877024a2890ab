#include <algorithm>
#include <type_traits>

#include "accumulate.cuh"
#include "intrinsics.cuh"
#include "launch.h"
#include "resident.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int64_t kSharedReservedPerBlock = 1024;  // by the driver
constexpr int64_t kSharedStatic = 2048;            // of the kernel
constexpr int kWantedBlocks = 2;                   // per multiprocessor: one loads while another computes
constexpr int kMostFeatures = 32;                  // of a block: a bit each in a word

constexpr int kStagedLayers = 4;  // one that is computed, and those on their way into shared memory
constexpr int kStagedRuns = 4;    // run records of a layer that are brought along
constexpr int kLayerFields = sizeof(PlanLayer) / sizeof(int64_t);
constexpr int kRunFields = sizeof(PlanRun) / sizeof(int64_t);

// Of one of the two buffers; a multiple of 16 bytes.
__host__ __device__ int64_t buffer_floats(int64_t max_width, int features) {
  return (max_width * features + 3) / 4 * 4;
}

int64_t block_bytes(int64_t max_width, int features, int64_t staged_words) {
  return (2 * buffer_floats(max_width, features) + kStagedLayers * staged_words) * static_cast<int64_t>(sizeof(float));
}

// Blocks of so much shared memory that one multiprocessor holds.
int64_t blocks_that_fit(int64_t bytes, const DeviceLimits& limits) {
  if (bytes + kSharedStatic > limits.block_shared_bytes) return 0;
  return limits.shared_bytes / (bytes + kSharedStatic + kSharedReservedPerBlock);
}

// A block's size. Each thread has `kVector` features of one row group. Two, and not four, keep the registers free for
// four warps a scheduler, without which the multiply-adds wait for one another.
template <int kFeaturesOfThread, int kThreads, int kBlocks>
struct Shape {
  static constexpr int kVector = kFeaturesOfThread;
  static constexpr int kMaxThreads = kThreads;
  static constexpr int kMinBlocks = kBlocks;
};

// The features of a block at work: a power of two, `columns` of them, of which `lanes` threads have kVector each.
// Activations lie in shared memory as [neuron][columns].
struct Columns {
  int count_bits;
  int lane_bits;

  __device__ int count() const { return 1 << count_bits; }
  __device__ int lanes() const { return 1 << lane_bits; }
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

// One run of one layer from `in` to `out`. Returns a bit for each of the thread's features that some output made
// active.
template <int kVector, int kOutputs, bool kStored, typename Words>
__device__ __forceinline__ uint32_t compute_run(const PlanLayer& layer, const PlanRun run, const Words& words,
                                                const Scale& scale, const Columns& columns, const float* in,
                                                float* out) {
  const int lane = threadIdx.x & (columns.lanes() - 1);
  const int stride = columns.count();
  const int groups = static_cast<int>(run.groups);
  const int units = groups * (static_cast<int>(run.group_outputs) / kOutputs);
  const char* column = reinterpret_cast<const char*>(in + lane * kVector);
  // One multiply-add makes an address of an index, if the compiler does not know that it could shift and add.
  const uint32_t stride_bytes = opaque(static_cast<uint32_t>(stride * sizeof(float)));
  const Bounds bounds = scale.bounds(layer);
  uint32_t active = 0;
  for (int u = threadIdx.x >> columns.lane_bits; u < units; u += blockDim.x >> columns.lane_bits) {
    const Unit unit = Unit::at(u, groups, kOutputs);
    float sums[kOutputs][kVector];
    start_with_bias(layer, run, unit, words, scale, sums);
    accumulate<kOutputs, kVector, kStored, !kStored, uint16_t>(
        run, unit, words,
        [=](uint32_t index, float (&x)[kVector]) {
          load_vector<kVector>(reinterpret_cast<const float*>(column + index * stride_bytes), x);
        },
        sums);
    active |= clip_all(sums, bounds);
    float* target = out + unit.first_slot(run) * stride + lane * kVector;
#pragma unroll
    for (int r = 0; r < kOutputs; ++r) store_vector<kVector>(target + r * unit.width * stride, sums[r]);
  }
  return active << (lane * kVector);
}

// A layer's records, as shared memory holds them.
struct alignas(16) StagedLayer {
  PlanLayer layer;
  PlanRun runs[kStagedRuns];
};

template <int kVector, typename Words>
__device__ __forceinline__ uint32_t compute_layer(const StagedLayer& staged, const PlanRun* runs, const Words& words,
                                                  const Scale& scale, const Columns& columns, const float* in,
                                                  float* out) {
  uint32_t active = 0;
  const PlanLayer& layer = staged.layer;
  for (int r = 0; r < static_cast<int>(layer.runs); ++r) {
    const PlanRun& run = r < kStagedRuns ? staged.runs[r] : runs[layer.first_run + r];
    const auto compute = [&](auto stored) {
      constexpr bool kStored = decltype(stored)::value;
      dispatch_outputs<kStored>(run.group_outputs, [&](auto outputs) {
        active |= compute_run<kVector, decltype(outputs)::value, kStored>(layer, run, words, scale, columns, in, out);
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
  Columns columns{kVector - 1, 0};
  while (columns.count() < share && columns.count() < tile) ++columns.count_bits, ++columns.lane_bits;
  return columns;
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kMaxThreads, Shape::kMinBlocks)
    resident_kernel(const __grid_constant__ ResidentStep step, int tile) {
  constexpr int kVector = Shape::kVector;
  extern __shared__ __align__(16) float buffers[];
  __shared__ BlockState state;
  const int64_t buffer = buffer_floats(step.max_width, tile);
  Staging staging(step, state, reinterpret_cast<uint32_t*>(buffers + 2 * buffer));
  const PlanLayer* layers = reinterpret_cast<const PlanLayer*>(step.words + step.layers_word);
  const int64_t count = step.count ? *step.count : step.features;
  const Columns columns = share_of_block<kVector>(count, tile);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * columns.count(); first < count;
       first += static_cast<int64_t>(gridDim.x) * columns.count()) {
    float *in = buffers, *out = buffers + buffer;
    const int64_t present = min(static_cast<int64_t>(columns.count()), count - first);
    const uint32_t used = present == kMostFeatures ? 0xFFFFFFFFu : (1u << present) - 1;
    int32_t members = threadIdx.x < present;  // that the feature of this thread's number stands for
    if (members && step.members) members = step.members[id_of(step, first + threadIdx.x)];
    if (threadIdx.x < kStagedLayers) state.active_words[threadIdx.x] = 0;
    staging.begin();
    load_features<kVector>(step, first, count, layers[step.first_layer].inputs, columns, in);
    staging.wait();
    __syncthreads();
    uint32_t active = 0;
    int64_t width = 0;
    bool prunable = false;
    for (int l = step.first_layer; l < step.end_layer; ++l) {
      staging.advance(l);
      const StagedLayer& record = staging.record(l);
      uint32_t* word = &state.active_words[l % kStagedLayers];
      uint32_t mine;
      if (staging.holds(record.layer)) {
        const SharedWords words{staging.sections(l), record.layer.first_word};
        mine = compute_layer<kVector>(record, staging.runs(), words, step.scale, columns, in, out);
      } else {
        mine = compute_layer<kVector>(record, staging.runs(), GlobalWords{step.words}, step.scale, columns, in, out);
      }
      mine = __reduce_or_sync(0xFFFFFFFFu, mine);
      if (threadIdx.x % 32 == 0 && mine) atomicOr(word, mine);
      width = record.layer.outputs;  // read here: past the barrier another thread may stage over the record
      prunable = record.layer.prunable;
      staging.wait();
      __syncthreads();
      active = *word & used;
      // Read by all before the barrier above, two layers ago, and written after the next but one.
      if (threadIdx.x == 0) state.active_words[(l + 2) % kStagedLayers] = 0;
      if (threadIdx.x < 32 && step.active && active) {
        const int32_t sum = __reduce_add_sync(0xFFFFFFFFu, active >> threadIdx.x & 1u ? members : 0);
        if (threadIdx.x == 0) atomicAdd(step.active + l, sum);
      }
      float* swap = in;
      in = out, out = swap;
      if (!active && prunable) break;
    }
    if (!step.target) {
      store_results(step, first, active, columns, in);
    } else if (const uint32_t kept = prunable ? active : used) {
      store_tile(step, first, width, kept, columns, in);
    }
    finish_copies<0>();  // of layers that were not reached
    __syncthreads();
  }
}

template <typename Shape>
cudaError_t launch(ResidentStep step, int tile, const PlanView& plan, const DeviceLimits& limits, cudaStream_t stream) {
  int64_t units = 1, words = 0;
  for (int l = step.first_layer; l < step.end_layer; ++l) {
    words = std::max(words, plan.layers[l].words);
    for (int64_t r = 0; r < plan.layers[l].runs; ++r) {
      const PlanRun& run = plan.runs[plan.layers[l].first_run + r];
      units = std::max(units, run.groups * (run.group_outputs / outputs_of_unit(run)));
    }
  }
  const int64_t wanted = (units * (tile / Shape::kVector) + 31) / 32 * 32;
  const int threads = static_cast<int>(std::min<int64_t>(Shape::kMaxThreads, std::max<int64_t>(wanted, 64)));
  const auto kernel = resident_kernel<Shape>;
  const auto allow = [kernel](int64_t bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  };
  int64_t shared = block_bytes(step.max_width, tile, 0), resident_blocks = 0;
  cudaError_t error = allow(shared);
  if (error != cudaSuccess) return error;
  if ((error = resident_block_count(kernel, threads, shared, &resident_blocks)) != cudaSuccess) return error;
  // Sections are brought along where that costs no block its place.
  step.staged_words = 0;
  const int64_t shared_with_sections = block_bytes(step.max_width, tile, words);
  if (blocks_that_fit(shared_with_sections, limits) > 0) {
    int64_t blocks_with_sections = 0;
    if ((error = allow(shared_with_sections)) != cudaSuccess) return error;
    error = resident_block_count(kernel, threads, shared_with_sections, &blocks_with_sections);
    if (error != cudaSuccess) return error;
    if (blocks_with_sections >= resident_blocks) {
      step.staged_words = static_cast<int>(words);
      shared = shared_with_sections;
    }
  }
  const int64_t vectors = (step.features + Shape::kVector - 1) / Shape::kVector;
  kernel<<<static_cast<unsigned>(std::min(vectors, resident_blocks)), threads, shared, stream>>>(step, tile);
  return cudaGetLastError();
}

}  // namespace

int resident_features(int64_t max_width, const DeviceLimits& limits) {
  int fits = 0;
  for (int features = 1; features <= kMostFeatures; features *= 2) {
    const int64_t blocks = blocks_that_fit(block_bytes(max_width, features, 0), limits);
    if (blocks < (features > 4 ? kWantedBlocks : 1)) break;
    fits = features;
  }
  return fits;
}

cudaError_t launch_resident(const ResidentStep& step, const PlanView& plan, cudaStream_t stream) {
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  const int tile = resident_features(step.max_width, limits);
  if (tile == 0) return cudaErrorInvalidConfiguration;
  if (tile == 1) return launch<Shape<1, 512, 1>>(step, tile, plan, limits, stream);
  if (tile <= 4) return launch<Shape<2, 512, 1>>(step, tile, plan, limits, stream);
  return launch<Shape<2, 256, 2>>(step, tile, plan, limits, stream);
}

}  // namespace spdnn::cuda
