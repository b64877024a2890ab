#include <algorithm>

#include "launch.h"
#include "row_edges.cuh"
#include "row_products.h"
#include "sliced_products.h"

namespace spdnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWantedBlocks = 1056;  // eight for each multiprocessor of a large device
constexpr int64_t kMostBlocks = 1 << 20;

// Parts that the features are cut into, whose sums are added up at the end.
int64_t parts_of(int64_t features, int64_t edges) {
  constexpr int64_t kFewestFeatures = 32;
  const int64_t blocks = std::max<int64_t>(divide_up(edges, kThreads), 1);
  return std::max<int64_t>(1, std::min(kWantedBlocks / blocks, features / kFewestFeatures));
}

// The output of each edge.
__global__ void __launch_bounds__(kThreads)
    rows_of_edges_kernel(const __grid_constant__ CompressedRows rows, int32_t* row_of_edge) {
  for (int64_t edge = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; edge < rows.edges;
       edge += static_cast<int64_t>(gridDim.x) * kThreads) {
    int64_t low = 0, high = rows.out_width;  // indptr[low] <= edge < indptr[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (rows.indptr[middle] <= edge ? low : high) = middle;
    }
    row_of_edge[edge] = static_cast<int32_t>(low);
  }
}

// A thread has an edge, of the features of its block's part: activations are read where they are.
__global__ void __launch_bounds__(kThreads)
    sampled_kernel(const __grid_constant__ Sampled sampled, const int32_t* row_of_edge, float* parts) {
  const CompressedRows& rows = sampled.rows;
  for (int64_t edge = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; edge < rows.edges;
       edge += static_cast<int64_t>(gridDim.x) * kThreads) {
    const auto index = static_cast<uint32_t>(rows.indices[edge]);
    const float* out = sampled.out + row_of_edge[edge];
    float sum = 0;
    if (index < rows.in_width) {
      const float* in = sampled.in + index;
      for (int64_t feature = blockIdx.y; feature < sampled.features; feature += gridDim.y) {
        sum = fmaf(out[feature * rows.out_width], in[feature * rows.in_width], sum);
      }
    }
    parts[blockIdx.y * rows.edges + edge] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const float* parts, int64_t count, int64_t edges, float* result) {
  for (int64_t edge = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; edge < edges;
       edge += static_cast<int64_t>(gridDim.x) * kThreads) {
    float sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * edges + edge];
    result[edge] = sum;
  }
}

}  // namespace

// The sums of each part, and the output of each edge.
int64_t sampled_workspace_bytes(const CompressedRows& rows, int64_t features) {
  const int64_t words = (parts_of(features, rows.edges) + 1) * rows.edges;
  const int64_t sliced = slices_pay(rows, features) ? sliced_sampled_bytes(rows, features) : 0;
  return std::max(words * static_cast<int64_t>(sizeof(float)), sliced);
}

cudaError_t launch_sampled(const Sampled& sampled, cudaStream_t stream) {
  const CompressedRows& rows = sampled.rows;
  if (rows.edges == 0) return cudaSuccess;
  DeviceLimits limits;
  cudaError_t error = read_device_limits(&limits);
  if (error != cudaSuccess) return error;
  if (slices_pay(rows, sampled.features) && sliced_sampled_bytes(rows, sampled.features) > 0 && fits_slices(limits)) {
    return launch_sliced_sampled(sampled, stream);
  }
  const int64_t parts = parts_of(sampled.features, rows.edges);
  float* sums = static_cast<float*>(sampled.workspace);
  auto* row_of_edge = reinterpret_cast<int32_t*>(sums + parts * rows.edges);
  const auto blocks = static_cast<unsigned>(std::min(divide_up(rows.edges, kThreads), kMostBlocks));
  rows_of_edges_kernel<<<blocks, kThreads, 0, stream>>>(rows, row_of_edge);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  sampled_kernel<<<dim3(blocks, static_cast<unsigned>(parts)), kThreads, 0, stream>>>(sampled, row_of_edge, sums);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  add_parts_kernel<<<blocks, kThreads, 0, stream>>>(sums, parts, rows.edges, sampled.result);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
