// A whole network on a GPU, without any XLA in it: launches on a stream, never synchronises, never allocates.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "input.h"
#include "layout/plan_view.h"

namespace spdnn::cuda {

// A stretch of layers and what is to be done there. `schedule` is made of these.
struct ScheduleStep {
  int64_t action;
  int64_t first_layer;
  int64_t end_layer;
};

inline constexpr int64_t kGrouped = 1;        // one layer a step
inline constexpr int64_t kResident = 2;       // all layers of the step in one launch
inline constexpr int64_t kStaged = 3;         // one layer a step
inline constexpr int64_t kEqualFeatures = 4;  // no layer: looks for equal features, in plans that allow it
inline constexpr int64_t kChain = 5;          // all layers of the step in one launch
inline constexpr int64_t kSpread = 6;         // all layers of the plan in one launch

struct NetworkCall {
  PlanView plan;                    // on the host
  const uint32_t* words = nullptr;  // the same plan on the device
  const ScheduleStep* schedule = nullptr;
  int64_t steps = 0;
  InputFeatures input{};
  int64_t features = 0;
  float* activations = nullptr;  // (features, outputs), or null where not wanted
  bool* alive = nullptr;         // (features)
  int32_t* active = nullptr;     // (layers), or null where not wanted
  void* workspace = nullptr;
};

// Bytes of workspace that a call needs.
int64_t workspace_bytes(const PlanView& plan, int64_t features);

// What is wrong with a schedule, on the device at hand; or null.
const char* check_schedule(const PlanView& plan, const ScheduleStep* schedule, int64_t steps);

// Launches all steps. Returns the first launch error.
cudaError_t run_network(const NetworkCall& call, cudaStream_t stream);

}  // namespace spdnn::cuda
