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

// A barrier for all kThreads threads of a block that reach it from different places in the code; __syncthreads, and
// bar.sync, are for one place.
template <int kThreads>
__device__ __forceinline__ void meet_from_anywhere() {
  asm volatile("barrier.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// Memory through which blocks of one launch talk to each other, past L1, which other multiprocessors do not see. Words
// of a vector are read each by itself.
__device__ __forceinline__ uint32_t load_coherent(const uint32_t* source) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(source) : "memory");
  return value;
}

__device__ __forceinline__ uint4 load_coherent(const uint4* source) {
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_coherent(uint32_t* target, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(target), "r"(value) : "memory");
}

// After all that this thread has done, and what a barrier has let it know of.
__device__ __forceinline__ void store_after_all(uint32_t* target, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(target), "r"(value) : "memory");
}

template <int kCount>
__device__ __forceinline__ void store_coherent(float* target, const float (&values)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount % 4 == 0, "vectors have one, two or four words");
  if constexpr (kCount == 1) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(target), "f"(values[0]) : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(target), "f"(values[0]), "f"(values[1])
                 : "memory");
  } else {
#pragma unroll
    for (int k = 0; k < kCount; k += 4) {
      asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target + k), "f"(values[k]),
                   "f"(values[k + 1]), "f"(values[k + 2]), "f"(values[k + 3])
                   : "memory");
    }
  }
}

// Between two looks at such memory. Who waits long may wait a little longer, and leaves L2 to those that work
// meanwhile.
__device__ __forceinline__ void pause(int tries) {
  constexpr int kPatience = 4, kNanoseconds = 20, kMost = 500;
  if (tries > kPatience) __nanosleep(min(tries * kNanoseconds, kMost));
}

}  // namespace spdnn::cuda
