// Lays the edges of a layer out once more, in blocks and stages: the staged sections of a plan (spdnn_layout.h).
#pragma once

#include <cstdint>
#include <vector>

#include "layout/layer_arrays.h"

namespace spdnn {

struct StagedSections {
  std::vector<uint32_t> words;
  int64_t records_offset = 0;  // where in `words` the StagedStage records begin
  int64_t stages = 0;
};

// `slot_of` gives the slot of each output, `input_slot` that of each input; null: inputs stand in order. Throws
// std::invalid_argument where 32-bit offsets do not reach.
StagedSections build_staged_sections(const LayerArrays& layer, const std::vector<int32_t>& slot_of,
                                     const int32_t* input_slot, bool single_valued);

}  // namespace spdnn
