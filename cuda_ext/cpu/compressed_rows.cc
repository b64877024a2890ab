#include "cpu/compressed_rows.h"

#include <algorithm>

namespace spdnn::cpu {

// Without a branch in the loops: so they take a vector at a time, and cost little beside the product that follows.
const char* check_rows(const CompressedRows& rows) {
  if (rows.indptr[0] != 0 || rows.indptr[rows.outputs] != rows.edges) {
    return "indptr must rise from 0 to the number of edges";
  }
  bool falls = false;
  for (int64_t j = 0; j < rows.outputs; ++j) falls |= rows.indptr[j + 1] < rows.indptr[j];
  if (falls) return "indptr falls";
  int32_t least = 0, largest = -1;
  for (int64_t e = 0; e < rows.edges; ++e) {
    least = std::min(least, rows.indices[e]);
    largest = std::max(largest, rows.indices[e]);
  }
  return least < 0 || largest >= rows.inputs ? "an edge names an input neuron that does not exist" : nullptr;
}

}  // namespace spdnn::cpu
