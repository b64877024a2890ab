// Features of a slice of neurons in shared memory: eight lanes read a neuron's together, 128 bytes, so that banks never
// meet, whichever neurons a warp reads.
#pragma once

#include <cstdint>

#include "layout/spdnn_layout.h"
#include "row_edges.cuh"

namespace spdnn::cuda {

struct FeatureSlice {
  using Vector = Floats<kQuad>;
  static constexpr int kFeatures = 32;
  static constexpr int kLanes = kFeatures / kQuad;  // that share a neuron, four features each
  static constexpr int kStride = kLanes + 1;        // vectors of a neuron: neighbours are written to other banks
  static constexpr int64_t kNeuronBytes = kStride * static_cast<int64_t>(sizeof(Vector));

  // Brings features first .. first + 31 of the neurons from `begin`, a multiple of 32, to `end` along, zeros where
  // there are none or a mask holds no bit.
  template <int kThreads>
  __device__ static void load(const float* in, int64_t width, int64_t begin, int64_t end, int64_t first,
                              int64_t features, const Mask& mask, Vector* slice) {
    if (mask.words) {
      load<kThreads, true>(in, width, begin, end, first, features, mask, slice);
    } else {
      load<kThreads, false>(in, width, begin, end, first, features, mask, slice);
    }
  }

  // The neuron behind the last, of which all features are zero.
  __device__ static void clear_neuron(int64_t neuron, Vector* slice) {
    if (threadIdx.x < kLanes) slice[neuron * kStride + threadIdx.x] = Vector{};
  }

 private:
  // A thread has four features, and neurons as far apart as the threads that have the same. Loads stand under no
  // condition, so that many are on their way together.
  template <int kThreads, bool kMasked>
  __device__ static void load(const float* in, int64_t width, int64_t begin, int64_t end, int64_t first,
                              int64_t features, const Mask& mask, Vector* slice) {
    constexpr int kApart = kThreads / kLanes, kAtOnce = kMasked ? 2 : 4;
    const int lane = threadIdx.x / kApart;
    const float* rows[kQuad];
    const uint32_t* words[kQuad];
    bool held[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const int64_t feature = first + lane * kQuad + k, row = min(feature, features - 1);
      held[k] = feature < features;
      rows[k] = in + row * width + begin;
      if constexpr (kMasked) words[k] = mask.words + row * mask.stride + begin / kMaskBits;
    }
    const int count = static_cast<int>(end - begin);
    for (int place = threadIdx.x % kApart; place < count; place += kApart * kAtOnce) {
      Vector vectors[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const uint32_t from = min(place + n * kApart, count - 1);
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          const float y = rows[k][from];
          bool wanted = held[k];
          if constexpr (kMasked) wanted &= words[k][from / kMaskBits] >> (from % kMaskBits) & 1;
          vectors[n].at[k] = wanted ? y : 0.0f;
        }
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (place + n * kApart < count) slice[(place + n * kApart) * kStride + lane] = vectors[n];
      }
    }
  }
};

}  // namespace spdnn::cuda
