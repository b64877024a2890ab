// One run of one layer times one feature: lanes are outputs. Compiled once per instruction set, as kernels.cc is, and
// with the same sums in the same order: a result does not depend on how many features are computed at a time.
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
    SPDNN_UNROLL
    for (int edge = 0; edge < kEdgeChunk; ++edge) {
      SPDNN_UNROLL
      for (int g = 0; g < kG; ++g) {
        const Floats x = Floats{} + task.in[indices[g * kEdgeChunk + edge]];
        const float* w = kStored ? weights + (g * kEdgeChunk + edge) * kR : weights;
        SPDNN_UNROLL
        for (int v = 0; v < kV; ++v) sums[g][v] = multiply_add(load<Floats>(w + v * L::kCount), x, sums[g][v]);
      }
    }
    indices += slice.width * kEdgeChunk;
    if (kStored) weights += slice.width * kEdgeChunk * kR;
  }
  SPDNN_UNROLL
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

// --- outputs that share nothing: each lane reads inputs of its own ---

// Vectors of four lanes, filled one by one: as fast as a gather, where processors have one, and on some twice as fast.
constexpr int kSide = 4;
using Four = Lanes<kSide>;
static_assert(kSide == kEdgeChunk, "a chunk of edges for each lane is a square");

// Elements a, b of x and c, d of y.
template <int a, int b, int c, int d>
inline Four::Floats pick(Four::Floats x, Four::Floats y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, a, b, kSide + c, kSide + d);
#else
  return __builtin_shuffle(x, y, Four::Bits{a, b, kSide + c, kSide + d});
#endif
}

// An edge of all lanes at a time, from the edges of each lane.
struct Square {
  Four::Floats rows[kSide];
};

inline Square load_transposed(const float* from) {
  Four::Floats lanes[kSide];
  __builtin_memcpy(lanes, from, sizeof lanes);
  const Four::Floats low01 = pick<0, 1, 0, 1>(lanes[0], lanes[1]), low23 = pick<0, 1, 0, 1>(lanes[2], lanes[3]);
  const Four::Floats high01 = pick<2, 3, 2, 3>(lanes[0], lanes[1]), high23 = pick<2, 3, 2, 3>(lanes[2], lanes[3]);
  return {{pick<0, 2, 0, 2>(low01, low23), pick<1, 3, 1, 3>(low01, low23), pick<0, 2, 0, 2>(high01, high23),
           pick<1, 3, 1, 3>(high01, high23)}};
}

// The indices of a chunk; those of 16 bits are one word.
template <typename Index>
struct ChunkIndices {
  explicit ChunkIndices(const Index* from) : indices(from) {}
  int64_t operator[](int edge) const { return indices[edge]; }
  const Index* indices;
};

template <>
struct ChunkIndices<uint16_t> {
  explicit ChunkIndices(const uint16_t* from) : word(load<uint64_t>(from)) {}
  int64_t operator[](int edge) const { return static_cast<int64_t>(word >> (16 * edge) & 0xffff); }
  uint64_t word;
};

// kV times four groups of one output.
template <int kV, bool kStored, typename Index>
inline void compute_fours(const RunTask& task, const Slice<kStored, Index>& slice) {
  using Indices = ChunkIndices<Index>;
  Four::Floats sums[kV] = {};
  const Four::Floats equal = Four::Floats{} + *slice.weights;
  const Index* indices = slice.indices;
  const float* weights = slice.weights;
  for (int64_t chunk = task.edges / kEdgeChunk; chunk > 0; --chunk) {
    SPDNN_UNROLL
    for (int v = 0; v < kV; ++v) {
      const Index* of_four = indices + v * kSide * kEdgeChunk;
      const Indices a(of_four), b(of_four + kEdgeChunk), c(of_four + 2 * kEdgeChunk), d(of_four + 3 * kEdgeChunk);
      Square values{};
      if (kStored) values = load_transposed(weights + v * kSide * kEdgeChunk);
      SPDNN_UNROLL
      for (int edge = 0; edge < kEdgeChunk; ++edge) {
        const Four::Floats x = {task.in[a[edge]], task.in[b[edge]], task.in[c[edge]], task.in[d[edge]]};
        sums[v] = multiply_add(kStored ? values.rows[edge] : equal, x, sums[v]);
      }
    }
    indices += slice.width * kEdgeChunk;
    if (kStored) weights += slice.width * kEdgeChunk;
  }
  const Four::Floats lower = Four::Floats{} + task.lower, upper = Four::Floats{} + task.upper;
  SPDNN_UNROLL
  for (int v = 0; v < kV; ++v) {
    const int64_t slot = slice.slot + v * kSide;
    const Four::Floats bias = task.bias ? load<Four::Floats>(task.bias + slot) : Four::Floats{} + task.shared_bias;
    const Four::Floats y = activated(sums[v], bias, lower, upper);
    __builtin_memcpy(task.out + slot, &y, sizeof y);
    const Four::Bits bits = (Four::Bits)y;
    *task.nonzero |= bits[0] | bits[1] | bits[2] | bits[3];
  }
}

// A whole slice at a time, so that it is read once from end to end; what is left of its groups in halves.
template <int kV, bool kStored, typename Index>
inline void compute_lone_outputs(const RunTask& task, Slice<kStored, Index> slice) {
  for (; slice.groups >= kV * kSide; slice.skip(kV * kSide, 1)) compute_fours<kV>(task, slice);
  if (slice.groups == 0) return;
  if constexpr (kV > 1) {
    compute_lone_outputs<kV / 2>(task, slice);
  } else {
    compute_groups<kMaxGroups / 2, 1>(task, slice);
  }
}

// Outputs of a group: kR, or fewer.
template <int kR, bool kStored, typename Index>
inline void compute_slice(const RunTask& task, const Slice<kStored, Index>& slice) {
  if constexpr (kR == 1) {
    compute_lone_outputs<kSliceGroups / kSide>(task, slice);
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
