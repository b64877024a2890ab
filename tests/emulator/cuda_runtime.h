// Stands in for CUDA's header, so that g++ compiles the kernels and a processor runs them: block by block, each thread
// of a block a fiber; the blocks of a cooperative launch all together. See emulate.py.
#pragma once

#define __CUDACC__ 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(bytes) alignas(bytes)

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- the host's side
// --------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int kSharedBytes = 228 * 1024, kMultiprocessors = 2;  // an H100's; and few, so that blocks loop
  *value = attribute == cudaDevAttrMultiProcessorCount            ? kMultiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kSharedBytes - 1024
                                                                  : kSharedBytes;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  return std::memset(target, value, bytes), cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {

void seed(uint64_t value);  // of the order in which fibers run between barriers

void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, const std::function<void()>& kernel);

// All blocks at a time, as those that wait for each other must be. Static shared memory would be one for all.
void launch_together(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// For a thread that waits for what others write.
void let_others_run();

void* dynamic_shared();

void block_barrier();

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// Each of these lanes of the warp gives a word; returns those of all, in their lanes' places, when they have arrived.
const uint64_t* exchange(uint64_t word, uint32_t lanes = kAllLanes);

void start_copy(void* target, const void* source, int bytes);
void close_copies();
void finish_copies(int open_groups);

template <typename T>
T word_as(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <typename T>
uint64_t as_word(T value) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->numAttrs != 1 || !config->attrs[0].val.cooperative) return cudaErrorInvalidConfiguration;
  emulator::launch_together(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}

// --- the device's side
// ------------------------------------------------------------------------------------------------

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a > b ? a : b;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return __ldg(address);
}
inline void __threadfence() {}
inline int __clz(uint32_t bits) { return bits ? __builtin_clz(bits) : 32; }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline uint32_t __vcmpeq4(uint32_t a, uint32_t b) {
  uint32_t equal = 0;
  for (uint32_t byte = 0xFF; byte; byte <<= 8) equal |= (a & byte) == (b & byte) ? byte : 0;
  return equal;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * k & 7) & 0xFF) << 8 * k;
  return result;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift % 32));
}
inline float __saturatef(float value) { return std::isnan(value) ? 0.0f : std::min(std::max(value, 0.0f), 1.0f); }
inline uint32_t __float_as_uint(float value) { return emulator::word_as<uint32_t>(emulator::as_word(value)); }
inline float __uint_as_float(uint32_t bits) { return emulator::word_as<float>(bits); }

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address |= value;
  return old;
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() { emulator::exchange(0); }

template <typename T>
T __shfl_sync(uint32_t, T value, int lane) {
  return emulator::word_as<T>(emulator::exchange(emulator::as_word(value))[lane % 32]);
}
template <typename T>
T __shfl_up_sync(uint32_t, T value, int distance) {
  const int lane = (threadIdx.x + threadIdx.y * blockDim.x) % 32;
  return emulator::word_as<T>(emulator::exchange(emulator::as_word(value))[std::max(lane - distance, 0)]);
}
template <typename T>
T __shfl_xor_sync(uint32_t lanes, T value, int mask) {
  const int lane = (threadIdx.x + threadIdx.y * blockDim.x) % 32;
  return emulator::word_as<T>(emulator::exchange(emulator::as_word(value), lanes)[lane ^ mask]);
}
inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  const uint64_t* words = emulator::exchange(predicate);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(words[lane]) << lane;
  return bits;
}
inline uint32_t __match_any_sync(uint32_t, uint32_t value) {
  const uint64_t* words = emulator::exchange(value);
  uint32_t alike = 0;
  for (int lane = 0; lane < 32; ++lane) alike |= static_cast<uint32_t>(words[lane] == value) << lane;
  return alike;
}
template <typename T>
T __reduce_add_sync(uint32_t, T value) {
  const uint64_t* words = emulator::exchange(emulator::as_word(value));
  T sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += emulator::word_as<T>(words[lane]);
  return sum;
}
inline uint32_t __reduce_or_sync(uint32_t, uint32_t value) {
  const uint64_t* words = emulator::exchange(value);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(words[lane]);
  return bits;
}
