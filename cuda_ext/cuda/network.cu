#include <algorithm>

#include "activity.h"
#include "grouped.h"
#include "network.h"
#include "resident.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int64_t kAlignment = 256;

int64_t widest(const PlanView& plan, int64_t first_layer, int64_t end_layer) {
  int64_t width = 0;
  for (int64_t l = first_layer; l < end_layer; ++l) {
    width = std::max({width, plan.layers[l].inputs, plan.layers[l].outputs});
  }
  return width;
}

// The arrays that lie in the workspace. Lists and activations exist twice: a step reads one and writes the other.
struct Workspace {
  float* tiles[2];
  int32_t* ids[2];
  int32_t* slots;
  int32_t* counts;  // features in work before each layer, and after the last
  uint8_t* flags;

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
    take(slots, padded);
    take(counts, plan.header->layers + 1);
    take(flags, padded);
    return used;
  }
};

class Launcher {
 public:
  Launcher(const NetworkCall& call, cudaStream_t stream) : call_(call), stream_(stream) {
    workspace_.lay_out(static_cast<char*>(call.workspace), call.plan, call.features);
  }

  cudaError_t run() {
    clear(call_.alive, call_.features);
    clear(call_.active, call_.plan.header->layers);
    clear(call_.activations, call_.features * call_.plan.header->outputs);
    clear(workspace_.counts, call_.plan.header->layers + 1);
    if (call_.features == 0) return error_;
    for (int64_t s = 0; s < call_.steps && error_ == cudaSuccess; ++s) {
      const ScheduleStep& step = call_.schedule[s];
      const bool last = s + 1 == call_.steps;
      if (step.family == kResident) {
        run_resident(step, last);
      } else {
        run_grouped(step.first_layer, last);
      }
    }
    return error_;
  }

 private:
  template <typename T>
  void clear(T* array, int64_t count) {
    if (array && count > 0) check(cudaMemsetAsync(array, 0, count * sizeof(T), stream_));
  }

  void check(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }

  const int32_t* slot_of() const {
    return reinterpret_cast<const int32_t*>(call_.words + call_.plan.header->slot_offset);
  }

  float cap() const { return static_cast<float>(call_.plan.header->cap); }

  void run_resident(const ScheduleStep& schedule, bool last) {
    ResidentStep step{};
    step.words = call_.words;
    step.layers_word = sizeof(PlanHeader) / sizeof(uint32_t);
    step.runs_word = step.layers_word + call_.plan.header->layers * sizeof(PlanLayer) / sizeof(uint32_t);
    step.runs = call_.plan.header->runs;
    step.first_layer = static_cast<int>(schedule.first_layer);
    step.end_layer = static_cast<int>(schedule.end_layer);
    step.max_width = static_cast<int>(widest(call_.plan, schedule.first_layer, schedule.end_layer));
    step.tile = resident_features(step.max_width);
    step.cap = cap();
    step.input = call_.input;
    step.features = call_.features;
    if (schedule.first_layer > 0) {
      step.source = workspace_.tiles[current_];
      step.ids = workspace_.ids[current_];
      step.count = workspace_.counts + schedule.first_layer;
    }
    step.active = call_.active;
    if (last) {
      step.alive = call_.alive;
      step.activations = call_.activations;
      step.slot_of = slot_of();
      step.outputs = call_.plan.header->outputs;
    } else {
      step.target = workspace_.tiles[1 - current_];
      step.target_ids = workspace_.ids[1 - current_];
      step.target_count = workspace_.counts + schedule.end_layer;
    }
    check(launch_resident(step, call_.plan, stream_));
    current_ = 1 - current_;
  }

  void run_grouped(int64_t l, bool last) {
    if (l == 0) {
      check(launch_read_input(call_.input, call_.features, workspace_.tiles[current_], stream_));
      check(launch_start(call_.features, workspace_.slots, workspace_.ids[current_], workspace_.counts, stream_));
    }
    const PlanLayer& layer = call_.plan.layers[l];
    GroupedStep step{};
    step.words = call_.words;
    step.cap = cap();
    step.source = workspace_.tiles[current_];
    step.slots = workspace_.slots;
    step.count = workspace_.counts + l;
    step.source_count = workspace_.counts + std::max<int64_t>(l - 1, 0);
    step.target = workspace_.tiles[1 - current_];
    step.flags = workspace_.flags;
    step.features = call_.features;
    if (l == 0) clear(workspace_.flags, call_.features);
    check(launch_grouped(step, layer, call_.plan.runs, stream_));
    ActivityStep activity{};
    activity.flags = workspace_.flags;
    activity.count = step.count;
    activity.ids = workspace_.ids[current_];
    activity.prunable = layer.prunable;
    activity.next_slots = workspace_.slots;
    activity.next_ids = workspace_.ids[1 - current_];
    activity.next_count = workspace_.counts + l + 1;
    activity.active = call_.active ? call_.active + l : nullptr;
    activity.alive = last ? call_.alive : nullptr;
    check(launch_activity(activity, stream_));
    if (last && call_.activations) {
      OutputStep output{};
      output.source = step.target;
      output.width = layer.outputs;
      output.outputs = call_.plan.header->outputs;
      output.ids = workspace_.ids[current_];
      output.count = step.count;
      output.slot_of = slot_of();
      output.activations = call_.activations;
      output.features = call_.features;
      check(launch_write_output(output, stream_));
    }
    current_ = 1 - current_;
  }

  const NetworkCall& call_;
  cudaStream_t stream_;
  Workspace workspace_;
  int current_ = 0;  // which of the arrays that exist twice the next step reads
  cudaError_t error_ = cudaSuccess;
};

}  // namespace

int64_t workspace_bytes(const PlanView& plan, int64_t features) { return Workspace{}.lay_out(nullptr, plan, features); }

const char* check_schedule(const PlanView& plan, const ScheduleStep* schedule, int64_t steps) {
  int64_t next_layer = 0;
  for (int64_t s = 0; s < steps; ++s) {
    const ScheduleStep& step = schedule[s];
    if (step.first_layer != next_layer || step.end_layer <= step.first_layer || step.end_layer > plan.header->layers) {
      return "the schedule's steps do not cover the layers in order";
    }
    if (step.family == kResident) {
      if (resident_features(widest(plan, step.first_layer, step.end_layer)) == 0) {
        return "the schedule keeps layers resident that are too wide for shared memory: build the plan again";
      }
    } else if (step.family != kGrouped || step.end_layer != step.first_layer + 1) {
      return "the schedule holds a malformed step";
    }
    if (s > 0 && step.family != schedule[0].family) return "the schedule mixes kernel families";
    next_layer = step.end_layer;
  }
  return next_layer == plan.header->layers ? nullptr : "the schedule's steps do not cover the layers in order";
}

cudaError_t run_network(const NetworkCall& call, cudaStream_t stream) { return Launcher(call, stream).run(); }

}  // namespace spdnn::cuda
