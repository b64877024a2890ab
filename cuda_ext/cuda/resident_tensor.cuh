// Layers by tensor cores: row groups of one weight, whose outputs share their inputs.
//
// The sum of a group's inputs is a product with ones. Each activation is held as three bfloat16 whose sum it is, to the
// last bit: products with one are exact, and sums are float32. 16 outputs, 8 features and 16 edges make one
// instruction.
#pragma once

#include "accumulate.cuh"
#include "resident_block.cuh"

namespace spdnn::cuda {

inline constexpr int kParts = 3;          // bfloat16 of an activation
inline constexpr int kPanel = 8;          // features of an instruction
inline constexpr int kPanelBytes = 16;    // of one part of a neuron
inline constexpr int kTogether = 16;      // outputs of an instruction; edges, too
inline constexpr int kPanelsOfWarp = 16;  // groups times panels that a warp has of a layer

// [part][neuron][panel][8]. Eight panels lie in a line of all banks, in an order that differs from line to line: a
// group's inputs, the outputs of a group before, are a constant number of slots apart.
struct SplitActivations {
  static constexpr int kVector = 4;
  static constexpr int kFewestColumns = kPanel;
  char* memory;
  int panel_bits;
  uint32_t part_bytes;
  uint32_t width;

  // With a neuron beyond the last, which is always zero.
  __host__ __device__ static int64_t part_size(int64_t width, int tile) {
    constexpr int64_t kLine = 8 * kPanelBytes;
    return ((width + 1) * tile * static_cast<int64_t>(sizeof(uint16_t)) + kLine - 1) / kLine * kLine;
  }
  __host__ __device__ static int64_t bytes(int64_t width, int tile) { return kParts * part_size(width, tile); }

  __device__ SplitActivations(char* memory, const Columns& columns, int width, int tile)
      : memory(memory),
        panel_bits(columns.count_bits - 3),
        part_bytes(static_cast<uint32_t>(part_size(width, tile))),
        width(width) {
    for (uint32_t k = threadIdx.x; k < kParts * columns.count() / 4; k += blockDim.x) {
      const uint32_t part = k % kParts, column = k / kParts * 4;
      *reinterpret_cast<uint2*>(memory + part * part_bytes + offset(width, column)) = make_uint2(0, 0);
    }
  }

  // The neuron that is always zero.
  __device__ uint32_t zero() const { return width; }

  // Of a feature's part of a neuron.
  __device__ __forceinline__ uint32_t offset(uint32_t neuron, uint32_t column) const {
    const uint32_t panel = (neuron << panel_bits) + column / kPanel;
    return (panel ^ (neuron >> 5 & 7u)) * kPanelBytes + column % kPanel * 2;
  }

  // Two neighbouring features, from an even column on.
  __device__ __forceinline__ void set_pair(uint32_t neuron, uint32_t column, float x, float y) const {
    char* target = memory + offset(neuron, column);
    float rest_x = x, rest_y = y;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t both = pack_bfloat16(rest_x, rest_y);
      *reinterpret_cast<uint32_t*>(target + part * part_bytes) = both;
      rest_x -= __uint_as_float(both << 16);
      rest_y -= __uint_as_float(both & 0xFFFF0000u);
    }
  }

  __device__ void set(int neuron, int column, float x) const {
    char* target = memory + offset(neuron, column);
    float rest = x;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t bits = pack_bfloat16(rest, 0.0f);
      *reinterpret_cast<uint16_t*>(target + part * part_bytes) = static_cast<uint16_t>(bits);
      const float taken = __uint_as_float(bits << 16);
      rest = rest == taken ? 0.0f : rest - taken;  // infinity, too, is taken as a whole
    }
  }

  __device__ void set_vector(int neuron, int column, const float (&x)[kVector]) const {
    set_pair(neuron, column, x[0], x[1]);
    set_pair(neuron, column + 2, x[2], x[3]);
  }

  __device__ float get(int neuron, int column) const {
    const char* source = memory + offset(neuron, column);
    float x = 0.0f;
#pragma unroll
    for (int part = kParts - 1; part >= 0; --part) {
      x += __uint_as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(source + part * part_bytes)) << 16);
    }
    return x;
  }
};

struct TensorProducts {
  using Activations = SplitActivations;

  __device__ static uint32_t compute_layer(const LayerView& view, const Scale& scale, const Activations& activations) {
    switch (activations.panel_bits) {
      case 0:
        return compute<1>(view, scale, activations);
      case 1:
        return compute<2>(view, scale, activations);
      default:
        return compute<4>(view, scale, activations);
    }
  }

 private:
  // A warp takes each group as a whole, for all panels.
  template <int kPanels>
  __device__ static __forceinline__ uint32_t compute(const LayerView& view, const Scale& scale,
                                                     const Activations& activations) {
    constexpr int kGroups = kPanelsOfWarp / kPanels;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
    float sums[kGroups][kPanels][4];
    uint32_t active = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      at_unit(view, warp + g * warps, [&](const PlanRun& run, const Unit& unit) {
        add_edges<kPanels>(view, run, unit, lane, activations, sums[g]);
        active |= finish<kPanels>(view, run, unit, lane, scale, sums[g]);
      });
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      at_unit(view, warp + g * warps, [&](const PlanRun& run, const Unit& unit) {
        const int slot = unit.first_slot(run) + lane / 4 * unit.width;
        const bool both_halves = run.group_outputs >= kTogether;
#pragma unroll
        for (int p = 0; p < kPanels; ++p) {
          const int column = p * kPanel + lane % 4 * 2;
          activations.set_pair(slot, column, sums[g][p][0], sums[g][p][1]);
          if (both_halves) activations.set_pair(slot + 8 * unit.width, column, sums[g][p][2], sums[g][p][3]);
        }
      });
    }
    return active;
  }

  // Calls visit(run, unit) with unit `number` of the layer, 16 outputs of a group of 16 or more, or one of 8; if there
  // is such a unit.
  template <typename Visit>
  __device__ static __forceinline__ void at_unit(const LayerView& view, int number, const Visit& visit) {
    for (int r = 0; r < static_cast<int>(view.layer().runs); ++r) {
      const PlanRun& run = view.run(r);
      const int outputs = min(static_cast<int>(run.group_outputs), kTogether);
      const int units = static_cast<int>(run.groups) * (static_cast<int>(run.group_outputs) / outputs);
      if (number < units) return visit(run, Unit::at(number, static_cast<int>(run.groups), outputs));
      number -= units;
    }
  }

  // The sums of a group's inputs. Thread `lane` has edge `lane` of 32; in the sums, outputs lane / 4 and lane / 4 + 8
  // of features lane % 4 * 2 and the next.
  template <int kPanels>
  __device__ static __forceinline__ void add_edges(const LayerView& view, const PlanRun& run, const Unit& unit,
                                                   int lane, const Activations& activations,
                                                   float (&sums)[kPanels][4]) {
    const int edges = static_cast<int>(run.edges), chunks = edges / kEdgeChunk;
    const uint16_t* indices = view.at<uint16_t>(run.index_offset);
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (float& sum : sums[p]) sum = 0.0f;
    }
#pragma unroll 1
    for (int first = 0; first < edges; first += 32) {
      const int edge = first + lane;
      const int position = unit.slice * chunks + edge / kEdgeChunk * unit.width + unit.lane;
      const uint32_t neuron = edge < edges ? indices[position * kEdgeChunk + edge % kEdgeChunk] : activations.zero();
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        const char* row = activations.memory + activations.offset(neuron, p * kPanel);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          uint32_t x[4];
          load_four_transposed(row + part * activations.part_bytes, x);
          add_product_with_ones(x[0], x[1], sums[p]);
          if (first + kTogether < edges) add_product_with_ones(x[2], x[3], sums[p]);
        }
      }
    }
  }

  // Weight, bias, clip. Returns a bit for each feature that is not zero.
  template <int kPanels>
  __device__ static __forceinline__ uint32_t finish(const LayerView& view, const PlanRun& run, const Unit& unit,
                                                    int lane, const Scale& scale, float (&sums)[kPanels][4]) {
    const PlanLayer& layer = view.layer();
    const float weight = static_cast<float>(run.value);
    float bias[2] = {static_cast<float>(layer.bias), static_cast<float>(layer.bias)};
    const bool both_halves = run.group_outputs >= kTogether;
    if (layer.bias_offset >= 0) {
      const float* biases = view.at<float>(layer.bias_offset) + unit.first_slot(run) + lane / 4 * unit.width;
      bias[0] = biases[0];
      bias[1] = both_halves ? biases[8 * unit.width] : 0.0f;
    }
    uint32_t active = 0;
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[p][k] = fmaf(weight, sums[p][k], bias[k / 2] * scale.per_unit);
      scale.clip(sums[p]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool counts = k < 2 || both_halves;
        active |= static_cast<uint32_t>(counts && sums[p][k] != 0.0f) << (p * kPanel + lane % 4 * 2 + k % 2);
      }
    }
    return active;
  }
};

}  // namespace spdnn::cuda
