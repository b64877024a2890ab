// The largest of many indices: the whole of a bounds check where it lies below the bound.
//
// Without an early way out compilers make vector code of it, and each file that includes this has its own, for the
// instruction set that it is compiled for.
#pragma once

#include <cstdint>

namespace spdnn {
namespace {

template <typename Index>
inline uint32_t largest_of(const Index* indices, int64_t count) {
  Index largest = 0;
  for (int64_t k = 0; k < count; ++k) largest = indices[k] > largest ? indices[k] : largest;
  return largest;
}

// Of 16-bit or 32-bit indices; 0 where there are none.
inline uint32_t largest_index(const void* indices, int bits, int64_t count) {
  return bits == 16 ? largest_of(static_cast<const uint16_t*>(indices), count)
                    : largest_of(static_cast<const uint32_t*>(indices), count);
}

}  // namespace

using LargestIndex = uint32_t (*)(const void* indices, int bits, int64_t count);

}  // namespace spdnn
