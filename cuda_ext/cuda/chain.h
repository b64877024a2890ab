// Kernel family `chain`: many layers in one launch, each output by itself. A lane has an output and one, two or four
// features; activations lie in shared memory, twice, and edges come straight from L2 into registers, some ahead, across
// layers. What a warp has to do is written down before the launch, so that it meets nothing but edges.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"
#include "layout/plan_view.h"
#include "resident.h"

namespace spdnn::cuda {

// What is wrong with layers that are to be a chain, or null.
const char* check_chain(const PlanView& plan, int64_t first_layer, int64_t end_layer, const DeviceLimits& limits);

// Room for what the launches of a step write down, whichever layers of the plan the step has.
int64_t chain_workspace_bytes(const PlanView& plan);

cudaError_t launch_chain(const ResidentStep& step, const PlanView& plan, void* workspace, cudaStream_t stream);

}  // namespace spdnn::cuda
