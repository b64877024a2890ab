#include <algorithm>

#include "activity.h"
#include "launch.h"
#include "warp.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kActivityThreads = 1024;
constexpr int kActivityWarps = kActivityThreads / 32;

// Sum over the block's threads before this one; `total` over all.
__device__ int exclusive_sum(int value, int* total) {
  __shared__ int warp_sums[kActivityWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int sum = sum_until(value);
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    warp_sums[lane] = sum_until(warp_sums[lane]);
  }
  __syncthreads();
  const int before = warp == 0 ? 0 : warp_sums[warp - 1];
  *total = warp_sums[kActivityWarps - 1];
  __syncthreads();
  return before + sum - value;
}

// Places before `end` whose flag says `flag`, counted by the whole block. `end` is a multiple of 16.
__device__ int count_flags(const uint8_t* flags, int64_t end, uint8_t flag) {
  const uint32_t wanted = flag * 0x01010101u;
  int found = 0;
  for (int64_t place = threadIdx.x * 16; place < end; place += kActivityThreads * 16) {
    const uint4 sixteen = *reinterpret_cast<const uint4*>(flags + place);
    for (const uint32_t four : {sixteen.x, sixteen.y, sixteen.z, sixteen.w}) {
      found += __popc(__vcmpeq4(four, wanted)) / 8;
    }
  }
  int total = 0;
  exclusive_sum(found, &total);
  return total;
}

// Each block takes a share of the places, and counts itself who stays of those before: flags are so short beside what
// a layer moves that this costs less than to wait for other blocks. The order of the lists does not depend on the run.
__global__ void __launch_bounds__(kActivityThreads) activity_kernel(const __grid_constant__ ActivityStep step) {
  const int64_t count = step.count ? *step.count : step.features;
  const int64_t chunks = (count + kActivityThreads - 1) / kActivityThreads;
  const int64_t share = (chunks + gridDim.x - 1) / gridDim.x * kActivityThreads;
  const int64_t begin = blockIdx.x * share, end = min(begin + share, count);
  if (begin >= count && blockIdx.x > 0) return;
  int64_t kept = step.prunable ? count_flags(step.flags, begin, step.flag) : begin;
  int active = 0;
  for (int64_t first = begin; first < end; first += kActivityThreads) {
    const int64_t place = first + threadIdx.x;
    const bool in_work = place < end;
    const bool flag = in_work && step.flags[place] == step.flag;
    const int32_t id = in_work && step.ids ? step.ids[place] : static_cast<int32_t>(place);
    const int32_t slot = in_work && step.slots ? step.slots[place] : static_cast<int32_t>(place);
    const bool keep = in_work && (flag || !step.prunable);
    int chunk_kept = 0;
    const int64_t target = kept + exclusive_sum(keep, &chunk_kept);
    if (keep) {
      step.next_slots[target] = slot;
      step.next_ids[target] = id;
    }
    if (flag && step.alive) step.alive[id] = true;
    if (flag) active += step.members ? step.members[id] : 1;
    kept += chunk_kept;
  }
  if (threadIdx.x == 0 && end == count) *step.next_count = static_cast<int32_t>(kept);
  if (!step.active) return;
  active = __reduce_add_sync(0xFFFFFFFFu, active);
  if (threadIdx.x % 32 == 0 && active) atomicAdd(step.active, active);
}

}  // namespace

cudaError_t launch_activity(const ActivityStep& step, cudaStream_t stream) {
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  const int64_t chunks = (step.features + kActivityThreads - 1) / kActivityThreads;
  const unsigned blocks = static_cast<unsigned>(std::clamp<int64_t>(chunks, 1, limits.multiprocessors));
  activity_kernel<<<blocks, kActivityThreads, 0, stream>>>(step);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
