// Kernel family `staged`, for outputs that share no inputs: one layer from device memory to device memory. The inputs
// that a block's outputs read are brought through shared memory in stages, as in section III of arXiv 2007.14152.
#pragma once

#include <cuda_runtime.h>

#include "layer_step.h"
#include "layout/plan_view.h"

namespace spdnn::cuda {

cudaError_t launch_staged(const LayerStep& step, const PlanLayer& layer, cudaStream_t stream);

}  // namespace spdnn::cuda
