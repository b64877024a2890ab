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

__device__ __forceinline__ uint32_t opaque(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Reads sixteen bytes of shared memory here, not where they are used first.
template <typename T>
__device__ __forceinline__ T read_shared_now(const void* source) {
  static_assert(sizeof(T) == 16);
  union {
    uint32_t words[4];
    T value;
  } read;
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(source));
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(read.words[0]), "=r"(read.words[1]), "=r"(read.words[2]), "=r"(read.words[3])
               : "r"(address));
  return read.value;
}

// Starts to copy 4, 8 or 16 bytes from device memory to shared memory, past the registers.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* target, const void* source) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "the machine copies 4, 8 or 16 bytes at a time");
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(source), "n"(kBytes) : "memory");
  }
}

// Closes a group of copies: those that this thread has started since the last one.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, but for those of the last kOpen groups. A barrier makes those of all threads visible.
template <int kOpen>
__device__ __forceinline__ void finish_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

}  // namespace spdnn::cuda
