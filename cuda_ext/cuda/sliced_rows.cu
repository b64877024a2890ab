#include <algorithm>

#include "feature_slice.cuh"
#include "sliced_rows.h"

namespace spdnn::cuda {
namespace {

constexpr int kThreads = 256, kRowsOfBlock = kThreads / 32;  // a warp has a row
constexpr int64_t kAlignment = 256;
constexpr int64_t kFewestEdges = 2;  // of a row and slice, on average, that pay for looking after them
constexpr int64_t kMostQuads = int64_t{1} << 31;
static_assert(kMostSliceNeurons % kMaskBits == 0);

// The first edge of a row from `begin` on whose input is not below `neuron`. In rows that do not ascend it is some
// edge, and not before that of a lower neuron.
__device__ uint32_t first_edge_from(const int32_t* indices, uint32_t begin, uint32_t end, int64_t neuron) {
  while (begin < end) {
    const uint32_t middle = begin + (end - begin) / 2;
    if (static_cast<uint32_t>(indices[middle]) < neuron) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Edges behind all inputs are in no part.
__global__ void __launch_bounds__(kThreads)
    slice_rows_kernel(const __grid_constant__ CompressedRows rows, const float* values, bool single_value,
                      const __grid_constant__ SlicedRows sliced) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  if (row >= rows.out_width) return;
  const RowEdges edges(rows, row);
  uint32_t* firsts = sliced.firsts + row * (sliced.slices + 1);
  for (int64_t s = lane; s <= sliced.slices; s += 32) {
    const int64_t neuron = min(s * sliced.slice_neurons, rows.in_width);
    firsts[s] = first_edge_from(rows.indices, edges.begin, edges.end, neuron);
  }
  __syncwarp();
  const auto none = static_cast<uint32_t>(sliced.slice_neurons);
  for (uint32_t edge = edges.begin + lane; edge < firsts[sliced.slices]; edge += 32) {
    const auto index = static_cast<uint32_t>(rows.indices[edge]);
    auto s = static_cast<int64_t>(min(index / none, static_cast<uint32_t>(sliced.slices - 1)));
    while (edge < firsts[s]) --s;  // only where indices do not ascend
    while (edge >= firsts[s + 1]) ++s;
    Quad* quads = sliced.quads + sliced.first_quad(firsts[s], row, s);
    const auto put = [&](uint32_t place, uint32_t neuron, float weight) {
      quads[place / kQuad].indices.at[place % kQuad] = static_cast<int32_t>(neuron * FeatureSlice::kNeuronBytes);
      quads[place / kQuad].weights.at[place % kQuad] = weight;
    };
    const uint32_t neuron = min(index - static_cast<uint32_t>(s) * none, none);
    put(edge - firsts[s], neuron, values ? values[single_value ? 0 : edge] : 0.0f);
    if (edge + 1 < firsts[s + 1]) continue;
    for (uint32_t place = edge + 1 - firsts[s]; place % kQuad; ++place) put(place, none, 0.0f);
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_sums_kernel(const __grid_constant__ CompressedRows rows, const __grid_constant__ SlicedRows sliced,
                       const float* sums, int64_t parts, float* result) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  if (row >= rows.out_width) return;
  const RowEdges edges(rows, row);
  const uint32_t* firsts = sliced.firsts + row * (sliced.slices + 1);
  int64_t s = 0;
  for (uint32_t edge = edges.begin + threadIdx.x % 32; edge < edges.end; edge += 32) {
    while (s < sliced.slices && edge >= firsts[s + 1]) ++s;
    float sum = 0;
    if (s < sliced.slices) {
      const float* place = sums + sliced.first_quad(firsts[s], row, s) * kQuad + (edge - firsts[s]);
      for (int64_t part = 0; part < parts; ++part) sum += place[part * sliced.quad_count * kQuad];
    }
    result[edge] = sum;
  }
}

int64_t firsts_bytes(const CompressedRows& rows, const SlicedRows& sliced) {
  const int64_t bytes = rows.out_width * (sliced.slices + 1) * static_cast<int64_t>(sizeof(uint32_t));
  return divide_up(bytes, kAlignment) * kAlignment;
}

unsigned blocks_of(const CompressedRows& rows) {
  return static_cast<unsigned>(divide_up(rows.out_width, kRowsOfBlock));
}

}  // namespace

SlicedRows cut_rows(const CompressedRows& rows) {
  SlicedRows sliced;
  if (rows.in_width <= 0) return sliced;
  const int64_t neurons = divide_up(rows.in_width, divide_up(rows.in_width, kMostSliceNeurons));
  sliced.slice_neurons = divide_up(neurons, kMaskBits) * kMaskBits;
  sliced.slices = divide_up(rows.in_width, sliced.slice_neurons);
  sliced.quad_count = rows.edges / kQuad + rows.out_width * sliced.slices + 1;
  const bool pays = rows.edges >= kFewestEdges * rows.out_width * sliced.slices;
  return pays && sliced.quad_count < kMostQuads ? sliced : SlicedRows{};
}

int64_t sliced_rows_bytes(const CompressedRows& rows, const SlicedRows& sliced) {
  return firsts_bytes(rows, sliced) + sliced.quad_count * static_cast<int64_t>(sizeof(Quad));
}

void place_sliced_rows(const CompressedRows& rows, void* workspace, SlicedRows* sliced) {
  sliced->firsts = static_cast<uint32_t*>(workspace);
  sliced->quads = reinterpret_cast<Quad*>(static_cast<char*>(workspace) + firsts_bytes(rows, *sliced));
}

cudaError_t launch_slice_rows(const CompressedRows& rows, const float* values, bool single_value,
                              const SlicedRows& sliced, cudaStream_t stream) {
  slice_rows_kernel<<<blocks_of(rows), kThreads, 0, stream>>>(rows, values, single_value, sliced);
  return cudaGetLastError();
}

cudaError_t launch_gather_sums(const CompressedRows& rows, const SlicedRows& sliced, const float* sums, int64_t parts,
                               float* result, cudaStream_t stream) {
  gather_sums_kernel<<<blocks_of(rows), kThreads, 0, stream>>>(rows, sliced, sums, parts, result);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
