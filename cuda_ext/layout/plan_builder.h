// Builds a plan (spdnn_layout.h) from layers in compressed-row form, layer by layer and on several threads.
#pragma once

#include <cstdint>
#include <deque>
#include <future>
#include <memory>
#include <vector>

#include "layout/layer_arrays.h"
#include "layout/spdnn_layout.h"

namespace spdnn {

struct LayerOrder;

// How the layers that the builder is given came out of the original network.
struct Simplification {
  bool neurons = false;            // equal neurons were merged
  bool features = false;           // the back ends may merge equal features
  std::vector<int32_t> expansion;  // output of the last layer that holds each original output, where `neurons`
};

// How layers are laid out, by the outputs of a row group, on average.
struct LayoutRule {
  double staged_below = 0;        // those with fewer get staged sections (spdnn_layout.h) ...
  int64_t staged_wider_than = 0;  // ... where they have more inputs or outputs than this
  double single_below = 0;        // others with fewer have each output in a row group of its own
};

struct BuiltLayer {
  PlanLayer layer{};          // first_run, prunable and offsets still relative to the layer
  std::vector<PlanRun> runs;  // offsets relative to `words`
  std::vector<uint32_t> words;
  bool keeps_zero = true;  // a feature that is all zero before the layer is so after it
  std::shared_ptr<const LayerOrder> order;
};

class PlanBuilder {
 public:
  // `threads` layers are worked on at a time.
  PlanBuilder(int threads, const LayoutRule& rule);
  PlanBuilder(const PlanBuilder&) = delete;
  PlanBuilder& operator=(const PlanBuilder&) = delete;
  ~PlanBuilder();

  // Takes the next layer, whose arrays live as long as `owner`. Returns when it is queued; blocks while `threads`
  // layers are in work. Throws std::invalid_argument, for this layer or one before it.
  void add(const LayerArrays& layer, const LayerOrigin& origin, std::shared_ptr<void> owner);

  // Number of words of the finished plan. Waits for all layers; throws like add.
  int64_t finish(const Simplification& simplification);

  // Writes the plan, of finish() words, and frees the layers on the way. To be called once, after finish().
  void write(uint32_t* plan);

 private:
  // Owners are let go of on the caller's thread: a worker that waited for Python's lock could wait for ever.
  struct InWork {
    std::shared_ptr<void> owner;
    std::future<BuiltLayer> built;
  };

  void collect_one();

  size_t threads_;
  LayoutRule rule_;
  std::vector<int32_t> expansion_;  // as in Simplification
  int64_t layer_count_ = 0;
  int64_t last_outputs_ = -1;
  PlanHeader header_{};
  std::shared_future<std::shared_ptr<const LayerOrder>> last_order_;
  std::deque<InWork> in_work_;
  std::vector<BuiltLayer> built_;
};

}  // namespace spdnn
