// Kernel family `grouped`: one layer from device memory to device memory, a warp for a row group times 128 features.
#pragma once

#include <cuda_runtime.h>

#include "layer_step.h"
#include "layout/plan_view.h"

namespace spdnn::cuda {

cudaError_t launch_grouped(const LayerStep& step, const PlanLayer& layer, const PlanRun* runs, cudaStream_t stream);

}  // namespace spdnn::cuda
