// Products of many features with rows that were cut into slices (sliced_rows.h): 32 features of a slice of the inputs
// lie in shared memory, and sums of some hundreds of outputs stay in registers from slice to slice.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"
#include "row_products.h"

namespace spdnn::cuda {

// Bytes of workspace that it takes; 0 where the rows cannot be cut, or are not worth it.
int64_t sliced_product_bytes(const CompressedRows& rows);
int64_t sliced_sampled_bytes(const CompressedRows& rows, int64_t features);

// Whether so many features are worth it.
bool slices_pay(const CompressedRows& rows, int64_t features);

// Whether the device has the shared memory for it.
bool fits_slices(const DeviceLimits& limits);

cudaError_t launch_sliced_product(const Product& product, const DeviceLimits& limits, cudaStream_t stream);
cudaError_t launch_sliced_sampled(const Sampled& sampled, cudaStream_t stream);

}  // namespace spdnn::cuda
