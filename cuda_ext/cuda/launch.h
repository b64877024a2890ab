// How many blocks a persistent kernel is launched with.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace spdnn::cuda {

// Blocks that the device holds at a time, all multiprocessors together; at least 1.
template <typename Kernel>
cudaError_t resident_block_count(Kernel kernel, int threads, int64_t shared_bytes, int64_t* blocks) {
  int device = 0, multiprocessors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, static_cast<size_t>(shared_bytes));
  *blocks = static_cast<int64_t>(multiprocessors) * std::max(each, 1);
  return error;
}

}  // namespace spdnn::cuda
