// Checks the contents of a plan. What its records say must hold already (`check_plan`).
#pragma once

#include <cstdint>
#include <string>

#include "layout/largest.h"
#include "layout/plan_view.h"

namespace spdnn {

// Whether every index of layer l (counted from 0) names one of the layer's inputs; with the last layer, too, whether
// the output order names its slots. Cheap beside running the layer: the CPU back end does it in every call, for words
// may have been changed since the plan was built, with a `largest` for its processor. Returns what is wrong, or null.
const char* check_indices(const PlanView& plan, int64_t l, const uint32_t* words, LargestIndex largest);

// The same of `count` indices of one of the layer's runs, and of the output order.
const char* check_group_indices(const PlanLayer& layer, const void* indices, int64_t count, LargestIndex largest);
const char* check_slots(const PlanView& plan, const uint32_t* words, LargestIndex largest);

// Checks all records of a plan of `word_count` words. Returns what is wrong and where, or an empty string.
std::string check_records(const int64_t* records, int64_t count, int64_t word_count, PlanView* plan);

// Checks a plan that comes from outside: its records, indices, output order and stages. `records` holds `count` 64-bit
// words, `words` a plan of `word_count`. Returns what is wrong and where, or an empty string.
std::string check_contents(const int64_t* records, int64_t count, const uint32_t* words, int64_t word_count);

}  // namespace spdnn
