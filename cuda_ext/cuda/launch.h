// What the device at hand offers, and how many blocks a persistent kernel is launched with.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace spdnn::cuda {

struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes = 0;        // of a multiprocessor, for the blocks that it holds
  int block_shared_bytes = 0;  // of one block, at most
};

inline cudaError_t read_device_limits(DeviceLimits* limits) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const auto read = [device](cudaDeviceAttr attribute, int* value) {
    return cudaDeviceGetAttribute(value, attribute, device);
  };
  for (const cudaError_t error : {read(cudaDevAttrMultiProcessorCount, &limits->multiprocessors),
                                  read(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits->shared_bytes),
                                  read(cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->block_shared_bytes)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Blocks that the device holds at a time, all multiprocessors together; at least 1.
template <typename Kernel>
cudaError_t resident_block_count(Kernel kernel, int threads, int64_t shared_bytes, int64_t* blocks) {
  DeviceLimits limits;
  int each = 0;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  const cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, static_cast<size_t>(shared_bytes));
  *blocks = static_cast<int64_t>(limits.multiprocessors) * std::max(each, 1);
  return error;
}

}  // namespace spdnn::cuda
