// The few places where CUDA C++ has no word for what the machine does.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spdnn::cuda {

// A value that the compiler must take as given. Outputs of one group with one weight and one bias are equal, and a
// compiler that saw it would compute them once; an uncompressed run multiplies every stored edge.
__device__ __forceinline__ float opaque(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

// Starts to copy 16 bytes from device memory to shared memory, past the registers.
__device__ __forceinline__ void copy_async(void* target, const void* source) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(target))),
      "l"(source)
      : "memory");
}

// Waits for the copies that this thread has started. A barrier makes those of all threads visible.
__device__ __forceinline__ void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace spdnn::cuda
