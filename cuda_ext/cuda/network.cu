#include <algorithm>
#include <vector>

#include "activity.h"
#include "chain.h"
#include "equal_features.h"
#include "first_layer.h"
#include "grouped.h"
#include "launch.h"
#include "network.h"
#include "resident.h"
#include "rows.h"
#include "spread.h"
#include "staged.h"
#include "start.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int64_t kAlignment = 256;

// The arrays that lie in the workspace. Lists and activations exist twice: a step reads one and writes the other.
struct Workspace {
  float* tiles[2];
  int32_t* ids[2];
  int32_t* slots[2];
  int32_t* counts;  // features in work: before, and after each step
  uint8_t* flags;
  FeatureClasses classes;  // only where the plan lets equal features be merged
  uint4* chain;            // what a chain's launches write down
  uint32_t* exchange;      // through which blocks exchange activations where few features are spread

  // Lays the arrays out from `base` on. Returns the bytes they take.
  int64_t lay_out(char* base, const PlanView& plan, int64_t features) {
    int64_t used = 0;
    auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(base + used);
      used += (count * static_cast<int64_t>(sizeof *array) + kAlignment - 1) / kAlignment * kAlignment;
    };
    const int64_t padded = (features + 3) / 4 * 4;  // the grouped family reads and writes four features at a time
    for (float*& buffer : tiles) take(buffer, tiled_floats(features, widest(plan, 0, plan.header->layers)));
    for (int32_t*& list : ids) take(list, padded);
    for (int32_t*& list : slots) take(list, padded);
    take(counts, count_of_counts(plan));
    take(flags, padded);
    classes.table_places = plan.header->merge_features ? table_places(features) : 0;
    const int64_t entries = plan.header->merge_features ? features : 0;
    take(classes.hashes, entries);
    take(classes.candidates, entries);
    take(classes.table, classes.table_places);
    take(classes.leader_of, entries);
    take(classes.members, entries);
    take(chain, chain_workspace_bytes(plan) / static_cast<int64_t>(sizeof *chain));
    take(exchange, most_exchange_words(plan, features));
    return used;
  }

  // A step has one layer at least, or follows one that has.
  static int64_t count_of_counts(const PlanView& plan) { return 2 * plan.header->layers + 1; }
};

class Launcher {
 public:
  Launcher(const NetworkCall& call, cudaStream_t stream)
      : call_(call), stream_(stream), scale_(Scale::of_plan(call.plan)), input_(call.input) {
    input_.per_unit = scale_.per_unit;
    workspace_.lay_out(static_cast<char*>(call.workspace), call.plan, call.features);
    check(read_device_limits(&limits_));
    next_count_ = workspace_.counts;
  }

  cudaError_t run() {
    start();
    if (call_.features == 0) return error_;
    deal();
    for (int64_t s = 0; s < call_.steps && error_ == cudaSuccess; ++s) {
      const ScheduleStep& step = call_.schedule[s];
      const bool last = step.end_layer == call_.plan.header->layers;
      if (step.action == kEqualFeatures) {
        find_equal_features(step.first_layer);
      } else if (step.action == kSpread) {
        spread();
      } else if (step.action == kGrouped || step.action == kStaged) {
        run_layer(step, last);
      } else {
        run_layers(step, last);
      }
    }
    if (call_.plan.header->merge_features) {
      check(launch_expand(workspace_.classes, call_.features, call_.alive, call_.activations,
                          call_.plan.header->outputs, stream_));
    }
    return error_;
  }

 private:
  // The features in work, and where they stand. Null where nothing is to be said: see ActivityStep and LayerStep.
  struct Features {
    const int32_t* count = nullptr;
    const int32_t* source_count = nullptr;
    const int32_t* slots = nullptr;
    const int32_t* ids = nullptr;
  };

  void start() {
    StartStep step{};
    step.features = call_.features;
    step.alive = call_.alive;
    step.flags = workspace_.flags;
    step.active = call_.active;
    step.layers = call_.plan.header->layers;
    step.counts = workspace_.counts;
    step.count_of_counts = Workspace::count_of_counts(call_.plan);
    step.classes = workspace_.classes;
    const bool is_spread = call_.features > 0 && call_.steps > 0 && call_.schedule[0].action == kSpread;
    if (is_spread) {
      step.unwritten = workspace_.exchange;
      step.unwritten_words = SpreadRoom(call_.plan, call_.features, limits_).exchange_words();
    }
    check(launch_start(step, stream_));
    const size_t bytes = call_.features * call_.plan.header->outputs * sizeof(float);
    if (!is_spread && call_.activations && bytes > 0) check(cudaMemsetAsync(call_.activations, 0, bytes, stream_));
  }

  // Before the steps that may run layers as chains.
  void deal() {
    for (int64_t s = 0; s < call_.steps; ++s) {
      const ScheduleStep& step = call_.schedule[s];
      if (step.action != kChain) continue;
      chains_.push_back({static_cast<int>(step.first_layer), static_cast<int>(step.end_layer)});
    }
    if (error_ != cudaSuccess || chains_.empty()) return;
    check(launch_deals(call_.words, call_.plan, scale_, call_.features, chains_, workspace_.chain, stream_));
  }

  // What the next step sets flags to. No flag is that: they are cleared when all numbers have been used.
  uint8_t next_flag() {
    if (++flag_ == 0) {
      check(cudaMemsetAsync(workspace_.flags, 0, call_.features, stream_));
      flag_ = 1;
    }
    return flag_;
  }

  void check(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }

  const int32_t* slot_of() const {
    return reinterpret_cast<const int32_t*>(call_.words + call_.plan.header->slot_offset);
  }

  const PlanRun* device_runs() const {
    return reinterpret_cast<const PlanRun*>(call_.words + runs_word(*call_.plan.header));
  }

  const int32_t* members() const { return call_.plan.header->merge_features ? workspace_.classes.members : nullptr; }

  float* source() const { return workspace_.tiles[tiles_]; }
  float* target() const { return workspace_.tiles[1 - tiles_]; }
  int32_t* next_ids() const { return workspace_.ids[1 - list_]; }

  // After a step that wrote `target()`.
  void flip_tiles() { tiles_ = 1 - tiles_; }

  // After a step that wrote `next_ids()` and `next_count_`.
  void flip_lists() {
    list_ = 1 - list_;
    now_.ids = workspace_.ids[list_];
    now_.slots = workspace_.slots[list_];
    now_.count = next_count_++;
  }

  ResidentStep layers_of(int64_t first_layer, int64_t end_layer) const {
    ResidentStep step{};
    step.words = call_.words;
    step.layers_word = kLayersWord;
    step.runs_word = runs_word(*call_.plan.header);
    step.runs = call_.plan.header->runs;
    step.first_layer = static_cast<int>(first_layer);
    step.end_layer = static_cast<int>(end_layer);
    step.max_width = static_cast<int>(widest(call_.plan, first_layer, end_layer));
    step.scale = scale_;
    step.input = input_;
    step.features = call_.features;
    step.active = call_.active;
    return step;
  }

  void give_results(ResidentStep& step) const {
    step.alive = call_.alive;
    step.activations = call_.activations;
    step.slot_of = slot_of();
    step.outputs = call_.plan.header->outputs;
  }

  void spread() {
    ResidentStep step = layers_of(0, call_.plan.header->layers);
    give_results(step);
    check(launch_spread(step, SpreadRoom(call_.plan, call_.features, limits_), workspace_.exchange, stream_));
  }

  void run_layers(const ScheduleStep& schedule, bool last) {
    ResidentStep step = layers_of(schedule.first_layer, schedule.end_layer);
    step.source = schedule.first_layer > 0 ? source() : nullptr;
    step.slots = now_.slots;
    step.ids = now_.ids;
    step.members = members();
    step.count = now_.count;
    if (last) {
      give_results(step);
    } else {
      step.target = target();
      step.target_ids = next_ids();
      step.target_count = next_count_;
    }
    if (schedule.action == kChain) {
      check(launch_chain(step, call_.plan, chains_[next_chain_++].portions, stream_));
    } else {
      check(launch_resident(step, call_.plan, stream_));
    }
    flip_tiles();
    flip_lists();
    now_.slots = nullptr;
    now_.source_count = now_.count;
  }

  void run_layer(const ScheduleStep& schedule, bool last) {
    const int64_t l = schedule.first_layer;
    const PlanLayer& layer = call_.plan.layers[l];
    LayerStep step{};
    step.words = call_.words;
    step.scale = scale_;
    step.bounds = scale_.bounds(layer);
    step.source = source();
    const bool from_narrow = l == 0 && schedule.action == kGrouped && input_.type != InputType::kFloat32;
    const bool from_rows = from_narrow && fits_first_layer(layer, limits_);
    if (from_narrow && !from_rows) {
      check(launch_read_narrow_input(input_, call_.features, source(), stream_));
      step.source = nullptr;
      step.narrow_source = source();
      step.narrow_type = input_.type;
    } else if (l == 0 && !from_rows) {
      check(launch_read_input(input_, call_.features, source(), stream_));
    }
    step.slots = now_.slots;
    step.count = now_.count;
    step.source_count = now_.source_count;
    step.target = target();
    step.flags = workspace_.flags;
    step.flag = next_flag();
    step.features = call_.features;
    if (schedule.action == kStaged) {
      check(launch_staged(step, layer, stream_));
    } else if (from_rows) {
      check(launch_first_layer(step, input_, call_.plan, device_runs() + layer.first_run, stream_));
    } else {
      check(launch_grouped(step, layer, call_.plan.runs, stream_));
    }
    if (last && call_.activations) write_output(layer);
    flip_tiles();
    now_.slots = nullptr;  // in the target each feature stands at its own number
    now_.source_count = now_.count;
    ActivityStep activity = lists_after(layer.prunable);
    activity.active = call_.active ? call_.active + l : nullptr;
    activity.alive = last ? call_.alive : nullptr;
    check(launch_activity(activity, stream_));
    flip_lists();
  }

  ActivityStep lists_after(bool prunable) const {
    ActivityStep activity{};
    activity.flags = workspace_.flags;
    activity.flag = flag_;
    activity.count = now_.count;
    activity.features = call_.features;
    activity.slots = now_.slots;
    activity.ids = now_.ids;
    activity.members = members();
    activity.prunable = prunable;
    activity.next_slots = workspace_.slots[1 - list_];
    activity.next_ids = next_ids();
    activity.next_count = next_count_;
    return activity;
  }

  void write_output(const PlanLayer& layer) {
    OutputStep output{};
    output.source = target();
    output.width = layer.outputs;
    output.unit = scale_.unit;
    output.outputs = call_.plan.header->outputs;
    output.ids = now_.ids;
    output.count = now_.count;
    output.slot_of = slot_of();
    output.activations = call_.activations;
    output.features = call_.features;
    check(launch_write_output(output, stream_));
  }

  void find_equal_features(int64_t l) {
    EqualStep step{};
    step.classes = workspace_.classes;
    step.source = source();
    step.width = call_.plan.layers[l].inputs;
    step.flags = workspace_.flags;
    next_flag();
    step.activity = lists_after(true);
    check(launch_equal_features(step, stream_));
    flip_lists();
  }

  const NetworkCall& call_;
  cudaStream_t stream_;
  Scale scale_;
  InputFeatures input_;
  Workspace workspace_;
  DeviceLimits limits_;
  Features now_;
  int tiles_ = 0, list_ = 0;  // which of the arrays that exist twice the next step reads
  uint8_t flag_ = 0;          // of the step in work
  int32_t* next_count_ = nullptr;
  std::vector<ChainLayers> chains_;
  size_t next_chain_ = 0;
  cudaError_t error_ = cudaSuccess;
};

// `before`: the step before, or null.
const char* check_step(const PlanView& plan, const ScheduleStep& step, const ScheduleStep* before,
                       const DeviceLimits& limits) {
  const int64_t layers = step.end_layer - step.first_layer;
  if (step.first_layer != (before ? before->end_layer : 0) || layers < 0 || step.end_layer > plan.header->layers) {
    return "the schedule's steps do not cover the layers in order";
  }
  switch (step.action) {
    case kGrouped:
      return layers == 1 ? nullptr : "a step of the grouped family has one layer";
    case kStaged:
      if (layers != 1) return "a step of the staged family has one layer";
      return plan.layers[step.first_layer].staged_offset >= 0 ? nullptr : "a layer lacks the staged family's sections";
    case kChain:
      return layers < 1 ? "a step of the chain family has no layer"
                        : check_chain(plan, step.first_layer, step.end_layer, limits);
    case kSpread:
      return layers == plan.header->layers ? nullptr : "a step of the spread family has all layers";
    case kResident:
      if (layers < 1) return "a step of the resident family has no layer";
      if (resident_features(plan, step.first_layer, step.end_layer, limits) > 0) return nullptr;
      return "the schedule keeps layers resident that are too wide for shared memory: build the plan again";
    case kEqualFeatures:
      if (layers != 0 || !before || before->action == kEqualFeatures || step.end_layer == plan.header->layers) {
        return "equal features can be looked for between layers only";
      }
      return plan.header->merge_features ? nullptr : "the plan does not let equal features be merged";
    default:
      return "the schedule holds an unknown step";
  }
}

}  // namespace

int64_t workspace_bytes(const PlanView& plan, int64_t features) { return Workspace{}.lay_out(nullptr, plan, features); }

const char* check_schedule(const PlanView& plan, const ScheduleStep* schedule, int64_t steps) {
  DeviceLimits limits;
  if (read_device_limits(&limits) != cudaSuccess) return "the CUDA device does not answer";
  int64_t next_layer = 0;
  for (int64_t s = 0; s < steps; ++s) {
    if (const char* wrong = check_step(plan, schedule[s], s > 0 ? &schedule[s - 1] : nullptr, limits)) return wrong;
    next_layer = schedule[s].end_layer;
  }
  return next_layer == plan.header->layers ? nullptr : "the schedule's steps do not cover the layers in order";
}

cudaError_t run_network(const NetworkCall& call, cudaStream_t stream) { return Launcher(call, stream).run(); }

}  // namespace spdnn::cuda
