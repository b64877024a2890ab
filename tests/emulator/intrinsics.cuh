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

}  // namespace spdnn::cuda
