#include <algorithm>

#include "activity.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kActivityThreads = 1024;
constexpr int kActivityWarps = kActivityThreads / 32;
constexpr int kSquare = 32;  // features and neurons that a block transposes at a time
constexpr int kTransposeRows = 8;

// Sum over the block's threads before this one; `total` over all.
__device__ int exclusive_sum(int value, int* total) {
  __shared__ int warp_sums[kActivityWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFu, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int warp_sum = warp_sums[lane];
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, warp_sum, distance);
      if (lane >= distance) warp_sum += other;
    }
    warp_sums[lane] = warp_sum;
  }
  __syncthreads();
  const int before = warp == 0 ? 0 : warp_sums[warp - 1];
  *total = warp_sums[kActivityWarps - 1];
  __syncthreads();
  return before + sum - value;
}

// One block: the lists are short beside a layer's work, and their order does not depend on the run. A list may be
// written over itself: what stays moves forward, and a chunk is read before its places are written.
__global__ void __launch_bounds__(kActivityThreads) activity_kernel(const __grid_constant__ ActivityStep step) {
  const int64_t count = step.count ? *step.count : step.features;
  int64_t kept = 0;
  int active = 0;
  for (int64_t first = 0; first < count; first += kActivityThreads) {
    const int64_t place = first + threadIdx.x;
    const bool in_work = place < count;
    const bool flag = in_work && step.flags[place];
    const int32_t id = in_work && step.ids ? step.ids[place] : static_cast<int32_t>(place);
    const int32_t slot = in_work && step.slots ? step.slots[place] : static_cast<int32_t>(place);
    const bool keep = in_work && (flag || !step.prunable);
    int chunk_kept = 0;
    const int64_t target = kept + exclusive_sum(keep, &chunk_kept);
    if (keep) {
      step.next_slots[target] = slot;
      step.next_ids[target] = id;
    }
    if (in_work) step.flags[place] = 0;
    if (flag && step.alive) step.alive[id] = true;
    if (flag) active += step.members ? step.members[id] : 1;
    kept += chunk_kept;
  }
  if (threadIdx.x == 0) *step.next_count = static_cast<int32_t>(kept);
  if (!step.active) return;
  active = __reduce_add_sync(0xFFFFFFFFu, active);
  if (threadIdx.x % 32 == 0 && active) atomicAdd(step.active, active);
}

__global__ void __launch_bounds__(kSquare* kTransposeRows)
    read_input_kernel(InputFeatures input, int64_t features, float* target) {
  __shared__ float square[kSquare][kSquare + 1];
  const int64_t first_neuron = static_cast<int64_t>(blockIdx.x) * kSquare;
  for (int64_t tile = blockIdx.y; tile * kSquare < features; tile += gridDim.y) {
    for (int row = threadIdx.y; row < kSquare; row += kTransposeRows) {
      const int64_t feature = tile * kSquare + row, neuron = first_neuron + threadIdx.x;
      const bool inside = feature < features && neuron < input.inputs;
      square[row][threadIdx.x] = inside ? feature_at(input, feature, neuron) : 0.0f;
    }
    __syncthreads();
    for (int row = threadIdx.y; row < kSquare; row += kTransposeRows) {
      const int64_t neuron = first_neuron + row;
      if (neuron < input.inputs) {
        target[tiled_offset(tile * kSquare + threadIdx.x, neuron, input.inputs)] = square[threadIdx.x][row];
      }
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kSquare* kTransposeRows)
    write_output_kernel(const __grid_constant__ OutputStep step) {
  __shared__ float square[kSquare][kSquare + 1];
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * kSquare;
  const int64_t count = step.count ? *step.count : step.features;
  for (int64_t tile = blockIdx.y; tile * kSquare < count; tile += gridDim.y) {
    const int64_t slot = tile * kSquare + threadIdx.x;
    for (int row = threadIdx.y; row < kSquare; row += kTransposeRows) {
      const int64_t output = first_output + row;
      const bool inside = slot < count && output < step.outputs;
      square[row][threadIdx.x] = inside ? step.source[tiled_offset(slot, step.slot_of[output], step.width)] : 0.0f;
    }
    __syncthreads();
    for (int row = threadIdx.y; row < kSquare; row += kTransposeRows) {
      const int64_t row_slot = tile * kSquare + row, output = first_output + threadIdx.x;
      if (row_slot < count && output < step.outputs) {
        const int64_t id = step.ids ? step.ids[row_slot] : row_slot;
        step.activations[id * step.outputs + output] = square[threadIdx.x][row] * step.unit;
      }
    }
    __syncthreads();
  }
}

dim3 transpose_grid(int64_t features, int64_t neurons) {
  const int64_t tiles = (features + kSquare - 1) / kSquare;
  return dim3(static_cast<unsigned>((neurons + kSquare - 1) / kSquare),
              static_cast<unsigned>(std::min<int64_t>(tiles, 4096)));
}

}  // namespace

cudaError_t launch_activity(const ActivityStep& step, cudaStream_t stream) {
  activity_kernel<<<1, kActivityThreads, 0, stream>>>(step);
  return cudaGetLastError();
}

cudaError_t launch_read_input(const InputFeatures& input, int64_t features, float* target, cudaStream_t stream) {
  if (input.inputs == 0) return cudaSuccess;
  read_input_kernel<<<transpose_grid(features, input.inputs), dim3(kSquare, kTransposeRows), 0, stream>>>(
      input, features, target);
  return cudaGetLastError();
}

cudaError_t launch_write_output(const OutputStep& step, cudaStream_t stream) {
  if (step.outputs == 0) return cudaSuccess;
  write_output_kernel<<<transpose_grid(step.features, step.outputs), dim3(kSquare, kTransposeRows), 0, stream>>>(step);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
