// Kernel family `chain`: many layers in one launch for few features. A block has one, two or four features and nothing
// to share weights with, so that these come straight from L2 into registers, a layer ahead of the one that is computed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layout/plan_view.h"
#include "resident.h"

namespace spdnn::cuda {

// What is wrong with layers that are to be a chain, or null.
const char* check_chain(const PlanView& plan, int64_t first_layer, int64_t end_layer);

// Features of which each multiprocessor has one block: up to so many a chain is the faster family.
cudaError_t chain_features(const PlanView& plan, int64_t first_layer, int64_t end_layer, int64_t* features);

// The kernel leaves everything as it is where more than `most_features` are in work.
cudaError_t launch_chain(const ResidentStep& step, const PlanView& plan, int64_t most_features, cudaStream_t stream);

}  // namespace spdnn::cuda
