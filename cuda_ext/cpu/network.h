// A whole network on the CPU, in one call, without any XLA in it.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/tile.h"
#include "cpu/work_sharing.h"
#include "layout/plan_view.h"

namespace spdnn::cpu {

struct NetworkCall {
  PlanView plan;
  const uint32_t* words = nullptr;
  InputFeatures input;
  int64_t features = 0;
  float* activations = nullptr;  // (features, outputs), or null where not wanted
  bool* alive = nullptr;         // (features): not all zero after the last layer
  int32_t* active = nullptr;     // (layers): active features after each; null where not wanted
};

// Runs all layers. Memory beyond the arguments: at most 64 MiB a thread, or two tiles of 16 features where those take
// more (networks wider than half a million neurons). Returns what went wrong, or an empty string.
std::string run_network(const NetworkCall& call, int helpers, const ScheduleTask& schedule);

}  // namespace spdnn::cpu
