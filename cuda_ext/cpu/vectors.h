// The vectors of the instruction set that a source is compiled for; for sources that are compiled once for each.
#pragma once

#include <cstdint>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace spdnn::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(float))));

// sum + x * y, rounded once where the instruction set can: said here, for a compiler that is free to choose chooses by
// the width of a vector, and results would depend on how many features are computed at a time.
template <typename Floats>
inline Floats multiply_add(Floats x, Floats y, Floats sum) {
#if defined(__FMA__) || defined(__aarch64__)
  if constexpr (sizeof(Floats) == sizeof(float)) {
    return __builtin_fmaf(x, y, sum);
#if defined(__aarch64__)
  } else if constexpr (sizeof(Floats) == sizeof(float32x4_t)) {
    return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)x, (float32x4_t)y);
#else
#if defined(__AVX512F__)
  } else if constexpr (sizeof(Floats) == sizeof(__m512)) {
    return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#endif
  } else if constexpr (sizeof(Floats) == sizeof(__m256)) {
    return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
  } else if constexpr (sizeof(Floats) == sizeof(__m128)) {
    return (Floats)_mm_fmadd_ps((__m128)x, (__m128)y, (__m128)sum);
#endif
  } else {
    static_assert(sizeof(Floats) == 2 * sizeof(float), "a vector of two");
    return Floats{__builtin_fmaf(x[0], y[0], sum[0]), __builtin_fmaf(x[1], y[1], sum[1])};
  }
#else
  return sum + x * y;
#endif
}

}  // namespace
}  // namespace spdnn::cpu
