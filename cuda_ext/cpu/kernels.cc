#include "cpu/kernels.h"

#include "cpu/vectors.h"
#include "layout/spdnn_layout.h"

#define SPDNN_CONCATENATE_(a, b) a##b
#define SPDNN_CONCATENATE(a, b) SPDNN_CONCATENATE_(a, b)

namespace spdnn::cpu {
namespace {

// A block of sums stays in registers: kSums vectors, as outputs x vectors of features. Full tiles take kVectors of
// features, so that few weights are broadcast; narrow tiles take more outputs, so that few features are read twice.
#if defined(__AVX512F__)
constexpr int kVectors = 4, kSums = 16;
#else
constexpr int kVectors = 2, kSums = 8;
#endif

typedef uint32_t UnalignedBits
    __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(uint32_t)), may_alias));

// Where the weights of a group stand. A run of one weight is read with steps of 0 from an array of equal values,
// through the same code as stored weights: every stored edge is multiplied, and the compiler cannot see that sums
// agree.
struct Weights {
  const float* first;
  int64_t edge_step;
  int64_t chunk_step;
};

template <int kR, int kV, typename Index>
inline void compute_block(const RunTask& task, const Index* indices, int64_t chunk_step, const Weights& weights,
                          int64_t slot, int64_t slot_step, int64_t feature) {
  Vector sums[kR][kV] = {};
  const float* in = task.in + feature;
  const float* weight = weights.first;
  auto add_edge = [&](Index index, const float* edge_weights) {
    const Vector* x = reinterpret_cast<const Vector*>(in + static_cast<int64_t>(index) * task.stride);
    Vector features[kV];
    for (int v = 0; v < kV; ++v) features[v] = x[v];
    for (int r = 0; r < kR; ++r) {
      const Vector w = Vector{} + edge_weights[r];
      for (int v = 0; v < kV; ++v) sums[r][v] += w * features[v];
    }
  };
  for (int64_t chunk = task.edges / kEdgeChunk; chunk > 0; --chunk) {
    for (int edge = 0; edge < kEdgeChunk; ++edge) add_edge(indices[edge], weight + edge * weights.edge_step);
    indices += chunk_step;
    weight += weights.chunk_step;
  }
  for (int edge = 0; edge < task.edges % kEdgeChunk; ++edge) add_edge(indices[edge], weight + edge * weights.edge_step);
  // The bias comes last: so a result has the bits that plain XLA operations give it, in the same order.
  for (int r = 0; r < kR; ++r) {
    const float bias = task.bias ? task.bias[slot + r * slot_step] : task.shared_bias;
    for (int v = 0; v < kV; ++v) sums[r][v] += bias;
  }
  UnalignedBits* nonzero = reinterpret_cast<UnalignedBits*>(task.nonzero + feature);
  const Vector lower = Vector{} + task.lower, upper = Vector{} + task.upper;
  for (int v = 0; v < kV; ++v) {
    Bits bits = nonzero[v];
    for (int r = 0; r < kR; ++r) {
      Vector y = sums[r][v];
      y = y > lower ? y : lower;  // in this order a NaN becomes the lower bound, and -0.0 becomes 0.0
      y = y > upper ? upper : y;
      reinterpret_cast<Vector*>(task.out + (slot + r * slot_step) * task.stride + feature)[v] = y;
      bits |= (Bits)y;  // the bits as they are
    }
    nonzero[v] = bits;
  }
}

// Outputs of a group: as many at a time as there are registers, then the rest in halves.
template <int kR, int kV, typename Index>
inline void compute_outputs(const RunTask& task, const Index* indices, int64_t chunk_step, Weights weights,
                            int64_t slot, int64_t slot_step, int64_t feature, int64_t outputs) {
  for (; outputs >= kR; outputs -= kR) {
    compute_block<kR, kV>(task, indices, chunk_step, weights, slot, slot_step, feature);
    slot += kR * slot_step;
    weights.first += kR;
  }
  if constexpr (kR > 1) {
    compute_outputs<kR / 2, kV>(task, indices, chunk_step, weights, slot, slot_step, feature, outputs);
  }
}

// Features of a group, from `feature` on: kV vectors at a time, then the rest in halves.
template <int kV, typename Index>
inline void compute_features(const RunTask& task, const Index* indices, int64_t chunk_step, const Weights& weights,
                             int64_t slot, int64_t slot_step, int64_t feature) {
  for (; feature + (kV - 1) * kLanes < task.features; feature += kV * kLanes) {
    compute_outputs<kSums / kV, kV>(task, indices, chunk_step, weights, slot, slot_step, feature, task.group_outputs);
  }
  if constexpr (kV > 1) {
    compute_features<kV / 2>(task, indices, chunk_step, weights, slot, slot_step, feature);
  }
}

template <typename Index>
void compute_run(const RunTask& task) {
  float equal[kMaxGroupOutputs];
  for (float& value : equal) value = task.value;
  asm volatile("" : : "r"(equal) : "memory");
  for (int64_t slice = 0; slice < task.groups; slice += kSliceGroups) {
    const int64_t rest = task.groups - slice, width = rest < kSliceGroups ? rest : kSliceGroups;
    for (int64_t group = 0; group < width; ++group) {
      const int64_t first_edge = slice * task.edges + group * kEdgeChunk;
      const Index* indices = static_cast<const Index*>(task.indices) + first_edge;
      const int64_t chunk_step = width * kEdgeChunk;
      Weights weights{equal, 0, 0};
      if (task.values) {
        weights = {task.values + first_edge * task.group_outputs, task.group_outputs, chunk_step * task.group_outputs};
      }
      const int64_t slot = task.first_slot + slice * task.group_outputs + group;
      compute_features<kVectors>(task, indices, chunk_step, weights, slot, width, 0);
    }
  }
}

void run(const RunTask& task) { task.index_bits == 16 ? compute_run<uint16_t>(task) : compute_run<uint32_t>(task); }

}  // namespace

#define SPDNN_STRING_(text) #text
#define SPDNN_STRING(text) SPDNN_STRING_(text)

extern const RowKernels SPDNN_CONCATENATE(row_kernels_, SPDNN_KERNELS);
extern const Kernels SPDNN_CONCATENATE(kernels_, SPDNN_KERNELS);
const Kernels SPDNN_CONCATENATE(kernels_, SPDNN_KERNELS) = {SPDNN_STRING(SPDNN_KERNELS), kLanes, &run, &largest_index,
                                                            &SPDNN_CONCATENATE(row_kernels_, SPDNN_KERNELS)};

}  // namespace spdnn::cpu
