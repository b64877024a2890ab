#include <algorithm>
#include <cmath>

#include "launch.h"
#include "row_edges.cuh"
#include "row_products.h"
#include "sliced_products.h"

namespace spdnn::cuda {
namespace {

constexpr int kMostFeatures = 32;

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

// With all inputs of some features in shared memory, or none.
cudaError_t launch_whole_product(const Product& product, const DeviceLimits& limits, cudaStream_t stream) {
  const CompressedRows& rows = product.rows;
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

// --- mask ---

constexpr int kMaskThreads = 256;
constexpr int kMaskWords = 4;  // that a warp makes at a time

__global__ void __launch_bounds__(kMaskThreads) store_mask_kernel(const __grid_constant__ Product product) {
  const int64_t width = product.rows.out_width, words = (width + 31) / 32,
                parts = (words + kMaskWords - 1) / kMaskWords,
                warps = static_cast<int64_t>(gridDim.x) * (kMaskThreads / 32);
  const int lane = threadIdx.x % 32;
  for (int64_t item = (static_cast<int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x) / 32;
       item < product.features * parts; item += warps) {
    const int64_t feature = item / parts, first_word = item % parts * kMaskWords;
    uint32_t inside[kMaskWords];
#pragma unroll
    for (int k = 0; k < kMaskWords; ++k) {
      const int64_t neuron = (first_word + k) * 32 + lane;
      const float y = neuron < width ? product.out[feature * width + neuron] : product.lower;
      inside[k] = __ballot_sync(0xFFFFFFFFu, y > product.lower && y < product.upper);
    }
#pragma unroll
    for (int k = 0; k < kMaskWords; ++k) {
      if (lane == k && first_word + k < words) {
        product.inside.words[feature * product.inside.stride + first_word + k] = inside[k];
      }
    }
  }
}

// Of what was written before.
cudaError_t launch_store_mask(const Product& product, cudaStream_t stream) {
  if (!product.inside.words) return cudaSuccess;
  const int64_t parts = product.features * divide_up(product.rows.out_width, 32 * kMaskWords);
  const int64_t blocks = std::min<int64_t>(divide_up(parts, kMaskThreads / 32), 1 << 20);
  store_mask_kernel<<<static_cast<unsigned>(blocks), kMaskThreads, 0, stream>>>(product);
  return cudaGetLastError();
}

}  // namespace

int64_t product_workspace_bytes(const CompressedRows& rows, int64_t features) {
  constexpr int64_t kFewest = 16;  // no empty buffer
  return slices_pay(rows, features) ? std::max(sliced_product_bytes(rows), kFewest) : kFewest;
}

cudaError_t launch_product(const Product& product, cudaStream_t stream) {
  const CompressedRows& rows = product.rows;
  if (product.features == 0 || rows.out_width == 0) return cudaSuccess;
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  if (slices_pay(rows, product.features) && sliced_product_bytes(rows) > 0 && fits_slices(limits)) {
    return launch_sliced_product(product, limits, stream);
  }
  const cudaError_t error = launch_whole_product(product, limits, stream);
  return error == cudaSuccess ? launch_store_mask(product, stream) : error;
}

}  // namespace spdnn::cuda
