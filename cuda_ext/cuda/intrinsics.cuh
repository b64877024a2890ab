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

// Starts to copy 8 or 16 bytes from device memory to shared memory, past the registers.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* target, const void* source) {
  static_assert(kBytes == 8 || kBytes == 16, "the machine copies 8 or 16 bytes at a time");
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(source) : "memory");
  }
}

// Closes a group of copies: those that this thread has started since the last one.
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, but for those of the last kOpen groups. A barrier makes those of all threads visible.
template <int kOpen>
__device__ __forceinline__ void finish_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

__device__ __forceinline__ uint32_t shared_address_of(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Two bfloat16, nearest to x and y, x in the lower half.
__device__ __forceinline__ uint32_t pack_bfloat16(float x, float y) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
  return both;
}

// Four matrices of 8 rows of 16 bytes, 8 bfloat16 each; the rows of matrix m are where threads 8 m .. 8 m + 7 point.
// Thread t gets of each matrix column t / 4 of rows t % 4 * 2 and the next, side by side.
__device__ __forceinline__ void load_four_transposed(uint32_t row, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

// Adds to a tile of 16 x 8 sums the product of a 16 x 16 matrix of ones with a 16 x 8 matrix of bfloat16, two of whose
// parts come from load_four_transposed. Thread t has of the sums rows t / 4 and t / 4 + 8, columns t % 4 * 2 and the
// next.
__device__ __forceinline__ void add_product_with_ones(uint32_t upper, uint32_t lower, float (&sums)[4]) {
  constexpr uint32_t kOnes = 0x3F803F80u;
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%5, %6}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(kOnes), "r"(upper), "r"(lower));
}

}  // namespace spdnn::cuda
