// Weights in rows compressed by output neuron, as a caller gives them.
#pragma once

#include <cstdint>

namespace spdnn::cpu {

struct CompressedRows {
  int64_t inputs = 0, outputs = 0, edges = 0;
  const int32_t* indptr = nullptr;   // (outputs + 1)
  const int32_t* indices = nullptr;  // (edges): input neurons
};

// What is wrong with them, or null.
const char* check_rows(const CompressedRows& rows);

}  // namespace spdnn::cpu
