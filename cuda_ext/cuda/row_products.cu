#include <algorithm>
#include <cmath>

#include "intrinsics.cuh"
#include "launch.h"
#include "row_products.h"

namespace spdnn::cuda {
namespace {

constexpr int kQuad = 4;  // edges, or features, that are read at a time
constexpr int kMostFeatures = 32;

template <int kCount>
struct alignas(kCount * sizeof(float)) Floats {
  float at[kCount];
};

struct alignas(16) Ints {
  int32_t at[kQuad];
};

// --- features of a block in shared memory, as [neuron][feature], and behind the last neuron one of zeros ---

template <int kFeatures>
struct Resident {
  static constexpr int kVector = kFeatures < kQuad ? kFeatures : kQuad;  // features of a lane
  static constexpr int kLanes = kFeatures / kVector;                     // of all features of a neuron
  static constexpr int kCount = kFeatures;
  static int64_t bytes_of_neuron() { return kCount * static_cast<int64_t>(sizeof(float)); }
  using Vector = Floats<kVector>;

  // Brings features first .. first + kFeatures of the neurons from `begin` to `end` along, zeros where there are none.
  __device__ static void load(const float* in, int64_t width, int64_t begin, int64_t end, int64_t first,
                              int64_t features, const Mask& mask, Vector* shared) {
#pragma unroll 1  // few loads on their way, for registers may be held by sums
    for (int64_t neuron = begin + threadIdx.x; neuron < end; neuron += blockDim.x) {
#pragma unroll 2
      for (int lane = 0; lane < kLanes; ++lane) {
        Vector vector;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const int64_t feature = first + lane * kVector + k;
          const bool held = neuron < width && feature < features && mask.holds(feature, neuron);
          vector.at[k] = held ? in[feature * width + neuron] : 0.0f;
        }
        shared[(neuron - begin) * kLanes + lane] = vector;
      }
    }
  }
};

// How many features of so many neurons a block can hold, a power of two; 0: not even one.
int resident_features(int64_t width, int64_t features, int64_t shared_bytes) {
  const auto fits = [&](int count) {
    return (width + 1) * count * static_cast<int64_t>(sizeof(float)) <= shared_bytes;
  };
  int count = kMostFeatures;
  while (count > 0 && (!fits(count) || (count > kQuad && count / 2 >= features))) count /= 2;
  return count;
}

// Calls `run` with Resident<count>.
template <typename Run>
cudaError_t with_resident(int count, const Run& run) {
  if (count == 32) return run(Resident<32>());
  if (count == 16) return run(Resident<16>());
  if (count == 8) return run(Resident<8>());
  if (count == 4) return run(Resident<4>());
  if (count == 2) return run(Resident<2>());
  return run(Resident<1>());
}

// --- product ---

constexpr int kProductThreads = 1024;

// Four edges of a lane.
struct Quad {
  Ints indices;
  Floats<kQuad> weights;
};

// Edges of rows, four at a time from a multiple of four on: so they are read 16 bytes at a time wherever a row begins.
struct EdgeReader {
  const int32_t* indices;
  const float* values;  // null: `value` for all
  float value;
  uint32_t edges;
  bool aligned;

  __device__ EdgeReader(const Product& product, bool aligned)
      : indices(product.rows.indices),
        values(product.single_value ? nullptr : product.values),
        value(product.single_value ? product.values[0] : 0.0f),
        edges(static_cast<uint32_t>(product.rows.edges)),
        aligned(aligned) {}

  // From any place on, though nobody needs what lies behind the last row.
  __device__ __forceinline__ void read(uint32_t first, Quad& quad) const {
    if (aligned && first + kQuad <= edges) {
      quad.indices = *reinterpret_cast<const Ints*>(indices + first);
      if (values) quad.weights = *reinterpret_cast<const Floats<kQuad>*>(values + first);
    } else {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const uint32_t edge = min(first + k, edges - 1);
        quad.indices.at[k] = indices[edge];
        if (values) quad.weights.at[k] = values[edge];
      }
    }
  }
};

// Edges of a row.
struct RowEdges {
  uint32_t begin, end;

  __device__ RowEdges(const CompressedRows& rows, int64_t row) : begin(0), end(0) {
    if (row >= rows.out_width) return;
    begin = max(rows.indptr[row], 0);
    end = static_cast<uint32_t>(min(int64_t{max(rows.indptr[row + 1], 0)}, rows.edges));
  }
};

// Sums of one output for the features of a lane, of every `lanes`-th quad of edges from the `lane`-th on, two ahead.
// `activation(index)` are the features of an input, zeros for `none` and beyond.
template <int kVector, typename Activation>
__device__ __forceinline__ void sum_row(const EdgeReader& reader, const RowEdges& row, int lane, int lanes,
                                        uint32_t none, const Activation& activation, float (&sums)[kVector]) {
  const uint32_t step = lanes * kQuad;
  uint32_t first = (row.begin / kQuad + lane) * kQuad;
  if (first >= row.end) return;
  Quad quads[2];
#pragma unroll
  for (Quad& quad : quads) {
#pragma unroll
    for (float& weight : quad.weights.at) weight = reader.value;
  }
  const auto multiply = [&](Quad quad) {
    if (first < row.begin || first + kQuad > row.end) {  // not all of them are the row's
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (first + k >= row.begin && first + k < row.end) continue;
        quad.indices.at[k] = static_cast<int32_t>(none);
        quad.weights.at[k] = 0;
      }
    }
    Floats<kVector> x[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) x[k] = activation(min(static_cast<uint32_t>(quad.indices.at[k]), none));
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[v] = fmaf(quad.weights.at[k], x[k].at[v], sums[v]);
    }
  };
  reader.read(first, quads[0]);
  reader.read(first + step, quads[1]);
  for (;;) {
#pragma unroll
    for (Quad& quad : quads) {
      multiply(quad);
      reader.read(first + 2 * step, quad);
      first += step;
      if (first >= row.end) return;
    }
  }
}

// Adds up what lanes have of the same outputs, those that differ in the bits from kFrom to kTo: each time two lanes
// meet, each hands the other half of its sums over. Returns the first of those that stay, sums[0] and on, of which
// there are kCount.
template <int kFrom, int kTo, int kCount>
__device__ __forceinline__ int share_sums(float* sums, int lane) {
  if constexpr (kFrom >= kTo) {
    return 0;
  } else if constexpr (kCount == 1) {
    sums[0] += __shfl_xor_sync(0xFFFFFFFFu, sums[0], kFrom);
    return share_sums<2 * kFrom, kTo, 1>(sums, lane);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kFrom;
#pragma unroll
    for (int v = 0; v < kHalf; ++v) {
      const float given = upper ? sums[v] : sums[v + kHalf], kept = upper ? sums[v + kHalf] : sums[v];
      sums[v] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, kFrom);
    }
    return (upper ? kHalf : 0) + share_sums<2 * kFrom, kTo, kHalf>(sums, lane);
  }
}

template <int kCount>
__device__ __forceinline__ void write_row(const Product& product, int64_t row, int64_t first_feature,
                                          const float* sums) {
  const float bias = product.bias ? product.bias[product.single_bias ? 0 : row] : 0.0f;
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int64_t feature = first_feature + v;
    if (feature >= product.features) break;
    const float y = fminf(fmaxf(sums[v] + bias, product.lower), product.upper);
    product.out[feature * product.rows.out_width + row] = product.out_mask.holds(feature, row) ? y : 0.0f;
  }
}

constexpr int kRowLanes = 8;  // of an output: its features, and beyond those its edges, shared among them

// Eight lanes take one output, so that a warp reads the edges of four: they lie in few lines of memory, and to read the
// weights costs less than to read the activations.
template <typename Features>
__global__ void __launch_bounds__(kProductThreads)
    product_kernel(const __grid_constant__ Product product, bool aligned, int64_t rows_of_block) {
  using Vector = typename Features::Vector;
  constexpr int kVector = Features::kVector, kLanes = Features::kLanes, kFeatures = Features::kCount;
  constexpr int kRowsOfWarp = 32 / kRowLanes, kEdgeLanes = kRowLanes / kLanes;
  constexpr int kLeft = kVector > kEdgeLanes ? kVector / kEdgeLanes : 1;  // features that a lane writes
  constexpr int kWriters = kLanes * (kVector / kLeft);                    // lanes that write, of an output's
  extern __shared__ __align__(16) float memory[];
  Vector* shared = reinterpret_cast<Vector*>(memory);
  const EdgeReader reader(product, aligned);
  const int warp_lane = threadIdx.x % 32, lane = warp_lane % kLanes, edge_lane = warp_lane % kRowLanes / kLanes;
  const int64_t first_row = blockIdx.x * rows_of_block,
                end_row = min(first_row + rows_of_block, product.rows.out_width);
  const auto none = static_cast<uint32_t>(product.rows.in_width);
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kFeatures; first < product.features;
       first += static_cast<int64_t>(gridDim.y) * kFeatures) {
    Features::load(product.in, product.rows.in_width, 0, product.rows.in_width + 1, first, product.features,
                   product.in_mask, shared);
    __syncthreads();
    int64_t row = first_row + threadIdx.x / 32 * kRowsOfWarp + warp_lane / kRowLanes;
    RowEdges edges(product.rows, row);
    for (; row - warp_lane / kRowLanes < end_row; row += kProductThreads / kRowLanes) {
      const RowEdges next_edges(product.rows, row + kProductThreads / kRowLanes);
      float sums[kVector] = {};
      if (row < end_row) {
        sum_row(
            reader, edges, edge_lane, kEdgeLanes, none, [&](uint32_t index) { return shared[index * kLanes + lane]; },
            sums);
      }
      const int left = share_sums<kLanes, kRowLanes, kVector>(sums, warp_lane);
      if (row < end_row && warp_lane % kRowLanes < kWriters) {
        write_row<kLeft>(product, row, first + lane * kVector + left, sums);
      }
      edges = next_edges;
    }
    __syncthreads();
  }
}

// Where not even one feature fits into shared memory: activations are read where they are.
constexpr int kWideThreads = 256;
__global__ void __launch_bounds__(kWideThreads)
    wide_product_kernel(const __grid_constant__ Product product, bool aligned) {
  const EdgeReader reader(product, aligned);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWideThreads + threadIdx.x;
  if (row >= product.rows.out_width) return;
  const RowEdges edges(product.rows, row);
  const auto none = static_cast<uint32_t>(product.rows.in_width);
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kQuad; first < product.features;
       first += static_cast<int64_t>(gridDim.y) * kQuad) {
    float sums[kQuad] = {};
    const auto activation = [&](uint32_t index) {
      Floats<kQuad> x;
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const int64_t feature = first + k;
        const bool held = feature < product.features && index < none && product.in_mask.holds(feature, index);
        x.at[k] = held ? product.in[feature * product.rows.in_width + index] : 0.0f;
      }
      return x;
    };
    sum_row(reader, edges, 0, 1, none, activation, sums);
    write_row<kQuad>(product, row, first, sums);
  }
}

// Into how many parts the outputs are cut, each of which brings its features along anew: more parts leave fewer
// multiprocessors idle at the end. To bring a neuron along costs about as much as an edge.
int64_t choose_parts(int64_t groups, int64_t resident_blocks, int64_t most, double edges_of_neuron) {
  constexpr int64_t kMostParts = 64;
  int64_t best = 1;
  double least = INFINITY;
  for (int64_t parts = 1; parts <= std::min(most, kMostParts); ++parts) {
    const int64_t rounds = (groups * parts + resident_blocks - 1) / resident_blocks;
    const double cost = static_cast<double>(rounds) * (1 + edges_of_neuron / static_cast<double>(parts));
    if (cost < least) {
      best = parts;
      least = cost;
    }
  }
  return best;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(Ints) == 0; }

constexpr int64_t kMostBlocksY = 65535;

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace

cudaError_t launch_product(const Product& product, cudaStream_t stream) {
  const CompressedRows& rows = product.rows;
  if (product.features == 0 || rows.out_width == 0) return cudaSuccess;
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  const bool aligned = is_aligned(rows.indices) && (product.single_value || is_aligned(product.values));
  const int count = resident_features(rows.in_width, product.features, limits.block_shared_bytes);
  if (count == 0) {
    const dim3 grid(static_cast<unsigned>(divide_up(rows.out_width, kWideThreads)),
                    static_cast<unsigned>(std::min(divide_up(product.features, kQuad), kMostBlocksY)));
    wide_product_kernel<<<grid, kWideThreads, 0, stream>>>(product, aligned);
    return cudaGetLastError();
  }
  return with_resident(count, [&](auto features) {
    using Features = decltype(features);
    constexpr int64_t kRowsAtOnce = kProductThreads / kRowLanes;
    const int64_t groups = divide_up(product.features, Features::kCount);
    const int64_t bytes = (rows.in_width + 1) * Features::bytes_of_neuron();
    const auto kernel = product_kernel<Features>;
    int64_t resident_blocks = 0;
    const cudaError_t error = resident_block_count(kernel, kProductThreads, bytes, &resident_blocks);
    if (error != cudaSuccess) return error;
    const double edges_of_neuron = static_cast<double>(rows.edges) / static_cast<double>(rows.in_width + 1);
    const int64_t parts =
        choose_parts(groups, resident_blocks, divide_up(rows.out_width, kRowsAtOnce), edges_of_neuron);
    const int64_t rows_of_block = divide_up(divide_up(rows.out_width, parts), kRowsAtOnce) * kRowsAtOnce;
    const dim3 grid(static_cast<unsigned>(divide_up(rows.out_width, rows_of_block)),
                    static_cast<unsigned>(std::min(groups, kMostBlocksY)));
    kernel<<<grid, kProductThreads, static_cast<size_t>(bytes), stream>>>(product, aligned, rows_of_block);
    return cudaGetLastError();
  });
}

// --- masks ---

namespace {

constexpr int kMaskThreads = 256;

constexpr int kMaskWords = 4;  // that a warp makes at a time

__global__ void __launch_bounds__(kMaskThreads) store_mask_kernel(const __grid_constant__ StoreMask step) {
  const int64_t words = (step.width + 31) / 32, parts = (words + kMaskWords - 1) / kMaskWords,
                warps = static_cast<int64_t>(gridDim.x) * (kMaskThreads / 32);
  const int lane = threadIdx.x % 32;
  for (int64_t item = (static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x) / 32;
       item < step.features * parts; item += warps) {
    const int64_t feature = item / parts, first_word = item % parts * kMaskWords;
    uint32_t inside[kMaskWords];
#pragma unroll
    for (int k = 0; k < kMaskWords; ++k) {
      const int64_t neuron = (first_word + k) * 32 + lane;
      const float y = neuron < step.width ? step.activations[feature * step.width + neuron] : step.lower;
      inside[k] = __ballot_sync(0xFFFFFFFFu, y > step.lower && y < step.upper);
    }
#pragma unroll
    for (int k = 0; k < kMaskWords; ++k) {
      if (lane == k && first_word + k < words) {
        step.mask.words[feature * step.mask.stride + first_word + k] = inside[k];
      }
    }
  }
}

}  // namespace

cudaError_t launch_store_mask(const StoreMask& step, cudaStream_t stream) {
  const int64_t parts = step.features * divide_up(step.width, 32 * kMaskWords);
  if (parts == 0) return cudaSuccess;
  const int64_t blocks = std::min<int64_t>(divide_up(parts, kMaskThreads / 32), 1 << 20);
  store_mask_kernel<<<static_cast<unsigned>(blocks), kMaskThreads, 0, stream>>>(step);
  return cudaGetLastError();
}

// --- sampled product ---

namespace {

constexpr int kSampledThreads = 512;
constexpr int kEdgesOfBlock = 16384;
constexpr int kEdgesAtOnce = 4;  // of a lane, on their way from shared memory
constexpr int64_t kEndsBytes = kEdgesOfBlock * static_cast<int64_t>(sizeof(uint32_t));
constexpr int64_t kWantedBlocks = 264;  // two for each multiprocessor of the largest devices
constexpr int64_t kPackedNeurons = 1 << 16;

// Outputs that a block's edges are likely to have between them, where rows are somewhat uneven.
int64_t outputs_of_block(const CompressedRows& rows) {
  return std::min(rows.out_width, 2 * divide_up(kEdgesOfBlock * rows.out_width, rows.edges));
}

// Parts that the features are cut into, whose sums are added up at the end.
int64_t sampled_parts(int64_t features, int64_t edges) {
  const int64_t edge_blocks = std::max<int64_t>(divide_up(edges, kEdgesOfBlock), 1);
  return std::max<int64_t>(1, std::min(kWantedBlocks / edge_blocks, divide_up(features, kMostFeatures)));
}

// The output of each edge.
__global__ void __launch_bounds__(kMaskThreads)
    rows_of_edges_kernel(const __grid_constant__ CompressedRows rows, int32_t* row_of_edge) {
  for (int64_t edge = static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x; edge < rows.edges;
       edge += static_cast<int64_t>(gridDim.x) * kMaskThreads) {
    int64_t low = 0, high = rows.out_width;  // indptr[low] <= edge < indptr[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (rows.indptr[middle] <= edge ? low : high) = middle;
    }
    row_of_edge[edge] = static_cast<int32_t>(low);
  }
}

// Sums of edges from `first` on, every `step`-th, for the features of the block's part: activations are read where they
// are.
__device__ void sample_edges(const Sampled& sampled, const int32_t* row_of_edge, int64_t first, int64_t end,
                             int64_t step) {
  const CompressedRows& rows = sampled.rows;
  for (int64_t edge = first; edge < end; edge += step) {
    const auto index = static_cast<uint32_t>(rows.indices[edge]);
    const float* out = sampled.out + row_of_edge[edge];
    float sum = 0;
    if (index < rows.in_width) {
      const float* in = sampled.in + index;
      for (int64_t feature = blockIdx.y; feature < sampled.features; feature += gridDim.y) {
        sum = fmaf(out[feature * rows.out_width], in[feature * rows.in_width], sum);
      }
    }
    sampled.workspace[blockIdx.y * rows.edges + edge] = sum;
  }
}

// Where not even one feature fits into shared memory, or both ends of an edge not into one word.
__global__ void __launch_bounds__(kSampledThreads)
    wide_sampled_kernel(const __grid_constant__ Sampled sampled, const int32_t* row_of_edge) {
  sample_edges(sampled, row_of_edge, static_cast<int64_t>(blockIdx.x) * kSampledThreads + threadIdx.x,
               sampled.rows.edges, static_cast<int64_t>(gridDim.x) * kSampledThreads);
}

// Lanes hold the sums of many edges, and neighbours those of neighbouring edges, whose outputs are few: these, too, are
// kept in shared memory, which has room for `staged_rows`. Both ends of an edge are kept in one word.
template <typename Features>
__global__ void __launch_bounds__(kSampledThreads)
    sampled_kernel(const __grid_constant__ Sampled sampled, const int32_t* row_of_edge, int64_t staged_rows) {
  using Vector = typename Features::Vector;
  constexpr int kVector = Features::kVector, kLanes = Features::kLanes, kFeatures = Features::kCount;
  constexpr int kShare = kLanes > 1 ? 2 : 1;  // lanes that share edges, each with other features
  constexpr int kTurns = kLanes / kShare, kGroups = kSampledThreads / kShare, kEdges = kEdgesOfBlock / kGroups;
  extern __shared__ __align__(16) float memory[];
  const CompressedRows& rows = sampled.rows;
  Vector* in = reinterpret_cast<Vector*>(memory);
  Vector* out = in + (rows.in_width + 1) * kLanes;
  uint32_t* ends = reinterpret_cast<uint32_t*>(out + staged_rows * kLanes);
  const int lane = threadIdx.x % kShare, group = threadIdx.x / kShare;
  const int64_t first_edge = static_cast<int64_t>(blockIdx.x) * kEdgesOfBlock;
  const int count = static_cast<int>(min(rows.edges - first_edge, int64_t{kEdgesOfBlock}));
  const int64_t first_row = row_of_edge[first_edge], end_row = row_of_edge[first_edge + count - 1] + 1;
  if (end_row - first_row > staged_rows) {  // rows of hardly any edges
    return sample_edges(sampled, row_of_edge, first_edge + threadIdx.x, first_edge + count, kSampledThreads);
  }
  for (int k = threadIdx.x; k < kEdgesOfBlock; k += kSampledThreads) {
    const int64_t edge = first_edge + min(k, count - 1);
    const uint32_t index = min(static_cast<uint32_t>(rows.indices[edge]), static_cast<uint32_t>(rows.in_width));
    ends[k] = index << 16 | static_cast<uint32_t>(row_of_edge[edge] - first_row);
  }
  float sums[kEdges] = {};
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kFeatures; first < sampled.features;
       first += static_cast<int64_t>(gridDim.y) * kFeatures) {
    __syncthreads();
    Features::load(sampled.in, rows.in_width, 0, rows.in_width + 1, first, sampled.features, Mask{}, in);
    Features::load(sampled.out, rows.out_width, first_row, end_row, first, sampled.features, Mask{}, out);
    __syncthreads();
#pragma unroll 1
    for (int turn = 0; turn < kTurns; ++turn) {
      const int place = (turn + group) % kTurns * kShare + lane;  // neighbours read different banks
#pragma unroll
      for (int k = 0; k < kEdges; ++k) {
        if (k % kEdgesAtOnce == 0) __syncwarp();  // loads do not pass it: those of all edges would fit no registers
        const uint32_t both = ends[group + k * kGroups];
        const Vector x = in[(both >> 16) * kLanes + place], y = out[(both & 0xFFFF) * kLanes + place];
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[k] = fmaf(y.at[v], x.at[v], sums[k]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kEdges; ++k) {
    float sum = sums[k];
    if constexpr (kShare > 1) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    const int edge = group + k * kGroups;
    if (lane == 0 && edge < count) sampled.workspace[blockIdx.y * rows.edges + first_edge + edge] = sum;
  }
}

__global__ void __launch_bounds__(kMaskThreads)
    add_parts_kernel(const float* parts, int64_t count, int64_t edges, float* result) {
  for (int64_t edge = static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x; edge < edges;
       edge += static_cast<int64_t>(gridDim.x) * kMaskThreads) {
    float sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * edges + edge];
    result[edge] = sum;
  }
}

}  // namespace

// The sums of each part, and the output of each edge.
int64_t sampled_workspace_bytes(int64_t features, int64_t edges) {
  return (sampled_parts(features, edges) + 1) * edges * static_cast<int64_t>(sizeof(float));
}

cudaError_t launch_sampled(const Sampled& sampled, cudaStream_t stream) {
  const CompressedRows& rows = sampled.rows;
  if (rows.edges == 0) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = read_device_limits(&limits);
  if (error != cudaSuccess) return error;
  const int64_t parts = sampled_parts(sampled.features, rows.edges);
  int32_t* row_of_edge = reinterpret_cast<int32_t*>(sampled.workspace + parts * rows.edges);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(divide_up(rows.edges, kMaskThreads), 1 << 20));
  rows_of_edges_kernel<<<blocks, kMaskThreads, 0, stream>>>(rows, row_of_edge);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  const bool packs = rows.in_width <= kPackedNeurons && rows.out_width <= kPackedNeurons && sampled.features > 0;
  const int64_t shared_bytes = limits.block_shared_bytes - kEndsBytes;
  const int count =
      packs ? resident_features(rows.in_width + outputs_of_block(rows), sampled.features, shared_bytes) : 0;
  if (count == 0) {
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(divide_up(rows.edges, kSampledThreads), 1 << 20)),
                    static_cast<unsigned>(parts));
    wide_sampled_kernel<<<grid, kSampledThreads, 0, stream>>>(sampled, row_of_edge);
    error = cudaGetLastError();
  } else {
    error = with_resident(count, [&](auto features) {
      using Features = decltype(features);
      const int64_t staged_rows =
          std::min(shared_bytes / Features::bytes_of_neuron() - rows.in_width - 1, rows.out_width);
      const int64_t bytes = (rows.in_width + 1 + staged_rows) * Features::bytes_of_neuron() + kEndsBytes;
      const auto kernel = sampled_kernel<Features>;
      const cudaError_t refused = allow_shared_bytes(kernel, kSampledThreads, bytes);
      if (refused != cudaSuccess) return refused;
      const dim3 grid(static_cast<unsigned>(divide_up(rows.edges, kEdgesOfBlock)), static_cast<unsigned>(parts));
      kernel<<<grid, kSampledThreads, static_cast<size_t>(bytes), stream>>>(sampled, row_of_edge, staged_rows);
      return cudaGetLastError();
    });
  }
  if (error != cudaSuccess) return error;
  add_parts_kernel<<<blocks, kMaskThreads, 0, stream>>>(sampled.workspace, parts, rows.edges, sampled.result);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
