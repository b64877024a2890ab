// A run, slice by slice; for sources that are compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/vectors.h"
#include "layout/spdnn_layout.h"

// Before a loop over sums: unrolled whole, they are registers. By themselves compilers give up on the larger ones.
#if defined(__clang__)
#define SPDNN_UNROLL _Pragma("unroll")
#else
#define SPDNN_UNROLL _Pragma("GCC unroll 32")
#endif

namespace spdnn::cpu {
namespace {

// A vector of kWidth floats, which may be fewer than the instruction set offers; the last resort is one.
template <int kWidth>
struct Lanes {
  typedef float Floats __attribute__((vector_size(kWidth * sizeof(float))));
  typedef uint32_t Bits __attribute__((vector_size(kWidth * sizeof(float))));
  static constexpr int kCount = kWidth;
};

template <>
struct Lanes<1> {
  typedef float Floats;
  typedef uint32_t Bits;
  static constexpr int kCount = 1;
};

// From memory that need not be aligned.
template <typename T, typename Element>
inline T load(const Element* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// What an output is from its sum. The bias comes last: so a result has the bits that plain XLA operations give it, in
// the same order.
template <typename Floats>
inline Floats activated(Floats sum, Floats bias, Floats lower, Floats upper) {
  Floats y = sum + bias;
  y = y > lower ? y : lower;  // in this order a NaN becomes the lower bound, and -0.0 becomes 0.0
  return y > upper ? upper : y;
}

// One slice, or what is left of its groups.
template <bool kStored, typename Index>
struct Slice {
  const Index* indices;
  const float* weights;  // where none are stored: as many equal ones as a group may have outputs
  int64_t width;         // groups of the whole slice
  int64_t groups;        // those that are left
  int64_t slot;          // of the first output of the first of them

  void skip(int64_t count, int64_t group_outputs) {
    indices += count * kEdgeChunk;
    if (kStored) weights += count * kEdgeChunk * group_outputs;
    groups -= count;
    slot += count;
  }
};

template <bool kStored, typename Index, typename Compute>
inline void for_each_slice(const RunTask& task, const float* weights, const Compute& compute) {
  for (int64_t first = 0; first < task.groups; first += kSliceGroups) {
    const int64_t rest = task.groups - first, width = rest < kSliceGroups ? rest : kSliceGroups;
    compute(Slice<kStored, Index>{static_cast<const Index*>(task.indices) + first * task.edges,
                                  weights + (kStored ? first * task.edges * task.group_outputs : 0), width, width,
                                  task.first_slot + first * task.group_outputs});
  }
}

// Calls compute(slice) for each slice, with the types of the run. A run of one weight goes through the same
// multiplications as one that stores its weights: every stored edge is multiplied, and the compiler cannot see that
// sums agree.
template <typename Compute>
inline void compute_slices(const RunTask& task, const Compute& compute) {
  if (task.values) {
    return task.index_bits == 16 ? for_each_slice<true, uint16_t>(task, task.values, compute)
                                 : for_each_slice<true, uint32_t>(task, task.values, compute);
  }
  float equal[kMaxGroupOutputs];
  for (float& value : equal) value = task.value;
  asm volatile("" : : "r"(equal) : "memory");
  task.index_bits == 16 ? for_each_slice<false, uint16_t>(task, equal, compute)
                        : for_each_slice<false, uint32_t>(task, equal, compute);
}

}  // namespace
}  // namespace spdnn::cpu
