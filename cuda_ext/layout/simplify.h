// Rewrites a network into a smaller one that computes the same: equal neurons are merged, constant ones folded into the
// next layer's biases, unread ones dropped.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "layout/layer_arrays.h"

namespace spdnn {

// A simplified layer. A layer keeps one neuron at least.
struct SimplifiedLayer {
  int64_t inputs = 0;
  std::vector<int64_t> indptr;   // outputs + 1
  std::vector<int32_t> indices;  // ascending inside a row
  std::vector<float> values;     // one for each edge, or one for all
  std::vector<float> bias;       // one for each output, or one for all
  LayerOrigin origin;

  int64_t outputs() const { return static_cast<int64_t>(indptr.size()) - 1; }
};

// Takes the layers one by one, front to back, then goes over the result once, back to front.
//
// That is a fixed point. The forward pass decides on a neuron when all it reads is in its final form: what it merges
// stays merged, and what it keeps apart differs. Dropping a neuron that nobody reads changes no other neuron's edges,
// weights or bias, so it makes no two neurons equal and no neuron constant.
class Simplifier {
 public:
  // Bits of a row's hash outside of `hash_mask` are ignored: a test forces collisions with it.
  Simplifier(int threads, uint64_t hash_mask);

  // Takes the next layer; keeps nothing of its arrays. Throws std::invalid_argument.
  void add(const LayerArrays& layer);

  // To be called once, after the last layer. Throws std::invalid_argument where there is none.
  void finish();

  // After finish(): hands out the layers in order, and lets go of each.
  bool empty() const { return layers_.empty(); }
  SimplifiedLayer take();

  // After finish(): the output of the last simplified layer that holds each original output.
  const std::vector<int32_t>& expansion() const { return expansion_; }

 private:
  // What stands for a neuron of the layer before: a neuron of its simplified form, or a constant.
  struct Source {
    int32_t neuron;  // -1: `value`
    float value;
  };

  int threads_;
  uint64_t hash_mask_;
  int64_t layer_count_ = 0;
  int64_t last_outputs_ = -1;
  std::vector<Source> sources_;  // of the layer before; empty before the first layer: inputs stand for themselves
  std::vector<int32_t> expansion_;
  std::deque<SimplifiedLayer> layers_;
};

}  // namespace spdnn
