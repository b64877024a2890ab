#include "layout/staged_sections.h"

#include <algorithm>
#include <stdexcept>

#include "layout/spdnn_layout.h"

namespace spdnn {
namespace {

constexpr int64_t kRecordWords = sizeof(StagedStage) / sizeof(uint32_t);

// Where a block's kernel finds an input: its stage, and its position there.
struct Place {
  uint16_t stage;
  uint16_t position;
};

struct Edge {
  uint32_t input;  // slot
  float value;
};

// Builds the sections block by block. What it keeps between blocks is room.
class Builder {
 public:
  Builder(const LayerArrays& layer, const std::vector<int32_t>& slot_of, const int32_t* input_slot, bool single_valued)
      : layer_(layer),
        input_slot_(input_slot),
        single_valued_(single_valued),
        row_of_slot_(slot_of.size()),
        is_read_((layer.inputs + 63) / 64),
        places_(layer.inputs) {
    for (size_t row = 0; row < slot_of.size(); ++row) row_of_slot_[slot_of[row]] = static_cast<int32_t>(row);
  }

  StagedSections build() {
    for (int64_t first = 0; first < layer_.outputs; first += kStagedRows) {
      first_stage_.push_back(static_cast<uint32_t>(stages_.size()));
      add_block(first, std::min<int64_t>(first + kStagedRows, layer_.outputs));
    }
    first_stage_.push_back(static_cast<uint32_t>(stages_.size()));
    return finish();
  }

 private:
  // Outputs in slots first .. end.
  void add_block(int64_t first, int64_t end) {
    collect_edges(first, end);
    collect_footprint();
    const int64_t inputs = static_cast<int64_t>(footprint_.size());
    const int64_t stages = (inputs + kStagedInputs - 1) / kStagedInputs;
    if (stages > UINT16_MAX) fail();
    for (int64_t stage = 0; stage < stages; ++stage) {
      const int64_t begin = inputs * stage / stages, stage_end = inputs * (stage + 1) / stages;
      for (int64_t k = begin; k < stage_end; ++k) {
        places_[footprint_[k]] = {static_cast<uint16_t>(stage), static_cast<uint16_t>(k - begin)};
      }
    }
    count_edges(stages);
    for (int64_t stage = 0; stage < stages; ++stage) {
      add_stage(stage, inputs * stage / stages, inputs * (stage + 1) / stages);
    }
    deal_out_edges();
  }

  void collect_edges(int64_t first, int64_t end) {
    edges_.clear();
    row_begin_.assign(1, 0);
    for (int64_t slot = first; slot < end; ++slot) {
      const int32_t row = row_of_slot_[slot];
      for (int64_t edge = layer_.indptr[row]; edge < layer_.indptr[row + 1]; ++edge) {
        const int32_t input = layer_.indices[edge];
        edges_.push_back({static_cast<uint32_t>(input_slot_ ? input_slot_[input] : input), layer_.value(edge)});
      }
      row_begin_.push_back(static_cast<int64_t>(edges_.size()));
    }
  }

  // The inputs that the block reads, ascending.
  void collect_footprint() {
    for (const Edge& edge : edges_) is_read_[edge.input / 64] |= uint64_t{1} << edge.input % 64;
    footprint_.clear();
    for (size_t word = 0; word < is_read_.size(); ++word) {
      for (; is_read_[word] != 0; is_read_[word] &= is_read_[word] - 1) {
        footprint_.push_back(static_cast<uint32_t>(word * 64 + __builtin_ctzll(is_read_[word])));
      }
    }
  }

  // Of each row in each stage.
  void count_edges(int64_t stages) {
    next_edge_.assign(stages * kStagedRows, 0);
    for (size_t row = 0; row + 1 < row_begin_.size(); ++row) {
      for (int64_t edge = row_begin_[row]; edge < row_begin_[row + 1]; ++edge) {
        ++next_edge_[places_[edges_[edge].input].stage * kStagedRows + row];
      }
    }
  }

  // Makes room for a stage, without its edges. In next_edge_ the counts give way to where each row's first edge goes.
  void add_stage(int64_t number, int64_t begin, int64_t end) {
    std::vector<uint32_t> chunk_begin(kStagedRows + 1);
    uint32_t chunks = 0;
    for (int64_t row = 0; row < kStagedRows; ++row) {
      int64_t& edges = next_edge_[number * kStagedRows + row];
      chunk_begin[row] = chunks;
      const int64_t chunks_of_row = (edges + kEdgeChunk - 1) / kEdgeChunk;
      edges = static_cast<int64_t>(chunks) * kEdgeChunk;
      chunks += static_cast<uint32_t>(chunks_of_row);
    }
    chunk_begin[kStagedRows] = chunks;
    const int64_t edges = static_cast<int64_t>(chunks) * kEdgeChunk;
    StagedStage stage{};
    stage.map_offset = append(footprint_.data() + begin, end - begin);
    stage.map_count = static_cast<uint32_t>(end - begin);
    stage.chunk_offset = append(chunk_begin.data(), static_cast<int64_t>(chunk_begin.size()));
    stage.index_offset = reserve(edges / 2);
    std::fill_n(reinterpret_cast<uint16_t*>(words_.data() + stage.index_offset), edges, uint16_t{kStagedInputs});
    if (!single_valued_) stage.value_offset = reserve(edges);  // zeros
    stages_.push_back(stage);
  }

  void deal_out_edges() {
    const StagedStage* stages = stages_.data() + first_stage_.back();
    for (size_t row = 0; row + 1 < row_begin_.size(); ++row) {
      for (int64_t k = row_begin_[row]; k < row_begin_[row + 1]; ++k) {
        const Place place = places_[edges_[k].input];
        const int64_t edge = next_edge_[place.stage * kStagedRows + row]++;
        const StagedStage& stage = stages[place.stage];
        reinterpret_cast<uint16_t*>(words_.data() + stage.index_offset)[edge] = place.position;
        if (!single_valued_) reinterpret_cast<float*>(words_.data() + stage.value_offset)[edge] = edges_[k].value;
      }
    }
  }

  // Puts the head, which counts the stages, before the rest.
  StagedSections finish() {
    StagedSections sections;
    sections.stages = static_cast<int64_t>(stages_.size());
    sections.records_offset = round_up(static_cast<int64_t>(first_stage_.size()), kWordAlignment);
    const int64_t head = sections.records_offset + sections.stages * kRecordWords;
    if (head + static_cast<int64_t>(words_.size()) > UINT32_MAX) fail();
    for (StagedStage& stage : stages_) {
      for (uint32_t* offset : {&stage.map_offset, &stage.chunk_offset, &stage.index_offset}) {
        *offset += static_cast<uint32_t>(head);
      }
      if (!single_valued_) stage.value_offset += static_cast<uint32_t>(head);
    }
    sections.words.resize(head + words_.size());
    std::copy(first_stage_.begin(), first_stage_.end(), sections.words.begin());
    std::copy_n(reinterpret_cast<const uint32_t*>(stages_.data()), stages_.size() * kRecordWords,
                sections.words.begin() + sections.records_offset);
    std::copy(words_.begin(), words_.end(), sections.words.begin() + head);
    return sections;
  }

  [[noreturn]] static void fail() {
    throw std::invalid_argument("the layer has too many edges for the staged kernels: choose another kernel");
  }

  // Zeroed. Returns where they stand now. Too many words are found out in finish().
  uint32_t reserve(int64_t count) {
    const size_t offset = words_.size();
    words_.resize(offset + round_up(count, kWordAlignment));
    return static_cast<uint32_t>(offset);
  }

  uint32_t append(const uint32_t* data, int64_t count) {
    const uint32_t offset = reserve(count);
    std::copy_n(data, count, words_.data() + offset);
    return offset;
  }

  const LayerArrays& layer_;
  const int32_t* input_slot_;
  const bool single_valued_;
  std::vector<int32_t> row_of_slot_;
  std::vector<uint32_t> first_stage_;
  std::vector<StagedStage> stages_;
  std::vector<uint32_t> words_;  // what the stages point to
  // Of the block in work:
  std::vector<Edge> edges_;
  std::vector<int64_t> row_begin_;
  std::vector<uint64_t> is_read_;  // a bit for each input
  std::vector<uint32_t> footprint_;
  std::vector<Place> places_;       // of each input that is read
  std::vector<int64_t> next_edge_;  // of each row in each stage: how many edges; then where the next one goes
};

}  // namespace

StagedSections build_staged_sections(const LayerArrays& layer, const std::vector<int32_t>& slot_of,
                                     const int32_t* input_slot, bool single_valued) {
  return Builder(layer, slot_of, input_slot, single_valued).build();
}

}  // namespace spdnn
