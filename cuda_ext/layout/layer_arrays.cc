#include "layout/layer_arrays.h"

#include <cmath>
#include <stdexcept>

namespace spdnn {
namespace {

void check_rows(const LayerArrays& layer, int64_t number) {
  if (layer.indptr[0] != 0) fail_layer(number, "indptr must start with 0");
  for (int64_t row = 0; row < layer.outputs; ++row) {
    const int64_t begin = layer.indptr[row], end = layer.indptr[row + 1];
    if (end < begin) fail_layer(number, "indptr falls at output neuron " + std::to_string(row));
    int64_t previous = -1;
    for (int64_t edge = begin; edge < end; ++edge) {
      const int64_t index = layer.indices[edge];
      if (index < 0 || index >= layer.inputs) {
        fail_layer(number, "output neuron " + std::to_string(row) + " reads input neuron " + std::to_string(index) +
                               ", but there are " + std::to_string(layer.inputs));
      }
      if (index <= previous) {
        fail_layer(number, "the inputs of output neuron " + std::to_string(row) +
                               " are not ascending and distinct; build the layer with SparseLayer.from_scipy");
      }
      previous = index;
    }
  }
}

void check_finite(const float* values, int64_t count, const char* name, int64_t number) {
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) fail_layer(number, std::string(name) + " " + std::to_string(i) + " is not finite");
  }
}

}  // namespace

void fail_layer(int64_t number, const std::string& what) {
  throw std::invalid_argument("layer " + std::to_string(number) + ": " + what);
}

void check_layer(const LayerArrays& layer, int64_t number) {
  if (!(layer.clip.lower < layer.clip.upper)) fail_layer(number, "the lower bound must lie below the upper one");
  check_rows(layer, number);
  check_finite(layer.values, layer.value_count, "weight", number);
  check_finite(layer.bias, layer.bias_count, "bias", number);
}

void check_chain(const LayerArrays& layer, int64_t number, int64_t outputs_before) {
  if (outputs_before >= 0 && layer.inputs != outputs_before) {
    fail_layer(number, "has " + std::to_string(layer.inputs) + " inputs, but the layer before has " +
                           std::to_string(outputs_before) + " outputs");
  }
}

}  // namespace spdnn
