// Takes the place of cuda_ext/cuda/intrinsics.cuh.
#pragma once

#include <cuda_runtime.h>

namespace spdnn::cuda {

template <typename T>
T opaque(T value) {
  return value;
}

template <int kBytes>
void copy_async(void* target, const void* source) {
  emulator::start_copy(target, source, kBytes);
}

inline void close_copies() { emulator::close_copies(); }

template <int kOpen>
void finish_copies() {
  emulator::finish_copies(kOpen);
}

inline uint32_t bfloat16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7F800000u) == 0x7F800000u) return bits >> 16 | ((bits & 0x7FFFFFu) ? 0x40u : 0u);
  return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
}

inline float float_of_bfloat16(uint32_t bits) { return __uint_as_float((bits & 0xFFFFu) << 16); }

inline uint32_t pack_bfloat16(float x, float y) { return bfloat16_bits(y) << 16 | bfloat16_bits(x); }

inline uint32_t shared_address_of(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) -
                               static_cast<const char*>(emulator::dynamic_shared()));
}

inline void load_four_transposed(uint32_t row, uint32_t (&x)[4]) {
  if (row % 16) emulator::fail("a matrix row that is not aligned");
  const uint64_t* rows = emulator::exchange(row);
  const int lane = threadIdx.x % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t pair = 0;
    for (int k = 0; k < 2; ++k) {
      const char* row_of_lane =
          static_cast<const char*>(emulator::dynamic_shared()) + rows[matrix * 8 + lane % 4 * 2 + k];
      const auto* source = reinterpret_cast<const uint16_t*>(row_of_lane);
      pair |= static_cast<uint32_t>(source[lane / 4]) << (16 * k);
    }
    x[matrix] = pair;
  }
}

inline void add_product_with_ones(uint32_t upper, uint32_t lower, float (&sums)[4]) {
  const int lane = threadIdx.x % 32;
  float columns[8] = {};
  const uint64_t* words = emulator::exchange(static_cast<uint64_t>(upper) << 32 | lower);
  for (int thread = 0; thread < 32; ++thread) {
    for (const uint32_t pair : {static_cast<uint32_t>(words[thread] >> 32), static_cast<uint32_t>(words[thread])}) {
      columns[thread / 4] += float_of_bfloat16(pair) + float_of_bfloat16(pair >> 16);
    }
  }
  for (int k = 0; k < 4; ++k) sums[k] += columns[lane % 4 * 2 + k % 2];
}

}  // namespace spdnn::cuda
