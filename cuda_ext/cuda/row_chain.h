// A plan's rows on a GPU: all layers, and both ways through their derivative.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layout/plan_rows.h"

namespace spdnn::cuda {

struct ChainCall {
  RowsView rows;                    // on the host
  const uint32_t* words = nullptr;  // on the device
  int64_t features = 0;
  const float* in = nullptr;  // (features, inputs); (features, outputs) where `transposed`
  float* out = nullptr;       // the reverse
  uint32_t* masks = nullptr;  // (features, mask words)
  char* workspace = nullptr;  // chain_workspace_bytes
};

// Bytes of workspace that a call needs.
int64_t chain_workspace_bytes(const RowsView& rows, int64_t features);

// All layers, and their masks. Returns the first launch error.
cudaError_t run_chain(const ChainCall& call, cudaStream_t stream);

// The derivative there, as in cpu/chain.h.
cudaError_t run_chain_derivative(const ChainCall& call, bool transposed, cudaStream_t stream);

}  // namespace spdnn::cuda
