// Kernel family `chain`: many layers in one launch, each output by itself. A lane has an output and one, two or four
// features; activations lie in shared memory, twice, and edges come straight from L2 into registers, some ahead, across
// layers. What a warp has to do is written down before the launch, so that it meets nothing but edges.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "launch.h"
#include "layout/plan_view.h"
#include "resident.h"
#include "scale.h"

namespace spdnn::cuda {

// What is wrong with layers that are to be a chain, or null.
const char* check_chain(const PlanView& plan, int64_t first_layer, int64_t end_layer, const DeviceLimits& limits);

// Room for what is written down of a plan's chains, whichever layers they have.
int64_t chain_workspace_bytes(const PlanView& plan);

// Layers of a chain, and where in the workspace what is written down of them begins.
struct ChainLayers {
  int first_layer, end_layer;
  void* portions = nullptr;
};

// Writes down what all chains of a schedule have to do, and where that is. Before any of them runs: what a launch costs
// is paid once.
cudaError_t launch_deals(const uint32_t* words, const PlanView& plan, const Scale& scale, int64_t features,
                         std::vector<ChainLayers>& chains, void* workspace, cudaStream_t stream);

cudaError_t launch_chain(const ResidentStep& step, const PlanView& plan, void* portions, cudaStream_t stream);

}  // namespace spdnn::cuda
