// A first layer alone in a launch, from the caller's bytes or bits: each block brings whole rows into shared memory, as
// they are, and computes all outputs from there. So the input is read once, and nothing is written but the result.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"
#include "layer_step.h"
#include "layout/plan_view.h"

namespace spdnn::cuda {

// Whether four rows of such a layer, a byte for each input, fit into shared memory.
bool fits_first_layer(const PlanLayer& layer, const DeviceLimits& limits);

// `runs`: the layer's, where the device reads them. Of the step, the source and the lists are not looked at.
cudaError_t launch_first_layer(const LayerStep& step, const InputFeatures& input, const PlanView& plan,
                               const PlanRun* runs, cudaStream_t stream);

}  // namespace spdnn::cuda
