// Values in the order of the transposed index, without any XLA in it: a program of many layers has one such call each,
// and of all differing sizes, for each of which XLA would compile a gather.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/work_sharing.h"

namespace spdnn::cpu {

struct PermutedCall {
  int64_t count = 0;
  const float* values = nullptr;   // (count)
  const int32_t* order = nullptr;  // (count): numbers of values
  float* result = nullptr;         // (count): values[order[k]]
};

// Returns what went wrong, or an empty string.
std::string run_permuted(const PermutedCall& call, int helpers, const ScheduleTask& schedule);

}  // namespace spdnn::cpu
