// Checks the contents of a plan that comes from outside, once: the handlers check only its records, in every call.
#pragma once

#include <cstdint>
#include <string>

namespace spdnn {

// Whether every index names an input of its layer and every slot an output, and the records hold. `records` holds
// `count` 64-bit words, `words` a plan of `word_count`. Returns what is wrong and where, or an empty string.
std::string check_contents(const int64_t* records, int64_t count, const uint32_t* words, int64_t word_count);

}  // namespace spdnn
