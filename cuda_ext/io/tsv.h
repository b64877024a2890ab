// Reads tables of two whole numbers and one number a line with tabs between: the form of the challenge's files.
#pragma once

#include <cstdint>
#include <memory>

namespace spdnn {

// The lines of a text up to the first one that is malformed or has no end.
struct TsvTable {
  std::unique_ptr<int32_t[]> first;
  std::unique_ptr<int32_t[]> second;
  std::unique_ptr<float[]> third;
  int64_t rows = 0;
  int64_t bytes = 0;  // how far the rows reach: where the malformed line, or the rest that has no end, begins
};

// Reads `size` bytes of text and none beyond, on at most `threads` threads. Lines end in \n or \r\n; blanks may stand
// around a field; whole numbers are what int32 holds.
TsvTable parse_tsv(const char* text, int64_t size, int threads);

}  // namespace spdnn
