#include "cpu/kernels.h"

#include "cpu/slices.h"

#define SPDNN_CONCATENATE_(a, b) a##b
#define SPDNN_CONCATENATE(a, b) SPDNN_CONCATENATE_(a, b)

namespace spdnn::cpu {

void SPDNN_CONCATENATE(run_one_feature_, SPDNN_KERNELS)(const RunTask& task);  // one_feature.cc

namespace {

// A block of sums stays in registers: kSums vectors, as groups x outputs x vectors of features. Full tiles take
// kVectors of features, so that few weights are broadcast; narrow tiles take more outputs, so that few features are
// read twice. Where outputs share nothing, several of them are summed up at a time: additions need not wait for each
// other.
#if defined(__AVX512F__)
constexpr int kVectors = 4, kSums = 16;
#else
constexpr int kVectors = 2, kSums = 8;
#endif
constexpr int kMaxGroups = 8;

// kG groups, kR outputs of each from `output` on, kV vectors of features.
template <int kG, int kR, int kV, typename L, bool kStored, typename Index>
inline void compute_block(const RunTask& task, const Slice<kStored, Index>& slice, int64_t output, int64_t feature) {
  using Floats = typename L::Floats;
  using Bits = typename L::Bits;
  const int64_t outputs = kR * kV < kSums ? kR : task.group_outputs;  // of a group
  const int64_t chunk_step = slice.width * kEdgeChunk;
  const float* in = task.in + feature;
  const Index* indices = slice.indices;
  const float* weights = slice.weights + output;
  Floats sums[kG][kR][kV] = {};
  const auto add_edge = [&](int edge) {
    for (int g = 0; g < kG; ++g) {
      const int64_t index = indices[g * kEdgeChunk + edge];
      const Floats* x = reinterpret_cast<const Floats*>(in + index * task.stride);
      const float* w = kStored ? weights + (g * kEdgeChunk + edge) * outputs : weights;
      Floats features[kV];
      for (int v = 0; v < kV; ++v) features[v] = x[v];
      for (int r = 0; r < kR; ++r) {
        for (int v = 0; v < kV; ++v) sums[g][r][v] = multiply_add(Floats{} + w[r], features[v], sums[g][r][v]);
      }
    }
  };
  for (int64_t chunk = task.edges / kEdgeChunk; chunk > 0; --chunk) {
    for (int edge = 0; edge < kEdgeChunk; ++edge) add_edge(edge);
    indices += chunk_step;
    if (kStored) weights += chunk_step * outputs;
  }
  for (int edge = 0; edge < task.edges % kEdgeChunk; ++edge) add_edge(edge);
  const Floats lower = Floats{} + task.lower, upper = Floats{} + task.upper;
  for (int v = 0; v < kV; ++v) {
    uint32_t* nonzero = task.nonzero + feature + v * L::kCount;
    Bits bits = load<Bits>(nonzero);
    for (int g = 0; g < kG; ++g) {
      for (int r = 0; r < kR; ++r) {
        const int64_t slot = slice.slot + (output + r) * slice.width + g;
        const Floats bias = Floats{} + (task.bias ? task.bias[slot] : task.shared_bias);
        const Floats y = activated(sums[g][r][v], bias, lower, upper);
        reinterpret_cast<Floats*>(task.out + slot * task.stride + feature)[v] = y;
        bits |= (Bits)y;  // the bits as they are
      }
    }
    __builtin_memcpy(nonzero, &bits, sizeof bits);
  }
}

// Groups of a slice: kG at a time, then the rest in halves.
template <int kG, int kR, int kV, typename L, bool kStored, typename Index>
inline void compute_groups(const RunTask& task, Slice<kStored, Index> slice, int64_t output, int64_t feature) {
  while (slice.groups >= kG) {
    compute_block<kG, kR, kV, L>(task, slice, output, feature);
    slice.skip(kG, task.group_outputs);
  }
  if constexpr (kG > 1) {
    if (slice.groups > 0) compute_groups<kG / 2, kR, kV, L>(task, slice, output, feature);
  }
}

// Outputs of the groups, a power of two: all at a time, or as many as there are registers.
template <int kR, int kV, typename L, bool kStored, typename Index>
inline void compute_outputs(const RunTask& task, const Slice<kStored, Index>& slice, int64_t feature) {
  if constexpr (kR > 1) {
    if (task.group_outputs < kR) return compute_outputs<kR / 2, kV, L>(task, slice, feature);
  }
  constexpr int kFitting = kSums / (kR * kV), kG = kFitting < kMaxGroups ? kFitting : kMaxGroups;
  if constexpr (kG == 1) {  // a group's outputs one after the other, while what they read is at hand
    for (Slice<kStored, Index> group = slice; group.groups > 0; group.skip(1, task.group_outputs)) {
      for (int64_t output = 0; output < task.group_outputs; output += kR) {
        compute_block<1, kR, kV, L>(task, group, output, feature);
      }
    }
  } else {
    for (int64_t output = 0; output < task.group_outputs; output += kR) {
      compute_groups<kG, kR, kV, L>(task, slice, output, feature);
    }
  }
}

// Features from `feature` on: kV vectors at a time, then the rest in halves.
template <int kV, typename L, bool kStored, typename Index>
inline void compute_features(const RunTask& task, const Slice<kStored, Index>& slice, int64_t feature) {
  for (; feature + (kV - 1) * L::kCount < task.features; feature += kV * L::kCount) {
    compute_outputs<kSums / kV, kV, L>(task, slice, feature);
  }
  if constexpr (kV > 1) compute_features<kV / 2, L>(task, slice, feature);
}

template <int kV, typename L>
void run_lanes(const RunTask& task) {
  compute_slices(task, [&](const auto& slice) { compute_features<kV, L>(task, slice, 0); });
}

void run(const RunTask& task) {
  if (task.stride == 1) return SPDNN_CONCATENATE(run_one_feature_, SPDNN_KERNELS)(task);
#if defined(__AVX__)
  if (task.stride == 4) return run_lanes<1, Lanes<4>>(task);
#endif
#if defined(__AVX512F__)
  if (task.stride == 8) return run_lanes<1, Lanes<8>>(task);
#endif
  run_lanes<kVectors, Lanes<kLanes>>(task);
}

}  // namespace

#define SPDNN_STRING_(text) #text
#define SPDNN_STRING(text) SPDNN_STRING_(text)

extern const RowKernels SPDNN_CONCATENATE(row_kernels_, SPDNN_KERNELS);
extern const Kernels SPDNN_CONCATENATE(kernels_, SPDNN_KERNELS);
const Kernels SPDNN_CONCATENATE(kernels_, SPDNN_KERNELS) = {SPDNN_STRING(SPDNN_KERNELS), kLanes, &run, &largest_index,
                                                            &SPDNN_CONCATENATE(row_kernels_, SPDNN_KERNELS)};

}  // namespace spdnn::cpu
