#include <algorithm>
#include <cmath>

#include "row_chain.h"
#include "row_products.h"

namespace spdnn::cuda {
namespace {

const int32_t* ints(const ChainCall& call, int64_t offset) {
  return reinterpret_cast<const int32_t*>(call.words + offset);
}

const float* floats(const ChainCall& call, int64_t offset) {
  return reinterpret_cast<const float*>(call.words + offset);
}

Mask mask_of(const ChainCall& call, const RowsLayer& layer) {
  if (layer.mask_words == 0) return {};
  return {call.masks + layer.mask_word, call.rows.mask_words()};
}

int64_t buffer_bytes(const RowsView& rows, int64_t features) {
  constexpr int64_t kAlignment = 256;
  return round_up(features * rows.widest() * static_cast<int64_t>(sizeof(float)), kAlignment);
}

Product by_output(const ChainCall& call, const RowsLayer& layer) {
  Product product{};
  product.features = call.features;
  product.workspace = call.workspace + 2 * buffer_bytes(call.rows, call.features);
  product.rows = {layer.inputs, layer.outputs, layer.edges, ints(call, layer.row_offset),
                  ints(call, layer.index_offset)};
  product.values = floats(call, layer.value_offset);
  product.lower = -INFINITY;
  product.upper = INFINITY;
  return product;
}

Product by_input(const ChainCall& call, const RowsLayer& layer) {
  Product product = by_output(call, layer);
  product.rows = {layer.outputs, layer.inputs, layer.edges, ints(call, layer.column_offset),
                  ints(call, layer.output_offset)};
  product.values = floats(call, layer.weight_offset);
  return product;
}

// Takes the features through the layers, from buffer to buffer of the workspace: `step(layer, in, out)`.
template <typename Step>
cudaError_t walk(const ChainCall& call, bool backwards, const Step& step) {
  const int64_t layers = call.rows.count;
  const int64_t bytes = buffer_bytes(call.rows, call.features);
  float* buffers[] = {reinterpret_cast<float*>(call.workspace), reinterpret_cast<float*>(call.workspace + bytes)};
  const float* in = call.in;
  for (int64_t l = 0; l < layers; ++l) {
    float* out = l + 1 == layers ? call.out : buffers[l % 2];
    const cudaError_t error = step(call.rows.layers[backwards ? layers - 1 - l : l], in, out);
    if (error != cudaSuccess) return error;
    in = out;
  }
  return cudaSuccess;
}

}  // namespace

// Two buffers for activations, and the largest workspace of a product, either way.
int64_t chain_workspace_bytes(const RowsView& rows, int64_t features) {
  int64_t of_product = 0;
  for (int64_t l = 0; l < rows.count; ++l) {
    const RowsLayer& layer = rows.layers[l];
    for (const CompressedRows& way : {CompressedRows{layer.inputs, layer.outputs, layer.edges, nullptr, nullptr},
                                      CompressedRows{layer.outputs, layer.inputs, layer.edges, nullptr, nullptr}}) {
      of_product = std::max(of_product, product_workspace_bytes(way, features));
    }
  }
  return 2 * buffer_bytes(rows, features) + of_product;
}

cudaError_t run_chain(const ChainCall& call, cudaStream_t stream) {
  return walk(call, false, [&](const RowsLayer& layer, const float* in, float* out) {
    Product product = by_output(call, layer);
    product.in = in;
    product.bias = floats(call, layer.bias_offset);
    product.lower = finite_bound(static_cast<float>(layer.lower));
    product.upper = finite_bound(static_cast<float>(layer.upper));
    product.out = out;
    product.inside = mask_of(call, layer);
    return launch_product(product, stream);
  });
}

cudaError_t run_chain_derivative(const ChainCall& call, bool transposed, cudaStream_t stream) {
  const RowsLayer *first = call.rows.layers, *last = first + call.rows.count - 1;
  return walk(call, transposed, [&](const RowsLayer& layer, const float* in, float* out) {
    Product product = transposed ? by_input(call, layer) : by_output(call, layer);
    if (!transposed) {
      product.out_mask = mask_of(call, layer);
    } else {  // what comes in was cut by the mask when it was written: once, where it is read several times
      if (&layer == last) product.in_mask = mask_of(call, layer);
      if (&layer != first) product.out_mask = mask_of(call, *(&layer - 1));
    }
    product.in = in;
    product.out = out;
    return launch_product(product, stream);
  });
}

}  // namespace spdnn::cuda
