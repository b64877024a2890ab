#include "layout/plan_builder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "layout/staged_sections.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace spdnn {

// Where the outputs of a layer stand: its row groups, run by run.
struct LayerOrder {
  struct Group {
    int64_t first_member;  // position in `members` of the first of the group's outputs
  };
  struct Run {
    int64_t group_outputs;
    int64_t edges;  // padded
    bool padded;    // some row of it is shorter than `edges`
    int64_t first_slot;
    std::vector<Group> groups;
  };
  std::vector<Run> runs;
  std::vector<int32_t> members;  // output neurons, the members of a group side by side
  std::vector<int32_t> slot_of;  // slot of each output neuron
  bool is_staged = false;        // the layer gets staged sections
};

namespace {

// Inputs of a layer that may be kept in shared memory: two buffers of one feature take all of it.
constexpr int64_t kWidestShared = 28 * 1024;

// Padded row length. Coarser for long rows, so that a layer of many different lengths has few runs: at most one
// eighth of the edges is padding beyond the multiple of 4.
int64_t padded_edges(int64_t edges) {
  int64_t step = kEdgeChunk;
  while (step * 16 < edges) step *= 2;
  return round_up(edges, step);
}

bool all_equal(const float* values, int64_t count) {
  return std::all_of(values, values + count, [&](float v) { return std::memcmp(&v, values, sizeof v) == 0; });
}

struct Row {
  uint64_t hash;
  int64_t edges;
  int32_t output;
};

// Finds the sets of outputs with the same inputs, orders them, and deals them out into runs.
class Grouping {
 public:
  Grouping(const LayerArrays& layer, const LayoutRule& rule) : layer_(layer), rule_(rule) {}

  std::shared_ptr<const LayerOrder> order() {
    find_sets();
    sort_sets();
    is_staged_ = wants_stages();
    if (is_staged_) sort_by_similarity();
    auto order = std::make_shared<LayerOrder>();
    deal_into_runs(*order);
    number_slots(*order);
    order->is_staged = is_staged_;
    return order;
  }

 private:
  struct Set {
    uint64_t leading_inputs;  // the two smallest inputs: sets that read the same region stand together
    int64_t edges;
    int64_t first_member;
    int64_t members;
  };

  const int32_t* inputs_of(int64_t row) const { return layer_.indices + layer_.indptr[row]; }
  int64_t edges_of(int64_t row) const { return layer_.indptr[row + 1] - layer_.indptr[row]; }

  uint64_t hash(int64_t row) const {
    uint64_t hash = 0x9E3779B97F4A7C15u;
    for (int64_t edge = layer_.indptr[row]; edge < layer_.indptr[row + 1]; ++edge) {
      hash = (hash ^ static_cast<uint32_t>(layer_.indices[edge])) * 0xD6E8FEB86659FD93u;
      hash ^= hash >> 32;
    }
    return hash;
  }

  bool same_inputs(int32_t a, int32_t b) const {
    return edges_of(a) == edges_of(b) && std::equal(inputs_of(a), inputs_of(a) + edges_of(a), inputs_of(b));
  }

  void find_sets() {
    std::vector<Row> rows(layer_.outputs);
    for (int64_t row = 0; row < layer_.outputs; ++row) {
      rows[row] = {hash(row), edges_of(row), static_cast<int32_t>(row)};
    }
    std::sort(rows.begin(), rows.end(),
              [](const Row& a, const Row& b) { return a.hash != b.hash ? a.hash < b.hash : a.output < b.output; });
    members_.reserve(rows.size());
    for (size_t begin = 0; begin < rows.size();) {
      size_t end = begin + 1;
      while (end < rows.size() && rows[end].hash == rows[begin].hash) ++end;
      add_sets_of_bucket(rows.data() + begin, rows.data() + end);
      begin = end;
    }
  }

  // Rows of one hash are nearly always equal; a collision only costs another pass over the bucket.
  void add_sets_of_bucket(Row* begin, Row* end) {
    while (begin != end) {
      const int32_t leader = begin->output;
      Row* rest = std::stable_partition(begin, end, [&](const Row& row) { return same_inputs(row.output, leader); });
      const int64_t first = static_cast<int64_t>(members_.size());
      for (Row* row = begin; row != rest; ++row) members_.push_back(row->output);
      sets_.push_back({leading_inputs(leader), edges_of(leader), first, rest - begin});
      begin = rest;
    }
  }

  uint64_t leading_inputs(int32_t row) const {
    const int64_t edges = edges_of(row);
    const uint64_t first = edges > 0 ? inputs_of(row)[0] : 0;
    const uint64_t second = edges > 1 ? inputs_of(row)[1] : 0;
    return first << 32 | second;
  }

  void sort_sets() {
    std::sort(sets_.begin(), sets_.end(), [&](const Set& a, const Set& b) {
      if (a.leading_inputs != b.leading_inputs) return a.leading_inputs < b.leading_inputs;
      return members_[a.first_member] < members_[b.first_member];
    });
  }

  // Sets stand for groups here: a set of more than 32 outputs, which is several groups, changes nothing.
  bool wants_stages() const {
    return std::max(layer_.inputs, layer_.outputs) > rule_.staged_wider_than && shares_less_than(rule_.staged_below);
  }

  bool shares_less_than(double outputs) const {
    return static_cast<double>(layer_.outputs) < outputs * static_cast<double>(std::max<size_t>(sets_.size(), 1));
  }

  // Blocks of outputs that read the same inputs have small footprints. Leading inputs tell where inputs are numbered by
  // place; signatures of hashes tell whatever their numbers. The order with the smaller footprints stays.
  void sort_by_similarity() {
    const int64_t footprint = footprint_of_blocks();
    const std::vector<Set> by_place = sets_;
    for (Set& set : sets_) set.leading_inputs = signature(members_[set.first_member]);
    sort_sets();
    if (footprint_of_blocks() >= footprint) sets_ = by_place;
  }

  // The two smallest hashes of the row's inputs: rows that share many inputs likely share these (min-hashing).
  uint64_t signature(int32_t row) const {
    uint32_t first = UINT32_MAX, second = UINT32_MAX;
    for (int64_t edge = layer_.indptr[row]; edge < layer_.indptr[row + 1]; ++edge) {
      uint32_t hash = static_cast<uint32_t>(layer_.indices[edge]) * 0x9E3779B1u;
      hash = (hash ^ hash >> 15) * 0x85EBCA77u;
      hash ^= hash >> 13;
      if (hash < first) {
        second = first;
        first = hash;
      } else if (hash < second) {
        second = hash;
      }
    }
    return static_cast<uint64_t>(first) << 32 | second;
  }

  // Distinct inputs of each block of outputs, all blocks together.
  int64_t footprint_of_blocks() const {
    std::vector<int64_t> last_block(layer_.inputs, -1);
    int64_t footprint = 0, rows = 0;
    for (const Set& set : sets_) {
      const int32_t row = members_[set.first_member];
      const int64_t block = rows / kStagedRows;
      rows += set.members;
      for (int64_t edge = layer_.indptr[row]; edge < layer_.indptr[row + 1]; ++edge) {
        int64_t& last = last_block[layer_.indices[edge]];
        footprint += last != block;
        last = block;
      }
    }
    return footprint;
  }

  // A set of 13 outputs becomes groups of 8, 4 and 1: no output is padded.
  void deal_into_runs(LayerOrder& order) {
    const int64_t most_outputs = !is_staged_ && shares_less_than(rule_.single_below) ? 1 : kMaxGroupOutputs;
    std::map<std::pair<int64_t, int64_t>, LayerOrder::Run> runs;  // by (-outputs of a group, edges): large groups first
    for (const Set& set : sets_) {
      const int64_t edges = padded_edges(set.edges);
      int64_t first = set.first_member;
      for (int64_t left = set.members, outputs = most_outputs; left > 0; outputs /= 2) {
        for (; left >= outputs; left -= outputs, first += outputs) {
          LayerOrder::Run& run = runs[{-outputs, edges}];
          run.padded |= set.edges != edges;
          run.groups.push_back({first});
        }
      }
    }
    for (auto& [key, run] : runs) {
      run.group_outputs = -key.first;
      run.edges = key.second;
      order.runs.push_back(std::move(run));
    }
    order.members = std::move(members_);
  }

  static void number_slots(LayerOrder& order) {
    order.slot_of.resize(order.members.size());
    int64_t next_slot = 0;
    for (LayerOrder::Run& run : order.runs) {
      run.first_slot = next_slot;
      const int64_t groups = static_cast<int64_t>(run.groups.size());
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t slice = group / kSliceGroups * kSliceGroups;
        const int64_t width = std::min<int64_t>(kSliceGroups, groups - slice);
        for (int64_t r = 0; r < run.group_outputs; ++r) {
          const int32_t output = order.members[run.groups[group].first_member + r];
          order.slot_of[output] =
              static_cast<int32_t>(run.first_slot + slice * run.group_outputs + r * width + group - slice);
        }
      }
      next_slot += groups * run.group_outputs;
    }
  }

  const LayerArrays& layer_;
  const LayoutRule& rule_;
  bool is_staged_ = false;
  std::vector<int32_t> members_;
  std::vector<Set> sets_;
};

// Writes the sections of a layer. `input_slot` gives the slot of each input neuron; null: neurons stand in order.
class Emission {
 public:
  Emission(const LayerArrays& layer, const LayerOrigin& origin, std::shared_ptr<const LayerOrder> order,
           const int32_t* input_slot)
      : layer_(layer), origin_(origin), order_(*order), input_slot_(input_slot) {
    built_.order = std::move(order);
  }

  BuiltLayer build() {
    PlanLayer& record = built_.layer;
    record.inputs = layer_.inputs;
    record.outputs = layer_.outputs;
    record.edges = origin_.edges;
    record.multiplied_edges = layer_.edges();
    record.merged = origin_.merged;
    record.constant = origin_.constant;
    record.unread = origin_.unread;
    record.runs = static_cast<int64_t>(order_.runs.size());
    record.lower = layer_.clip.lower;
    record.upper = layer_.clip.upper;
    record.index_bits = layer_.inputs <= 65536 ? 16 : 32;
    single_valued_ = all_equal(layer_.values, layer_.value_count);
    for (const LayerOrder::Run& run : order_.runs) emit(run);
    emit_bias();
    emit_staged();
    return std::move(built_);
  }

 private:
  // Makes room for `bytes` and returns its offset in words.
  int64_t reserve(int64_t bytes) {
    const int64_t offset = static_cast<int64_t>(built_.words.size());
    built_.words.resize(offset + round_up((bytes + 3) / 4, kWordAlignment));
    return offset;
  }

  void emit(const LayerOrder::Run& run) {
    PlanRun record{};
    record.group_outputs = run.group_outputs;
    record.edges = run.edges;
    record.groups = static_cast<int64_t>(run.groups.size());
    record.first_slot = run.first_slot;
    const int64_t group_edges = record.groups * record.edges;
    edge_order_.clear();
    if (run.group_outputs == 1 && layer_.inputs <= kWidestShared && !order_.is_staged) spread_over_banks(run);
    record.index_offset = reserve(group_edges * built_.layer.index_bits / 8);
    if (built_.layer.index_bits == 16) {
      emit_indices<uint16_t>(run, record.index_offset);
    } else {
      emit_indices<uint32_t>(run, record.index_offset);
    }
    record.value_offset = -1;
    if (single_valued_ && !run.padded) {
      record.value = layer_.value_count > 0 ? layer_.values[0] : 0.0f;
    } else if (group_edges > 0) {
      record.value_offset = reserve(group_edges * record.group_outputs * 4);
      emit_values(run, record.value_offset);
    }
    built_.runs.push_back(record);
  }

  // Orders the edges of each group, so that neighbouring groups read inputs whose slots differ modulo 8, 4 and 2 at a
  // time: a GPU's threads of such groups then find their activations in different banks of shared memory. Larger groups
  // read so little beside what they multiply that it does not matter.
  void spread_over_banks(const LayerOrder::Run& run) {
    constexpr int kClasses = 8;
    std::vector<int32_t> by_class(run.edges);
    edge_order_.resize(run.groups.size() * run.edges);
    int32_t* next = edge_order_.data();
    for (size_t group = 0; group < run.groups.size(); ++group) {
      const int32_t row = order_.members[run.groups[group].first_member];
      const int64_t begin = layer_.indptr[row], edges = layer_.indptr[row + 1] - begin;
      int32_t first[kClasses + 1] = {}, end[kClasses];  // of each class in by_class
      for (int64_t edge = 0; edge < edges; ++edge) ++first[slot_of_input(layer_.indices[begin + edge]) % kClasses + 1];
      for (int k = 0; k < kClasses; ++k) first[k + 1] += first[k];
      std::copy_n(first, kClasses, end);
      for (int64_t edge = 0; edge < edges; ++edge) {
        by_class[end[slot_of_input(layer_.indices[begin + edge]) % kClasses]++] = static_cast<int32_t>(edge);
      }
      for (int64_t edge = 0; edge < edges; ++edge) {
        const int wanted = static_cast<int>((edge + static_cast<int64_t>(group)) % kClasses);
        int chosen = wanted;
        for (int modulus = kClasses / 2; end[chosen] == first[chosen]; modulus /= 2) {  // the fullest of those near it
          for (int k = wanted % modulus; k < kClasses; k += modulus) {
            if (end[k] - first[k] > end[chosen] - first[chosen]) chosen = k;
          }
        }
        *next++ = by_class[--end[chosen]];
      }
      for (int64_t edge = edges; edge < run.edges; ++edge) *next++ = static_cast<int32_t>(edge);
    }
  }

  int32_t slot_of_input(int32_t input) const { return input_slot_ ? input_slot_[input] : input; }

  // Where an edge of the padded run stands in its rows.
  int64_t edge_in_row(const LayerOrder::Run& run, int64_t group, int64_t edge) const {
    return edge_order_.empty() ? edge : edge_order_[group * run.edges + edge];
  }

  // Calls visit(group, edge, element) for each edge of the padded run, `element` counting as spdnn_layout.h says.
  template <typename Visit>
  static void for_each_edge(const LayerOrder::Run& run, Visit visit) {
    const int64_t groups = static_cast<int64_t>(run.groups.size());
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t slice = group / kSliceGroups * kSliceGroups;
      const int64_t width = std::min<int64_t>(kSliceGroups, groups - slice);
      for (int64_t edge = 0; edge < run.edges; ++edge) {
        const int64_t in_slice = (edge / kEdgeChunk * width + group - slice) * kEdgeChunk + edge % kEdgeChunk;
        visit(group, edge, slice * run.edges + in_slice);
      }
    }
  }

  template <typename Index>
  void emit_indices(const LayerOrder::Run& run, int64_t offset) {
    Index* indices = reinterpret_cast<Index*>(built_.words.data() + offset);
    for_each_edge(run, [&](int64_t group, int64_t edge, int64_t element) {
      const int32_t row = order_.members[run.groups[group].first_member];
      const int64_t begin = layer_.indptr[row], last = layer_.indptr[row + 1] - 1;
      const int32_t input = layer_.indices[std::min(begin + edge_in_row(run, group, edge), last)];
      indices[element] = static_cast<Index>(slot_of_input(input));
    });
  }

  void emit_values(const LayerOrder::Run& run, int64_t offset) {
    float* values = reinterpret_cast<float*>(built_.words.data() + offset);
    const bool stored = layer_.value_count > 1;
    for_each_edge(run, [&](int64_t group, int64_t edge, int64_t element) {
      for (int64_t r = 0; r < run.group_outputs; ++r) {
        const int32_t row = order_.members[run.groups[group].first_member + r];
        const int64_t position = layer_.indptr[row] + edge_in_row(run, group, edge);
        const bool padding = position >= layer_.indptr[row + 1];
        values[element * run.group_outputs + r] = padding ? 0.0f : layer_.values[stored ? position : 0];
      }
    });
  }

  void emit_bias() {
    PlanLayer& record = built_.layer;
    record.bias_offset = -1;
    if (layer_.bias_count == 0) return;
    built_.keeps_zero = std::all_of(layer_.bias, layer_.bias + layer_.bias_count,
                                    [this](float bias) { return layer_.clip.clipped(bias) == 0; });
    if (all_equal(layer_.bias, layer_.bias_count)) {
      record.bias = layer_.bias[0];
      return;
    }
    record.bias_offset = reserve(record.outputs * 4);
    float* bias = reinterpret_cast<float*>(built_.words.data() + record.bias_offset);
    for (int64_t output = 0; output < record.outputs; ++output) bias[order_.slot_of[output]] = layer_.bias[output];
  }

  void emit_staged() {
    PlanLayer& record = built_.layer;
    record.staged_offset = record.stage_offset = -1;
    if (!order_.is_staged) return;
    const StagedSections sections = build_staged_sections(layer_, order_.slot_of, input_slot_, single_valued_);
    record.staged_offset = reserve(static_cast<int64_t>(sections.words.size()) * 4);
    record.stage_offset = record.staged_offset + sections.records_offset;
    record.stages = sections.stages;
    record.staged_single_valued = single_valued_;
    record.staged_value = single_valued_ && layer_.value_count > 0 ? layer_.values[0] : 0.0f;
    std::copy(sections.words.begin(), sections.words.end(), built_.words.begin() + record.staged_offset);
  }

  const LayerArrays& layer_;
  const LayerOrigin& origin_;
  const LayerOrder& order_;
  const int32_t* input_slot_;
  bool single_valued_ = false;
  std::vector<int32_t> edge_order_;  // of the run in work, where its edges do not stand as they came
  BuiltLayer built_;
};

using Order = std::shared_ptr<const LayerOrder>;

BuiltLayer build_layer(LayerArrays layer, LayerOrigin origin, int64_t number, LayoutRule rule,
                       std::promise<Order> order_promise, std::shared_future<Order> input_order) {
  Order order;
  try {
    check_layer(layer, number);
    order = Grouping(layer, rule).order();
    order_promise.set_value(order);
  } catch (...) {
    order_promise.set_exception(std::current_exception());
    throw;
  }
  const Order inputs = input_order.valid() ? input_order.get() : nullptr;
  return Emission(layer, origin, order, inputs ? inputs->slot_of.data() : nullptr).build();
}

// To the system: else freed layers stay resident, and the peak is twice the plan.
void return_freed_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

}  // namespace

PlanBuilder::PlanBuilder(int threads, const LayoutRule& rule) : threads_(std::max(threads, 1)), rule_(rule) {}

PlanBuilder::~PlanBuilder() = default;

void PlanBuilder::add(const LayerArrays& layer, const LayerOrigin& origin, std::shared_ptr<void> owner) {
  check_chain(layer, ++layer_count_, last_outputs_);
  while (in_work_.size() >= threads_) collect_one();
  if (layer_count_ == 1) header_.inputs = layer.inputs;
  last_outputs_ = layer.outputs;
  std::promise<Order> order_promise;
  std::shared_future<Order> order = order_promise.get_future().share();
  in_work_.push_back({std::move(owner), std::async(std::launch::async, build_layer, layer, origin, layer_count_, rule_,
                                                   std::move(order_promise), last_order_)});
  last_order_ = order;
}

void PlanBuilder::collect_one() {
  BuiltLayer built = in_work_.front().built.get();
  in_work_.pop_front();
  if (!built_.empty()) built_.back().order.reset();  // only the last layer's order is still needed
  built_.push_back(std::move(built));
}

int64_t PlanBuilder::finish(const Simplification& simplification) {
  if (layer_count_ == 0) throw std::invalid_argument("a network needs at least one layer");
  expansion_ = simplification.expansion;
  for (const int32_t output : expansion_) {
    if (output < 0 || output >= last_outputs_) throw std::invalid_argument("the expansion names an unknown output");
  }
  while (!in_work_.empty()) collect_one();
  header_.version = kPlanVersion;
  header_.layers = layer_count_;
  header_.outputs = simplification.neurons ? static_cast<int64_t>(expansion_.size()) : last_outputs_;
  header_.merged_neurons = simplification.neurons;
  header_.merge_features = simplification.features;
  bool later_keep_zero = true;
  for (auto built = built_.rbegin(); built != built_.rend(); ++built) {
    built->layer.prunable = later_keep_zero;
    later_keep_zero = later_keep_zero && built->keeps_zero;
    header_.runs += built->layer.runs;
  }
  int64_t words = round_up(
      (sizeof(PlanHeader) + header_.layers * sizeof(PlanLayer) + header_.runs * sizeof(PlanRun)) / sizeof(uint32_t),
      kWordAlignment);
  int64_t first_run = 0;
  for (size_t l = 0; l < built_.size(); ++l) {
    BuiltLayer& built = built_[l];
    built.layer.first_word = words;
    built.layer.words = static_cast<int64_t>(built.words.size());
    built.layer.next_words = l + 1 < built_.size() ? static_cast<int64_t>(built_[l + 1].words.size()) : 0;
    built.layer.first_run = first_run;
    first_run += built.layer.runs;
    for (int64_t* offset : {&built.layer.bias_offset, &built.layer.staged_offset, &built.layer.stage_offset}) {
      if (*offset >= 0) *offset += words;
    }
    for (PlanRun& run : built.runs) {
      run.index_offset += words;
      if (run.value_offset >= 0) run.value_offset += words;
    }
    words += static_cast<int64_t>(built.words.size());
  }
  header_.slot_offset = words;
  header_.words = words + round_up(header_.outputs, kWordAlignment);
  return header_.words;
}

void PlanBuilder::write(uint32_t* plan) {
  constexpr size_t kWorthReturning = size_t{64} << 20;  // it walks through the whole heap
  auto append = [next = reinterpret_cast<char*>(plan)](const void* data, size_t bytes) mutable {
    if (bytes > 0) std::memcpy(next, data, bytes);
    next += bytes;
    return next;
  };
  append(&header_, sizeof header_);
  for (const BuiltLayer& built : built_) append(&built.layer, sizeof built.layer);
  for (const BuiltLayer& built : built_) append(built.runs.data(), built.runs.size() * sizeof(PlanRun));
  const size_t table_words =
      (sizeof(PlanHeader) + header_.layers * sizeof(PlanLayer) + header_.runs * sizeof(PlanRun)) / sizeof(uint32_t);
  const uint32_t padding[kWordAlignment] = {};
  append(padding, (round_up(table_words, kWordAlignment) - table_words) * sizeof(uint32_t));
  const Order last_order = built_.back().order;
  size_t freed = 0;
  for (BuiltLayer& built : built_) {
    append(built.words.data(), built.words.size() * sizeof(uint32_t));
    freed += built.words.size() * sizeof(uint32_t);
    std::vector<uint32_t>().swap(built.words);
    if (freed >= kWorthReturning) {
      return_freed_memory();
      freed = 0;
    }
  }
  if (header_.merged_neurons) {
    for (const int32_t output : expansion_) append(&last_order->slot_of[output], sizeof(int32_t));
  } else {
    append(last_order->slot_of.data(), last_order->slot_of.size() * sizeof(int32_t));
  }
  append(padding, (round_up(header_.outputs, kWordAlignment) - header_.outputs) * sizeof(uint32_t));
}

}  // namespace spdnn
