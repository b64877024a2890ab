#include <algorithm>

#include "accumulate.cuh"
#include "chain.h"
#include "intrinsics.cuh"
#include "launch.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kMostFeatures = 4;  // of a block
constexpr int kMostWorkers = 8;   // warps that multiply; one more describes the layers to come
constexpr int kMostRuns = 16;     // of a layer
constexpr int kWidest = 4096;     // neurons of a layer
constexpr int kPieceChunks = 8;   // of a row: what a warp brings and multiplies at a time
constexpr int kDescribed = 4;     // layers that are described ahead of the one that is computed
constexpr int kLayers = 8;        // of whose descriptions there is room; a power of two
constexpr int kMostSlots = 4;     // pieces that a warp has room for: one that is multiplied, and those on their way
constexpr int kFewestSlots = 3;
constexpr int kLayerFields = sizeof(PlanLayer) / sizeof(int64_t);
constexpr int kRunFields = sizeof(PlanRun) / sizeof(int64_t);
static_assert(kLayerFields <= 32, "a warp copies a layer's record at once, a field a lane");
static_assert(kLayers >= kDescribed + 4, "records are asked for four layers before they are read");

// Some outputs of a layer, at most 32 that lie side by side: what a warp computes at a time, an output a lane.
struct alignas(16) Slice {
  uint32_t indices;  // of the first edges: where in the plan, in 16 bytes
  uint32_t values;   // the same; 0: `value` for all
  float value;
  uint32_t first_slot : 12;
  uint32_t last_lane : 5;
  uint32_t chunks : 15;

  __device__ int width() const { return last_lane + 1; }
};
static_assert(kWidest <= 1 << 12 && kWidest / kEdgeChunk < 1 << 15, "slots and chunks fit a slice");

// A layer as the workers see it.
struct Head {
  int slices;
  int outputs;
  bool prunable;
  Bounds bounds;
  float bias;
  const float* biases;  // of each slot; null: `bias` for all
};

int64_t slices_of(const PlanRun& run) { return (run.groups + kSliceGroups - 1) / kSliceGroups * run.group_outputs; }

int64_t most_slices(const PlanView& plan, int64_t first_layer, int64_t end_layer) {
  int64_t most = 1;
  for (int64_t l = first_layer; l < end_layer; ++l) {
    int64_t slices = 0;
    for (int64_t r = 0; r < plan.layers[l].runs; ++r) slices += slices_of(plan.runs[plan.layers[l].first_run + r]);
    most = std::max(most, slices);
  }
  return most;
}

// What a block keeps in shared memory beside its features and the slices.
struct alignas(16) BlockState {
  PlanLayer records[kLayers];
  PlanRun runs[kLayers][kMostRuns];
  Head heads[kLayers];
  uint32_t active_words[kLayers];  // a bit for each feature that is not all zero
  int32_t members[kMostFeatures];
  int32_t first_target;
};

// Describes the layers to come: one warp's work, so that the others meet nothing but slices. Two layers before it
// describes one it asks for its runs, and two before that for its record.
class Clerk {
 public:
  __device__ Clerk(const ResidentStep& step, BlockState& state, Slice* slices, int most_slices)
      : step_(step),
        layers_(reinterpret_cast<const PlanLayer*>(step.words + step.layers_word)),
        runs_(reinterpret_cast<const PlanRun*>(step.words + step.runs_word)),
        state_(state),
        slices_(slices),
        most_slices_(most_slices),
        lane_(threadIdx.x % 32) {}

  __device__ void begin() {
    const int first = step_.first_layer;
    for (int l = first; l < first + kDescribed + 4; ++l) ask_record(l);
    arrive<0>();
    for (int l = first; l < first + kDescribed + 2; ++l) ask_runs(l);
    arrive<0>();
    for (int l = first; l < first + kDescribed; ++l) describe(l);
  }

  __device__ void advance(int l) {
    finish_copies<1>();
    __syncwarp();
    describe(l + kDescribed);
    ask_runs(l + kDescribed + 2);
    ask_record(l + kDescribed + 4);
    close_copies();
  }

 private:
  template <int kOpen>
  __device__ void arrive() {
    close_copies();
    finish_copies<kOpen>();
    __syncwarp();
  }

  __device__ void ask_record(int l) {
    if (l < step_.end_layer && lane_ < kLayerFields) {
      copy_async<8>(reinterpret_cast<int64_t*>(&state_.records[l % kLayers]) + lane_,
                    reinterpret_cast<const int64_t*>(layers_ + l) + lane_);
    }
  }

  __device__ void ask_runs(int l) {
    if (l >= step_.end_layer) return;
    const PlanLayer& record = state_.records[l % kLayers];
    int64_t* target = reinterpret_cast<int64_t*>(state_.runs[l % kLayers]);
    const int64_t* source = reinterpret_cast<const int64_t*>(runs_ + record.first_run);
    for (int field = lane_; field < static_cast<int>(record.runs) * kRunFields; field += 32) {
      copy_async<8>(target + field, source + field);
    }
  }

  __device__ void describe(int l) {
    if (l >= step_.end_layer) return;
    const PlanLayer& record = state_.records[l % kLayers];
    Slice* slices = slices_ + l % kLayers * most_slices_;
    int first = 0;  // slice of the run
    for (int r = 0; r < static_cast<int>(record.runs); ++r) {
      const PlanRun& run = state_.runs[l % kLayers][r];
      const int groups = static_cast<int>(run.groups), outputs = static_cast<int>(run.group_outputs);
      const int chunks = static_cast<int>(run.edges) / kEdgeChunk;
      const int count = (groups + kSliceGroups - 1) / kSliceGroups * outputs;
      for (int s = lane_; s < count; s += 32) {
        const int group = s / outputs * kSliceGroups, width = min(kSliceGroups, groups - group);
        const int64_t before = static_cast<int64_t>(group) * chunks;  // chunks of the run
        Slice slice;
        slice.indices = static_cast<uint32_t>(run.index_offset / kWordAlignment + before / 2);
        slice.values = run.value_offset < 0 ? 0 : static_cast<uint32_t>(run.value_offset / kWordAlignment + before);
        slice.value = static_cast<float>(run.value);
        slice.first_slot = static_cast<uint32_t>(run.first_slot + group * outputs + s % outputs * width);
        slice.last_lane = width - 1;
        slice.chunks = chunks;
        slices[first + s] = slice;
      }
      first += count;
    }
    if (lane_ == 0) {
      const float* biases =
          record.bias_offset < 0 ? nullptr : reinterpret_cast<const float*>(step_.words) + record.bias_offset;
      state_.heads[l % kLayers] = {first,
                                   static_cast<int>(record.outputs),
                                   record.prunable != 0,
                                   step_.scale.bounds(record),
                                   static_cast<float>(record.bias),
                                   biases};
    }
  }

  const ResidentStep& step_;
  const PlanLayer* layers_;
  const PlanRun* runs_;
  BlockState& state_;
  Slice* slices_;
  int most_slices_;
  int lane_;
};

// A piece is up to kPieceChunks chunks of a slice. This is where one lies in shared memory, [chunk][width].
struct alignas(16) Slot {
  uint2 indices[kPieceChunks * 32];
  float4 values[kPieceChunks * 32];
  float biases[32];
};

// Brings a warp's pieces into shared memory, several ahead, across layers.
class Supply {
 public:
  __device__ Supply(const ResidentStep& step, const BlockState& state, const Slice* slices, int most_slices,
                    Slot* slots, int slot_count, int warp, int warps)
      : step_(step),
        state_(state),
        slices_(slices),
        most_slices_(most_slices),
        slots_(slots),
        slot_count_(slot_count),
        warps_(warps),
        warp_(warp),
        layer_(step.first_layer),
        slice_(warp) {}

  // Starts what there is room for and what is described while layer `l` is computed.
  __device__ void fill(int l) {
    while (asked_ - taken_ < slot_count_ - 1 && find_slice(l)) ask();
  }

  // The next piece. All lanes must be through with the one before.
  __device__ const Slot& take(int l) {
    switch (asked_ - taken_) {
      case 0:
        fill(l);
        finish_copies<0>();
        break;
      case 1:
        finish_copies<0>();
        break;
      case 2:
        finish_copies<1>();
        break;
      default:
        finish_copies<2>();
    }
    __syncwarp();
    return slots_[taken_++ % slot_count_];
  }

 private:
  // Goes to the next slice that has no piece yet. Returns whether there is one.
  __device__ bool find_slice(int l) {
    for (; layer_ < step_.end_layer && layer_ < l + kDescribed; ++layer_, slice_ = warp_) {
      if (slice_ < state_.heads[layer_ % kLayers].slices) return true;
    }
    return false;
  }

  __device__ void ask() {
    const Slice slice = slices_[layer_ % kLayers * most_slices_ + slice_];
    Slot& slot = slots_[asked_++ % slot_count_];
    const int lane = threadIdx.x % 32, width = slice.width();
    const int chunks = min(kPieceChunks, static_cast<int>(slice.chunks) - chunk_);
    const uint4* plan = reinterpret_cast<const uint4*>(step_.words);
    const uint4* indices = plan + slice.indices + chunk_ * width / 2;
    for (int k = lane; k < (chunks * width + 1) / 2; k += 32) {
      copy_async<16>(reinterpret_cast<uint4*>(slot.indices) + k, indices + k);
    }
    if (slice.values) {
      const uint4* values = plan + slice.values + chunk_ * width;
      for (int k = lane; k < chunks * width; k += 32) copy_async<16>(slot.values + k, values + k);
    }
    const float* biases = state_.heads[layer_ % kLayers].biases;
    if (biases && lane < width) copy_async<4>(slot.biases + lane, biases + slice.first_slot + lane);
    close_copies();
    chunk_ += kPieceChunks;
    if (chunk_ >= static_cast<int>(slice.chunks)) chunk_ = 0, slice_ += warps_;
  }

  const ResidentStep& step_;
  const BlockState& state_;
  const Slice* slices_;
  int most_slices_;
  Slot* slots_;
  int slot_count_, warps_, warp_;
  int layer_, slice_, chunk_ = 0;  // of the next piece to ask for
  int asked_ = 0, taken_ = 0;      // pieces
};

template <int kVector>
struct alignas(kVector * sizeof(float)) Vector {
  float x[kVector];
};

// The edges of kChunks chunks of a lane's output.
template <int kVector, int kChunks>
__device__ __forceinline__ void multiply(const uint2* indices, const float4* values, float value, int width,
                                         const Vector<kVector>* in, float (&sums)[kVector]) {
  uint2 index[kChunks];
  float4 weight[kChunks];
  Vector<kVector> features[kChunks][kEdgeChunk];
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    index[k] = indices[k * width];
    weight[k] = values ? values[k * width] : make_float4(value, value, value, value);
  }
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
#pragma unroll
    for (int edge = 0; edge < kEdgeChunk; ++edge) features[k][edge] = in[index_of(index[k], edge)];
  }
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      sums[v] = fmaf(weight[k].x, features[k][0].x[v], sums[v]);
      sums[v] = fmaf(weight[k].y, features[k][1].x[v], sums[v]);
      sums[v] = fmaf(weight[k].z, features[k][2].x[v], sums[v]);
      sums[v] = fmaf(weight[k].w, features[k][3].x[v], sums[v]);
    }
  }
}

// One of the warps that multiply: computes its outputs of layer l for kVector features, from `in` to `out`, which hold
// activations as [neuron][kVector]. Returns a bit for each feature that this lane's outputs leave active.
template <int kVector>
__device__ uint32_t compute_layer(const ResidentStep& step, const Head& head, const Slice* slices, int l,
                                  Supply& supply, int warp, int warps, const Vector<kVector>* in,
                                  Vector<kVector>* out) {
  const int lane = threadIdx.x % 32;
  uint32_t active = 0;
  supply.fill(l);
  for (int s = warp; s < head.slices; s += warps) {
    const Slice slice = slices[s];
    const int width = slice.width(), row = min(lane, static_cast<int>(slice.last_lane));  // more do as the last does
    float sums[kVector];
    for (int left = slice.chunks, first = 1; first || left > 0; left -= kPieceChunks, first = 0) {
      const Slot& slot = supply.take(l);
      if (first) {
        const float start = (head.biases ? slot.biases[row] : head.bias) * step.scale.per_unit;
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[v] = start;
      }
      const uint2* indices = slot.indices + row;
      const float4* values = slice.values ? slot.values + row : nullptr;
      int chunks = min(left, kPieceChunks);
      for (; chunks >= 4; chunks -= 4, indices += 4 * width, values += slice.values ? 4 * width : 0) {
        multiply<kVector, 4>(indices, values, slice.value, width, in, sums);
      }
      for (; chunks > 0; --chunks, indices += width, values += slice.values ? width : 0) {
        multiply<kVector, 1>(indices, values, slice.value, width, in, sums);
      }
      supply.fill(l);
    }
    head.bounds.clip(sums);
    if (lane == row) {
      Vector<kVector> result;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        result.x[v] = sums[v];
        active |= static_cast<uint32_t>((__float_as_uint(sums[v]) << 1) != 0) << v;  // -0.0 is zero
      }
      out[slice.first_slot + lane] = result;
    }
  }
  return active;
}

__device__ __forceinline__ int64_t id_of(const ResidentStep& step, int64_t place) {
  return step.ids ? step.ids[place] : place;
}

// Brings the tile's features into shared memory; those past the last are zero.
template <int kVector>
__device__ void load_features(const ResidentStep& step, int64_t first, int64_t count, int width, float* in) {
  for (int k = threadIdx.x; k < width * kVector; k += blockDim.x) {
    // Neighbouring threads read neighbours in the row, or in the tile.
    const int v = step.source ? k % kVector : k / width, neuron = step.source ? k / kVector : k % width;
    const int64_t place = first + v;
    float x = 0;
    if (place < count) {
      x = step.source ? step.source[tiled_offset(step.slots ? step.slots[place] : place, neuron, width)]
                      : feature_at(step.input, place, neuron);
    }
    in[neuron * kVector + v] = x;
  }
}

// After the last layer: the answer, in the caller's order.
template <int kVector>
__device__ void store_results(const ResidentStep& step, int64_t first, uint32_t active, const float* out) {
  if (threadIdx.x < kVector && (active >> threadIdx.x & 1u)) step.alive[id_of(step, first + threadIdx.x)] = true;
  if (!step.activations) return;
  for (int v = 0; v < kVector; ++v) {
    if (!(active >> v & 1u)) continue;
    float* row = step.activations + id_of(step, first + v) * step.outputs;
    for (int64_t output = threadIdx.x; output < step.outputs; output += blockDim.x) {
      row[output] = out[step.slot_of[output] * kVector + v] * step.scale.unit;
    }
  }
}

// Between launches: the kept features move together, so that the next launch finds no gaps.
template <int kVector>
__device__ void store_tile(const ResidentStep& step, int64_t first, int width, uint32_t kept, BlockState& state,
                           const float* out) {
  if (threadIdx.x == 0) state.first_target = atomicAdd(step.target_count, __popc(kept));
  __syncthreads();
  int64_t target = state.first_target;
  for (int v = 0; v < kVector; ++v) {
    if (!(kept >> v & 1u)) continue;
    if (threadIdx.x == 0) step.target_ids[target] = static_cast<int32_t>(id_of(step, first + v));
    for (int neuron = threadIdx.x; neuron < width; neuron += blockDim.x) {
      step.target[tiled_offset(target, neuron, width)] = out[neuron * kVector + v];
    }
    ++target;
  }
}

// How a block's shared memory is laid out.
struct Room {
  int workers;      // warps that multiply
  int most_slices;  // of a layer
  int slots;        // of a worker
  int features;     // of a block, at most

  __host__ __device__ int64_t slot_bytes() const { return static_cast<int64_t>(workers) * slots * sizeof(Slot); }
  __host__ __device__ int64_t slice_bytes() const {
    return static_cast<int64_t>(kLayers) * most_slices * sizeof(Slice);
  }
  // Of one of the two buffers of activations.
  __host__ __device__ int64_t buffer_floats(int64_t width) const { return (width * features + 3) / 4 * 4; }
  int64_t bytes(int64_t width) const {
    return slot_bytes() + slice_bytes() + 2 * buffer_floats(width) * static_cast<int64_t>(sizeof(float));
  }
};

template <int kVector>
__device__ void run_tile(const ResidentStep& step, const Room& room, int64_t first, int64_t count, BlockState& state,
                         char* shared) {
  Slot* slots = reinterpret_cast<Slot*>(shared);
  Slice* slices = reinterpret_cast<Slice*>(shared + room.slot_bytes());
  float* in = reinterpret_cast<float*>(shared + room.slot_bytes() + room.slice_bytes());
  float* out = in + room.buffer_floats(step.max_width);
  const int warp = threadIdx.x / 32;
  const bool is_clerk = warp == room.workers;
  const int64_t present = min(static_cast<int64_t>(kVector), count - first);
  const uint32_t used = (1u << present) - 1;
  Clerk clerk(step, state, slices, room.most_slices);
  Supply supply(step, state, slices, room.most_slices, slots + warp * room.slots, room.slots, warp, room.workers);
  if (is_clerk) clerk.begin();
  if (threadIdx.x < kLayers) state.active_words[threadIdx.x] = 0;
  if (threadIdx.x < kVector) {
    const bool counts = threadIdx.x < present;
    state.members[threadIdx.x] = counts && step.members ? step.members[id_of(step, first + threadIdx.x)] : counts;
  }
  const PlanLayer* layers = reinterpret_cast<const PlanLayer*>(step.words + step.layers_word);
  load_features<kVector>(step, first, count, static_cast<int>(__ldg(&layers[step.first_layer].inputs)), in);
  __syncthreads();
  uint32_t active = 0;
  for (int l = step.first_layer; l < step.end_layer; ++l) {
    uint32_t* word = &state.active_words[l % kLayers];
    if (is_clerk) {
      clerk.advance(l);
    } else {
      uint32_t mine = compute_layer<kVector>(step, state.heads[l % kLayers], slices + l % kLayers * room.most_slices, l,
                                             supply, warp, room.workers, reinterpret_cast<const Vector<kVector>*>(in),
                                             reinterpret_cast<Vector<kVector>*>(out));
      if (step.active || l + 1 == step.end_layer) {
        mine = __reduce_or_sync(0xFFFFFFFFu, mine);
        if (threadIdx.x % 32 == 0 && mine) atomicOr(word, mine);
      }
    }
    __syncthreads();
    active = *word & used;
    if (threadIdx.x == 0) {
      state.active_words[(l + 2) % kLayers] = 0;  // all have read it, six layers ago
      if (step.active && active) {
        int32_t sum = 0;
        for (int v = 0; v < kVector; ++v) sum += active >> v & 1u ? state.members[v] : 0;
        atomicAdd(step.active + l, sum);
      }
    }
    float* swap = in;
    in = out, out = swap;
  }
  const Head head = state.heads[(step.end_layer - 1) % kLayers];
  if (!step.target) {
    store_results<kVector>(step, first, active, in);
  } else if (const uint32_t kept = head.prunable ? active : used) {
    store_tile<kVector>(step, first, head.outputs, kept, state, in);
  }
  __syncthreads();
}

// Few features are spread over all blocks.
__global__ void __launch_bounds__((kMostWorkers + 1) * 32)
    chain_kernel(const __grid_constant__ ResidentStep step, Room room, int64_t most_features) {
  extern __shared__ __align__(16) char shared[];
  __shared__ BlockState state;
  const int64_t count = step.count ? *step.count : step.features, blocks = gridDim.x;
  if (count > most_features) return;
  const auto run = [&](auto vector) {
    constexpr int kVector = decltype(vector)::value;
    for (int64_t first = blockIdx.x * kVector; first < count; first += blocks * kVector) {
      run_tile<kVector>(step, room, first, count, state, shared);
    }
  };
  if (count <= blocks || room.features == 1) {
    run(std::integral_constant<int, 1>{});
  } else if (count <= 2 * blocks || room.features == 2) {
    run(std::integral_constant<int, 2>{});
  } else {
    run(std::integral_constant<int, kMostFeatures>{});
  }
}

// Rather more features than more slots: they share the weights.
Room room_for(const PlanView& plan, int64_t first_layer, int64_t end_layer, const DeviceLimits& limits) {
  const int64_t width = widest(plan, first_layer, end_layer);
  const int slices = static_cast<int>(most_slices(plan, first_layer, end_layer));
  Room room{std::min(slices, kMostWorkers), slices, kMostSlots, kMostFeatures};
  const auto fits = [&] {
    return room.bytes(width) + static_cast<int64_t>(sizeof(BlockState)) <= limits.block_shared_bytes;
  };
  if (!fits()) room.slots = kFewestSlots;
  while (!fits() && room.features > 1) room.features /= 2;
  while (!fits() && room.workers > 1) --room.workers;
  return room;
}

}  // namespace

const char* check_chain(const PlanView& plan, int64_t first_layer, int64_t end_layer) {
  for (int64_t l = first_layer; l < end_layer; ++l) {
    const PlanLayer& layer = plan.layers[l];
    if (std::max(layer.inputs, layer.outputs) > kWidest)
      return "the schedule holds a chain of layers that are too wide";
    if (layer.runs > kMostRuns) return "the schedule holds a chain of rows of too many lengths";
    for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
      if (plan.runs[r].group_outputs > 1 && plan.runs[r].value_offset >= 0) {
        return "the schedule holds a chain of outputs that share their inputs";
      }
    }
  }
  return nullptr;
}

cudaError_t chain_features(const PlanView& plan, int64_t first_layer, int64_t end_layer, int64_t* features) {
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  *features = static_cast<int64_t>(limits.multiprocessors) * room_for(plan, first_layer, end_layer, limits).features;
  return cudaSuccess;
}

cudaError_t launch_chain(const ResidentStep& step, const PlanView& plan, int64_t most_features, cudaStream_t stream) {
  DeviceLimits limits;
  cudaError_t error = read_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const Room room = room_for(plan, step.first_layer, step.end_layer, limits);
  const int threads = 32 * (room.workers + 1);
  const int64_t shared = room.bytes(step.max_width);
  int64_t resident_blocks = 0;
  if ((error = resident_block_count(chain_kernel, threads, shared, &resident_blocks)) != cudaSuccess) return error;
  const int64_t blocks = std::min({resident_blocks, step.features, most_features});
  chain_kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(step, room, most_features);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
