#include <algorithm>

#include "spread.h"
#include "start.h"

namespace spdnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1024;

__global__ void __launch_bounds__(kThreads) start_kernel(const __grid_constant__ StartStep step, int64_t entries) {
  const FeatureClasses& classes = step.classes;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < entries;
       k += static_cast<int64_t>(gridDim.x) * kThreads) {
    if (k < step.features) {
      step.alive[k] = false;
      step.flags[k] = 0;
      if (classes.table_places > 0) {
        classes.leader_of[k] = static_cast<int32_t>(k);
        classes.members[k] = 1;
      }
    }
    if (k < classes.table_places) classes.table[k] = -1;
    if (k < step.layers && step.active) step.active[k] = 0;
    if (k < step.count_of_counts) step.counts[k] = 0;
    if (k < step.unwritten_words) step.unwritten[k] = kUnwritten;
  }
}

}  // namespace

cudaError_t launch_start(const StartStep& step, cudaStream_t stream) {
  const int64_t entries =
      std::max({step.features, step.layers, step.count_of_counts, step.unwritten_words, step.classes.table_places});
  const int64_t blocks = std::min((entries + kThreads - 1) / kThreads, kMostBlocks);
  start_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(step, entries);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
