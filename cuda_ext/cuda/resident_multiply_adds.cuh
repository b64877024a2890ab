// Layers by fused multiply-adds, one for each edge and feature.
#pragma once

#include <type_traits>

#include "accumulate.cuh"
#include "resident_block.cuh"

namespace spdnn::cuda {

inline constexpr int kSumsOfThread = 64;  // outputs times features that a thread has of a layer

// [neuron][columns], once: a layer's sums stay in registers until all threads are through with its inputs.
template <int kFeaturesOfThread>
struct FloatActivations {
  static constexpr int kVector = kFeaturesOfThread;
  static constexpr int kFewestColumns = kVector;
  float* data;
  Columns columns;

  __host__ __device__ static int64_t bytes(int64_t width, int tile) {
    return (width * tile * static_cast<int64_t>(sizeof(float)) + 15) / 16 * 16;
  }

  __device__ FloatActivations(char* memory, const Columns& columns, int, int)
      : data(reinterpret_cast<float*>(memory)), columns(columns) {}

  __device__ float* at(int neuron, int column) const { return data + (neuron << columns.count_bits) + column; }
  __device__ void set(int neuron, int column, float x) const { *at(neuron, column) = x; }
  __device__ void set_vector(int neuron, int column, const float (&x)[kVector]) const {
    store_vector<kVector>(at(neuron, column), x);
  }
  __device__ float get(int neuron, int column) const { return *at(neuron, column); }
  __device__ void flip() {}
};

// The sums of a thread, first in, first out: registers have no addresses, so what is kept moves up when a part is
// added, and again when one is taken. A few moves beside all multiply-adds of a part, and a loop's body serves all
// parts.
template <int kVector>
struct Sums {
  static constexpr int kOutputs = kSumsOfThread / kVector;
  float values[kOutputs][kVector];

  template <int kPart>
  __device__ __forceinline__ void make_room() {
#pragma unroll
    for (int r = kOutputs - 1; r >= kPart; --r) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) values[r][v] = values[r - kPart][v];
    }
  }
};

// Walks through the units of a thread: `kOutputs` outputs of a group each. Of all units of the layer a thread takes
// each `step`th, so that neighbours read what stands side by side, and each has units of long rows and of short ones.
template <int kOutputs>
class UnitCursor {
 public:
  __device__ UnitCursor(const LayerView& view, int first, int step)
      : view_(view), step_(step), number_(first), runs_(static_cast<int>(view.layer().runs)) {
    units_ = runs_ > 0 ? units_of(view.run(0)) : 0;
  }

  // Calls visit(run, unit) for the next one, if there is one.
  template <typename Visit>
  __device__ __forceinline__ void next(const Visit& visit) {
    while (number_ >= first_unit_ + units_ && run_ + 1 < runs_) {
      first_unit_ += units_;
      units_ = units_of(view_.run(++run_));
    }
    if (number_ < first_unit_ + units_) {
      const PlanRun& run = view_.run(run_);
      visit(run, Unit::at(number_ - first_unit_, static_cast<int>(run.groups), kOutputs));
    }
    number_ += step_;
  }

 private:
  __device__ static int units_of(const PlanRun& run) {
    return static_cast<int>(run.groups) * (static_cast<int>(run.group_outputs) / kOutputs);
  }

  const LayerView& view_;
  int step_;
  int number_;
  int runs_;
  int run_ = 0;
  int first_unit_ = 0;  // of the run
  int units_;
};

// A thread's features of one neuron, in shared memory.
template <int kVector>
struct FeatureColumn {
  const char* first;
  uint32_t stride_bytes;

  __device__ FeatureColumn(const float* data, const Columns& columns)
      : first(reinterpret_cast<const char*>(data)),
        // One multiply-add makes an address of an index, if the compiler does not know that it could shift and add.
        stride_bytes(opaque(static_cast<uint32_t>(columns.count() * sizeof(float)))) {}

  __device__ __forceinline__ void load(uint32_t neuron, float (&x)[kVector]) const {
    load_vector<kVector>(reinterpret_cast<const float*>(first + neuron * stride_bytes), x);
  }
};

// The stored values of one chunk of a unit's edges.
template <int kOutputs>
struct ValueChunk {
  float of[kEdgeChunk][kOutputs];

  __device__ __forceinline__ explicit ValueChunk(float value) {
#pragma unroll
    for (int e = 0; e < kEdgeChunk; ++e) {
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) of[e][r] = value;
    }
  }

  __device__ __forceinline__ float at(int edge, int output) const { return of[edge][output]; }

  // `values` of the run, `position` of the chunk in it.
  __device__ __forceinline__ void load(const float* values, int position, int group_outputs, int first_output) {
    if constexpr (kOutputs == 1) {
      if (group_outputs == 1) {
        const float4 four = reinterpret_cast<const float4*>(values)[position];
        of[0][0] = four.x, of[1][0] = four.y, of[2][0] = four.z, of[3][0] = four.w;
      } else {
#pragma unroll
        for (int e = 0; e < kEdgeChunk; ++e) {
          of[e][0] = values[static_cast<int64_t>(position * kEdgeChunk + e) * group_outputs + first_output];
        }
      }
    } else {
      static_assert(kOutputs == 4, "the values of an edge come in one load");
#pragma unroll
      for (int e = 0; e < kEdgeChunk; ++e) {
        const int64_t first = static_cast<int64_t>(position * kEdgeChunk + e) * group_outputs + first_output;
        const float4 four = *reinterpret_cast<const float4*>(values + first);
        of[e][0] = four.x, of[e][1] = four.y, of[e][2] = four.z, of[e][3] = four.w;
      }
    }
  }
};

// One value for all edges.
struct NoValues {
  float value;

  __device__ __forceinline__ explicit NoValues(float value) : value(value) {}
  __device__ __forceinline__ float at(int, int) const { return value; }
  __device__ __forceinline__ void load(const float*, int, int, int) {}
};

// Adds the unit's edges to its sums: one multiply-add for each edge, output and feature. Indices and values are a chunk
// ahead, for they may come from device memory.
template <int kVector, int kOutputs, bool kStored>
__device__ __forceinline__ void add_edges(const LayerView& view, const PlanRun& run, const Unit& unit,
                                          const FeatureColumn<kVector>& column, float (&sums)[kOutputs][kVector]) {
  const int chunks = static_cast<int>(run.edges) / kEdgeChunk;
  if (chunks == 0) return;
  const uint2* indices = view.at<uint2>(run.index_offset);
  const bool stored = kStored && run.value_offset >= 0;
  const float* values = view.at<float>(stored ? run.value_offset : run.index_offset);
  const float shared_value = static_cast<float>(run.value);
  const int group_outputs = static_cast<int>(run.group_outputs);
  std::conditional_t<kStored, ValueChunk<kOutputs>, NoValues> next_values(shared_value);
  int position = unit.slice * chunks + unit.lane;
  const int end = position + chunks * unit.width;
  uint2 next = indices[position];
  if (stored) next_values.load(values, position, group_outputs, unit.first_output);
#pragma unroll 1
  while (position < end) {
    const uint2 now = next;
    const auto weights = next_values;
    position += unit.width;
    if (position < end) {
      next = indices[position];
      if (stored) next_values.load(values, position, group_outputs, unit.first_output);
    }
    float x[kEdgeChunk][kVector];
#pragma unroll
    for (int e = 0; e < kEdgeChunk; ++e) column.load(index_of(now, e), x[e]);
#pragma unroll
    for (int e = 0; e < kEdgeChunk; ++e) {
#pragma unroll
      for (int r = 0; r < kOutputs; ++r) {
        const float weight = weights.at(e, r);
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[r][v] = fmaf(weight, x[e][v], sums[r][v]);
      }
    }
  }
}

template <int kVector, int kOutputs>
__device__ __forceinline__ void add_bias(const LayerView& view, const PlanRun& run, const Unit& unit,
                                         const Scale& scale, float (&sums)[kOutputs][kVector]) {
  const PlanLayer& layer = view.layer();
  const float* biases = layer.bias_offset < 0 ? nullptr : view.at<float>(layer.bias_offset) + unit.first_slot(run);
  const float shared_bias = static_cast<float>(layer.bias);
#pragma unroll
  for (int r = 0; r < kOutputs; ++r) {
    const float start = (biases ? biases[r * unit.width] : shared_bias) * scale.per_unit;
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums[r][v] = opaque(start);
  }
}

// A thread has kVector features, and units of kOutputs outputs with the same inputs. Without kStored one weight serves
// all edges of a run.
template <int kVector, int kOutputs, bool kStored>
struct MultiplyAdds {
  using Activations = FloatActivations<kVector>;
  static constexpr bool kForeman = false;  // all registers are the sums'
  static constexpr int kThreads = kMostThreads;

  __device__ static void prepare(const LayerView&, int, const Activations&) {}  // there is no foreman

  __device__ static uint32_t compute_layer(const LayerView& view, int, const Scale& scale,
                                           const Activations& activations) {
    constexpr int kMost = Sums<kVector>::kOutputs, kParts = kMost / kOutputs;
    const int lanes = activations.columns.count() / kVector, column = threadIdx.x % lanes * kVector;
    const int first = threadIdx.x / lanes, step = blockDim.x / lanes;
    const FeatureColumn<kVector> features(activations.at(0, column), activations.columns);
    Sums<kVector> sums;
    uint32_t active = 0;
    UnitCursor<kOutputs> cursor(view, first, step);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      sums.template make_room<kOutputs>();
      cursor.next([&](const PlanRun& run, const Unit& unit) {
        float (&newest)[kOutputs][kVector] = reinterpret_cast<float (&)[kOutputs][kVector]>(sums.values[0]);
        add_bias(view, run, unit, scale, newest);
        add_edges<kVector, kOutputs, kStored>(view, run, unit, features, newest);
        active |= clip_all(newest, scale);
      });
    }
    __syncthreads();  // past it nobody reads the layer's inputs
    UnitCursor<kOutputs> again(view, first, step);
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      again.next([&](const PlanRun& run, const Unit& unit) {
        const int slot = unit.first_slot(run);
#pragma unroll
        for (int r = 0; r < kOutputs; ++r) {
          activations.set_vector(slot + r * unit.width, column, sums.values[kMost - kOutputs + r]);
        }
      });
      sums.template make_room<kOutputs>();
    }
    return active << column;
  }
};

}  // namespace spdnn::cuda
