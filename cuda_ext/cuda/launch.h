// What the device at hand offers, and how many blocks a persistent kernel is launched with. Each device is asked once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spdnn::cuda {

struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes = 0;        // of a multiprocessor, for the blocks that it holds
  int block_shared_bytes = 0;  // of one block, at most
};

cudaError_t read_device_limits(DeviceLimits* limits);

// Blocks that the device holds at a time, all multiprocessors together; at least 1. Lets the kernel have so much
// dynamic shared memory, too, and more in later launches.
cudaError_t resident_block_count(const void* kernel, int threads, int64_t shared_bytes, int64_t* blocks);

template <typename Kernel>
cudaError_t resident_block_count(Kernel* kernel, int threads, int64_t shared_bytes, int64_t* blocks) {
  return resident_block_count(reinterpret_cast<const void*>(kernel), threads, shared_bytes, blocks);
}

// Lets a kernel whose blocks are launched as they come have so much dynamic shared memory.
template <typename Kernel>
cudaError_t allow_shared_bytes(Kernel* kernel, int threads, int64_t shared_bytes) {
  int64_t blocks = 0;
  return resident_block_count(kernel, threads, shared_bytes, &blocks);
}

}  // namespace spdnn::cuda
