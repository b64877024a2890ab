// What the kernels are told of a plan's runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "layout/plan_view.h"

namespace spdnn::cpu {

// All of a run but its activations: `in`, `out`, `stride`, `features` and `nonzero`.
inline RunTask task_of(const PlanLayer& layer, const PlanRun& run, const uint32_t* words) {
  const auto floats = [words](int64_t offset) {
    return offset < 0 ? nullptr : reinterpret_cast<const float*>(words + offset);
  };
  RunTask task{};
  task.indices = words + run.index_offset;
  task.index_bits = static_cast<int>(layer.index_bits);
  task.values = floats(run.value_offset);
  task.value = static_cast<float>(run.value);
  task.bias = floats(layer.bias_offset);
  task.shared_bias = static_cast<float>(layer.bias);
  task.group_outputs = run.group_outputs;
  task.edges = run.edges;
  task.groups = run.groups;
  task.first_slot = run.first_slot;
  task.lower = finite_bound(layer.lower);
  task.upper = finite_bound(layer.upper);
  return task;
}

// Slices first .. end of a task of whole runs.
inline RunTask slices_of(const RunTask& run, int64_t first, int64_t end) {
  RunTask task = run;
  const int64_t group = first * kSliceGroups, edge = group * run.edges;
  task.indices = static_cast<const char*>(run.indices) + edge * run.index_bits / 8;
  if (task.values) task.values += edge * run.group_outputs;
  task.groups = std::min(end * kSliceGroups, run.groups) - group;
  task.first_slot += group * run.group_outputs;
  return task;
}

}  // namespace spdnn::cpu
