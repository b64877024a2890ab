// Kernel family `spread`: few features through all layers in one launch, each layer by all multiprocessors. A lane has
// an output, or several lanes share its edges. Blocks exchange what they computed through L2, and wait for the values
// themselves: memory that nobody has written yet holds a number that no activation is. So a layer costs one way to L2
// and back, and no barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"
#include "layout/plan_view.h"
#include "resident.h"

namespace spdnn::cuda {

// How the features of a call are laid over the multiprocessors.
struct SpreadRoom {
  int features;          // of a group, which has blocks of its own: 1, 2, 4 or 8
  int lanes;             // groups at work at a time
  int blocks;            // of a group, at most
  bool in_shared;        // blocks hold a layer's inputs in shared memory; else they read them where they are
  int64_t buffer_words;  // of one exchange buffer

  SpreadRoom(const PlanView& plan, int64_t features, const DeviceLimits& limits);

  // What the launch finds holding kUnwritten.
  int64_t exchange_words() const;
};

inline constexpr uint32_t kUnwritten = 0xFFFFFFFF;  // a NaN

// Words of `exchange`, whatever the device.
int64_t most_exchange_words(const PlanView& plan, int64_t features);

// The step has all layers of the plan, and reads the caller's input.
cudaError_t launch_spread(const ResidentStep& step, const SpreadRoom& room, uint32_t* exchange, cudaStream_t stream);

}  // namespace spdnn::cuda
