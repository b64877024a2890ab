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

// --- features of a block in shared memory, as [neuron][feature] ---

template <int kFeatures>
struct Resident {
  static constexpr int kVector = kFeatures < kQuad ? kFeatures : kQuad;  // features of a lane
  static constexpr int kLanes = kFeatures / kVector;                     // of all features of a neuron
  static constexpr int kCount = kFeatures;
  using Vector = Floats<kVector>;

  // Brings features first .. first + kFeatures along, zeros beyond the last one.
  __device__ static void load(const float* in, int64_t width, int64_t first, int64_t features, const Mask& mask,
                              Vector* shared) {
    for (int64_t neuron = threadIdx.x; neuron < width; neuron += blockDim.x) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        Vector vector;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const int64_t feature = first + lane * kVector + k;
          const bool held = feature < features && mask.holds(feature, neuron);
          vector.at[k] = held ? in[feature * width + neuron] : 0.0f;
        }
        shared[neuron * kLanes + lane] = vector;
      }
    }
  }
};

// How many features of so many neurons a block can hold, a power of two; 0: not even one.
int resident_features(int64_t width, int64_t features, const DeviceLimits& limits) {
  const auto fits = [&](int count) {
    return width * count * static_cast<int64_t>(sizeof(float)) <= limits.block_shared_bytes;
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

// Edges of rows, four at a time from a multiple of four on: so they are read 16 bytes at a time wherever a row begins.
struct EdgeReader {
  const CompressedRows& rows;
  const float* values;
  bool single_value;
  bool aligned;

  __device__ void read(int64_t first, Ints* indices, Floats<kQuad>* weights) const {
    if (aligned && first + kQuad <= rows.edges) {
      *indices = *reinterpret_cast<const Ints*>(rows.indices + first);
      if (!single_value) *weights = *reinterpret_cast<const Floats<kQuad>*>(values + first);
      return;
    }
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const int64_t edge = min(first + k, rows.edges - 1);
      indices->at[k] = rows.indices[edge];
      if (!single_value) weights->at[k] = values[edge];
    }
  }
};

// Sums of one output for the features of a lane, of every `lanes`-th quad of edges from the `lane`-th on;
// `activation(index)` are the features of an input.
template <int kVector, typename Activation>
__device__ void sum_row(const Product& product, const EdgeReader& reader, int64_t begin, int64_t end, int lane,
                        int lanes, const Activation& activation, float (&sums)[kVector]) {
  int64_t first = (begin / kQuad + lane) * kQuad;
  if (first >= end) return;
  Ints next_indices, indices;
  Floats<kQuad> next_weights, weights;
  const float single = product.single_value ? product.values[0] : 0.0f;
#pragma unroll
  for (float& weight : next_weights.at) weight = single;
  reader.read(first, &next_indices, &next_weights);
  for (; first < end; first += lanes * kQuad) {
    indices = next_indices;
    weights = next_weights;
    if (first + lanes * kQuad < end) reader.read(first + lanes * kQuad, &next_indices, &next_weights);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (first + k < begin || first + k >= end) continue;
      const Floats<kVector> x = activation(indices.at[k]);
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[v] = fmaf(weights.at[k], x.at[v], sums[v]);
    }
  }
}

template <int kVector>
__device__ void write_row(const Product& product, int64_t row, int64_t first_feature, const float (&sums)[kVector]) {
  const float bias = product.bias ? product.bias[product.single_bias ? 0 : row] : 0.0f;
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
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
  constexpr int kRowsOfWarp = 32 / kRowLanes;
  extern __shared__ __align__(16) float memory[];
  Vector* shared = reinterpret_cast<Vector*>(memory);
  const EdgeReader reader{product.rows, product.values, product.single_value, aligned};
  const int warp_lane = threadIdx.x % 32, lane = warp_lane % kLanes, edge_lane = warp_lane % kRowLanes / kLanes;
  const int64_t first_row = blockIdx.x * rows_of_block,
                end_row = min(first_row + rows_of_block, product.rows.out_width);
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kFeatures; first < product.features;
       first += static_cast<int64_t>(gridDim.y) * kFeatures) {
    Features::load(product.in, product.rows.in_width, first, product.features, product.in_mask, shared);
    __syncthreads();
    for (int64_t warp_row = first_row + threadIdx.x / 32 * kRowsOfWarp; warp_row < end_row;
         warp_row += kProductThreads / kRowLanes) {
      const int64_t row = warp_row + warp_lane / kRowLanes;
      const bool exists = row < end_row;
      float sums[kVector] = {};
      if (exists) {
        sum_row(
            product, reader, product.rows.begin_of(row), product.rows.end_of(row), edge_lane, kRowLanes / kLanes,
            [&](int32_t index) { return shared[product.rows.existing(index) * kLanes + lane]; }, sums);
      }
#pragma unroll
      for (int distance = kLanes; distance < kRowLanes; distance *= 2) {
#pragma unroll
        for (float& sum : sums) sum += __shfl_sync(0xFFFFFFFFu, sum, warp_lane ^ distance);
      }
      if (exists && edge_lane == 0) write_row(product, row, first + lane * kVector, sums);
    }
    __syncthreads();
  }
}

// Where not even one feature fits into shared memory: activations are read where they are.
__global__ void __launch_bounds__(kProductThreads)
    wide_product_kernel(const __grid_constant__ Product product, bool aligned) {
  const EdgeReader reader{product.rows, product.values, product.single_value, aligned};
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kProductThreads + threadIdx.x;
  if (row >= product.rows.out_width) return;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kQuad; first < product.features;
       first += static_cast<int64_t>(gridDim.y) * kQuad) {
    float sums[kQuad] = {};
    const auto activation = [&](int32_t given) {
      const int32_t index = product.rows.existing(given);
      Floats<kQuad> x;
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const int64_t feature = first + k;
        const bool held = feature < product.features && product.in_mask.holds(feature, index);
        x.at[k] = held ? product.in[feature * product.rows.in_width + index] : 0.0f;
      }
      return x;
    };
    sum_row(product, reader, product.rows.begin_of(row), product.rows.end_of(row), 0, 1, activation, sums);
    write_row(product, row, first, sums);
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

template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, int64_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace

cudaError_t launch_product(const Product& product, cudaStream_t stream) {
  const CompressedRows& rows = product.rows;
  if (product.features == 0 || rows.out_width == 0) return cudaSuccess;
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  const bool aligned = is_aligned(rows.indices) && (product.single_value || is_aligned(product.values));
  const int count = resident_features(rows.in_width, product.features, limits);
  if (count == 0) {
    const dim3 grid(static_cast<unsigned>(divide_up(rows.out_width, kProductThreads)),
                    static_cast<unsigned>(std::min(divide_up(product.features, kQuad), kMostBlocksY)));
    wide_product_kernel<<<grid, kProductThreads, 0, stream>>>(product, aligned);
    return cudaGetLastError();
  }
  return with_resident(count, [&](auto features) {
    using Features = decltype(features);
    constexpr int64_t kRowsAtOnce = kProductThreads / kRowLanes;
    const int64_t groups = divide_up(product.features, Features::kCount);
    const int64_t bytes = rows.in_width * Features::kCount * static_cast<int64_t>(sizeof(float));
    const auto kernel = product_kernel<Features>;
    int64_t resident_blocks = 0;
    cudaError_t error = allow_shared(kernel, bytes);
    if (error != cudaSuccess) return error;
    error = resident_block_count(kernel, kProductThreads, bytes, &resident_blocks);
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

__global__ void __launch_bounds__(kMaskThreads) store_mask_kernel(const __grid_constant__ StoreMask step) {
  const int64_t words = (step.width + 31) / 32, warps = static_cast<int64_t>(gridDim.x) * (kMaskThreads / 32);
  const int lane = threadIdx.x % 32;
  for (int64_t item = (static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x) / 32;
       item < step.features * words; item += warps) {
    const int64_t feature = item / words, word = item % words, neuron = word * 32 + lane;
    const float y = neuron < step.width ? step.activations[feature * step.width + neuron] : step.lower;
    const uint32_t bit = y > step.lower && y < step.upper ? 1u << lane : 0u;
    const uint32_t bits = __reduce_or_sync(0xFFFFFFFFu, neuron < step.width ? bit : 0u);
    if (lane == 0) step.mask.words[feature * step.mask.stride + word] = bits;
  }
}

}  // namespace

cudaError_t launch_store_mask(const StoreMask& step, cudaStream_t stream) {
  const int64_t words = step.features * divide_up(step.width, 32);
  if (words == 0) return cudaSuccess;
  const int64_t blocks = std::min<int64_t>(divide_up(words, kMaskThreads / 32), 1 << 20);
  store_mask_kernel<<<static_cast<unsigned>(blocks), kMaskThreads, 0, stream>>>(step);
  return cudaGetLastError();
}

// --- sampled product ---

namespace {

constexpr int kSampledThreads = 512;
constexpr int kEdgesOfThread = 32;
constexpr int64_t kEdgesOfBlock = kSampledThreads * kEdgesOfThread;
constexpr int64_t kWantedBlocks = 264;  // two for each multiprocessor of the largest devices
constexpr int64_t kPackedNeurons = 1 << 16;

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

// A thread holds the sums of many edges, and neighbouring threads those of neighbouring edges, whose outputs are few.
// Both ends of an edge are kept in one word.
template <typename Features>
__global__ void __launch_bounds__(kSampledThreads)
    sampled_kernel(const __grid_constant__ Sampled sampled, const int32_t* row_of_edge) {
  using Vector = typename Features::Vector;
  constexpr int kVector = Features::kVector, kLanes = Features::kLanes, kFeatures = Features::kCount;
  extern __shared__ __align__(16) float memory[];
  Vector* shared = reinterpret_cast<Vector*>(memory);
  const CompressedRows& rows = sampled.rows;
  const int64_t first_edge = blockIdx.x * kEdgesOfBlock + threadIdx.x;
  float sums[kEdgesOfThread] = {};
  uint32_t ends[kEdgesOfThread];
#pragma unroll
  for (int k = 0; k < kEdgesOfThread; ++k) {
    const int64_t edge = min(first_edge + k * kSampledThreads, rows.edges - 1);
    ends[k] = static_cast<uint32_t>(rows.existing(rows.indices[edge])) << 16 | static_cast<uint32_t>(row_of_edge[edge]);
  }
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kFeatures; first < sampled.features;
       first += static_cast<int64_t>(gridDim.y) * kFeatures) {
    __syncthreads();
    Features::load(sampled.in, rows.in_width, first, sampled.features, Mask{}, shared);
    __syncthreads();
#pragma unroll 1
    for (int lane = 0; lane < kLanes; ++lane) {
      const float* out[kVector];  // of a feature beyond the last one the inputs are zero, and any outputs will do
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        out[v] = sampled.out + min(first + lane * kVector + v, sampled.features - 1) * rows.out_width;
      }
#pragma unroll
      for (int k = 0; k < kEdgesOfThread; ++k) {
        const uint32_t both = opaque(ends[k]);  // or addresses of all edges would be kept beside them
        const Vector x = shared[(both >> 16) * kLanes + lane];
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[k] = fmaf(out[v][both & 0xFFFF], x.at[v], sums[k]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kEdgesOfThread; ++k) {
    const int64_t edge = first_edge + k * kSampledThreads;
    if (edge < rows.edges) sampled.workspace[blockIdx.y * rows.edges + edge] = sums[k];
  }
}

// Where not even one feature fits into shared memory, or both ends of an edge not into one word.
__global__ void __launch_bounds__(kSampledThreads)
    wide_sampled_kernel(const __grid_constant__ Sampled sampled, const int32_t* row_of_edge) {
  const CompressedRows& rows = sampled.rows;
  for (int64_t edge = static_cast<int64_t>(blockIdx.x) * kSampledThreads + threadIdx.x; edge < rows.edges;
       edge += static_cast<int64_t>(gridDim.x) * kSampledThreads) {
    const float* in = sampled.in + rows.existing(rows.indices[edge]);
    const float* out = sampled.out + row_of_edge[edge];
    float sum = 0;
    for (int64_t feature = blockIdx.y; feature < sampled.features; feature += gridDim.y) {
      sum = fmaf(out[feature * rows.out_width], in[feature * rows.in_width], sum);
    }
    sampled.workspace[blockIdx.y * rows.edges + edge] = sum;
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
  const dim3 grid(static_cast<unsigned>(divide_up(rows.edges, kEdgesOfBlock)), static_cast<unsigned>(parts));
  const bool packs = rows.in_width <= kPackedNeurons && rows.out_width <= kPackedNeurons && sampled.features > 0;
  const int count = packs ? resident_features(rows.in_width, sampled.features, limits) : 0;
  if (count == 0) {
    wide_sampled_kernel<<<grid, kSampledThreads, 0, stream>>>(sampled, row_of_edge);
    error = cudaGetLastError();
  } else {
    error = with_resident(count, [&](auto features) {
      using Features = decltype(features);
      const int64_t bytes = rows.in_width * Features::kCount * static_cast<int64_t>(sizeof(float));
      const auto kernel = sampled_kernel<Features>;
      if (const cudaError_t refused = allow_shared(kernel, bytes); refused != cudaSuccess) return refused;
      kernel<<<grid, kSampledThreads, static_cast<size_t>(bytes), stream>>>(sampled, row_of_edge);
      return cudaGetLastError();
    });
  }
  if (error != cudaSuccess) return error;
  add_parts_kernel<<<blocks, kMaskThreads, 0, stream>>>(sampled.workspace, parts, rows.edges, sampled.result);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
