// Takes the place of cuda_ext/cuda/intrinsics.cuh.
#pragma once

#include <cuda_runtime.h>

namespace spdnn::cuda {

template <typename T>
T opaque(T value) {
  return value;
}

template <typename T>
T read_shared_now(const void* source) {
  return *static_cast<const T*>(source);
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

template <int>
void meet_from_anywhere() {
  emulator::block_barrier();
}

template <typename T>
T load_coherent(const T* source) {
  return *source;
}

inline void store_coherent(uint32_t* target, uint32_t value) { *target = value; }
inline void store_after_all(uint32_t* target, uint32_t value) { *target = value; }

template <int kCount>
void store_coherent(float* target, const float (&values)[kCount]) {
  for (int k = 0; k < kCount; ++k) target[k] = values[k];
}

inline void pause(int) { emulator::let_others_run(); }

}  // namespace spdnn::cuda
