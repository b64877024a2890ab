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
constexpr int kPieceChunks = 8;   // of a row: what a lane holds in registers of the piece to come
constexpr int kHeads = 8;         // layer records on their way into shared memory, and there
constexpr int kRings = 4;         // layers whose runs, or slices, are in shared memory
constexpr int kLayerFields = sizeof(PlanLayer) / sizeof(int64_t);
constexpr int kRunFields = sizeof(PlanRun) / sizeof(int64_t);
static_assert(kLayerFields <= 32, "a warp copies a layer's record at once, a field a lane");

// Some outputs of a layer, at most 32 that lie side by side: what a warp computes at a time, an output a lane.
struct alignas(16) Slice {
  const uint2* indices;  // of the first chunk; the next one's are `width` further
  const float4* values;  // null: `value` for all
  float value;
  int first_slot;
  int width;
  int chunks;
};

// A layer as the workers see it.
struct Head {
  int slices;
  int outputs;
  bool prunable;
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
  PlanLayer records[kHeads];
  PlanRun runs[kRings][kMostRuns];
  Head heads[kRings];
  uint32_t active_words[kRings];  // of as many layers: a bit for each feature that is not all zero
  int32_t members[kMostFeatures];
  int32_t first_target;
};

// Describes the layers to come, several ahead: one warp's work, so that the others meet nothing but slices. While layer
// l is computed it writes the slices of l + 2, asks for the runs of l + 4 and for the record of l + 6.
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
    for (int l = first; l < first + 6; ++l) ask_record(l);
    arrive<0>();
    for (int l = first; l < first + 4; ++l) ask_runs(l);
    arrive<0>();
    describe(first);
    describe(first + 1);
  }

  __device__ void advance(int l) {
    finish_copies<1>();
    __syncwarp();
    describe(l + 2);
    ask_runs(l + 4);
    ask_record(l + 6);
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
      copy_async<8>(reinterpret_cast<int64_t*>(&state_.records[l % kHeads]) + lane_,
                    reinterpret_cast<const int64_t*>(layers_ + l) + lane_);
    }
  }

  __device__ void ask_runs(int l) {
    if (l >= step_.end_layer) return;
    const PlanLayer& record = state_.records[l % kHeads];
    int64_t* target = reinterpret_cast<int64_t*>(state_.runs[l % kRings]);
    const int64_t* source = reinterpret_cast<const int64_t*>(runs_ + record.first_run);
    for (int field = lane_; field < static_cast<int>(record.runs) * kRunFields; field += 32) {
      copy_async<8>(target + field, source + field);
    }
  }

  __device__ void describe(int l) {
    if (l >= step_.end_layer) return;
    const PlanLayer& record = state_.records[l % kHeads];
    Slice* slices = slices_ + l % kRings * most_slices_;
    int first = 0;  // slice of the run
    for (int r = 0; r < static_cast<int>(record.runs); ++r) {
      const PlanRun& run = state_.runs[l % kRings][r];
      const int groups = static_cast<int>(run.groups), outputs = static_cast<int>(run.group_outputs);
      const int chunks = static_cast<int>(run.edges) / kEdgeChunk;
      const int count = (groups + kSliceGroups - 1) / kSliceGroups * outputs;
      for (int s = lane_; s < count; s += 32) {
        const int group = s / outputs * kSliceGroups, width = min(kSliceGroups, groups - group);
        Slice slice;
        const int64_t offset = static_cast<int64_t>(group) * chunks;  // of its first chunk in the run
        slice.indices = reinterpret_cast<const uint2*>(step_.words + run.index_offset) + offset;
        slice.values =
            run.value_offset < 0 ? nullptr : reinterpret_cast<const float4*>(step_.words + run.value_offset) + offset;
        slice.value = static_cast<float>(run.value);
        slice.first_slot = static_cast<int>(run.first_slot) + group * outputs + s % outputs * width;
        slice.width = width;
        slice.chunks = chunks;
        slices[first + s] = slice;
      }
      first += count;
    }
    if (lane_ == 0) {
      const float* biases =
          record.bias_offset < 0 ? nullptr : reinterpret_cast<const float*>(step_.words) + record.bias_offset;
      state_.heads[l % kRings] = {first, static_cast<int>(record.outputs), record.prunable != 0,
                                  static_cast<float>(record.bias), biases};
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

// Up to kPieceChunks chunks of a slice's rows, as a lane meets them.
struct Piece {
  const uint2* indices = nullptr;
  const float4* values = nullptr;
  float value = 0;
  int stride = 0;
  int chunks = 0;

  __device__ static Piece of(const Slice& slice, int first_chunk) {
    const int lane = min(static_cast<int>(threadIdx.x % 32), slice.width - 1);  // those past the last do as the last
    const int64_t offset = static_cast<int64_t>(first_chunk) * slice.width + lane;
    return {slice.indices + offset, slice.values ? slice.values + offset : nullptr, slice.value, slice.width,
            min(kPieceChunks, slice.chunks - first_chunk)};
  }
};

// The edges of a piece. They are on their way from device memory while the piece before is multiplied.
struct Edges {
  uint2 indices[kPieceChunks];
  float4 values[kPieceChunks];

  // Asks for two chunks. Where there is but one, the second repeats its inputs with weight 0.
  __device__ __forceinline__ void ask(const Piece& piece, int chunk) {
    if (chunk >= piece.chunks) return;
#pragma unroll
    for (int k = chunk; k < chunk + 2; ++k) {
      const bool there = k < piece.chunks;
      indices[k] = __ldg(piece.indices + (there ? k : chunk) * piece.stride);
      if (!there) {
        values[k] = make_float4(0, 0, 0, 0);
      } else if (piece.values) {
        values[k] = __ldg(piece.values + k * piece.stride);
      } else {
        values[k] = make_float4(piece.value, piece.value, piece.value, piece.value);
      }
    }
  }
};

template <int kVector>
struct alignas(kVector * sizeof(float)) Vector {
  float x[kVector];
};

template <int kVector>
__device__ __forceinline__ void multiply_add(float weight, const Vector<kVector>& features, float (&sums)[kVector]) {
#pragma unroll
  for (int v = 0; v < kVector; ++v) sums[v] = fmaf(weight, features.x[v], sums[v]);
}

template <int kVector>
__device__ __forceinline__ void multiply_chunk(const uint2& indices, const float4& values, const Vector<kVector>* in,
                                               float (&sums)[kVector]) {
  Vector<kVector> features[kEdgeChunk];
#pragma unroll
  for (int edge = 0; edge < kEdgeChunk; ++edge) features[edge] = in[index_of(indices, edge)];
  multiply_add(values.x, features[0], sums);
  multiply_add(values.y, features[1], sums);
  multiply_add(values.z, features[2], sums);
  multiply_add(values.w, features[3], sums);
}

// The layers of a tile of kVector features, from `in`, as one of the warps that multiply sees them. Activations stand
// in shared memory as [neuron][kVector].
template <int kVector>
class Worker {
 public:
  __device__ Worker(const ResidentStep& step, BlockState& state, const Slice* slices, int most_slices)
      : step_(step),
        state_(state),
        slices_(slices),
        most_slices_(most_slices),
        warp_(threadIdx.x / 32),
        warps_(blockDim.x / 32 - 1) {}

  // The first layer's slices must be there.
  __device__ void begin() { ask_first(step_.first_layer); }

  // Returns a bit for each feature that this lane's outputs leave active.
  __device__ uint32_t compute(int l, const Vector<kVector>* in, Vector<kVector>* out) {
    const Head head = state_.heads[l % kRings];
    if (warp_ >= head.slices) ask_first(l + 1);
    uint32_t active = 0;
    for (int s = warp_; s < head.slices; s += warps_) {
      const Slice& slice = slice_at(l, s);
      const int slot = slice.first_slot + static_cast<int>(threadIdx.x % 32);
      float sums[2][kVector];  // of even and of odd chunks: half as long to wait
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[0][v] = start_, sums[1][v] = 0;
      for (int first = 0; first < slice.chunks || first == 0; first += kPieceChunks) {
        multiply(slice.chunks - first, piece_after(l, s, first + kPieceChunks), in, sums);
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[0][v] += sums[1][v];
      step_.scale.clip(sums[0]);
      if (threadIdx.x % 32 < slice.width) {
        Vector<kVector> result;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          result.x[v] = sums[0][v];
          active |= static_cast<uint32_t>((__float_as_uint(sums[0][v]) << 1) != 0) << v;  // -0.0 is zero
        }
        out[slot] = result;
      }
    }
    return active;
  }

 private:
  __device__ const Slice& slice_at(int l, int s) const { return slices_[l % kRings * most_slices_ + s]; }

  // What this warp computes after its piece of layer l and slice s that ends before `chunk`. Fetches the bias, too,
  // where it begins a slice: the sums of the one in work have started.
  __device__ Piece piece_after(int l, int s, int chunk) {
    const Slice& slice = slice_at(l, s);
    if (chunk < slice.chunks) return Piece::of(slice, chunk);
    if (s + warps_ < state_.heads[l % kRings].slices) return first_piece(l, s + warps_);
    return l + 1 < step_.end_layer && warp_ < state_.heads[(l + 1) % kRings].slices ? first_piece(l + 1, warp_)
                                                                                    : Piece{};
  }

  __device__ Piece first_piece(int l, int s) {
    const Slice& slice = slice_at(l, s);
    const Head& head = state_.heads[l % kRings];
    const int lane = min(static_cast<int>(threadIdx.x % 32), slice.width - 1);
    start_ = (head.biases ? __ldg(head.biases + slice.first_slot + lane) : head.bias) * step_.scale.per_unit;
    return Piece::of(slice, 0);
  }

  // Asks for what this warp begins a layer with.
  __device__ void ask_first(int l) {
    if (l >= step_.end_layer || warp_ >= state_.heads[l % kRings].slices) return;
    const Piece piece = first_piece(l, warp_);
#pragma unroll
    for (int chunk = 0; chunk < kPieceChunks; chunk += 2) edges_.ask(piece, chunk);
  }

  // Multiplies the chunks of the piece at hand and asks for the next piece's in their places.
  __device__ __forceinline__ void multiply(int chunks, const Piece& next, const Vector<kVector>* in,
                                           float (&sums)[2][kVector]) {
#pragma unroll
    for (int chunk = 0; chunk < kPieceChunks; chunk += 2) {
      if (chunk < chunks) {
        multiply_chunk(edges_.indices[chunk], edges_.values[chunk], in, sums[0]);
        multiply_chunk(edges_.indices[chunk + 1], edges_.values[chunk + 1], in, sums[1]);
      }
      edges_.ask(next, chunk);
    }
  }

  const ResidentStep& step_;
  BlockState& state_;
  const Slice* slices_;
  int most_slices_;
  int warp_, warps_;
  float start_ = 0;  // the bias of this lane's output of the piece at hand
  Edges edges_;
};

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

template <int kVector>
__device__ void run_tile(const ResidentStep& step, int64_t first, int64_t count, BlockState& state, float* buffers,
                         Slice* slices, int most_slices) {
  const bool is_clerk = threadIdx.x >= blockDim.x - 32;
  const int64_t present = min(static_cast<int64_t>(kVector), count - first);
  const uint32_t used = (1u << present) - 1;
  float *in = buffers, *out = buffers + step.max_width * kVector;
  Clerk clerk(step, state, slices, most_slices);
  if (is_clerk) clerk.begin();
  if (threadIdx.x < kRings) state.active_words[threadIdx.x] = 0;
  if (threadIdx.x < kVector) {
    const bool counts = threadIdx.x < present;
    state.members[threadIdx.x] = counts && step.members ? step.members[id_of(step, first + threadIdx.x)] : counts;
  }
  const PlanLayer* layers = reinterpret_cast<const PlanLayer*>(step.words + step.layers_word);
  load_features<kVector>(step, first, count, static_cast<int>(__ldg(&layers[step.first_layer].inputs)), in);
  __syncthreads();
  Worker<kVector> worker(step, state, slices, most_slices);
  if (!is_clerk) worker.begin();
  uint32_t active = 0;
  for (int l = step.first_layer; l < step.end_layer; ++l) {
    uint32_t* word = &state.active_words[l % kRings];
    const bool asked = step.active || l + 1 == step.end_layer;
    if (is_clerk) {
      clerk.advance(l);
    } else {
      uint32_t mine =
          worker.compute(l, reinterpret_cast<const Vector<kVector>*>(in), reinterpret_cast<Vector<kVector>*>(out));
      if (asked) {
        mine = __reduce_or_sync(0xFFFFFFFFu, mine);
        if (threadIdx.x % 32 == 0 && mine) atomicOr(word, mine);
      }
    }
    __syncthreads();
    active = *word & used;
    // Read by all before the barrier above, two layers ago, and written after the next but one.
    if (threadIdx.x == 0) {
      state.active_words[(l + 2) % kRings] = 0;
      if (step.active && active) {
        int32_t sum = 0;
        for (int v = 0; v < kVector; ++v) sum += active >> v & 1u ? state.members[v] : 0;
        atomicAdd(step.active + l, sum);
      }
    }
    float* swap = in;
    in = out, out = swap;
  }
  const Head head = state.heads[(step.end_layer - 1) % kRings];
  if (!step.target) {
    store_results<kVector>(step, first, active, in);
  } else if (const uint32_t kept = head.prunable ? active : used) {
    store_tile<kVector>(step, first, head.outputs, kept, state, in);
  }
  __syncthreads();
}

// Few features are spread over all blocks.
__global__ void __launch_bounds__((kMostWorkers + 1) * 32)
    chain_kernel(const __grid_constant__ ResidentStep step, int most_slices, int64_t most_features) {
  extern __shared__ __align__(16) float shared[];
  __shared__ BlockState state;
  const int64_t count = step.count ? *step.count : step.features;
  if (count > most_features) return;
  Slice* slices = reinterpret_cast<Slice*>(shared);
  float* buffers = shared + kRings * most_slices * (sizeof(Slice) / sizeof(float));
  const auto run = [&](auto vector) {
    constexpr int kVector = decltype(vector)::value;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * kVector; first < count;
         first += static_cast<int64_t>(gridDim.x) * kVector) {
      run_tile<kVector>(step, first, count, state, buffers, slices, most_slices);
    }
  };
  if (count <= gridDim.x) {
    run(std::integral_constant<int, 1>{});
  } else if (count <= 2 * static_cast<int64_t>(gridDim.x)) {
    run(std::integral_constant<int, 2>{});
  } else {
    run(std::integral_constant<int, kMostFeatures>{});
  }
}

struct Launch {
  int threads = 0;
  int most_slices = 0;
  int64_t shared = 0;
  int64_t blocks = 0;  // that the device holds at a time
};

cudaError_t launch_for(const PlanView& plan, int64_t first_layer, int64_t end_layer, Launch* launch) {
  int64_t width = 0;
  for (int64_t l = first_layer; l < end_layer; ++l) {
    width = std::max({width, plan.layers[l].inputs, plan.layers[l].outputs});
  }
  launch->most_slices = static_cast<int>(most_slices(plan, first_layer, end_layer));
  launch->threads = 32 * (std::min(launch->most_slices, kMostWorkers) + 1);
  launch->shared = kRings * launch->most_slices * sizeof(Slice) + 2 * width * kMostFeatures * sizeof(float);
  return resident_block_count(chain_kernel, launch->threads, launch->shared, &launch->blocks);
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
  Launch launch;
  const cudaError_t error = launch_for(plan, first_layer, end_layer, &launch);
  *features = launch.blocks * kMostFeatures;
  return error;
}

cudaError_t launch_chain(const ResidentStep& step, const PlanView& plan, int64_t most_features, cudaStream_t stream) {
  Launch launch;
  if (const cudaError_t error = launch_for(plan, step.first_layer, step.end_layer, &launch); error != cudaSuccess) {
    return error;
  }
  const int64_t blocks = std::min(launch.blocks, std::min(step.features, most_features));
  chain_kernel<<<static_cast<unsigned>(blocks), launch.threads, launch.shared, stream>>>(step, launch.most_slices,
                                                                                         most_features);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
