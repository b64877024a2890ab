// Kernel family `chain`, for many features of layers so narrow that a block can hold 32 features of them twice: a lane
// has a feature, and a warp takes one output after the other. So all lanes read the same edges, and inputs that lie
// side by side.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"
#include "resident.h"

namespace spdnn::cuda {

// More features than these of layers of such a width, inputs and outputs, give all blocks work: fewer had better be
// spread more thinly. The largest number where layers are not so narrow.
int64_t too_few_for_narrow(int64_t width, const DeviceLimits& limits);

// Runs the layers of a chain where more than so many features are in work; else it returns at once.
cudaError_t launch_narrow(const ResidentStep& step, int64_t more_than, cudaStream_t stream);

}  // namespace spdnn::cuda
