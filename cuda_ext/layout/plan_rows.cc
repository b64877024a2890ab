#include "layout/plan_rows.h"

#include <cmath>
#include <cstring>
#include <string>

#include "layout/layer_arrays.h"

namespace spdnn {
namespace {

struct Edge {
  int32_t input;
  float value;
};

// A layer's edges by output slot.
std::vector<std::vector<Edge>> read_edges(const PlanView& plan, const PlanLayer& layer, const uint32_t* words) {
  std::vector<std::vector<Edge>> rows(layer.outputs);
  for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
    const PlanRun& run = plan.runs[r];
    const auto index = [&](int64_t element) -> int32_t {
      if (layer.index_bits == 32) return static_cast<int32_t>(words[run.index_offset + element]);
      return reinterpret_cast<const uint16_t*>(words + run.index_offset)[element];
    };
    const float* values = run.value_offset < 0 ? nullptr : reinterpret_cast<const float*>(words + run.value_offset);
    for (int64_t slice = 0; slice < run.groups; slice += kSliceGroups) {
      const int64_t width = std::min<int64_t>(kSliceGroups, run.groups - slice);
      for (int64_t group = 0; group < width; ++group) {
        for (int64_t edge = 0; edge < run.edges; ++edge) {
          const int64_t element =
              slice * run.edges + (edge / kEdgeChunk * width + group) * kEdgeChunk + edge % kEdgeChunk;
          for (int64_t output = 0; output < run.group_outputs; ++output) {
            const float value = values ? values[element * run.group_outputs + output] : static_cast<float>(run.value);
            if (value == 0) continue;
            rows[run.first_slot + slice * run.group_outputs + output * width + group].push_back(
                {index(element), value});
          }
        }
      }
    }
  }
  return rows;
}

class Writer {
 public:
  explicit Writer(PlanRows* rows) : rows_(rows) {}

  // Room for a section. Returns its offset.
  int64_t add(int64_t words) {
    const int64_t offset = static_cast<int64_t>(rows_->words.size());
    rows_->words.resize(offset + round_up(words, kWordAlignment));
    return offset;
  }

  int32_t* ints(int64_t offset) { return reinterpret_cast<int32_t*>(rows_->words.data() + offset); }
  float* floats(int64_t offset) { return reinterpret_cast<float*>(rows_->words.data() + offset); }

 private:
  PlanRows* rows_;
};

// Slot of each row: itself, but in the last layer, whose rows are the original network's outputs.
std::vector<int32_t> slots_of_rows(const PlanView& plan, int64_t l, const uint32_t* words) {
  std::vector<int32_t> slots(l + 1 == plan.header->layers ? plan.header->outputs : plan.layers[l].outputs);
  for (size_t row = 0; row < slots.size(); ++row) {
    slots[row] = l + 1 == plan.header->layers ? static_cast<int32_t>(words[plan.header->slot_offset + row])
                                              : static_cast<int32_t>(row);
  }
  return slots;
}

void write_by_output(const std::vector<std::vector<Edge>>& edges, const std::vector<int32_t>& slots, RowsLayer* layer,
                     Writer* writer) {
  layer->row_offset = writer->add(layer->outputs + 1);
  layer->index_offset = writer->add(layer->edges);
  layer->value_offset = writer->add(layer->edges);
  int32_t *starts = writer->ints(layer->row_offset), *indices = writer->ints(layer->index_offset), edge = 0;
  float* values = writer->floats(layer->value_offset);
  for (size_t row = 0; row < slots.size(); ++row) {
    starts[row] = edge;
    for (const Edge& of_row : edges[slots[row]]) {
      indices[edge] = of_row.input;
      values[edge++] = of_row.value;
    }
  }
  starts[slots.size()] = edge;
}

// From the rows by output, which are there.
void write_by_input(RowsLayer* layer, Writer* writer) {
  layer->column_offset = writer->add(layer->inputs + 1);
  layer->output_offset = writer->add(layer->edges);
  layer->weight_offset = writer->add(layer->edges);
  const int32_t *starts = writer->ints(layer->row_offset), *indices = writer->ints(layer->index_offset);
  const float* values = writer->floats(layer->value_offset);
  int32_t *columns = writer->ints(layer->column_offset), *outputs = writer->ints(layer->output_offset);
  float* weights = writer->floats(layer->weight_offset);
  for (int64_t e = 0; e < layer->edges; ++e) ++columns[indices[e] + 1];
  for (int64_t i = 0; i < layer->inputs; ++i) columns[i + 1] += columns[i];
  std::vector<int32_t> next(columns, columns + layer->inputs);
  for (int64_t row = 0; row < layer->outputs; ++row) {
    for (int32_t e = starts[row]; e < starts[row + 1]; ++e) {
      const int32_t place = next[indices[e]]++;
      outputs[place] = static_cast<int32_t>(row);
      weights[place] = values[e];
    }
  }
}

}  // namespace

PlanRows build_rows(const PlanView& plan, const uint32_t* words) {
  PlanRows rows;
  Writer writer(&rows);
  int64_t mask_word = 0;
  for (int64_t l = 0; l < plan.header->layers; ++l) {
    const PlanLayer& from = plan.layers[l];
    const std::vector<std::vector<Edge>> edges = read_edges(plan, from, words);
    const std::vector<int32_t> slots = slots_of_rows(plan, l, words);
    RowsLayer layer{};
    layer.inputs = from.inputs;
    layer.outputs = static_cast<int64_t>(slots.size());
    for (const int32_t slot : slots) layer.edges += static_cast<int64_t>(edges[slot].size());
    if (layer.edges > INT32_MAX) fail_layer(l + 1, "has too many edges for derivatives: 2^31 or more");
    write_by_output(edges, slots, &layer, &writer);
    layer.bias_offset = writer.add(layer.outputs);
    for (size_t row = 0; row < slots.size(); ++row) {
      float bias = static_cast<float>(from.bias);
      if (from.bias_offset >= 0) std::memcpy(&bias, words + from.bias_offset + slots[row], sizeof bias);
      writer.floats(layer.bias_offset)[row] = bias;
    }
    write_by_input(&layer, &writer);
    layer.lower = from.lower;
    layer.upper = from.upper;
    const bool clips = std::isfinite(layer.lower) || std::isfinite(layer.upper);
    layer.mask_word = mask_word;
    layer.mask_words = clips ? (layer.outputs + kMaskBits - 1) / kMaskBits : 0;
    mask_word += layer.mask_words;
    rows.layers.push_back(layer);
  }
  return rows;
}

}  // namespace spdnn
