// Layers by tensor cores: row groups of one weight, whose outputs share their inputs.
//
// The sum of a group's inputs is a product with ones. Each activation is held as three bfloat16 whose sum it is, to the
// last bit: products with one are exact, and sums are float32. 16 outputs, 8 features and 16 edges make one
// instruction.
#pragma once

#include "accumulate.cuh"
#include "resident_block.cuh"

namespace spdnn::cuda {

inline constexpr int kParts = 3;        // bfloat16 of an activation
inline constexpr int kPanel = 8;        // features of an instruction
inline constexpr int kPanelBytes = 16;  // of one part of a neuron
inline constexpr int kTogether = 16;    // outputs of an instruction; edges, too
inline constexpr int kMostPanels = 2;   // of a block
inline constexpr int kMostUnits = 256;  // of a layer

// 16 outputs of a group, or a group of 8: what one warp computes together, for all panels.
struct alignas(16) TensorUnit {
  uint32_t first_index = 0;  // of its first edge, counted in 16-bit words from the layer's first word on
  uint16_t slot = 0;         // of its first output; the next one's is `width` further
  uint8_t width = 0;
  uint8_t halves = 0;  // of an instruction's rows; 0: there is no such unit
  uint32_t edges = 0;
  float weight = 0;
};

// [part][neuron][panel][8]. Eight panels lie in a line of all banks, in an order that differs from line to line: a
// group's inputs, often the outputs of a group before, are a constant number of slots apart.
struct SplitActivations {
  static constexpr int kVector = 4;
  static constexpr int kFewestColumns = kPanel;
  char* memory;
  int panel_bits;
  uint32_t part_bytes;
  uint32_t width;
  uint32_t address;  // of `memory`, as instructions for shared memory take it
  int32_t to_other;  // from this buffer to the other one
  TensorUnit* lists;

  // With a neuron beyond the last, which is always zero.
  __host__ __device__ static int64_t part_size(int64_t width, int tile) {
    constexpr int64_t kLine = 8 * kPanelBytes;
    return ((width + 1) * tile * static_cast<int64_t>(sizeof(uint16_t)) + kLine - 1) / kLine * kLine;
  }
  // Two buffers, of a layer's inputs and of its outputs, and two lists of units, of this layer and of the next.
  __host__ __device__ static int64_t bytes(int64_t width, int tile) {
    return 2 * kParts * part_size(width, tile) + 2 * kMostUnits * static_cast<int64_t>(sizeof(TensorUnit));
  }

  __device__ TensorUnit* units(int layer) const { return lists + layer % 2 * kMostUnits; }

  __device__ SplitActivations(char* shared, const Columns& columns, int width, int tile)
      : memory(shared),
        panel_bits(columns.count_bits - 3),
        part_bytes(static_cast<uint32_t>(part_size(width, tile))),
        width(width),
        address(shared_address_of(shared)),
        to_other(static_cast<int32_t>(kParts * part_bytes)),
        lists(reinterpret_cast<TensorUnit*>(shared + 2 * kParts * part_bytes)) {
    for (uint32_t k = threadIdx.x; k < 2 * kParts * columns.count() / 4; k += blockDim.x) {
      const uint32_t part = k % (2 * kParts), column = k / (2 * kParts) * 4;
      *reinterpret_cast<uint2*>(memory + part * part_bytes + offset(width, column)) = make_uint2(0, 0);
    }
  }

  // After a layer, whose outputs lie in the other buffer.
  __device__ void flip() {
    memory += to_other;
    address += to_other;
    to_other = -to_other;
  }

  // The neuron that is always zero.
  __device__ uint32_t zero() const { return width; }

  // Of a feature's part of a neuron.
  __device__ __forceinline__ uint32_t offset(uint32_t neuron, uint32_t column) const {
    const uint32_t panel = (neuron << panel_bits) + column / kPanel;
    return (panel ^ (neuron >> 5 & 7u)) * kPanelBytes + column % kPanel * 2;
  }

  // Of a neuron's first panel; those that follow lie at the same address but for the number of the panel.
  __device__ __forceinline__ uint32_t shared_address(uint32_t neuron) const { return address + offset(neuron, 0); }

  // Two neighbouring features, from an even column on.
  __device__ __forceinline__ void set_pair(char* target, float x, float y) const {
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
    set_pair(memory + offset(neuron, column), x[0], x[1]);
    set_pair(memory + offset(neuron, column + 2), x[2], x[3]);
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
  static constexpr bool kForeman = true;
  static constexpr int kThreads = kMostThreads + 32;

  // Lists the units of the layer that comes next, one a thread; they end with one that is none.
  __device__ static void prepare(const LayerView& view, int number, const Activations& activations) {
    TensorUnit* units = activations.units(number);
    for (int u = threadIdx.x % 32; u < kMostUnits; u += 32) {
      units[u] = locate(view, u);
      if (units[u].halves == 0) break;
    }
  }

  __device__ static uint32_t compute_layer(const LayerView& view, int number, const Scale& scale,
                                           const Activations& activations) {
    return activations.panel_bits == 0 ? compute<1>(view, number, scale, activations)
                                       : compute<2>(view, number, scale, activations);
  }

 private:
  __device__ static TensorUnit locate(const LayerView& view, int number) {
    const PlanLayer& layer = view.layer();
    for (int r = 0; r < static_cast<int>(layer.runs); ++r) {
      const PlanRun& run = view.run(r);
      const int groups = static_cast<int>(run.groups), group_outputs = static_cast<int>(run.group_outputs);
      const bool full = group_outputs >= kTogether;
      const int units = full ? groups * (group_outputs / kTogether) : groups;
      if (number < units) {
        const Unit unit = Unit::at(number, groups, kTogether);
        const int edges = static_cast<int>(run.edges);
        const int chunk = unit.slice * (edges / kEdgeChunk) + unit.lane;
        TensorUnit result;
        result.first_index = static_cast<uint32_t>((run.index_offset - layer.first_word) * 2 + chunk * kEdgeChunk);
        result.slot = static_cast<uint16_t>(unit.first_slot(run));
        result.width = static_cast<uint8_t>(unit.width);
        result.halves = full ? 2 : 1;
        result.edges = edges;
        result.weight = static_cast<float>(run.value);
        return result;
      }
      number -= units;
    }
    return {};
  }

  // Of an instruction's sums thread `lane` has rows lane / 4 and lane / 4 + 8, and features lane % 4 * 2 and the next.
  template <int kPanels>
  __device__ static __forceinline__ uint32_t compute(const LayerView& view, int number, const Scale& scale,
                                                     const Activations& activations) {
    const uint32_t lane = threadIdx.x % 32, warps = blockDim.x / 32 - 1;
    const TensorUnit* units = activations.units(number);
    const uint16_t* indices = view.at<uint16_t>(view.layer().first_word);
    uint32_t any[kPanels][2] = {};
    uint32_t u = threadIdx.x / 32;
    TensorUnit next = units[u];
    uint32_t next_neuron = index_of_edge(next, indices, lane, activations);
#pragma unroll 1
    while (next.halves > 0) {
      const TensorUnit unit = next;
      const uint32_t neuron = next_neuron;
      u += warps;
      next.halves = 0;
      if (u < kMostUnits) {
        next = units[u];
        next_neuron = index_of_edge(next, indices, lane, activations);
      }
      float sums[kParts][kPanels][4] = {};
      add_edges<kPanels>(unit, neuron, indices, lane, activations, sums);
      finish<kPanels>(view, unit, lane, scale, sums, any);
      store<kPanels>(unit, lane, activations, sums[0]);
    }
    uint32_t active = 0;
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int k = 0; k < 2; ++k) active |= static_cast<uint32_t>((any[p][k] << 1) != 0) << (p * kPanel + k);
    }
    return active << lane % 4 * 2;
  }

  // The input of one edge of a unit; past the last, the neuron that is zero.
  __device__ static __forceinline__ uint32_t index_of_edge(const TensorUnit& unit, const uint16_t* indices,
                                                           uint32_t edge, const Activations& activations) {
    const uint32_t position = unit.first_index + (edge / kEdgeChunk * unit.width) * kEdgeChunk + edge % kEdgeChunk;
    return edge < unit.edges ? indices[position] : activations.zero();
  }

  // Adds a group's inputs. Thread `lane` brings edge `lane` of each 32, `neuron` the first.
  template <int kPanels>
  __device__ static __forceinline__ void add_edges(const TensorUnit& unit, uint32_t neuron, const uint16_t* indices,
                                                   uint32_t lane, const Activations& activations,
                                                   float (&sums)[kParts][kPanels][4]) {
#pragma unroll 1
    for (uint32_t first = 0;;) {
      const uint32_t row = activations.shared_address(neuron);
      uint32_t x[kParts][kPanels][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int p = 0; p < kPanels; ++p) {
          load_four_transposed((row + part * activations.part_bytes) ^ (p * kPanelBytes), x[part][p]);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {  // apart, so that they need not wait for one another
#pragma unroll
          for (int p = 0; p < kPanels; ++p) add_product_with_ones(x[part][p][k], x[part][p][k + 1], sums[part][p]);
        }
      }
      first += 32;
      if (first >= unit.edges) return;
      neuron = index_of_edge(unit, indices, first + lane, activations);
    }
  }

  // Sums of parts, weight, bias, clip; the result lies in the first part's. Keeps in `any` what bits are set in some
  // output.
  template <int kPanels>
  __device__ static __forceinline__ void finish(const LayerView& view, const TensorUnit& unit, uint32_t lane,
                                                const Scale& scale, float (&sums_of_parts)[kParts][kPanels][4],
                                                uint32_t (&any)[kPanels][2]) {
    float (&sums)[kPanels][4] = sums_of_parts[0];
    const PlanLayer& layer = view.layer();
    float lower = static_cast<float>(layer.bias), upper = lower;
    if (layer.bias_offset >= 0) {
      const float* biases = view.at<float>(layer.bias_offset) + unit.slot + lane / 4 * unit.width;
      lower = biases[0];
      if (unit.halves == 2) upper = biases[8 * unit.width];
    }
    lower *= scale.per_unit;
    upper *= scale.per_unit;
    const uint32_t upper_counts = unit.halves == 2 ? 0xFFFFFFFFu : 0;
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float sum = sums[p][k] + (sums_of_parts[1][p][k] + sums_of_parts[2][p][k]);
        sums[p][k] = fmaf(unit.weight, sum, k < 2 ? lower : upper);
      }
    }
    scale.clip(reinterpret_cast<float (&)[kPanels * 4]>(sums));
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        any[p][k] |= __float_as_uint(sums[p][k]) | (__float_as_uint(sums[p][k + 2]) & upper_counts);
      }
    }
  }

  template <int kPanels>
  __device__ static __forceinline__ void store(const TensorUnit& unit, uint32_t lane, const Activations& activations,
                                               const float (&sums)[kPanels][4]) {
    char* out = activations.memory + activations.to_other;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == unit.halves) return;
      const uint32_t neuron = unit.slot + (lane / 4 + half * 8) * unit.width;
      const uint32_t first = activations.offset(neuron, lane % 4 * 2);
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        activations.set_pair(out + (first ^ (p * kPanelBytes)), sums[p][2 * half], sums[p][2 * half + 1]);
      }
    }
  }
};

}  // namespace spdnn::cuda
