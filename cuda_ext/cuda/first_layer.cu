#include <algorithm>
#include <type_traits>

#include "accumulate.cuh"
#include "first_layer.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kVector = 4;    // features of a thread: a byte each in a word
constexpr int kChunk = 16;    // neurons that a thread brings of a row at a time
constexpr int kMostBits = 5;  // of the words of a neuron: 128 features
constexpr int kRowBits =
    2;  // of the rows that a warp reads at a time, in fours: so it reads 128 bytes of each, or more

// The features of a block in shared memory: [neuron][four features]. Between chunks of neurons as many words are left
// free as a warp stores of each at a time: so it stores into all banks.
struct ByteTile {
  uint32_t* words;
  int bits;  // a neuron has a power of two of words

  __host__ __device__ static int chunks(int64_t inputs) { return static_cast<int>((inputs + kChunk - 1) / kChunk); }
  static int64_t bytes(int64_t inputs, int bits) {
    const int64_t words_of_chunk = (kChunk << bits) + (1 << std::min(bits, kRowBits));
    return chunks(inputs) * words_of_chunk * static_cast<int64_t>(sizeof(uint32_t));
  }
  __device__ uint32_t* at(uint32_t neuron, int word) const {
    return words + (neuron << bits) + (neuron / kChunk << min(bits, kRowBits)) + word;
  }
};

// A byte each for sixteen neurons of a row; zeros past its end, and past the last row.
__device__ __forceinline__ uint4 sixteen_bytes(const InputFeatures& input, int64_t features, int64_t feature,
                                               int64_t neuron) {
  if (feature >= features) return {};
  if (input.type == InputType::kPacked) {
    const int64_t row = feature * ((input.inputs + 31) / 32);
    const uint32_t bits = __ldg(static_cast<const uint32_t*>(input.data) + row + neuron / 32) >> (neuron % 32);
    const auto spread = [](uint32_t four) { return (four & 0xFu) * 0x00204081u & 0x01010101u; };
    return {spread(bits), spread(bits >> 4), spread(bits >> 8), spread(bits >> 12)};
  }
  const uint8_t* bytes = static_cast<const uint8_t*>(input.data) + feature * input.inputs + neuron;
  if (input.inputs % kChunk == 0) return __ldg(reinterpret_cast<const uint4*>(bytes));
  uint32_t words[kChunk / 4] = {};
#pragma unroll
  for (int k = 0; k < kChunk; ++k) {
    if (neuron + k < input.inputs) words[k / 4] |= static_cast<uint32_t>(__ldg(bytes + k)) << k % 4 * 8;
  }
  return {words[0], words[1], words[2], words[3]};
}

// Brings the block's features along, from feature `first` on.
__device__ void load_bytes(const InputFeatures& input, int64_t features, int64_t first, const ByteTile& tile) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int row_bits = min(tile.bits, kRowBits), parts = 1 << (tile.bits - row_bits), chunks_at_once = 32 >> row_bits;
  const int chunks = ByteTile::chunks(input.inputs);
  for (int patch = threadIdx.x / 32;; patch += warps) {
    const int part = patch & (parts - 1), first_chunk = (patch >> (tile.bits - row_bits)) * chunks_at_once;
    if (first_chunk >= chunks) return;
    const int word = (part << row_bits) + (lane & ((1 << row_bits) - 1)), chunk = first_chunk + (lane >> row_bits);
    if (chunk >= chunks) continue;
    uint4 rows[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      rows[v] = sixteen_bytes(input, features, first + word * kVector + v, int64_t{chunk} * kChunk);
    }
    const auto store = [&](int neuron, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
      uint32_t four[kVector] = {a, b, c, d};
      transpose_bytes(four);
#pragma unroll
      for (int k = 0; k < 4; ++k) *tile.at(chunk * kChunk + neuron + k, word) = four[k];
    };
    store(0, rows[0].x, rows[1].x, rows[2].x, rows[3].x);
    store(4, rows[0].y, rows[1].y, rows[2].y, rows[3].y);
    store(8, rows[0].z, rows[1].z, rows[2].z, rows[3].z);
    store(12, rows[0].w, rows[1].w, rows[2].w, rows[3].w);
  }
}

// Four features of a neuron as numbers.
struct Bytes {
  ByteTile column;  // begins with the thread's word
  float per_unit;

  __device__ void operator()(uint32_t index, float (&x)[kVector]) const {
    const uint32_t bytes = *column.at(index, 0);
#pragma unroll
    for (int v = 0; v < kVector; ++v) x[v] = float_of_byte(bytes >> 8 * v & 0xFFu, per_unit);
  }
};

// The sums of an output by itself whose edges have one weight: that times the sum of the inputs, which are whole
// numbers, two to a word, and so is their sum.
__device__ __forceinline__ void add_up(const PlanRun& run, const Unit& unit, const GlobalWords& words,
                                       const Bytes& load, float (&sums)[1][kVector]) {
  constexpr int kEdgesOfHalfWord = 256;  // whose sum it holds
  const int chunks = static_cast<int>(run.edges) / kEdgeChunk;
  const auto indices = words.at<uint2>(run.index_offset);
  int64_t position = static_cast<int64_t>(unit.slice) * chunks + unit.lane;
  float totals[kVector] = {};
  for (int chunk = 0; chunk < chunks;) {
    const int end = min(chunk + kEdgesOfHalfWord / kEdgeChunk, chunks);
    uint32_t even = 0, odd = 0;
#pragma unroll 4
    for (; chunk < end; ++chunk, position += unit.width) {
      const uint2 four = indices[position];
#pragma unroll
      for (int edge = 0; edge < kEdgeChunk; ++edge) {
        const uint32_t bytes = *load.column.at(index_of(four, edge), 0);
        even += bytes & 0x00FF00FFu;
        odd += __byte_perm(bytes, 0, 0x4341);
      }
    }
    totals[0] += static_cast<float>(even & 0xFFFFu), totals[1] += static_cast<float>(odd & 0xFFFFu);
    totals[2] += static_cast<float>(even >> 16), totals[3] += static_cast<float>(odd >> 16);
  }
  const float weight = static_cast<float>(run.value) * load.per_unit;
#pragma unroll
  for (int v = 0; v < kVector; ++v) sums[0][v] = fmaf(totals[v], weight, sums[0][v]);
}

// Returns a bit for each of the thread's features that some output leaves active.
template <int kOutputs, bool kStored>
__device__ __forceinline__ uint32_t compute_unit(const LayerStep& step, const PlanLayer& layer, const PlanRun& run,
                                                 const Unit& unit, const Bytes& load, int64_t slot) {
  const GlobalWords words{step.words};
  float sums[kOutputs][kVector];
  start_with_bias(layer, run, unit, words, step.scale, sums);
  if constexpr (kOutputs == 1 && !kStored) {
    add_up(run, unit, words, load, sums);
  } else {
    accumulate<kOutputs, kVector, kStored, kOutputs == 1, uint16_t>(run, unit, words, load, sums);
  }
  const uint32_t active = clip_all(sums, step.bounds);
  float* target = step.target + tiled_offset(slot, unit.first_slot(run), layer.outputs);
#pragma unroll
  for (int r = 0; r < kOutputs; ++r) {
    *reinterpret_cast<float4*>(target + r * unit.width * kTile) =
        make_float4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
  }
  return active;
}

// What a layer's runs are: outputs by themselves with one weight for all edges of a run, or any.
enum class Runs { kSums, kAny };

// Calls body(outputs of a unit, whether weights are stored), both constants.
template <Runs kRuns, typename Body>
__device__ __forceinline__ void dispatch(const PlanRun& run, const Body& body) {
  if constexpr (kRuns == Runs::kSums) {
    body(std::integral_constant<int, 1>{}, std::false_type{});
  } else {
    const auto with = [&](auto stored) {
      dispatch_outputs<stored.value>(run.group_outputs, [&](auto outputs) { body(outputs, stored); });
    };
    run.value_offset >= 0 ? with(std::true_type{}) : with(std::false_type{});
  }
}

// Sums take few registers: there are more threads, which wait for memory by turns.
template <Runs kRuns>
constexpr int kThreads = kRuns == Runs::kSums ? 384 : 256;
template <Runs kRuns>
constexpr int kBlocks = kRuns == Runs::kSums ? 3 : 2;

// A block for the features of a tile. Threads take units of outputs in turn, through all runs, so that all have work
// where runs are short.
template <Runs kRuns>
__global__ void __launch_bounds__(kThreads<kRuns>, kBlocks<kRuns>)
    first_layer_kernel(const __grid_constant__ LayerStep step, const __grid_constant__ InputFeatures input,
                       const __grid_constant__ PlanLayer layer, const PlanRun* runs, int bits) {
  extern __shared__ __align__(16) uint32_t words[];
  const ByteTile tile{words, bits};
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kVector << bits;
  load_bytes(input, step.features, first, tile);
  __syncthreads();
  const int word = threadIdx.x & ((1 << bits) - 1);
  const int64_t slot = first + word * kVector;
  const Bytes load{{words + word, bits}, step.scale.per_unit};
  uint32_t active = 0;
  int number = threadIdx.x >> bits, first_unit = 0;
  for (int64_t r = 0; r < layer.runs; ++r) {
    const PlanRun run = runs[r];
    dispatch<kRuns>(run, [&](auto outputs, auto stored) {
      constexpr int kOutputs = outputs.value;
      const int groups = static_cast<int>(run.groups), end = first_unit + groups * run.group_outputs / kOutputs;
      for (; number < end; number += kThreads<kRuns> >> bits) {
        const Unit unit = Unit::at(number - first_unit, groups, kOutputs);
        active |= compute_unit<kOutputs, stored.value>(step, layer, run, unit, load, slot);
      }
      first_unit = end;
    });
  }
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    if ((active >> v & 1u) && slot + v < step.features) step.flags[slot + v] = step.flag;
  }
}

// As many features as leave room for two blocks: one computes while the other brings its features along. -1: none fit.
int bits_for(const PlanLayer& layer, const DeviceLimits& limits) {
  constexpr int64_t kReserved = 1024;  // of each block
  for (int bits = kMostBits; bits >= 0; --bits) {
    if (2 * (ByteTile::bytes(layer.inputs, bits) + kReserved) <= limits.shared_bytes) return bits;
  }
  return ByteTile::bytes(layer.inputs, 0) <= limits.block_shared_bytes ? 0 : -1;
}

template <Runs kRuns>
cudaError_t launch(const LayerStep& step, const InputFeatures& input, const PlanLayer& layer, const PlanRun* runs,
                   int bits, cudaStream_t stream) {
  const auto kernel = first_layer_kernel<kRuns>;
  const int64_t shared = ByteTile::bytes(layer.inputs, bits), features_of_block = int64_t{kVector} << bits;
  if (const cudaError_t error = allow_shared_bytes(kernel, kThreads<kRuns>, shared); error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>((step.features + features_of_block - 1) / features_of_block);
  kernel<<<blocks, kThreads<kRuns>, static_cast<size_t>(shared), stream>>>(step, input, layer, runs, bits);
  return cudaGetLastError();
}

}  // namespace

bool fits_first_layer(const PlanLayer& layer, const DeviceLimits& limits) {
  return layer.index_bits == 16 && bits_for(layer, limits) >= 0;
}

cudaError_t launch_first_layer(const LayerStep& step, const InputFeatures& input, const PlanView& plan,
                               const PlanRun* runs, cudaStream_t stream) {
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  const PlanLayer& layer = plan.layers[0];
  bool sums = true;
  for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
    sums &= plan.runs[r].group_outputs == 1 && plan.runs[r].value_offset < 0;
  }
  const auto launch_it = sums ? launch<Runs::kSums> : launch<Runs::kAny>;
  return launch_it(step, input, layer, runs, bits_for(layer, limits), stream);
}

}  // namespace spdnn::cuda
