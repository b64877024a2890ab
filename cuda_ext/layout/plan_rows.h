// The rows of a plan (spdnn_layout.h): built from its words, read by the derivatives of both back ends.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layout/plan_view.h"

namespace spdnn {

struct PlanRows {
  std::vector<RowsLayer> layers;
  std::vector<uint32_t> words;
};

// Throws std::invalid_argument where a layer has 2^31 edges or more.
PlanRows build_rows(const PlanView& plan, const uint32_t* words);

struct RowsView {
  const RowsLayer* layers = nullptr;
  int64_t count = 0;

  const RowsLayer* begin() const { return layers; }
  const RowsLayer* end() const { return layers + count; }
  int64_t inputs() const { return layers[0].inputs; }
  int64_t outputs() const { return layers[count - 1].outputs; }
  int64_t mask_words() const { return layers[count - 1].mask_word + layers[count - 1].mask_words; }

  int64_t widest() const {
    int64_t width = inputs();
    for (const RowsLayer& layer : *this) width = std::max(width, layer.outputs);
    return width;
  }
};

// `records` holds RowsLayer records as 64-bit words; `words` is the length of what they point to. Sections lie one
// behind the other, as the builder lays them: a record that was changed does not fit its neighbours. Returns what is
// wrong, or null.
inline const char* view_rows(const int64_t* records, int64_t size, int64_t words, RowsView* view) {
  constexpr int64_t kRecord = sizeof(RowsLayer) / sizeof(int64_t);
  if (size < kRecord || size % kRecord != 0) return "the table of a plan's rows does not hold whole records";
  view->layers = reinterpret_cast<const RowsLayer*>(records);
  view->count = size / kRecord;
  int64_t width = view->inputs(), mask_word = 0, next = 0;
  const auto follows = [&](int64_t offset, int64_t length) {
    if (offset != next || !section_inside(offset, length, 0, words)) return false;
    next += round_up(length, kWordAlignment);
    return true;
  };
  for (const RowsLayer& layer : *view) {
    if (layer.inputs != width || layer.inputs < 0 || layer.outputs < 0 || layer.inputs >= INT32_MAX ||
        layer.outputs >= INT32_MAX) {
      return "the widths of a plan's rows do not chain";
    }
    width = layer.outputs;
    if (!follows(layer.row_offset, layer.outputs + 1) || !follows(layer.index_offset, layer.edges) ||
        !follows(layer.value_offset, layer.edges) || !follows(layer.bias_offset, layer.outputs) ||
        !follows(layer.column_offset, layer.inputs + 1) || !follows(layer.output_offset, layer.edges) ||
        !follows(layer.weight_offset, layer.edges)) {
      return "a plan's rows do not fill its words";
    }
    const int64_t mask_words = (layer.outputs + kMaskBits - 1) / kMaskBits;
    if (layer.mask_word != mask_word || (layer.mask_words != 0 && layer.mask_words != mask_words)) {
      return "the masks of a plan's rows are malformed";
    }
    mask_word += layer.mask_words;
  }
  return next == words ? nullptr : "a plan's rows do not fill its words";
}

}  // namespace spdnn
