// The micro-kernels for weights in compressed rows, over one tile of features (kernels.h).
#pragma once

#include <cstdint>

namespace spdnn::cpu {

// Rows of weights, compressed by output neuron.
struct Rows {
  const int32_t* indptr;   // (outputs + 1)
  const int32_t* indices;  // input neuron of each edge
  int64_t first, end;      // the rows to compute
};

// Clipped sums: out[j] = clip(sum of value * in[index] over the edges of row j, + bias).
struct ProductTask {
  Rows rows;
  const float* values;  // of each edge; null: `value` for all
  float value;
  const float* bias;  // of each output; null: `shared_bias`
  float shared_bias;
  float lower, upper;
  const float* in;   // 64-byte aligned
  float* out;        // 64-byte aligned
  int64_t stride;    // features in a row of `in` and `out`
  int64_t features;  // features to compute, rounded up to the vector width by the kernel
};

// Products of activations of both ends of each edge, summed over the features of the tile, added to `sums`.
struct SampledTask {
  Rows rows;
  const float* in;   // of the input neurons, 64-byte aligned; zero beyond the last feature
  const float* out;  // of the output neurons, likewise
  int64_t stride;
  float* sums;  // of each edge
};

// Masks: bit b of word w of a feature is neuron 32 w + b, set where its activation lies inside the bounds.
struct MaskTask {
  uint32_t* words;       // of the tile's first feature
  int64_t words_stride;  // words between features
  int64_t neurons;
  float lower, upper;
  float* tile;
  int64_t stride;
  int64_t features;
};

struct RowKernels {
  void (*product)(const ProductTask&);
  void (*sampled)(const SampledTask&);
  void (*store_mask)(const MaskTask&);  // tile -> words
  void (*apply_mask)(const MaskTask&);  // zeros in the tile where the words hold none
};

}  // namespace spdnn::cpu
