#include <algorithm>
#include <cmath>

#include "launch.h"
#include "resident.h"
#include "resident_multiply_adds.cuh"
#include "resident_tensor.cuh"

namespace spdnn::cuda {
namespace {

// What the layers of a launch have in common.
struct Kind {
  int outputs = kMostOutputs;  // of a unit: 1, 4 or 16
  bool stored = false;
  int64_t most_outputs = 1;         // of a layer
  int64_t groups = 1;               // units of 16 outputs that a layer has at most
  int64_t smallest = kMostOutputs;  // group
  int64_t words = 0;                // of the longest layer's sections

  bool bounded = false;

  static constexpr int kMostOutputs = 16;

  Kind(const PlanView& plan, int64_t first_layer, int64_t end_layer) {
    for (int64_t l = first_layer; l < end_layer; ++l) {
      const PlanLayer& layer = plan.layers[l];
      int64_t layer_groups = 0;
      most_outputs = std::max(most_outputs, layer.outputs);
      words = std::max(words, layer.words);
      for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
        const PlanRun& run = plan.runs[r];
        stored |= run.value_offset >= 0;
        while (run.group_outputs < outputs) outputs /= 4;
        smallest = std::min(smallest, run.group_outputs);
        layer_groups += run.groups * std::max<int64_t>(run.group_outputs / kTogether, 1);
      }
      groups = std::max(groups, layer_groups);
    }
    if (stored) outputs = std::min(outputs, 4);
    bounded = std::isfinite(plan.header->cap);
  }

  // A tensor core's instruction is for 16 outputs with the same inputs; with 8, half of it is for nothing. What is not
  // bounded may overflow, and infinity has no parts.
  bool suits_tensor_cores() const { return smallest >= 8 && !stored && groups <= kMostUnits && bounded; }
};

// How a block computes the layers of a launch.
struct Choice {
  bool tensor = false;
  int features = 0;  // of a block; 0: not even the fewest fit
  int threads = 0;
};

bool fits(int64_t bytes, const DeviceLimits& limits) { return bytes + kSharedStatic <= limits.block_shared_bytes; }

int vector_for(int features) { return std::min(features, 4); }

Choice choose(const PlanView& plan, int64_t first_layer, int64_t end_layer, const DeviceLimits& limits) {
  const Kind kind(plan, first_layer, end_layer);
  const int64_t width = widest(plan, first_layer, end_layer);
  for (int panels = kMostPanels; panels > 0 && kind.suits_tensor_cores(); panels /= 2) {
    if (fits(SplitActivations::bytes(width, panels * kPanel), limits)) {
      const int64_t warps = std::clamp<int64_t>(kind.groups, 2, kMostThreads / 32);
      return {true, panels * kPanel, static_cast<int>((warps + 1) * 32)};
    }
  }
  for (int features = kMostFeatures; features >= 2; features /= 2) {
    const int64_t outputs_of_thread = kSumsOfThread / vector_for(features);
    const int64_t lanes = features / vector_for(features);
    const int64_t threads = round_up((kind.most_outputs + outputs_of_thread - 1) / outputs_of_thread * lanes, 32);
    if (fits(FloatActivations<4>::bytes(width, features), limits) && threads <= kMostThreads) {
      return {false, features, static_cast<int>(std::max<int64_t>(threads, 64))};
    }
  }
  return {};
}

template <int kVector>
cudaError_t launch_multiply_adds(const ResidentStep& step, const Choice& choice, const Kind& kind,
                                 const DeviceLimits& limits, cudaStream_t stream) {
  const auto launch = [&](auto products) {
    return launch_products<decltype(products)>(step, choice.features, choice.threads, kind.words, limits, stream);
  };
  switch (kind.outputs) {
    case 1:
      return kind.stored ? launch(MultiplyAdds<kVector, 1, true>{}) : launch(MultiplyAdds<kVector, 1, false>{});
    case 4:
      return kind.stored ? launch(MultiplyAdds<kVector, 4, true>{}) : launch(MultiplyAdds<kVector, 4, false>{});
    default:
      return launch(MultiplyAdds<kVector, 16, false>{});
  }
}

}  // namespace

int resident_features(const PlanView& plan, int64_t first_layer, int64_t end_layer, const DeviceLimits& limits) {
  return choose(plan, first_layer, end_layer, limits).features;
}

cudaError_t launch_resident(const ResidentStep& step, const PlanView& plan, cudaStream_t stream) {
  DeviceLimits limits;
  if (const cudaError_t error = read_device_limits(&limits); error != cudaSuccess) return error;
  const Choice choice = choose(plan, step.first_layer, step.end_layer, limits);
  const Kind kind(plan, step.first_layer, step.end_layer);
  if (choice.features == 0) return cudaErrorInvalidConfiguration;
  if (choice.tensor) {
    return launch_products<TensorProducts>(step, choice.features, choice.threads, kind.words, limits, stream);
  }
  return (choice.features == 2 ? launch_multiply_adds<2> : launch_multiply_adds<4>)(step, choice, kind, limits, stream);
}

}  // namespace spdnn::cuda
