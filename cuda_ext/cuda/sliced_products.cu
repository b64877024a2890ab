#include <algorithm>
#include <cmath>
#include <type_traits>

#include "feature_slice.cuh"
#include "intrinsics.cuh"
#include "launch.h"
#include "sliced_products.h"
#include "sliced_rows.h"

namespace spdnn::cuda {
namespace {

using Vector = FeatureSlice::Vector;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kLanes = FeatureSlice::kLanes;  // of a row: each has four features
constexpr int kRowsAtOnce = kThreads / kLanes;
constexpr int kRowsOfWarp = 32 / kLanes;        // at a time
constexpr int kMostRows = 16, kFewestRows = 4;  // of a group of lanes

// --- what a block has to do of a slice ---

constexpr int kChunk = 4;   // quads that lanes of a row copy together, sixteen bytes each
constexpr int kStages = 4;  // chunks of a ring
static_assert(kChunk * sizeof(Quad) == kLanes * 16);

// A row's part of the slice: quads, which are few, for its inputs are distinct; and the chunks of that row of the
// warp's which has most, at least one.
struct RowWork {
  uint32_t first_quad;
  uint16_t quads, chunks;
};

// Chunks on their way to a warp, [stage][quad][half][row of the warp]: a lane reads a half, and banks do not meet.
struct Ring {
  uint4 halves[kStages][kChunk][2][kRowsOfWarp];
};

template <int kRows>
struct Shared {
  static constexpr int kRowsOfBlock = kRows * kRowsAtOnce;
  Ring rings[kWarps];
  RowWork work[kRowsOfBlock];
};

// In dynamic shared memory, of which the slice takes the beginning.
template <int kRows>
__device__ Shared<kRows>& shared_after(int64_t slice_bytes) {
  extern __shared__ __align__(16) float memory[];
  return *reinterpret_cast<Shared<kRows>*>(reinterpret_cast<char*>(memory) + slice_bytes);
}

__device__ Vector* shared_slice() {
  extern __shared__ __align__(16) float memory[];
  return reinterpret_cast<Vector*>(memory);
}

template <int kRows>
__device__ void find_work(const CompressedRows& rows, const SlicedRows& sliced, int64_t first_row, int64_t slice,
                          RowWork* work) {
  for (int place = threadIdx.x; place < kRows * kRowsAtOnce; place += kThreads) {
    const int64_t row = first_row + place;
    uint32_t first = 0, count = 0;
    if (row < rows.out_width) {
      const uint32_t* firsts = sliced.firsts + row * (sliced.slices + 1) + slice;
      first = firsts[0];
      count = firsts[1] - first;
    }
    const uint32_t quads = (count + kQuad - 1) / kQuad;
    uint32_t most = max(quads, 1u);
#pragma unroll
    for (int apart = 1; apart < kRowsOfWarp; apart *= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, apart));
    work[place] = {static_cast<uint32_t>(sliced.first_quad(first, row, slice)), static_cast<uint16_t>(quads),
                   static_cast<uint16_t>((most + kChunk - 1) / kChunk)};
  }
}

// Brings a warp's chunks along, row after row, some ahead of those that it multiplies.
template <int kRows>
class Stream {
 public:
  __device__ Stream(const SlicedRows& sliced, const RowWork* work, Ring* ring)
      : source_(reinterpret_cast<const char*>(sliced.quads) + threadIdx.x % kLanes * 16),
        work_(work + threadIdx.x / kLanes),
        target_(&ring->halves[0][threadIdx.x % kLanes / 2][threadIdx.x % 2][threadIdx.x % 32 / kLanes]) {
    begin_row();
#pragma unroll
    for (int stage = 0; stage + 1 < kStages; ++stage) copy_next();
  }

  // Calls `take(r, work, chunk, stage)` for all chunks of the lane's rows, where that of row r lies in such a stage of
  // the ring.
  template <typename Take>
  __device__ __forceinline__ void run(const Take& take) {
    int stage = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const RowWork work = work_[r * kRowsAtOnce];
      for (int chunk = 0; chunk < work.chunks; ++chunk) {
        finish_copies<kStages - 2>();  // the chunk is there; the one behind those on their way may be copied
        __syncwarp();
        copy_next();
        take(r, work, chunk, stage);
        stage = (stage + 1) % kStages;
      }
    }
    finish_copies<0>();
  }

 private:
  __device__ __forceinline__ void begin_row() {
    const RowWork work = work_[row_ * kRowsAtOnce];
    from_ = work.first_quad;
    left_ = work.quads - static_cast<int>(threadIdx.x % kLanes / 2);
    chunks_ = work.chunks;
  }

  __device__ __forceinline__ void copy_next() {
    if (row_ < kRows) {
      if (left_ > 0) {
        copy_async<16>(target_ + stage_ * (sizeof(Ring) / kStages / sizeof(uint4)), source_ + from_ * sizeof(Quad));
      }
      from_ += kChunk;
      left_ -= kChunk;
      stage_ = (stage_ + 1) % kStages;
      if (--chunks_ == 0 && ++row_ < kRows) begin_row();
    }
    close_copies();
  }

  const char* source_;
  const RowWork* work_;
  uint4* target_;
  int row_ = 0, stage_ = 0, left_, chunks_;
  uint64_t from_;
};

__device__ __forceinline__ Vector read_place(const Vector* slice, int32_t offset) {
  return *reinterpret_cast<const Vector*>(reinterpret_cast<const char*>(slice) + offset);
}

// --- product ---

__device__ __forceinline__ Quad read_quad(const Ring& ring, int stage, int quad) {
  const int row = threadIdx.x % 32 / kLanes;
  return {read_shared_now<Ints>(&ring.halves[stage][quad][0][row]),
          read_shared_now<Floats<kQuad>>(&ring.halves[stage][quad][1][row])};
}

// Adds quads of a chunk, one of them ahead.
__device__ __forceinline__ void multiply_chunk(const Ring& ring, int stage, int quads, const Vector* slice,
                                               float (&sums)[kQuad]) {
  Quad quad = read_quad(ring, stage, 0);
#pragma unroll
  for (int q = 0; q < kChunk; ++q) {
    if (q >= quads) break;
    const Quad next = read_quad(ring, stage, (q + 1) % kChunk);
    Vector x[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) x[k] = read_place(slice, quad.indices.at[k]);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
#pragma unroll
      for (int v = 0; v < kQuad; ++v) sums[v] = fmaf(quad.weights.at[k], x[k].at[v], sums[v]);
    }
    quad = next;
  }
}

// Sums in shared memory, [feature][row], on their way to device memory.
template <int kRows>
constexpr int kTileStride = kRows * kRowsAtOnce + 1;

template <int kRows>
__device__ __forceinline__ void write_rows(const Product& product, int64_t first_row, int64_t first_feature,
                                           const float (&sums)[kRows][kQuad], float* tile) {
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r * kRowsAtOnce + group;
    const bool biased = product.bias && row < product.rows.out_width;
    const float bias = biased ? product.bias[product.single_bias ? 0 : row] : 0.0f;
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      tile[(lane * kQuad + v) * kTileStride<kRows> + r * kRowsAtOnce + group] =
          fminf(fmaxf(sums[r][v] + bias, product.lower), product.upper);
    }
  }
  __syncthreads();
  for (int f = threadIdx.x / 32; f < FeatureSlice::kFeatures; f += kWarps) {
    const int64_t feature = first_feature + f;
    if (feature >= product.features) break;
#pragma unroll 4
    for (int from = 0; from < kRows * kRowsAtOnce; from += 32) {
      const int64_t row = first_row + from + threadIdx.x % 32;
      if (first_row + from >= product.rows.out_width) break;
      const bool exists = row < product.rows.out_width;
      const float y = exists ? tile[f * kTileStride<kRows> + from + threadIdx.x % 32] : product.lower;
      if (exists) {
        product.out[feature * product.rows.out_width + row] = product.out_mask.holds(feature, row) ? y : 0.0f;
      }
      if (!product.inside.words) continue;
      const uint32_t inside = __ballot_sync(0xFFFFFFFFu, y > product.lower && y < product.upper);
      if (threadIdx.x % 32 == 0) product.inside.words[feature * product.inside.stride + row / kMaskBits] = inside;
    }
  }
}

template <int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    sliced_product_kernel(const __grid_constant__ Product product, const __grid_constant__ SlicedRows sliced,
                          int64_t slice_bytes) {
  Vector* slice = shared_slice();
  Shared<kRows>& shared = shared_after<kRows>(slice_bytes);
  Ring& ring = shared.rings[threadIdx.x / 32];
  const int lane = threadIdx.x % kLanes;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Shared<kRows>::kRowsOfBlock;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * FeatureSlice::kFeatures; first < product.features;
       first += static_cast<int64_t>(gridDim.y) * FeatureSlice::kFeatures) {
    float sums[kRows][kQuad] = {};
    for (int64_t s = 0; s < sliced.slices; ++s) {
      __syncthreads();
      find_work<kRows>(product.rows, sliced, first_row, s, shared.work);
      __syncthreads();
      Stream<kRows> stream(sliced, shared.work, &ring);
      const int64_t begin = s * sliced.slice_neurons, end = min(begin + sliced.slice_neurons, product.rows.in_width);
      FeatureSlice::load<kThreads>(product.in, product.rows.in_width, begin, end, first, product.features,
                                   product.in_mask, slice);
      FeatureSlice::clear_neuron(sliced.slice_neurons, slice);
      __syncthreads();
      stream.run([&](int r, const RowWork& work, int chunk, int stage) {
        multiply_chunk(ring, stage, work.quads - chunk * kChunk, slice + lane, sums[r]);
      });
    }
    __syncthreads();
    write_rows<kRows>(product, first_row, first, sums, reinterpret_cast<float*>(slice));
  }
}

// --- sampled product ---

// A block has some outputs, a slice of the inputs, and a part of the features. Each sum has one thread that adds to it,
// so that the order of additions does not depend on the run.
template <int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    sliced_sampled_kernel(const __grid_constant__ Sampled sampled, const __grid_constant__ SlicedRows sliced,
                          float* parts, int64_t slice_bytes) {
  const CompressedRows& rows = sampled.rows;
  Vector* slice = shared_slice();
  Shared<kRows>& shared = shared_after<kRows>(slice_bytes);
  Ring& ring = shared.rings[threadIdx.x / 32];
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, row_of_warp = threadIdx.x % 32 / kLanes;
  const unsigned together = ((1u << kLanes) - 1) << (row_of_warp * kLanes);  // rows of a warp end by themselves
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Shared<kRows>::kRowsOfBlock,
                end_row = min(first_row + Shared<kRows>::kRowsOfBlock, rows.out_width);
  const int64_t s = blockIdx.y, begin = s * sliced.slice_neurons,
                end = min(begin + sliced.slice_neurons, rows.in_width);
  float* sums = parts + static_cast<int64_t>(blockIdx.z) * sliced.quad_count * kQuad;
  find_work<kRows>(rows, sliced, first_row, s, shared.work);
  for (int64_t first = static_cast<int64_t>(blockIdx.z) * FeatureSlice::kFeatures; first < sampled.features;
       first += static_cast<int64_t>(gridDim.z) * FeatureSlice::kFeatures) {
    __syncthreads();
    Stream<kRows> stream(sliced, shared.work, &ring);
    FeatureSlice::load<kThreads>(sampled.out, rows.out_width, first_row, end_row, first, sampled.features, Mask{},
                                 slice);
    __syncthreads();
    Vector y[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) y[r] = slice[(r * kRowsAtOnce + group) * FeatureSlice::kStride + lane];
    __syncthreads();
    FeatureSlice::load<kThreads>(sampled.in, rows.in_width, begin, end, first, sampled.features, Mask{}, slice);
    FeatureSlice::clear_neuron(sliced.slice_neurons, slice);
    __syncthreads();
    stream.run([&](int r, const RowWork& work, int chunk, int stage) {
      const int quads = min(work.quads - chunk * kChunk, kChunk);
      for (int q = 0; q < quads; ++q) {
        const auto indices = read_shared_now<Ints>(&ring.halves[stage][q][0][row_of_warp]);
        Vector x[kQuad];
#pragma unroll
        for (int k = 0; k < kQuad; ++k) x[k] = read_place(slice + lane, indices.at[k]);
        float products[kQuad] = {};
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
#pragma unroll
          for (int v = 0; v < kQuad; ++v) products[k] = fmaf(y[r].at[v], x[k].at[v], products[k]);
        }
        const int edge = share_sums<1, kLanes, kQuad>(products, lane, together);
        const int64_t quad = work.first_quad + static_cast<int64_t>(chunk * kChunk + q);
        if (lane < kQuad) atomicAdd(sums + quad * kQuad + edge, products[0]);
      }
    });
  }
}

// --- how work is cut into blocks ---

constexpr int64_t kMostBlocks = 65535;        // of y and z
constexpr int64_t kFewestProducts = 1 << 25;  // below, to cut rows costs more than it gains
constexpr double kNeuronEdges = 2.6;          // what it takes to bring a neuron of a slice along, counted in edges

// Of the slice, which also holds what is written in the end, or the other factors of a sampled product.
template <int kRows>
int64_t slice_bytes(const SlicedRows& sliced) {
  constexpr int64_t kOutputs = Shared<kRows>::kRowsOfBlock;
  const int64_t neurons = std::max(sliced.slice_neurons + 1, kOutputs) * FeatureSlice::kNeuronBytes;
  constexpr int64_t kTile = FeatureSlice::kFeatures * kTileStride<kRows> * static_cast<int64_t>(sizeof(float));
  return std::max(neurons, round_up(kTile, sizeof(Vector)));
}

template <int kRows>
int64_t shared_bytes(const SlicedRows& sliced) {
  return slice_bytes<kRows>(sliced) + static_cast<int64_t>(sizeof(Shared<kRows>));
}

// Calls `run` with how many rows a group of lanes has, as a constant.
template <typename Run>
cudaError_t with_rows(int rows, const Run& run) {
  if (rows == 16) return run(std::integral_constant<int, 16>());
  if (rows == 8) return run(std::integral_constant<int, 8>());
  return run(std::integral_constant<int, 4>());
}

int64_t groups_of(int64_t features) { return divide_up(features, FeatureSlice::kFeatures); }

int choose_product_rows(const Product& product, const DeviceLimits& limits) {
  int best = kMostRows;
  double least = INFINITY;
  for (int count = kFewestRows; count <= kMostRows; count *= 2) {
    const int64_t parts = divide_up(product.rows.out_width, count * kRowsAtOnce);
    const int64_t rounds = divide_up(parts * groups_of(product.features), limits.multiprocessors);
    const double edges = static_cast<double>(product.rows.edges) / static_cast<double>(parts);
    const double cost =
        static_cast<double>(rounds) * (kNeuronEdges * static_cast<double>(product.rows.in_width) + edges);
    if (cost < least) {
      least = cost;
      best = count;
    }
  }
  return best;
}

// Rows of a group of lanes, and parts of the features. Multiprocessors are those of a large device: sums do not depend
// on the one at hand.
struct SampledCut {
  int rows = 0;
  int64_t parts = 0;
};

SampledCut cut_sampled(const CompressedRows& rows, const SlicedRows& sliced, int64_t features) {
  constexpr int64_t kMultiprocessors = 132;
  SampledCut best;
  double least = INFINITY;
  for (int count = kFewestRows; count <= kMostRows; count *= 2) {
    const int64_t tiles = divide_up(rows.out_width, count * kRowsAtOnce) * sliced.slices, groups = groups_of(features);
    const int64_t parts = std::clamp<int64_t>(kMultiprocessors / tiles, 1, std::min(groups, kMostBlocks));
    const int64_t rounds = divide_up(tiles * parts, kMultiprocessors) * divide_up(groups, parts);
    const double neurons = static_cast<double>(sliced.slice_neurons + count * kRowsAtOnce);
    const double edges = static_cast<double>(rows.edges) / static_cast<double>(tiles);
    const double cost = static_cast<double>(rounds) * (kNeuronEdges * neurons + edges);
    if (cost < least) {
      least = cost;
      best = {count, parts};
    }
  }
  return best;
}

int64_t sums_bytes(const SlicedRows& sliced, int64_t parts) {
  return parts * sliced.quad_count * kQuad * static_cast<int64_t>(sizeof(float));
}

}  // namespace

bool fits_slices(const DeviceLimits& limits) {
  SlicedRows widest;
  widest.slice_neurons = kMostSliceNeurons;
  return shared_bytes<kMostRows>(widest) <= limits.block_shared_bytes;
}

bool slices_pay(const CompressedRows& rows, int64_t features) {
  return static_cast<double>(features) * static_cast<double>(rows.edges) >= kFewestProducts;
}

int64_t sliced_product_bytes(const CompressedRows& rows) {
  const SlicedRows sliced = cut_rows(rows);
  return sliced.slices > 0 ? sliced_rows_bytes(rows, sliced, false) : 0;
}

int64_t sliced_sampled_bytes(const CompressedRows& rows, int64_t features) {
  const SlicedRows sliced = cut_rows(rows);
  if (sliced.slices == 0 || sliced.slices > kMostBlocks) return 0;
  return sums_bytes(sliced, cut_sampled(rows, sliced, features).parts) + sliced_rows_bytes(rows, sliced, true);
}

cudaError_t launch_sliced_product(const Product& product, const DeviceLimits& limits, cudaStream_t stream) {
  SlicedRows sliced = cut_rows(product.rows);
  place_sliced_rows(product.rows, product.workspace, false, &sliced);
  cudaError_t error = launch_slice_rows(product.rows, product.values, product.single_value, sliced, stream);
  if (error != cudaSuccess) return error;
  return with_rows(choose_product_rows(product, limits), [&](auto rows) {
    const int64_t bytes = shared_bytes<rows>(sliced);
    const auto kernel = sliced_product_kernel<rows>;
    if (const cudaError_t refused = allow_shared_bytes(kernel, kThreads, bytes); refused != cudaSuccess) return refused;
    const dim3 grid(static_cast<unsigned>(divide_up(product.rows.out_width, Shared<rows>::kRowsOfBlock)),
                    static_cast<unsigned>(std::min(groups_of(product.features), kMostBlocks)));
    kernel<<<grid, kThreads, static_cast<size_t>(bytes), stream>>>(product, sliced, slice_bytes<rows>(sliced));
    return cudaGetLastError();
  });
}

cudaError_t launch_sliced_sampled(const Sampled& sampled, cudaStream_t stream) {
  const CompressedRows& rows = sampled.rows;
  SlicedRows sliced = cut_rows(rows);
  const SampledCut cut = cut_sampled(rows, sliced, sampled.features);
  float* sums = static_cast<float*>(sampled.workspace);
  const int64_t of_sums = sums_bytes(sliced, cut.parts);
  place_sliced_rows(rows, static_cast<char*>(sampled.workspace) + of_sums, true, &sliced);
  cudaError_t error = cudaMemsetAsync(sums, 0, static_cast<size_t>(of_sums), stream);
  if (error == cudaSuccess) error = launch_slice_rows(rows, nullptr, false, sliced, stream);
  if (error != cudaSuccess) return error;
  error = with_rows(cut.rows, [&](auto count) {
    const int64_t bytes = shared_bytes<count>(sliced);
    const auto kernel = sliced_sampled_kernel<count>;
    if (const cudaError_t refused = allow_shared_bytes(kernel, kThreads, bytes); refused != cudaSuccess) return refused;
    const dim3 grid(static_cast<unsigned>(divide_up(rows.out_width, Shared<count>::kRowsOfBlock)),
                    static_cast<unsigned>(sliced.slices), static_cast<unsigned>(cut.parts));
    kernel<<<grid, kThreads, static_cast<size_t>(bytes), stream>>>(sampled, sliced, sums, slice_bytes<count>(sliced));
    return cudaGetLastError();
  });
  if (error != cudaSuccess) return error;
  return launch_gather_sums(rows, sliced, sums, cut.parts, sampled.result, stream);
}

}  // namespace spdnn::cuda
