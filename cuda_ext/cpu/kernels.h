// The micro-kernels of the CPU back end: one run of one layer times one tile of features.
//
// A tile holds up to `stride` features as [neuron][stride]. One source, kernels.cc, is compiled once per instruction
// set, with one_feature.cc. They include nothing of the C++ library: an inline function compiled for AVX-512 must never
// be the copy that the linker keeps for everyone.
#pragma once

#include <cstdint>

#include "cpu/row_kernels.h"
#include "layout/largest.h"

namespace spdnn::cpu {

struct RunTask {
  const void* indices;  // uint16_t or uint32_t, as spdnn_layout.h lays them out
  int index_bits;
  const float* values;  // null: `value` for all edges
  float value;
  const float* bias;  // of slot 0 of the layer; null: `shared_bias`
  float shared_bias;
  int64_t group_outputs;
  int64_t edges;  // of a group; need not be a multiple of 4 where there is one group
  int64_t groups;
  int64_t first_slot;
  float lower, upper;  // what sums are clipped to
  const float* in;     // 64-byte aligned; with a stride of 1 anywhere
  float* out;          // 64-byte aligned
  int64_t stride;      // features in a row of `in` and `out`: 1, 4, 8, or a multiple of 16
  int64_t features;    // features to compute, rounded up to the vector width by the kernel
  uint32_t* nonzero;   // (stride): bits of all results of a feature, or-ed
};

using RunKernel = void (*)(const RunTask&);

struct Kernels {
  const char* name;
  int lanes;  // floats in a vector
  RunKernel run;
  LargestIndex largest_index;
  const RowKernels* rows;
};

// The kernels for this processor, or those that the environment variable SPDNN_CPU_KERNELS names. Null, with `error`
// set, where it names none that runs here.
const Kernels* select_kernels(const char** error);

}  // namespace spdnn::cpu
