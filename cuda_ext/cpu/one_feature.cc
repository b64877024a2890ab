// One run of one layer times one feature: lanes are outputs. Compiled once per instruction set, as kernels.cc is, and
// with the same sums in the same order: a result does not depend on how many features are computed at a time.
#ifdef __AVX512F__
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC's header starts from vectors of any content (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#include "cpu/slices.h"

#define SPDNN_CONCATENATE_(a, b) a##b
#define SPDNN_CONCATENATE(a, b) SPDNN_CONCATENATE_(a, b)

namespace spdnn::cpu {
namespace {

constexpr int kMaxGroups = 4;  // so many sums that additions need not wait for each other

inline uint32_t bits_of(float y) { return load<uint32_t>(&y); }

// --- outputs that share their inputs: a vector of weights for each input ---

// kG groups of kR outputs.
template <int kG, int kR, bool kStored, typename Index>
inline void compute_groups_at_once(const RunTask& task, const Slice<kStored, Index>& slice) {
  using L = Lanes<(kR < kLanes ? kR : kLanes)>;
  using Floats = typename L::Floats;
  constexpr int kV = kR / L::kCount;  // vectors of a group
  Floats sums[kG][kV] = {};
  const Index* indices = slice.indices;
  const float* weights = slice.weights;
  for (int64_t chunk = task.edges / kEdgeChunk; chunk > 0; --chunk) {
    for (int edge = 0; edge < kEdgeChunk; ++edge) {
      for (int g = 0; g < kG; ++g) {
        const Floats x = Floats{} + task.in[indices[g * kEdgeChunk + edge]];
        const float* w = kStored ? weights + (g * kEdgeChunk + edge) * kR : weights;
        for (int v = 0; v < kV; ++v) sums[g][v] += load<Floats>(w + v * L::kCount) * x;
      }
    }
    indices += slice.width * kEdgeChunk;
    if (kStored) weights += slice.width * kEdgeChunk * kR;
  }
  for (int g = 0; g < kG; ++g) {
    float group_sums[kR];
    __builtin_memcpy(group_sums, sums[g], sizeof group_sums);
    for (int r = 0; r < kR; ++r) {
      const int64_t slot = slice.slot + r * slice.width + g;
      const float y = activated(group_sums[r], task.bias ? task.bias[slot] : task.shared_bias, task.lower, task.upper);
      task.out[slot] = y;
      *task.nonzero |= bits_of(y);
    }
  }
}

// Groups of a slice: kG at a time, then the rest in halves.
template <int kG, int kR, bool kStored, typename Index>
inline void compute_groups(const RunTask& task, Slice<kStored, Index> slice) {
  for (; slice.groups >= kG; slice.skip(kG, kR)) compute_groups_at_once<kG, kR>(task, slice);
  if constexpr (kG > 1) {
    if (slice.groups > 0) compute_groups<kG / 2, kR>(task, slice);
  }
}

// --- outputs that share nothing: each lane gathers inputs of its own ---

#ifdef __AVX512F__

// Edge e of lanes 0, 4, 8, 12, 1, 5, 9, 13, 2 .., from kEdgeChunk edges of each lane side by side.
struct Chunk {
  __m512i edges[kEdgeChunk];
};

inline Chunk load_chunk(const void* words) {
  const char* from = static_cast<const char*>(words);
  const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64);
  const __m512i c = _mm512_loadu_si512(from + 128), d = _mm512_loadu_si512(from + 192);
  const __m512i low_ab = _mm512_unpacklo_epi32(a, b), low_cd = _mm512_unpacklo_epi32(c, d);
  const __m512i high_ab = _mm512_unpackhi_epi32(a, b), high_cd = _mm512_unpackhi_epi32(c, d);
  return {{_mm512_unpacklo_epi64(low_ab, low_cd), _mm512_unpackhi_epi64(low_ab, low_cd),
           _mm512_unpacklo_epi64(high_ab, high_cd), _mm512_unpackhi_epi64(high_ab, high_cd)}};
}

inline Chunk load_indices(const uint32_t* indices) { return load_chunk(indices); }

// Of a lane, edges 0 and 1 are an even word, edges 2 and 3 the odd one after it.
inline Chunk load_indices(const uint16_t* indices) {
  const __m512i even = _mm512_setr_epi32(0, 8, 16, 24, 2, 10, 18, 26, 4, 12, 20, 28, 6, 14, 22, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1)), low = _mm512_set1_epi32(0xffff);
  const __m512i a = _mm512_loadu_si512(indices), b = _mm512_loadu_si512(indices + 32);
  const __m512i first = _mm512_permutex2var_epi32(a, even, b), last = _mm512_permutex2var_epi32(a, odd, b);
  return {{_mm512_and_si512(first, low), _mm512_srli_epi32(first, 16), _mm512_and_si512(last, low),
           _mm512_srli_epi32(last, 16)}};
}

// kV times kLanes groups of one output.
template <int kV, bool kStored, typename Index>
inline void gather_groups(const RunTask& task, const Slice<kStored, Index>& slice) {
  __m512 sums[kV];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  const __m512 equal = _mm512_set1_ps(*slice.weights);
  const Index* indices = slice.indices;
  const float* weights = slice.weights;
  for (int64_t chunk = task.edges / kEdgeChunk; chunk > 0; --chunk) {
    for (int v = 0; v < kV; ++v) {
      constexpr int kStep = kLanes * kEdgeChunk;
      const Chunk places = load_indices(indices + v * kStep);
      Chunk values{};
      if (kStored) values = load_chunk(weights + v * kStep);
      for (int edge = 0; edge < kEdgeChunk; ++edge) {
        const __m512 x = _mm512_i32gather_ps(places.edges[edge], task.in, sizeof(float));
        sums[v] = _mm512_fmadd_ps(kStored ? _mm512_castsi512_ps(values.edges[edge]) : equal, x, sums[v]);
      }
    }
    indices += slice.width * kEdgeChunk;
    if (kStored) weights += slice.width * kEdgeChunk;
  }
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Vector lower = Vector{} + task.lower, upper = Vector{} + task.upper;
  for (int v = 0; v < kV; ++v) {
    const int64_t slot = slice.slot + v * kLanes;
    const Vector bias = task.bias ? load<Vector>(task.bias + slot) : Vector{} + task.shared_bias;
    const Vector y = activated((Vector)_mm512_permutexvar_ps(in_order, sums[v]), bias, lower, upper);
    __builtin_memcpy(task.out + slot, &y, sizeof y);
    *task.nonzero |= _mm512_reduce_or_epi32((__m512i)y);
  }
}

template <bool kStored, typename Index>
inline void compute_lone_outputs(const RunTask& task, Slice<kStored, Index> slice) {
  for (; slice.groups >= 2 * kLanes; slice.skip(2 * kLanes, 1)) gather_groups<2>(task, slice);
  for (; slice.groups >= kLanes; slice.skip(kLanes, 1)) gather_groups<1>(task, slice);
  if (slice.groups > 0) compute_groups<kMaxGroups, 1>(task, slice);
}

#else

template <bool kStored, typename Index>
inline void compute_lone_outputs(const RunTask& task, const Slice<kStored, Index>& slice) {
  compute_groups<kMaxGroups, 1>(task, slice);
}

#endif

// Outputs of a group: kR, or fewer.
template <int kR, bool kStored, typename Index>
inline void compute_slice(const RunTask& task, const Slice<kStored, Index>& slice) {
  if constexpr (kR == 1) {
    compute_lone_outputs(task, slice);
  } else {
    if (task.group_outputs < kR) return compute_slice<kR / 2>(task, slice);
    constexpr int kFitting = kMaxGroups * kLanes / kR;
    compute_groups<(kFitting < 1 ? 1 : kFitting < kMaxGroups ? kFitting : kMaxGroups), kR>(task, slice);
  }
}

}  // namespace

void SPDNN_CONCATENATE(run_one_feature_, SPDNN_KERNELS)(const RunTask& task);
void SPDNN_CONCATENATE(run_one_feature_, SPDNN_KERNELS)(const RunTask& task) {
  compute_slices(task, [&](const auto& slice) { compute_slice<kMaxGroupOutputs>(task, slice); });
}

}  // namespace spdnn::cpu
