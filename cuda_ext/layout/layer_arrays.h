// A layer in compressed-row form, as it comes from the caller, and the checks that every reader of one makes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

namespace spdnn {

// What a layer's sums are clipped to; infinite where not at all.
struct ClipBounds {
  float lower = 0;
  float upper = INFINITY;

  float clipped(float sum) const { return std::min(std::max(sum, lower), upper); }
};

// One layer, rows compressed by output neuron.
struct LayerArrays {
  int64_t inputs = 0;
  int64_t outputs = 0;
  const int64_t* indptr = nullptr;   // outputs + 1
  const int32_t* indices = nullptr;  // indptr[outputs], ascending inside a row
  const float* values = nullptr;     // indptr[outputs], or one for all
  int64_t value_count = 0;
  const float* bias = nullptr;  // outputs, or one for all
  int64_t bias_count = 0;
  ClipBounds clip;

  int64_t edges() const { return indptr[outputs]; }
  float value(int64_t edge) const { return values[value_count > 1 ? edge : 0]; }
};

// What became of a layer on the way from the original network to the one that is multiplied.
struct LayerOrigin {
  int64_t edges = 0;     // stored edges of the original layer
  int64_t merged = 0;    // outputs that equal another one, which stands for them
  int64_t constant = 0;  // outputs of one value whatever the input, folded into the next layer's biases
  int64_t unread = 0;    // outputs that no later layer reads
};

// Throws std::invalid_argument that names the layer, counted from 1.
[[noreturn]] void fail_layer(int64_t number, const std::string& what);

// Throws std::invalid_argument where the rows are malformed or a number is not finite.
void check_layer(const LayerArrays& layer, int64_t number);

// Throws std::invalid_argument where the layer does not fit the one before, of `outputs_before` outputs; -1: there is
// none.
void check_chain(const LayerArrays& layer, int64_t number, int64_t outputs_before);

}  // namespace spdnn
