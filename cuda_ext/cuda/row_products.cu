#include <algorithm>
#include <cmath>

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

// Sums of one output for the features of a lane; `activation(index, k)` is feature k of an input.
template <int kVector, typename Activation>
__device__ void sum_row(const Product& product, const EdgeReader& reader, int64_t row, const Activation& activation,
                        float (&sums)[kVector]) {
  const int64_t begin = product.rows.indptr[row], end = product.rows.indptr[row + 1];
  if (begin == end) return;
  Ints next_indices, indices;
  Floats<kQuad> next_weights, weights;
  const float single = product.single_value ? product.values[0] : 0.0f;
#pragma unroll
  for (float& weight : next_weights.at) weight = single;
  reader.read(begin / kQuad * kQuad, &next_indices, &next_weights);
  for (int64_t first = begin / kQuad * kQuad; first < end; first += kQuad) {
    indices = next_indices;
    weights = next_weights;
    if (first + kQuad < end) reader.read(first + kQuad, &next_indices, &next_weights);
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

template <typename Features>
__global__ void __launch_bounds__(kProductThreads)
    product_kernel(const __grid_constant__ Product product, bool aligned, int64_t rows_of_block) {
  using Vector = typename Features::Vector;
  constexpr int kVector = Features::kVector, kLanes = Features::kLanes, kFeatures = kVector * kLanes;
  extern __shared__ __align__(16) float memory[];
  Vector* shared = reinterpret_cast<Vector*>(memory);
  const EdgeReader reader{product.rows, product.values, product.single_value, aligned};
  const int lane = threadIdx.x % kLanes;
  const int64_t first_row = blockIdx.x * rows_of_block,
                end_row = min(first_row + rows_of_block, product.rows.out_width);
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kFeatures; first < product.features;
       first += static_cast<int64_t>(gridDim.y) * kFeatures) {
    Features::load(product.in, product.rows.in_width, first, product.features, product.in_mask, shared);
    __syncthreads();
    for (int64_t row = first_row + threadIdx.x / kLanes; row < end_row; row += kProductThreads / kLanes) {
      float sums[kVector] = {};
      sum_row(product, reader, row, [&](int32_t index) { return shared[index * kLanes + lane]; }, sums);
      write_row(product, row, first + lane * kVector, sums);
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
    const auto activation = [&](int32_t index) {
      Floats<kQuad> x;
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const int64_t feature = first + k;
        const bool held = feature < product.features && product.in_mask.holds(feature, index);
        x.at[k] = held ? product.in[feature * product.rows.in_width + index] : 0.0f;
      }
      return x;
    };
    sum_row(product, reader, row, activation, sums);
    write_row(product, row, first, sums);
  }
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
    constexpr int kRowsAtOnce = kProductThreads / Features::kLanes;
    constexpr int64_t kBlocksOfMultiprocessor = 4;  // so that the last ones of a launch leave few idle for long
    const int64_t groups = divide_up(product.features, Features::kVector * Features::kLanes);
    const int64_t parts =
        std::max<int64_t>(1, std::min(divide_up(kBlocksOfMultiprocessor * limits.multiprocessors, groups),
                                      divide_up(rows.out_width, kRowsAtOnce)));
    const int64_t rows_of_block = divide_up(divide_up(rows.out_width, parts), kRowsAtOnce) * kRowsAtOnce;
    const int64_t bytes = rows.in_width * static_cast<int64_t>(sizeof(float)) * Features::kVector * Features::kLanes;
    const auto kernel = product_kernel<Features>;
    if (const cudaError_t error = allow_shared(kernel, bytes); error != cudaSuccess) return error;
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
constexpr int kEdgesOfThread = 16;
constexpr int64_t kEdgesOfBlock = kSampledThreads * kEdgesOfThread;
constexpr int64_t kWantedBlocks = 256;  // two for each multiprocessor of the largest devices

// Parts that the features are cut into, whose sums are added up at the end.
int64_t sampled_parts(int64_t features, int64_t edges) {
  const int64_t edge_blocks = std::max<int64_t>(divide_up(edges, kEdgesOfBlock), 1);
  return std::max<int64_t>(1, std::min(divide_up(kWantedBlocks, edge_blocks), divide_up(features, kMostFeatures)));
}

__device__ int64_t row_of_edge(const CompressedRows& rows, int64_t edge) {
  int64_t low = 0, high = rows.out_width;  // indptr[low] <= edge < indptr[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (rows.indptr[middle] <= edge ? low : high) = middle;
  }
  return low;
}

// A thread holds the sums of 16 edges that lie side by side, of which few rows are.
template <typename Features, bool kIsResident>
__global__ void __launch_bounds__(kSampledThreads) sampled_kernel(const __grid_constant__ Sampled sampled) {
  using Vector = typename Features::Vector;
  constexpr int kVector = Features::kVector, kLanes = Features::kLanes, kFeatures = kVector * kLanes;
  extern __shared__ __align__(16) float memory[];
  Vector* shared = reinterpret_cast<Vector*>(memory);
  const CompressedRows& rows = sampled.rows;
  const int64_t first_edge = (static_cast<int64_t>(blockIdx.x) * kSampledThreads + threadIdx.x) * kEdgesOfThread;
  const int count = static_cast<int>(max(min(rows.edges - first_edge, int64_t{kEdgesOfThread}), int64_t{0}));
  const int64_t first_row = count > 0 ? row_of_edge(rows, first_edge) : 0;
  float sums[kEdgesOfThread] = {};
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kFeatures; first < sampled.features;
       first += static_cast<int64_t>(gridDim.y) * kFeatures) {
    if constexpr (kIsResident) {
      __syncthreads();
      Features::load(sampled.in, rows.in_width, first, sampled.features, Mask{}, shared);
      __syncthreads();
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t feature = first + lane * kVector;
      int64_t row = first_row - 1, row_end = -1;
      Vector own{};
#pragma unroll
      for (int k = 0; k < kEdgesOfThread; ++k) {
        if (k >= count) break;
        const int64_t edge = first_edge + k;
        if (edge >= row_end) {
          do row_end = rows.indptr[++row + 1];
          while (edge >= row_end);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            own.at[v] = feature + v < sampled.features ? sampled.out[(feature + v) * rows.out_width + row] : 0.0f;
          }
        }
        const int64_t index = rows.indices[edge];
        Vector x;
        if constexpr (kIsResident) {
          x = shared[index * kLanes + lane];
        } else {
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            x.at[v] = feature + v < sampled.features ? sampled.in[(feature + v) * rows.in_width + index] : 0.0f;
          }
        }
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[k] = fmaf(own.at[v], x.at[v], sums[k]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kEdgesOfThread; ++k) {
    if (k < count) sampled.workspace[blockIdx.y * rows.edges + first_edge + k] = sums[k];
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

int64_t sampled_workspace_bytes(int64_t features, int64_t edges) {
  return sampled_parts(features, edges) * edges * static_cast<int64_t>(sizeof(float));
}

cudaError_t launch_sampled(const Sampled& sampled, cudaStream_t stream) {
  const int64_t edges = sampled.rows.edges;
  if (edges == 0) return cudaSuccess;
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  const int64_t parts = sampled_parts(sampled.features, edges);
  const dim3 grid(static_cast<unsigned>(divide_up(edges, kEdgesOfBlock)), static_cast<unsigned>(parts));
  const int count = resident_features(sampled.rows.in_width, sampled.features, limits);
  cudaError_t error = cudaSuccess;
  if (count == 0) {
    const auto kernel = sampled_kernel<Resident<kQuad>, false>;
    kernel<<<grid, kSampledThreads, 0, stream>>>(sampled);
    error = cudaGetLastError();
  } else {
    error = with_resident(count, [&](auto features) {
      using Features = decltype(features);
      const int64_t bytes =
          sampled.rows.in_width * static_cast<int64_t>(sizeof(float)) * Features::kVector * Features::kLanes;
      const auto kernel = sampled_kernel<Features, true>;
      if (const cudaError_t refused = allow_shared(kernel, bytes); refused != cudaSuccess) return refused;
      kernel<<<grid, kSampledThreads, static_cast<size_t>(bytes), stream>>>(sampled);
      return cudaGetLastError();
    });
  }
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min<int64_t>(divide_up(edges, kMaskThreads), 1 << 20);
  add_parts_kernel<<<static_cast<unsigned>(blocks), kMaskThreads, 0, stream>>>(sampled.workspace, parts, edges,
                                                                               sampled.result);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
