// Edges in compressed rows as kernels read them, and sums that lanes share.
#pragma once

#include <cstdint>

#include "row_products.h"

namespace spdnn::cuda {

constexpr int kQuad = 4;  // edges, or features, that are read at a time

template <int kCount>
struct alignas(kCount * sizeof(float)) Floats {
  float at[kCount];
};

struct alignas(16) Ints {
  int32_t at[kQuad];
};

struct Quad {
  Ints indices;
  Floats<kQuad> weights;
};

// Edges of a row.
struct RowEdges {
  uint32_t begin, end;

  __device__ RowEdges(const CompressedRows& rows, int64_t row) : begin(0), end(0) {
    if (row >= rows.out_width) return;
    begin = max(rows.indptr[row], 0);
    end = static_cast<uint32_t>(min(int64_t{max(rows.indptr[row + 1], 0)}, rows.edges));
  }
};

// Adds up what lanes have of the same outputs, those that differ in the bits from kFrom to kTo: each time two lanes
// meet, each hands the other half of its sums over. Returns the first of those that stay, sums[0] and on, of which
// there are kCount. `together`: the lanes that come here.
template <int kFrom, int kTo, int kCount>
__device__ __forceinline__ int share_sums(float* sums, int lane, unsigned together = 0xFFFFFFFFu) {
  if constexpr (kFrom >= kTo) {
    return 0;
  } else if constexpr (kCount == 1) {
    sums[0] += __shfl_xor_sync(together, sums[0], kFrom);
    return share_sums<2 * kFrom, kTo, 1>(sums, lane, together);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kFrom;
#pragma unroll
    for (int v = 0; v < kHalf; ++v) {
      const float given = upper ? sums[v] : sums[v + kHalf], kept = upper ? sums[v + kHalf] : sums[v];
      sums[v] = kept + __shfl_xor_sync(together, given, kFrom);
    }
    return (upper ? kHalf : 0) + share_sums<2 * kFrom, kTo, kHalf>(sums, lane, together);
  }
}

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace spdnn::cuda
