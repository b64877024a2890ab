// The records of a plan, as the host code of both back ends reads them from the handler's `table` attribute.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layout/spdnn_layout.h"

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
  if (view->header->layers < 1 || view->header->layers > count || view->header->runs < 0 ||
      view->header->runs > count || count != kHeader + view->header->layers * kLayer + view->header->runs * kRun) {
    return "the plan's table does not hold the records that its header announces";
  }
  view->layers = reinterpret_cast<const PlanLayer*>(records + kHeader);
  view->runs = reinterpret_cast<const PlanRun*>(records + kHeader + view->header->layers * kLayer);
  return nullptr;
}

// Neurons of the widest of these layers, inputs and outputs.
inline int64_t widest(const PlanView& plan, int64_t first_layer, int64_t end_layer) {
  int64_t width = 0;
  for (int64_t l = first_layer; l < end_layer; ++l) {
    width = std::max({width, plan.layers[l].inputs, plan.layers[l].outputs});
  }
  return width;
}

// Whether [offset, offset + size) lies inside [begin, begin + room) and begins where sections may.
inline bool section_inside(int64_t offset, int64_t size, int64_t begin, int64_t room) {
  return offset >= begin && offset % kWordAlignment == 0 && size >= 0 && size <= room && offset - begin <= room - size;
}

inline constexpr int64_t kStageWords = sizeof(StagedStage) / sizeof(uint32_t);

// Where the words of a plan hold its layers' records, and behind them those of the runs.
inline constexpr int64_t kLayersWord = sizeof(PlanHeader) / sizeof(uint32_t);

inline int64_t runs_word(const PlanHeader& header) {
  return kLayersWord + header.layers * static_cast<int64_t>(sizeof(PlanLayer) / sizeof(uint32_t));
}

inline int64_t words_of_records(const PlanHeader& header) {
  return round_up(runs_word(header) + header.runs * static_cast<int64_t>(sizeof(PlanRun) / sizeof(uint32_t)),
                  kWordAlignment);
}

// Checks the records of layer l: that it goes on where the layer before ends, and that its sections fill its part of
// the plan, one behind the other, as the builder lays them: a record that was changed does not fit its neighbours.
// Sizes are bounded before they are multiplied. Returns what is wrong, or null.
inline const char* check_layer(const PlanView& plan, int64_t l, int64_t words) {
  constexpr int64_t kMaxNeurons = INT32_MAX;
  const PlanHeader& header = *plan.header;
  const PlanLayer& layer = plan.layers[l];
  const PlanLayer* before = l > 0 ? &plan.layers[l - 1] : nullptr;
  if (layer.inputs != (before ? before->outputs : header.inputs)) return "the widths of the plan's layers do not chain";
  if (layer.inputs < 0 || layer.inputs > kMaxNeurons || layer.outputs < 0 || layer.outputs > kMaxNeurons) {
    return "a layer is too wide";
  }
  if (!section_inside(layer.first_word, layer.words, 0, words) ||
      layer.first_word != (before ? before->first_word + before->words : words_of_records(header))) {
    return "a layer's sections lie outside the plan";
  }
  if (layer.next_words != (l + 1 < header.layers ? plan.layers[l + 1].words : 0)) {
    return "a layer announces another length for the next one";
  }
  const int64_t end = layer.first_word + layer.words;
  const auto inside = [&](int64_t offset, int64_t size) {
    return section_inside(offset, size, layer.first_word, layer.words);
  };
  int64_t next = layer.first_word;  // where the next section has to begin
  const auto follows = [&](int64_t offset, int64_t size) {
    if (offset != next || !inside(offset, size)) return false;
    next += round_up(size, kWordAlignment);
    return true;
  };
  if (!(layer.lower < layer.upper)) return "a layer's activation is malformed";
  if (layer.index_bits != 16 && layer.index_bits != 32) return "a layer's indices have an unknown width";
  if (layer.runs < 0 || layer.first_run != (before ? before->first_run + before->runs : 0) ||
      layer.first_run > header.runs - layer.runs) {
    return "a layer names runs that the plan does not hold";
  }
  int64_t slot = 0;
  for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
    const PlanRun& run = plan.runs[r];
    const bool power = run.group_outputs > 0 && (run.group_outputs & (run.group_outputs - 1)) == 0;
    if (!power || run.group_outputs > kMaxGroupOutputs || run.edges < 0 || run.edges % kEdgeChunk != 0 ||
        run.edges > 2 * layer.words || run.groups < 0 || run.groups > layer.outputs || run.first_slot != slot) {
      return "a run's record is malformed";
    }
    slot += run.groups * run.group_outputs;
    if (run.edges > 0 && run.groups > 2 * layer.words / run.edges) return "a run's indices lie outside the plan";
    const int64_t edges = run.groups * run.edges;
    if (!follows(run.index_offset, edges * layer.index_bits / 32))
      return "a run's indices do not follow what is before";
    if (run.value_offset >= 0 && !follows(run.value_offset, edges * run.group_outputs)) {
      return "a run's values do not follow its indices";
    }
  }
  if (slot != layer.outputs) return "a layer's runs do not cover its outputs";
  if (layer.bias_offset >= 0 && !follows(layer.bias_offset, layer.outputs)) return "a bias does not follow the runs";
  if (layer.staged_offset >= 0) {
    const int64_t blocks = (layer.outputs + kStagedRows - 1) / kStagedRows;
    if (layer.staged_offset != next || layer.stages < 0 || layer.stages > layer.words ||
        !inside(layer.staged_offset, blocks + 1) || !inside(layer.stage_offset, layer.stages * kStageWords)) {
      return "a layer's stages lie outside the plan";
    }
    next = end;  // what the stages point to fills the rest
  }
  if (next != end) return "a layer's sections do not fill its part of the plan";
  return nullptr;
}

// Checks all records. Returns what is wrong, or null.
inline const char* check_plan(const PlanView& plan, int64_t words) {
  const PlanHeader& header = *plan.header;
  if (header.words != words) return "the plan's words are cut short";
  for (int64_t l = 0; l < header.layers; ++l) {
    if (const char* wrong = check_layer(plan, l, words)) return wrong;
  }
  if (!header.merged_neurons && plan.layers[header.layers - 1].outputs != header.outputs) {
    return "the plan's outputs are not its last layer's";
  }
  const PlanLayer& last = plan.layers[header.layers - 1];
  if (header.slot_offset != last.first_word + last.words ||
      !section_inside(header.slot_offset, header.outputs, 0, words)) {
    return "the output order lies outside the plan";
  }
  return nullptr;
}

}  // namespace spdnn
