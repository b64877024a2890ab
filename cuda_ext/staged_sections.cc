#include "staged_sections.h"

#include <algorithm>
#include <stdexcept>

#include "spdnn_layout.h"

namespace spdnn {
namespace {

struct Edge {
  uint32_t input;  // slot; then position in the block's footprint
  float value;
};

// The edges of the outputs in slots first .. end, row by row, inputs ascending.
class Block {
 public:
  Block(const LayerArrays& layer, const std::vector<int32_t>& row_of_slot, int64_t first, int64_t end,
        const int32_t* input_slot) {
    row_begin_.push_back(0);
    for (int64_t slot = first; slot < end; ++slot) {
      const int32_t row = row_of_slot[slot];
      for (int64_t edge = layer.indptr[row]; edge < layer.indptr[row + 1]; ++edge) {
        const int32_t input = layer.indices[edge];
        edges_.push_back({static_cast<uint32_t>(input_slot ? input_slot[input] : input), layer.value(edge)});
      }
      std::sort(edges_.begin() + row_begin_.back(), edges_.end(),
                [](const Edge& a, const Edge& b) { return a.input < b.input; });
      row_begin_.push_back(static_cast<int64_t>(edges_.size()));
    }
    next_.assign(row_begin_.begin(), row_begin_.end() - 1);
  }

  // The inputs that the block reads, ascending. From then on edges name positions in it. `place_of` has an entry for
  // each input.
  std::vector<uint32_t> take_footprint(std::vector<uint32_t>& place_of) {
    std::vector<uint32_t> footprint;
    footprint.reserve(edges_.size());
    for (const Edge& edge : edges_) footprint.push_back(edge.input);
    std::sort(footprint.begin(), footprint.end());
    footprint.erase(std::unique(footprint.begin(), footprint.end()), footprint.end());
    for (size_t place = 0; place < footprint.size(); ++place) place_of[footprint[place]] = static_cast<uint32_t>(place);
    for (Edge& edge : edges_) edge.input = place_of[edge.input];
    return footprint;
  }

  // The edges of a row that lie before place `end` of the footprint and were not taken before.
  std::pair<const Edge*, const Edge*> take_row(int64_t row, uint32_t end) {
    if (row >= static_cast<int64_t>(next_.size())) return {nullptr, nullptr};
    const int64_t begin = next_[row];
    while (next_[row] < row_begin_[row + 1] && edges_[next_[row]].input < end) ++next_[row];
    return {edges_.data() + begin, edges_.data() + next_[row]};
  }

 private:
  std::vector<Edge> edges_;
  std::vector<int64_t> row_begin_;
  std::vector<int64_t> next_;  // of each row, the first edge that was not taken
};

class Writer {
 public:
  Writer(int64_t blocks, bool single_valued) : single_valued_(single_valued) { first_stage_.reserve(blocks + 1); }

  void add_block(Block& block, std::vector<uint32_t>& place_of) {
    first_stage_.push_back(static_cast<uint32_t>(stages_.size()));
    const std::vector<uint32_t> footprint = block.take_footprint(place_of);
    const int64_t inputs = static_cast<int64_t>(footprint.size());
    const int64_t stages = (inputs + kStagedInputs - 1) / kStagedInputs;
    for (int64_t stage = 0; stage < stages; ++stage) {
      add_stage(block, footprint, inputs * stage / stages, inputs * (stage + 1) / stages);
    }
  }

  StagedSections finish() {
    first_stage_.push_back(static_cast<uint32_t>(stages_.size()));
    StagedSections sections;
    sections.stages = static_cast<int64_t>(stages_.size());
    sections.records_offset = round_up(static_cast<int64_t>(first_stage_.size()), kWordAlignment);
    constexpr int64_t kRecordWords = sizeof(StagedStage) / sizeof(uint32_t);
    const int64_t head = sections.records_offset + sections.stages * kRecordWords;
    if (head + static_cast<int64_t>(words_.size()) > UINT32_MAX) {
      throw std::invalid_argument("the layer has too many edges for the staged kernels: choose another kernel");
    }
    sections.words.resize(head);
    std::copy(first_stage_.begin(), first_stage_.end(), sections.words.begin());
    for (StagedStage& stage : stages_) {
      for (uint32_t* offset : {&stage.map_offset, &stage.chunk_offset, &stage.index_offset}) {
        *offset += static_cast<uint32_t>(head);
      }
      if (!single_valued_) stage.value_offset += static_cast<uint32_t>(head);
    }
    std::copy_n(reinterpret_cast<const uint32_t*>(stages_.data()), stages_.size() * kRecordWords,
                sections.words.begin() + sections.records_offset);
    sections.words.insert(sections.words.end(), words_.begin(), words_.end());
    return sections;
  }

 private:
  void add_stage(Block& block, const std::vector<uint32_t>& footprint, int64_t begin, int64_t end) {
    std::vector<uint32_t> chunk_begin;
    std::vector<uint16_t> indices;
    std::vector<float> values;
    for (int64_t row = 0; row < kStagedRows; ++row) {
      chunk_begin.push_back(static_cast<uint32_t>(indices.size() / kEdgeChunk));
      const auto [first, last] = block.take_row(row, static_cast<uint32_t>(end));
      for (const Edge* edge = first; edge != last; ++edge) {
        indices.push_back(static_cast<uint16_t>(edge->input - begin));
        values.push_back(edge->value);
      }
      indices.resize(round_up(static_cast<int64_t>(indices.size()), kEdgeChunk), kStagedInputs);
      values.resize(indices.size(), 0.0f);
    }
    chunk_begin.push_back(static_cast<uint32_t>(indices.size() / kEdgeChunk));
    StagedStage stage{};
    stage.map_offset = append(footprint.data() + begin, (end - begin) * 4);
    stage.map_count = static_cast<uint32_t>(end - begin);
    stage.chunk_offset = append(chunk_begin.data(), static_cast<int64_t>(chunk_begin.size()) * 4);
    stage.index_offset = append(indices.data(), static_cast<int64_t>(indices.size()) * 2);
    if (!single_valued_) stage.value_offset = append(values.data(), static_cast<int64_t>(values.size()) * 4);
    stages_.push_back(stage);
  }

  // Returns where the bytes stand now. Too many words are found out in finish().
  uint32_t append(const void* data, int64_t bytes) {
    const size_t offset = words_.size();
    words_.resize(offset + round_up((bytes + 3) / 4, kWordAlignment));
    std::copy_n(static_cast<const char*>(data), bytes, reinterpret_cast<char*>(words_.data() + offset));
    return static_cast<uint32_t>(offset);
  }

  bool single_valued_;
  std::vector<uint32_t> first_stage_;
  std::vector<StagedStage> stages_;
  std::vector<uint32_t> words_;
};

}  // namespace

StagedSections build_staged_sections(const LayerArrays& layer, const std::vector<int32_t>& slot_of,
                                     const int32_t* input_slot, bool single_valued) {
  std::vector<int32_t> row_of_slot(slot_of.size());
  for (size_t row = 0; row < slot_of.size(); ++row) row_of_slot[slot_of[row]] = static_cast<int32_t>(row);
  std::vector<uint32_t> place_of(layer.inputs);
  const int64_t blocks = (layer.outputs + kStagedRows - 1) / kStagedRows;
  Writer writer(blocks, single_valued);
  for (int64_t b = 0; b < blocks; ++b) {
    Block block(layer, row_of_slot, b * kStagedRows, std::min<int64_t>((b + 1) * kStagedRows, layer.outputs),
                input_slot);
    writer.add_block(block, place_of);
  }
  return writer.finish();
}

}  // namespace spdnn
