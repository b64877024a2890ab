#include <algorithm>

#include "feature_slice.cuh"
#include "sliced_rows.h"
#include "warp.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kThreads = 256, kRowsOfBlock = kThreads / 32;  // a warp has a row
constexpr int64_t kAlignment = 256;
constexpr int64_t kFewestEdges = 2;               // of a row and slice, on average, that pay for looking after them
constexpr int64_t kMostQuads = int64_t{1} << 29;  // numbers of their edges fit into 32 bits
constexpr int64_t kMostSlices = 1024;             // whose counts fit into shared memory
constexpr int64_t kMostBlocks = 1 << 20;
constexpr uint32_t kNoPlace = 0xFFFFFFFFu;
static_assert(kMostSliceNeurons % kMaskBits == 0);

// Counts a row's edges by slice, then brings each to its place, in their order: rows need not ascend. Edges of inputs
// that are not there have no place.
__global__ void __launch_bounds__(kThreads)
    slice_rows_kernel(const __grid_constant__ CompressedRows rows, const float* values, bool single_value,
                      const __grid_constant__ SlicedRows sliced) {
  extern __shared__ __align__(16) uint32_t memory[];
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  if (row >= rows.out_width) return;
  const auto slices = static_cast<uint32_t>(sliced.slices), neurons = static_cast<uint32_t>(sliced.slice_neurons);
  const RowEdges edges(rows, row);
  uint32_t* next = memory + threadIdx.x / 32 * slices;  // edge of each slice
  uint32_t* firsts = sliced.firsts + row * (sliced.slices + 1);
  for (uint32_t s = lane; s < slices; s += 32) next[s] = 0;
  __syncwarp();
  for (uint32_t edge = edges.begin + lane; edge < edges.end; edge += 32) {
    const auto index = static_cast<uint32_t>(rows.indices[edge]);
    if (index < rows.in_width) atomicAdd(next + index / neurons, 1u);
  }
  __syncwarp();
  uint32_t first = min(edges.begin, static_cast<uint32_t>(rows.edges));
  for (uint32_t from = 0; from < slices; from += 32) {
    const uint32_t s = from + lane, count = s < slices ? next[s] : 0;
    const uint32_t until = sum_until(count);
    if (s < slices) firsts[s] = next[s] = first + until - count;
    first += __shfl_sync(0xFFFFFFFFu, until, 31);
  }
  if (lane == 0) firsts[slices] = first;
  __syncwarp();
  const auto put = [&](uint32_t s, uint32_t edge_of_part, uint32_t neuron, float weight) {
    const int64_t quad = sliced.first_quad(firsts[s], row, s) + edge_of_part / kQuad;
    sliced.quads[quad].indices.at[edge_of_part % kQuad] = static_cast<int32_t>(neuron * FeatureSlice::kNeuronBytes);
    sliced.quads[quad].weights.at[edge_of_part % kQuad] = weight;
    return static_cast<uint32_t>(quad * kQuad + edge_of_part % kQuad);
  };
  for (uint32_t from = edges.begin; from < edges.end; from += 32) {
    const uint32_t edge = from + lane, index = edge < edges.end ? static_cast<uint32_t>(rows.indices[edge]) : 0;
    const bool placed = edge < edges.end && index < rows.in_width;
    const uint32_t s = placed ? index / neurons : slices, alike = __match_any_sync(0xFFFFFFFFu, s);
    const int before = __popc(alike & ((1u << lane) - 1));
    const uint32_t place = placed ? next[s] + before : 0;
    __syncwarp();
    if (placed && before == 0) next[s] += __popc(alike);
    __syncwarp();
    uint32_t of_sum = kNoPlace;
    if (placed) {
      of_sum = put(s, place - firsts[s], index - s * neurons, values ? values[single_value ? 0 : edge] : 0.0f);
    }
    if (sliced.places && edge < edges.end) sliced.places[edge] = of_sum;
  }
  for (uint32_t s = lane; s < slices; s += 32) {  // what rounds parts up
    for (uint32_t place = firsts[s + 1] - firsts[s]; place % kQuad; ++place) put(s, place, neurons, 0.0f);
  }
}

__global__ void __launch_bounds__(kThreads) gather_sums_kernel(const uint32_t* places, const float* sums, int64_t parts,
                                                               int64_t stride, int64_t edges, float* result) {
  for (int64_t edge = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; edge < edges;
       edge += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint32_t place = places[edge];  // anything where the edge is in no row
    float sum = 0;
    for (int64_t part = 0; place < stride && part < parts; ++part) sum += sums[part * stride + place];
    result[edge] = sum;
  }
}

int64_t firsts_bytes(const CompressedRows& rows, const SlicedRows& sliced) {
  return round_up(rows.out_width * (sliced.slices + 1) * static_cast<int64_t>(sizeof(uint32_t)), kAlignment);
}

int64_t quads_bytes(const SlicedRows& sliced) {
  return round_up(sliced.quad_count * static_cast<int64_t>(sizeof(Quad)), kAlignment);
}

}  // namespace

SlicedRows cut_rows(const CompressedRows& rows) {
  SlicedRows sliced;
  if (rows.in_width <= 0) return sliced;
  const int64_t neurons = divide_up(rows.in_width, divide_up(rows.in_width, kMostSliceNeurons));
  sliced.slice_neurons = round_up(neurons, kMaskBits);
  sliced.slices = divide_up(rows.in_width, sliced.slice_neurons);
  sliced.quad_count = rows.edges / kQuad + rows.out_width * sliced.slices + 1;
  const bool pays = rows.edges >= kFewestEdges * rows.out_width * sliced.slices;
  return pays && sliced.quad_count < kMostQuads && sliced.slices <= kMostSlices ? sliced : SlicedRows{};
}

int64_t sliced_rows_bytes(const CompressedRows& rows, const SlicedRows& sliced, bool with_places) {
  const int64_t of_places = with_places ? rows.edges * static_cast<int64_t>(sizeof(uint32_t)) : 0;
  return firsts_bytes(rows, sliced) + quads_bytes(sliced) + of_places;
}

void place_sliced_rows(const CompressedRows& rows, void* workspace, bool with_places, SlicedRows* sliced) {
  char* next = static_cast<char*>(workspace);
  sliced->firsts = reinterpret_cast<uint32_t*>(next);
  next += firsts_bytes(rows, *sliced);
  sliced->quads = reinterpret_cast<Quad*>(next);
  next += quads_bytes(*sliced);
  sliced->places = with_places ? reinterpret_cast<uint32_t*>(next) : nullptr;
}

cudaError_t launch_slice_rows(const CompressedRows& rows, const float* values, bool single_value,
                              const SlicedRows& sliced, cudaStream_t stream) {
  const size_t bytes = kRowsOfBlock * static_cast<size_t>(sliced.slices) * sizeof(uint32_t);
  const auto blocks = static_cast<unsigned>(divide_up(rows.out_width, kRowsOfBlock));
  slice_rows_kernel<<<blocks, kThreads, bytes, stream>>>(rows, values, single_value, sliced);
  return cudaGetLastError();
}

cudaError_t launch_gather_sums(const CompressedRows& rows, const SlicedRows& sliced, const float* sums, int64_t parts,
                               float* result, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::min(divide_up(rows.edges, kThreads), kMostBlocks));
  const int64_t stride = sliced.quad_count * kQuad;
  gather_sums_kernel<<<blocks, kThreads, 0, stream>>>(sliced.places, sums, parts, stride, rows.edges, result);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
