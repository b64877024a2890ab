// What a call finds at its start in memory that it is given as it is.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "equal_features.h"

namespace spdnn::cuda {

struct StartStep {
  int64_t features;
  bool* alive;      // (features): false
  uint8_t* flags;   // (features): 0
  int32_t* active;  // (layers): 0; may be null
  int64_t layers;
  int32_t* counts;  // 0
  int64_t count_of_counts;
  uint32_t* unwritten;  // words that are filled with kUnwritten (spread.h)
  int64_t unwritten_words;
  FeatureClasses classes;  // each feature is its own; `table_places` is 0 where equal features are not looked for
};

// One launch for all of them.
cudaError_t launch_start(const StartStep& step, cudaStream_t stream);

}  // namespace spdnn::cuda
