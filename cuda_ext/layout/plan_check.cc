#include "layout/plan_check.h"

#include <algorithm>

namespace spdnn {
namespace {

bool all_below(LargestIndex largest, const void* indices, int bits, int64_t count, int64_t limit) {
  return count == 0 || largest(indices, bits, count) < limit;
}

bool ascends(const uint32_t* values, int64_t count, int64_t last) {
  return std::is_sorted(values, values + count) && values[count - 1] <= last;
}

// `end` is the first word after the layer's sections.
bool check_stage(const PlanLayer& layer, const StagedStage& stage, const uint32_t* words, int64_t end) {
  const int64_t room = end - layer.staged_offset;
  const uint32_t* staged = words + layer.staged_offset;
  const auto inside = [room](int64_t offset, int64_t size) { return section_inside(offset, size, 0, room); };
  if (stage.map_count > kStagedInputs || !inside(stage.map_offset, stage.map_count) ||
      !inside(stage.chunk_offset, kStagedRows + 1)) {
    return false;
  }
  const uint32_t* chunk_begin = staged + stage.chunk_offset;
  if (!ascends(chunk_begin, kStagedRows + 1, room)) return false;
  const int64_t edges = static_cast<int64_t>(chunk_begin[kStagedRows]) * kEdgeChunk;
  if (!inside(stage.index_offset, edges / 2)) return false;
  if (!layer.staged_single_valued && !inside(stage.value_offset, edges)) return false;
  const uint16_t* indices = reinterpret_cast<const uint16_t*>(staged + stage.index_offset);
  return all_below(largest_index, staged + stage.map_offset, 32, stage.map_count, layer.inputs) &&
         std::all_of(indices, indices + edges, [&](uint16_t k) { return k < stage.map_count || k == kStagedInputs; });
}

bool check_stages(const PlanLayer& layer, const uint32_t* words) {
  if (layer.staged_offset < 0) return true;
  const int64_t blocks = (layer.outputs + kStagedRows - 1) / kStagedRows;
  if (!ascends(words + layer.staged_offset, blocks + 1, layer.stages)) return false;
  const StagedStage* stages = reinterpret_cast<const StagedStage*>(words + layer.stage_offset);
  return std::all_of(stages, stages + layer.stages, [&](const StagedStage& stage) {
    return check_stage(layer, stage, words, layer.first_word + layer.words);
  });
}

std::string in_layer(int64_t l, const char* wrong) { return "layer " + std::to_string(l + 1) + ": " + wrong; }

}  // namespace

const char* check_group_indices(const PlanLayer& layer, const void* indices, int64_t count, LargestIndex largest) {
  return all_below(largest, indices, static_cast<int>(layer.index_bits), count, layer.inputs)
             ? nullptr
             : "an index names an input that the layer does not have";
}

const char* check_slots(const PlanView& plan, const uint32_t* words, LargestIndex largest) {
  const PlanHeader& header = *plan.header;
  return all_below(largest, words + header.slot_offset, 32, header.outputs, plan.layers[header.layers - 1].outputs)
             ? nullptr
             : "the output order names a slot that does not exist";
}

const char* check_indices(const PlanView& plan, int64_t l, const uint32_t* words, LargestIndex largest) {
  const PlanLayer& layer = plan.layers[l];
  for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
    const PlanRun& run = plan.runs[r];
    const char* wrong = check_group_indices(layer, words + run.index_offset, run.groups * run.edges, largest);
    if (wrong) return wrong;
  }
  return l + 1 == plan.header->layers ? check_slots(plan, words, largest) : nullptr;
}

std::string check_records(const int64_t* records, int64_t count, int64_t word_count, PlanView* plan) {
  if (const char* wrong = view_plan(records, count, plan)) return wrong;
  for (int64_t l = 0; l < plan->header->layers; ++l) {
    if (const char* wrong = check_layer(*plan, l, word_count)) return in_layer(l, wrong);
  }
  const char* wrong = check_plan(*plan, word_count);
  return wrong ? wrong : "";
}

std::string check_contents(const int64_t* records, int64_t count, const uint32_t* words, int64_t word_count) {
  PlanView plan;
  std::string problem = check_records(records, count, word_count, &plan);
  for (int64_t l = 0; problem.empty() && l < plan.header->layers; ++l) {
    if (const char* wrong = check_indices(plan, l, words, largest_index)) return in_layer(l, wrong);
    if (!check_stages(plan.layers[l], words)) return in_layer(l, "a stage reaches outside the layer");
  }
  return problem;
}

}  // namespace spdnn
