#include "cpu/kernels.h"

#include "spdnn_layout.h"

#define SPDNN_CONCATENATE_(a, b) a##b
#define SPDNN_CONCATENATE(a, b) SPDNN_CONCATENATE_(a, b)

namespace spdnn::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kVectors = 4;  // vectors of features in registers: with 4 outputs, 16 of the 32 registers hold sums
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kVectors = 2;
#endif
constexpr int kOutputs = 4;  // outputs of a group that are summed at a time

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t UnalignedBits __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(uint32_t)), may_alias));

// Where the weights of a group stand. A run of one weight is read with steps of 0 from an array of equal values, through
// the same code as stored weights: every stored edge is multiplied, and the compiler cannot see that sums agree.
struct Weights {
  const float* first;
  int64_t edge_step;
  int64_t chunk_step;
};

template <int kR, int kV, typename Index>
inline void compute_block(const RunTask& task, const Index* indices, int64_t chunk_step, const Weights& weights,
                          int64_t slot, int64_t slot_step, int64_t feature) {
  Vector sums[kR][kV];
  for (int r = 0; r < kR; ++r) {
    const float bias = task.bias ? task.bias[slot + r * slot_step] : task.shared_bias;
    for (int v = 0; v < kV; ++v) sums[r][v] = Vector{} + bias;
  }
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
  UnalignedBits* nonzero = reinterpret_cast<UnalignedBits*>(task.nonzero + feature);
  const Vector zero{}, cap = zero + task.cap;
  for (int v = 0; v < kV; ++v) {
    Bits bits = nonzero[v];
    for (int r = 0; r < kR; ++r) {
      Vector y = sums[r][v];
      y = y > zero ? y : zero;
      y = y < cap ? y : cap;
      reinterpret_cast<Vector*>(task.out + (slot + r * slot_step) * task.stride + feature)[v] = y;
      bits |= (Bits)y;  // the bits as they are
    }
    nonzero[v] = bits;
  }
}

template <int kR, typename Index>
inline void compute_features(const RunTask& task, const Index* indices, int64_t chunk_step, const Weights& weights,
                             int64_t slot, int64_t slot_step) {
  int64_t feature = 0;
  for (; feature + (kVectors - 1) * kLanes < task.features; feature += kVectors * kLanes) {
    compute_block<kR, kVectors>(task, indices, chunk_step, weights, slot, slot_step, feature);
  }
  if constexpr (kVectors > 2) {
    if (feature + kLanes < task.features) {
      compute_block<kR, 2>(task, indices, chunk_step, weights, slot, slot_step, feature);
      feature += 2 * kLanes;
    }
  }
  for (; feature < task.features; feature += kLanes) {
    compute_block<kR, 1>(task, indices, chunk_step, weights, slot, slot_step, feature);
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
      int64_t slot = task.first_slot + slice * task.group_outputs + group;
      int64_t left = task.group_outputs;
      for (; left >= kOutputs; left -= kOutputs) {
        compute_features<kOutputs>(task, indices, chunk_step, weights, slot, width);
        slot += kOutputs * width;
        weights.first += kOutputs;
      }
      if (left == 2) compute_features<2>(task, indices, chunk_step, weights, slot, width);
      if (left == 1) compute_features<1>(task, indices, chunk_step, weights, slot, width);
    }
  }
}

void run(const RunTask& task) { task.index_bits == 16 ? compute_run<uint16_t>(task) : compute_run<uint32_t>(task); }

}  // namespace

#define SPDNN_STRING_(text) #text
#define SPDNN_STRING(text) SPDNN_STRING_(text)

extern const Kernels SPDNN_CONCATENATE(kernels_, SPDNN_KERNELS);
const Kernels SPDNN_CONCATENATE(kernels_, SPDNN_KERNELS) = {SPDNN_STRING(SPDNN_KERNELS), kLanes, &run};

}  // namespace spdnn::cpu
