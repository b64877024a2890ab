#include "plan_check.h"

#include <algorithm>

#include "plan_view.h"

namespace spdnn {
namespace {

// Whether all values lie below `limit`. Without an early way out of a block, compilers make vector code of it.
template <typename Value>
bool all_below(const Value* values, int64_t count, int64_t limit) {
  constexpr int64_t kBlock = 4096;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    Value largest = 0;
    for (int64_t k = begin; k < end; ++k) largest = std::max(largest, values[k]);
    if (largest >= limit) return false;
  }
  return true;
}

bool check_indices(const PlanLayer& layer, const PlanRun& run, const uint32_t* words) {
  const uint32_t* indices = words + run.index_offset;
  const int64_t count = run.groups * run.edges;
  if (layer.index_bits == 32) return all_below(indices, count, layer.inputs);
  return all_below(reinterpret_cast<const uint16_t*>(indices), count, layer.inputs);
}

}  // namespace

std::string check_contents(const int64_t* records, int64_t count, const uint32_t* words, int64_t word_count) {
  PlanView plan;
  if (const char* wrong = view_plan(records, count, &plan)) return wrong;
  for (int64_t l = 0; l < plan.header->layers; ++l) {
    const PlanLayer& layer = plan.layers[l];
    const char* wrong = check_layer(plan, l, word_count);
    for (int64_t r = layer.first_run; !wrong && r < layer.first_run + layer.runs; ++r) {
      if (!check_indices(layer, plan.runs[r], words)) wrong = "an index names an input that the layer does not have";
    }
    if (wrong) return "layer " + std::to_string(l + 1) + ": " + wrong;
  }
  if (const char* wrong = check_plan(plan, word_count)) return wrong;
  const int64_t slots = plan.layers[plan.header->layers - 1].outputs;
  if (!all_below(words + plan.header->slot_offset, plan.header->outputs, slots)) {
    return "layer " + std::to_string(plan.header->layers) + ": the output order names a slot that does not exist";
  }
  return "";
}

}  // namespace spdnn
