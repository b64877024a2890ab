// Compressed rows cut into slices of the inputs, so narrow that 32 features of a slice fit into shared memory. What a
// row has of a slice lies side by side, four edges at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "row_edges.cuh"
#include "row_products.h"

namespace spdnn::cuda {

inline constexpr int64_t kMostSliceNeurons = 1184;  // 167 KiB, which leaves room for weights on their way

struct SlicedRows {
  int64_t slice_neurons = 0;  // a multiple of 32
  int64_t slices = 0;
  int64_t quad_count = 0;      // room for them
  uint32_t* firsts = nullptr;  // (out_width, slices + 1): where each row's part of a slice begins, counted in edges
  Quad* quads = nullptr;       // indices: how many bytes a neuron lies behind the slice's first
  uint32_t* places = nullptr;  // (edges): where each stands among the edges of all quads; null: nobody asks

  // Where a row's part of a slice begins, whose first edge is that. Each part is rounded up by itself: it ends before
  // the next one begins, for that lies one quad further than by the edges between them.
  __host__ __device__ int64_t first_quad(uint32_t first_edge, int64_t row, int64_t slice) const {
    return first_edge / kQuad + row * slices + slice;
  }
};

// How rows are cut. Not at all, `slices` 0, where their parts would have hardly any edges.
SlicedRows cut_rows(const CompressedRows& rows);

// Bytes of the arrays, and lays them out in a workspace.
int64_t sliced_rows_bytes(const CompressedRows& rows, const SlicedRows& sliced, bool with_places);
void place_sliced_rows(const CompressedRows& rows, void* workspace, bool with_places, SlicedRows* sliced);

// Fills them. `values`: of the edges, or one for all; null: none are needed.
cudaError_t launch_slice_rows(const CompressedRows& rows, const float* values, bool single_value,
                              const SlicedRows& sliced, cudaStream_t stream);

// result[edge] = the sum of what so many arrays, one behind the other, hold in its place; 0 where it has none.
cudaError_t launch_gather_sums(const CompressedRows& rows, const SlicedRows& sliced, const float* sums, int64_t parts,
                               float* result, cudaStream_t stream);

}  // namespace spdnn::cuda
