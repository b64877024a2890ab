// Products with weights in compressed rows: layers, and what their derivatives are made of. Activations are the
// caller's, one feature a row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace spdnn::cuda {

// Weights compressed by the neurons of `out`. What lies in device memory cannot be refused before the launch: an index
// that names no neuron reads zeros, and a row that leaves the edges is cut.
struct CompressedRows {
  int64_t in_width, out_width, edges;
  const int32_t* indptr;   // (out_width + 1)
  const int32_t* indices;  // (edges): neuron of `in`
};

// Bits of activations (spdnn_layout.h): bit b of word w of a feature is neuron 32 w + b. No words: all bits are set.
struct Mask {
  uint32_t* words = nullptr;
  int64_t stride = 0;  // words between features

#ifdef __CUDACC__
  __device__ bool holds(int64_t feature, int64_t neuron) const {
    return !words || words[feature * stride + neuron / 32] >> (neuron % 32) & 1;
  }
#endif
};

// out = clip(in W + bias, lower, upper), zero where a mask holds no bit.
struct Product {
  CompressedRows rows;
  int64_t features;
  const float* in;      // (features, in_width)
  const float* values;  // (edges), or one
  bool single_value;
  const float* bias;  // (out_width), or one; null: none
  bool single_bias;
  float lower, upper;
  Mask in_mask, out_mask;
  Mask inside;      // written: bits of activations that lie inside the bounds; no words: nobody asks
  float* out;       // (features, out_width)
  void* workspace;  // product_workspace_bytes
};

int64_t product_workspace_bytes(const CompressedRows& rows, int64_t features);

cudaError_t launch_product(const Product& product, cudaStream_t stream);

// result[edge] = sum over features of in[., index] * out[., row].
struct Sampled {
  CompressedRows rows;
  int64_t features;
  const float* in;   // (features, in_width)
  const float* out;  // (features, out_width)
  void* workspace;   // sampled_workspace_bytes
  float* result;     // (edges)
};

int64_t sampled_workspace_bytes(const CompressedRows& rows, int64_t features);

cudaError_t launch_sampled(const Sampled& sampled, cudaStream_t stream);

}  // namespace spdnn::cuda
