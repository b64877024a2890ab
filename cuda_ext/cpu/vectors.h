// The vectors of the instruction set that a source is compiled for; for sources that are compiled once for each.
#pragma once

#include <cstdint>

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

}  // namespace
}  // namespace spdnn::cpu
