// A whole network for so few features that threads share the outputs of each layer, and not the features.
#pragma once

#include "cpu/kernels.h"
#include "cpu/network.h"

namespace spdnn::cpu {

// Whether a call is one of those.
bool are_few_features(const NetworkCall& call);

// As run_network: `alive` and `active` are cleared. Memory beyond the arguments: two tiles. Returns what is wrong with
// an index, or null. Throws std::bad_alloc.
const char* run_few_features(const NetworkCall& call, const Kernels& kernels, int helpers,
                             const ScheduleTask& schedule);

}  // namespace spdnn::cpu
