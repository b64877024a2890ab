#include <algorithm>

#include "accumulate.cuh"
#include "chain.h"
#include "intrinsics.cuh"
#include "launch.h"
#include "narrow.h"
#include "resident_block.cuh"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kMostWarps = 16;                          // of a block
constexpr int kWidest = 8192;                           // neurons of a layer
constexpr int kMostQuadBits = 2;                        // of the lanes that share an output: each has four features
constexpr int kFew = 4, kMany = kFew << kMostQuadBits;  // features of a block
constexpr int kMostSharingBits = 3;                     // of the lanes that share an output, at most
static_assert(kMostQuadBits <= kMostSharingBits);
constexpr int kBlocksOfFew = 2;       // of a multiprocessor, before blocks have many
constexpr int kPart = 8;              // portions that a warp asks for at a time
constexpr int kPortions = 3 * kPart;  // for which it has room: those in work, the next, and those on their way
constexpr int kAhead = 4;             // chunks on their way to a lane
constexpr int kActiveWords = 4;       // of as many layers
constexpr int kLooks = 8;             // layers after which a block looks whether its features are dead

// The edges of some outputs that lie side by side, with a lane for each, or a few: what a warp adds up at a time.
struct alignas(16) Portion {
  int64_t indices;  // word of the plan where the first output's are
  int64_t values;   // the same; -1: `value`, four times, for all
  int64_t biases;   // the same; -1: `bias` for all
  float bias;
  Bounds bounds;
  uint16_t chunks, first_slot;
  uint8_t outputs;
  uint8_t width;  // outputs that lie side by side in the plan
  bool ends_layer;
  bool prunable;
  float4 value;  // read where it lies, as others' are, so that a lane's loads do not depend on a condition
};
static_assert(sizeof(Portion) % 16 == 0, "portions are copied sixteen bytes at a time");

// Portions of a run where so many lanes, a power of two, share an output.
__host__ __device__ inline int64_t portions_of(const PlanRun& run, int sharing_bits) {
  const int outputs = kSliceGroups >> sharing_bits;
  return (run.groups + outputs - 1) / outputs;
}

// How the portions of a launch are dealt out: [warp][layer][portion], as many for each warp and layer. Those that a
// layer lacks are without outputs.
struct Deal {
  Portion* portions;
  int warps;
  int quad_bits;          // a power of two of lanes share an output's features ...
  int split_bits;         // ... and as many times another its edges
  int portions_of_layer;  // of a warp

  __host__ __device__ int sharing_bits() const { return quad_bits + split_bits; }
  __host__ __device__ int outputs_of_portion() const { return kSliceGroups >> sharing_bits(); }
  __host__ __device__ int64_t count(int64_t layers) const { return layers * warps * portions_of_layer; }
};

__device__ Portion portion_of(const PlanRun& run, const Deal& deal, int64_t number) {
  const int64_t first_output = number * deal.outputs_of_portion();
  const int64_t slice = first_output / kSliceGroups * kSliceGroups, place = first_output - slice;
  const int64_t width = min(static_cast<int64_t>(kSliceGroups), run.groups - slice);
  const int64_t first_edge = slice * run.edges + place * kEdgeChunk;
  Portion portion{};
  portion.indices = run.index_offset + first_edge / 2;
  portion.values = run.value_offset < 0 ? -1 : run.value_offset + first_edge;
  const float value = static_cast<float>(run.value);
  portion.value = make_float4(value, value, value, value);
  portion.chunks = static_cast<uint16_t>(run.edges / kEdgeChunk);
  portion.first_slot = static_cast<uint16_t>(run.first_slot + first_output);
  portion.outputs = static_cast<uint8_t>(min(static_cast<int64_t>(deal.outputs_of_portion()), width - place));
  portion.width = static_cast<uint8_t>(width);
  return portion;
}

// The deals of a step: for few features and for many.
struct StepDeals {
  int first_layer, layers;
  Deal few, many;
};

// Those of a schedule's chains, or of some of them: as many as a kernel takes as an argument.
constexpr int kMostDeals = 32;
struct Deals {
  const PlanLayer* layers;
  const PlanRun* runs;
  Scale scale;
  int count;
  StepDeals of[kMostDeals];
};

// A block deals out a layer, of all chains before any of them runs. Warps take portions in turn, so that each has long
// rows and short ones.
__global__ void deal_kernel(const __grid_constant__ Deals deals) {
  int layer_of_step = static_cast<int>(blockIdx.x), s = 0;
  while (layer_of_step >= deals.of[s].layers) layer_of_step -= deals.of[s++].layers;
  const StepDeals& step = deals.of[s];
  const Deal& deal = blockIdx.y == 0 ? step.few : step.many;
  if (!deal.portions) return;
  const PlanLayer& layer = deals.layers[step.first_layer + layer_of_step];
  const PlanRun* runs = deals.runs + layer.first_run;
  const auto give = [&](int64_t number, Portion portion) {
    const int64_t warp = number % deal.warps, place = number / deal.warps;
    if (layer.bias_offset < 0) {
      portion.biases = -1;
      portion.bias = static_cast<float>(layer.bias);
    } else {
      portion.biases = layer.bias_offset + portion.first_slot;
    }
    portion.bounds = deals.scale.bounds(layer);
    portion.ends_layer = place == deal.portions_of_layer - 1;
    portion.prunable = layer.prunable != 0;
    deal.portions[(warp * step.layers + layer_of_step) * deal.portions_of_layer + place] = portion;
  };
  int64_t first = 0;
  for (int64_t r = 0; r < layer.runs; ++r) {
    const PlanRun run = runs[r];
    const int64_t count = portions_of(run, deal.sharing_bits());
    for (int64_t k = threadIdx.x; k < count; k += blockDim.x) give(first + k, portion_of(run, deal, k));
    first += count;
  }
  for (int64_t k = first + threadIdx.x; k < deal.count(1); k += blockDim.x) give(k, Portion{});
}

// Four edges of a lane's output.
struct Chunk {
  uint2 indices;
  float4 weights;
};

// Brings a lane's edges, portion after portion, across layers: the first chunks of the next portion are on their way
// while the one before is finished.
class Supply {
 public:
  // `place`: which of the lanes that share a portion's outputs and edges this one is.
  __device__ Supply(const uint32_t* words, const Deal& deal, const Portion* source, int count, Portion* portions,
                    int place)
      : words_(words),
        source_(source),
        count_(count),
        portions_(portions),
        output_(place >> deal.split_bits),
        part_(place & ((1 << deal.split_bits) - 1)),
        split_bits_(deal.split_bits) {
    bring(0);
    finish_copies<0>();
    __syncwarp();
  }

  // Begins with the next portion, of which there must be one; asks for its first chunks.
  __device__ __forceinline__ void start(Chunk (&chunks_ahead)[kAhead]) {
    if (next_ % kPart == 0) {
      finish_copies<0>();
      __syncwarp();
      bring(next_ / kPart + 1);
    }
    portion_ = portions_ + next_ % kPortions;
    const int chunks = portion_->chunks, width = portion_->width;
    const int output = max(min(output_, portion_->outputs - 1), 0);  // lanes too many do as the last does
    left_ = (chunks - part_ + (1 << split_bits_) - 1) >> split_bits_;
    stride_ = width << split_bits_;
    const int place = part_ * width + output;
    indices_ = reinterpret_cast<const uint2*>(words_ + portion_->indices) + place;
    const bool stored = portion_->values >= 0;
    values_ = stored ? reinterpret_cast<const float4*>(words_ + portion_->values) + place : &source_[next_].value;
    value_stride_ = stored ? stride_ : 0;
    bias_ = 0;
    if (part_ == 0)
      bias_ = portion_->biases < 0 ? portion_->bias
                                   : __ldg(reinterpret_cast<const float*>(words_) + portion_->biases + output);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (k < left_) load(chunks_ahead[k]);
    }
    ++next_;
  }

  __device__ __forceinline__ void load(Chunk& chunk) {
    chunk.indices = __ldg(indices_);
    chunk.weights = __ldg(values_);
    indices_ += stride_;
    values_ += value_stride_;
  }

  __device__ bool has_more() const { return next_ < count_; }
  __device__ const Portion& portion() const { return *portion_; }
  __device__ int chunks() const { return left_; }  // of the lane, in the portion
  __device__ float bias() const { return bias_; }  // what the lane's sum starts with

  // Waits for portions that nobody will read.
  __device__ void end() const {
    finish_copies<0>();
    __syncwarp();
  }

 private:
  __device__ void bring(int part) {
    constexpr int kPieces = sizeof(Portion) / 16;
    const int first = part * kPart, pieces = min(kPart, count_ - first) * kPieces;
    for (int piece = threadIdx.x % 32; piece < pieces; piece += 32) {
      copy_async<16>(reinterpret_cast<uint4*>(portions_ + first % kPortions) + piece,
                     reinterpret_cast<const uint4*>(source_ + first) + piece);
    }
    close_copies();
  }

  const uint32_t* words_;
  const Portion* source_;
  int count_;  // portions
  Portion* portions_;
  int output_, part_, split_bits_;
  int next_ = 0;  // portion
  const Portion* portion_ = nullptr;
  int left_ = 0, stride_ = 0, value_stride_ = 0;
  float bias_ = 0;
  const uint2* indices_ = nullptr;
  const float4* values_ = nullptr;
};

template <int kVector>
__device__ __forceinline__ void multiply(const Chunk& chunk, const char* column, uint32_t stride_bytes,
                                         float (&sums)[kVector]) {
  float x[kEdgeChunk][kVector];
#pragma unroll
  for (int edge = 0; edge < kEdgeChunk; ++edge) {
    load_vector<kVector>(reinterpret_cast<const float*>(column + index_of(chunk.indices, edge) * stride_bytes),
                         x[edge]);
  }
  const float weights[kEdgeChunk] = {chunk.weights.x, chunk.weights.y, chunk.weights.z, chunk.weights.w};
#pragma unroll
  for (int edge = 0; edge < kEdgeChunk; ++edge) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums[v] = fmaf(weights[edge], x[edge][v], sums[v]);
  }
}

struct ChainState {
  uint32_t active_words[kActiveWords];  // a bit for each feature that is not all zero
};

// A warp's part of all layers. Returns the features that are active after the last layer, or 0 as soon as none is seen
// to be.
template <int kVector>
__device__ uint32_t run_layers(const ResidentStep& step, const Deal& deal, const Columns& columns, const Tile& tile,
                               ChainState& state, Supply& supply, Buffers& buffers) {
  const int lane = threadIdx.x % 32;
  const int quads = 1 << deal.quad_bits, sharing = quads << deal.split_bits;  // lanes of an output
  const int output = lane / sharing, column = lane % quads * kVector;
  const uint32_t stride = columns.count();
  const uint32_t stride_bytes = opaque(static_cast<uint32_t>(stride * sizeof(float)));
  Chunk chunks[kAhead];
  supply.start(chunks);
  for (int l = step.first_layer;; ++l) {
    const char* in = reinterpret_cast<const char*>(buffers.in + column);
    uint32_t mine = 0;
    bool ends = false, prunable = false;
    while (!ends) {
      const Portion& portion = supply.portion();
      float sums[kVector];
      const float start = supply.bias() * step.scale.per_unit;
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[v] = start;
#pragma unroll 1
      for (int left = supply.chunks(); left > 0; left -= kAhead) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          if (k >= left) break;
          multiply<kVector>(chunks[k], in, stride_bytes, sums);
          if (k + kAhead < left) supply.load(chunks[k]);
        }
      }
      const int outputs = portion.outputs, slot = portion.first_slot + output;
      const Bounds bounds = portion.bounds;
      ends = portion.ends_layer;
      prunable = portion.prunable;
      if (supply.has_more()) supply.start(chunks);
      for (int other = quads; other < sharing; other *= 2) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[v] += __shfl_xor_sync(0xFFFFFFFFu, sums[v], other);
      }
      if (output < outputs && lane % sharing < quads) {
        bounds.clip(sums);
        store_vector<kVector>(buffers.out + slot * stride + column, sums);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          mine |= static_cast<uint32_t>((__float_as_uint(sums[v]) << 1) != 0) << (column + v);  // -0.0 is zero
        }
      }
    }
    const bool last = l + 1 == step.end_layer, looks = last || step.active || l % kLooks == 0;
    uint32_t* word = &state.active_words[l % kActiveWords];
    if (looks) {
      mine = __reduce_or_sync(0xFFFFFFFFu, mine);
      if (lane == 0 && mine) atomicOr(word, mine);
    }
    // Read by all before the barrier that ended the last layer, and written again in the next but one.
    if (threadIdx.x == 0) state.active_words[(l + 2) % kActiveWords] = 0;
    __syncthreads();
    buffers.swap();
    if (!looks) continue;
    const uint32_t active = *word & tile.used;
    tile.count(step, l, active);
    if (last || (!active && prunable)) return active;
  }
}

// A launch: how many features a block has, and how it shares the work.
struct Room {
  int features = 0;  // a power of two; 0: not even one fits
  int spread = 0;    // so many features, where they are few, have a block each, and twice as many two a block
  Deal deal{};
  int64_t buffer_floats = 0;

  int64_t shared_bytes() const {
    return static_cast<int64_t>(deal.warps * kPortions * sizeof(Portion)) +
           2 * buffer_floats * static_cast<int64_t>(sizeof(float));
  }
};

template <int kVector>
__device__ void run_tiles(const ResidentStep& step, const Room& room, int64_t count, ChainState& state, char* shared) {
  const Deal& deal = room.deal;
  Portion* portions = reinterpret_cast<Portion*>(shared);
  float* first_buffer = reinterpret_cast<float*>(portions + deal.warps * kPortions);
  const int warp = threadIdx.x / 32, count_of_portions = (step.end_layer - step.first_layer) * deal.portions_of_layer;
  const PlanLayer* layers = reinterpret_cast<const PlanLayer*>(step.words + step.layers_word);
  const bool last_prunable = layers[step.end_layer - 1].prunable;
  const int64_t width = layers[step.end_layer - 1].outputs;
  const Columns columns{deal.quad_bits + kVectorBits<kVector>};
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * columns.count(); first < count;
       first += static_cast<int64_t>(gridDim.x) * columns.count()) {
    const Tile tile(step, first, count, columns);
    if (threadIdx.x < kActiveWords) state.active_words[threadIdx.x] = 0;
    Buffers buffers{first_buffer, first_buffer + room.buffer_floats};
    load_features(step, first, count, layers[step.first_layer].inputs, columns,
                  Activations<kVector>(buffers.in, columns));
    __syncthreads();
    Supply supply(step.words, deal, deal.portions + static_cast<int64_t>(warp) * count_of_portions, count_of_portions,
                  portions + warp * kPortions, threadIdx.x % 32 >> deal.quad_bits);
    const uint32_t active = run_layers<kVector>(step, deal, columns, tile, state, supply, buffers);
    supply.end();
    tile.store(step, width, last_prunable, active, columns, Activations<kVector>(buffers.in, columns));
    __syncthreads();
  }
}

// Takes the features in work where they are more than `more_than` and no more than `most`.
__global__ void __launch_bounds__(kMostWarps * 32, 1)
    chain_kernel(const __grid_constant__ ResidentStep step, const __grid_constant__ Room room, int64_t more_than,
                 int64_t most) {
  extern __shared__ __align__(16) char shared[];
  __shared__ ChainState state;
  const int64_t count = step.count ? *step.count : step.features;
  if (count <= more_than || count > most) return;
  if (room.features == 1 || count <= room.spread) {
    run_tiles<1>(step, room, count, state, shared);
  } else if (room.features == 2 || count <= 2 * room.spread) {
    run_tiles<2>(step, room, count, state, shared);
  } else {
    run_tiles<4>(step, room, count, state, shared);
  }
}

// Portions of the largest of some layers, by the bits of the lanes that share an output. One look at the records serves
// all that is asked: thousands of layers are many beside what a call costs the host.
struct MostPortions {
  int64_t by_bits[kMostSharingBits + 1] = {1, 1, 1, 1};

  MostPortions(const PlanView& plan, int64_t first_layer, int64_t end_layer) {
    for (int64_t l = first_layer; l < end_layer; ++l) {
      for (int bits = 0; bits <= kMostSharingBits; ++bits) {
        int64_t portions = 0;
        for (int64_t r = 0; r < plan.layers[l].runs; ++r) {
          portions += portions_of(plan.runs[plan.layers[l].first_run + r], bits);
        }
        by_bits[bits] = std::max(by_bits[bits], portions);
      }
    }
  }
};

// So many features of so wide layers fit no device's shared memory, twice.
bool may_fit(int64_t width, int features) {
  constexpr int64_t kMostShared = 256 * 1024;
  return 2 * width * features * static_cast<int64_t>(sizeof(float)) <= kMostShared;
}

// Lanes share an output's edges where warps would else have nothing to do.
Room room_for(const MostPortions& most, int64_t width, int most_features, const DeviceLimits& limits) {
  for (int features = most_features; features > 0; features /= 2) {
    Room room;
    room.features = features;
    Deal& deal = room.deal;
    while (kFew << deal.quad_bits < features) ++deal.quad_bits;
    while (deal.sharing_bits() < kMostSharingBits && most.by_bits[deal.sharing_bits() + 1] <= kMostWarps) {
      ++deal.split_bits;
    }
    const int64_t portions = most.by_bits[deal.sharing_bits()];
    deal.warps = static_cast<int>(std::min<int64_t>(portions, kMostWarps));
    deal.portions_of_layer = static_cast<int>((portions + deal.warps - 1) / deal.warps);
    room.buffer_floats = (width * features + 3) / 4 * 4;
    if (may_fit(width, features) && room.shared_bytes() + kSharedStatic <= limits.block_shared_bytes) return room;
  }
  return {};
}

// The launches of a step: `few` spreads few features over all multiprocessors; from `limit` on `many` of them share
// what a block reads of the plan, and from `most` on there is something better for narrow layers.
struct Rooms {
  Room few, many;
  int layers;
  int64_t limit, most;

  Rooms(const PlanView& plan, int64_t first_layer, int64_t end_layer, const DeviceLimits& limits)
      : layers(static_cast<int>(end_layer - first_layer)),
        limit(int64_t{kBlocksOfFew} * kFew * limits.multiprocessors) {
    const MostPortions portions(plan, first_layer, end_layer);
    const int64_t width = widest(plan, first_layer, end_layer);
    few = room_for(portions, width, kFew, limits);
    many = room_for(portions, width, kMany, limits);
    few.spread = limits.multiprocessors;
    if (many.features <= kFew) limit = INT64_MAX;
    most = too_few_for_narrow(width, limits);
  }

  bool has_many(int64_t features) const { return features > limit; }

  // Gives both deals their place. Returns the end of it.
  Portion* place(Portion* portions, int64_t features) {
    few.deal.portions = portions;
    portions += few.deal.count(layers);
    if (!has_many(features)) return portions;
    many.deal.portions = portions;
    return portions + many.deal.count(layers);
  }
};

cudaError_t launch(const ResidentStep& step, const Room& room, int64_t more_than, int64_t most, cudaStream_t stream) {
  const int threads = 32 * room.deal.warps;
  int64_t resident_blocks = 0;
  const cudaError_t error = resident_block_count(chain_kernel, threads, room.shared_bytes(), &resident_blocks);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min({resident_blocks, step.features, most});
  chain_kernel<<<static_cast<unsigned>(blocks), threads, room.shared_bytes(), stream>>>(step, room, more_than, most);
  return cudaGetLastError();
}

// What is wrong with a layer of a chain, or null.
const char* check_chained(const PlanView& plan, const PlanLayer& layer) {
  if (std::max(layer.inputs, layer.outputs) > kWidest) return "the schedule holds a chain of layers that are too wide";
  for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
    if (plan.runs[r].group_outputs > 1) return "the schedule holds a chain of outputs that are laid out in groups";
  }
  return nullptr;
}

}  // namespace

const char* check_chain(const PlanView& plan, int64_t first_layer, int64_t end_layer, const DeviceLimits& limits) {
  for (int64_t l = first_layer; l < end_layer; ++l) {
    if (const char* wrong = check_chained(plan, plan.layers[l])) return wrong;
  }
  const bool fits = Rooms(plan, first_layer, end_layer, limits).few.features > 0;
  return fits ? nullptr : "the schedule chains layers that are too wide for shared memory: build the plan again";
}

// Whatever the device, and whichever layers are a step.
int64_t chain_workspace_bytes(const PlanView& plan) {
  int64_t layers = 0, most_of_few = 0, most_of_many = 0;
  for (int64_t l = 0; l < plan.header->layers; ++l) {
    if (check_chained(plan, plan.layers[l])) continue;
    ++layers;
    const MostPortions most(plan, l, l + 1);
    int bits =
        kMostQuadBits;  // more than one lane shares an output only where so many features fit, or portions are few
    while (bits > 0 && !may_fit(widest(plan, l, l + 1), kFew << bits)) --bits;
    most_of_few = std::max(most_of_few, round_up(most.by_bits[0], kMostWarps));
    most_of_many = std::max(most_of_many, round_up(most.by_bits[bits], kMostWarps));
  }
  return layers * (most_of_few + most_of_many) * static_cast<int64_t>(sizeof(Portion));
}

cudaError_t launch_deals(const uint32_t* words, const PlanView& plan, const Scale& scale, int64_t features,
                         std::vector<ChainLayers>& chains, void* workspace, cudaStream_t stream) {
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  Deals deals{};
  deals.layers = reinterpret_cast<const PlanLayer*>(words + kLayersWord);
  deals.runs = reinterpret_cast<const PlanRun*>(words + runs_word(*plan.header));
  deals.scale = scale;
  Portion* portions = static_cast<Portion*>(workspace);
  int all_layers = 0, kinds = 1;
  for (size_t c = 0; c < chains.size(); ++c) {
    ChainLayers& chain = chains[c];
    Rooms rooms(plan, chain.first_layer, chain.end_layer, limits);
    chain.portions = portions;
    portions = rooms.place(portions, features);
    deals.of[deals.count++] = {chain.first_layer, rooms.layers, rooms.few.deal, rooms.many.deal};
    all_layers += rooms.layers;
    if (rooms.many.deal.portions) kinds = 2;
    if (deals.count < kMostDeals && c + 1 < chains.size()) continue;
    deal_kernel<<<dim3(static_cast<unsigned>(all_layers), kinds), 128, 0, stream>>>(deals);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    deals.count = all_layers = 0;
  }
  return cudaSuccess;
}

cudaError_t launch_chain(const ResidentStep& step, const PlanView& plan, void* portions, cudaStream_t stream) {
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  Rooms rooms(plan, step.first_layer, step.end_layer, limits);
  rooms.place(static_cast<Portion*>(portions), step.features);
  cudaError_t error = launch(step, rooms.few, 0, std::min(rooms.limit, rooms.most), stream);
  if (error == cudaSuccess && rooms.has_many(step.features)) {
    error = launch(step, rooms.many, rooms.limit, rooms.most, stream);
  }
  if (error == cudaSuccess && step.features > rooms.most) error = launch_narrow(step, rooms.most, stream);
  return error;
}

}  // namespace spdnn::cuda
