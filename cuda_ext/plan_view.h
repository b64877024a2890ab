// The records of a plan, as the host code of both back ends reads them from the handler's `table` attribute.
#pragma once

#include <cstdint>

#include "spdnn_layout.h"

namespace spdnn {

struct PlanView {
  const PlanHeader* header = nullptr;
  const PlanLayer* layers = nullptr;
  const PlanRun* runs = nullptr;
};

// `records` holds the header, the layers and the runs, as 64-bit words. Returns what is wrong, or null.
inline const char* view_plan(const int64_t* records, int64_t count, PlanView* view) {
  constexpr int64_t kHeader = sizeof(PlanHeader) / 8, kLayer = sizeof(PlanLayer) / 8, kRun = sizeof(PlanRun) / 8;
  if (count < kHeader) return "the plan's table is shorter than its header";
  view->header = reinterpret_cast<const PlanHeader*>(records);
  if (view->header->version != kPlanVersion) return "the plan was built by another version of spdnn_jax";
  if (view->header->layers < 1 || view->header->runs < 0 ||
      count != kHeader + view->header->layers * kLayer + view->header->runs * kRun) {
    return "the plan's table does not hold the records that its header announces";
  }
  view->layers = reinterpret_cast<const PlanLayer*>(records + kHeader);
  view->runs = reinterpret_cast<const PlanRun*>(records + kHeader + view->header->layers * kLayer);
  return nullptr;
}

// Checks that widths chain and that every section lies inside the plan. Returns what is wrong, or null.
inline const char* check_plan(const PlanView& plan, int64_t words) {
  const PlanHeader& header = *plan.header;
  if (header.words != words) return "the plan's words are cut short";
  auto inside = [&](int64_t offset, int64_t size) {
    return offset >= 0 && size >= 0 && offset % kWordAlignment == 0 && size <= words && offset <= words - size;
  };
  int64_t width = header.inputs;
  for (int64_t l = 0; l < header.layers; ++l) {
    const PlanLayer& layer = plan.layers[l];
    if (layer.inputs != width) return "the widths of the plan's layers do not chain";
    width = layer.outputs;
    if (!inside(layer.first_word, layer.words)) return "a layer's sections lie outside the plan";
    if (layer.bias_offset >= 0 && !inside(layer.bias_offset, layer.outputs)) return "a bias lies outside the plan";
    if (layer.index_bits != 16 && layer.index_bits != 32) return "a layer's indices have an unknown width";
    if (layer.first_run < 0 || layer.runs < 0 || layer.first_run > header.runs - layer.runs) {
      return "a layer names runs that the plan does not hold";
    }
    int64_t slot = 0;
    for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
      const PlanRun& run = plan.runs[r];
      const bool power = run.group_outputs > 0 && (run.group_outputs & (run.group_outputs - 1)) == 0;
      if (!power || run.group_outputs > kMaxGroupOutputs || run.edges < 0 || run.edges % kEdgeChunk != 0 ||
          run.groups < 0 || run.first_slot != slot) {
        return "a run's record is malformed";
      }
      slot += run.groups * run.group_outputs;
      const int64_t edges = run.groups * run.edges;
      if (!inside(run.index_offset, edges * layer.index_bits / 32)) return "a run's indices lie outside the plan";
      if (run.value_offset >= 0 && !inside(run.value_offset, edges * run.group_outputs)) {
        return "a run's values lie outside the plan";
      }
    }
    if (slot != layer.outputs) return "a layer's runs do not cover its outputs";
  }
  if (!header.merged_neurons && width != header.outputs) return "the plan's outputs are not its last layer's";
  if (!inside(header.slot_offset, header.outputs)) return "the output order lies outside the plan";
  return nullptr;
}

}  // namespace spdnn
