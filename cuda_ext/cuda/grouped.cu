#include <algorithm>
#include <type_traits>

#include "accumulate.cuh"
#include "grouped.h"
#include "launch.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 4;            // features of a thread
constexpr int kPanel = 32 * kVector;  // features of a warp

struct RunArguments {
  PlanLayer layer;
  PlanRun run;
};

// Four features from four places: a feature whose neighbours died keeps its old place until it is next written.
struct Gather {
  static constexpr bool kAhead = false;  // the addresses take the registers
  const float* column[kVector];

  __device__ void operator()(uint32_t index, float (&x)[kVector]) const {
#pragma unroll
    for (int v = 0; v < kVector; ++v) x[v] = __ldg(column[v] + static_cast<int64_t>(index) * kTile);
  }
};

struct Direct {
  static constexpr bool kAhead = true;
  const float* column;

  __device__ void operator()(uint32_t index, float (&x)[kVector]) const {
    const float4 v = __ldg(reinterpret_cast<const float4*>(column + static_cast<int64_t>(index) * kTile));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }
};

// The caller's bytes or bits.
template <typename Four>
struct Narrow {
  static constexpr bool kAhead = true;
  Four four;

  __device__ void operator()(uint32_t index, float (&x)[kVector]) const { four.load(index, x); }
};

template <int kOutputs, bool kStored, typename Index, typename Load>
__device__ __forceinline__ void compute_unit(const LayerStep& step, const RunArguments& arguments, const Unit& unit,
                                             uint32_t slot, uint32_t count, Load load) {
  const PlanRun& run = arguments.run;
  const GlobalWords words{step.words};
  float sums[kOutputs][kVector];
  start_with_bias(arguments.layer, run, unit, words, step.scale, sums);
  accumulate<kOutputs, kVector, kStored, !kStored && Load::kAhead, Index>(run, unit, words, load, sums);
  const uint32_t active = clip_all(sums, step.bounds);
  float* target = step.target + tiled_offset(slot, unit.first_slot(run), arguments.layer.outputs);
#pragma unroll
  for (int r = 0; r < kOutputs; ++r) {
    *reinterpret_cast<float4*>(target + r * unit.width * kTile) =
        make_float4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
  }
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    if ((active >> v & 1u) && slot + v < count && step.flags[slot + v] != step.flag) step.flags[slot + v] = step.flag;
  }
}

// Work items count through the units of a panel of features first, so that the panel's input stays in the L2 cache.
template <int kOutputs, bool kStored, typename Index>
__global__ void __launch_bounds__(kThreads, 2)
    grouped_kernel(const __grid_constant__ LayerStep step, const __grid_constant__ RunArguments arguments) {
  const PlanRun& run = arguments.run;
  const uint32_t count = step.features_in_work();
  const bool gathered = step.is_scattered(count);
  const uint32_t units = static_cast<uint32_t>(run.groups * (run.group_outputs / kOutputs));
  const uint32_t blocks_per_panel = (units + kWarps - 1) / kWarps;
  const uint32_t panels = count / kPanel + (count % kPanel != 0);
  const uint32_t lane = threadIdx.x % 32;
  uint32_t panel = blockIdx.x / blocks_per_panel, block = blockIdx.x % blocks_per_panel;
  for (; panel < panels; panel += gridDim.x / blocks_per_panel, block += gridDim.x % blocks_per_panel) {
    if (block >= blocks_per_panel) {
      block -= blocks_per_panel;
      if (++panel >= panels) break;
    }
    const uint32_t u = block * kWarps + threadIdx.x / 32;
    const uint32_t slot = panel * kPanel + lane * kVector;
    if (u >= units || slot >= count) continue;
    const Unit unit = Unit::at(static_cast<int>(u), static_cast<int>(run.groups), kOutputs);
    const int64_t width = arguments.layer.inputs;
    if (!step.source) {
      const auto compute = [&](auto four) {
        compute_unit<kOutputs, kStored, Index>(step, arguments, unit, slot, count, Narrow<decltype(four)>{four});
      };
      if (step.narrow_type == InputType::kUint8) {
        compute(FourBytes(step.narrow_source, slot, width, step.scale.per_unit));
      } else {
        compute(FourBits(step.narrow_source, slot, width, step.scale.per_unit));
      }
    } else if (gathered || slot + kVector > count) {  // past the last feature a tile holds what was there before
      Gather gather;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const uint32_t place = min(slot + v, count - 1);
        const int64_t from = gathered ? step.slots[place] : place;
        gather.column[v] = step.source + tiled_offset(from, 0, width);
      }
      compute_unit<kOutputs, kStored, Index>(step, arguments, unit, slot, count, gather);
    } else {
      const Direct direct{step.source + tiled_offset(slot, 0, width)};
      compute_unit<kOutputs, kStored, Index>(step, arguments, unit, slot, count, direct);
    }
  }
}

template <int kOutputs, bool kStored, typename Index>
cudaError_t launch(const LayerStep& step, const RunArguments& arguments, cudaStream_t stream) {
  const auto kernel = grouped_kernel<kOutputs, kStored, Index>;
  int64_t resident_blocks = 0;
  if (const cudaError_t error = resident_block_count(kernel, kThreads, 0, &resident_blocks); error != cudaSuccess) {
    return error;
  }
  const int64_t units = arguments.run.groups * (arguments.run.group_outputs / kOutputs);
  const int64_t items = (units + kWarps - 1) / kWarps * ((step.features + kPanel - 1) / kPanel);
  kernel<<<static_cast<unsigned>(std::min(items, resident_blocks)), kThreads, 0, stream>>>(step, arguments);
  return cudaGetLastError();
}

template <bool kStored, typename Index>
cudaError_t launch_run(const LayerStep& step, const RunArguments& arguments, cudaStream_t stream) {
  switch (outputs_of_unit(arguments.run)) {
    case 1:
      return launch<1, kStored, Index>(step, arguments, stream);
    case 2:
      return launch<2, kStored, Index>(step, arguments, stream);
    case 4:
      return launch<4, kStored, Index>(step, arguments, stream);
    case 8:
      return launch<8, kStored, Index>(step, arguments, stream);
    default:
      return launch<kMostOutputs<kStored>, kStored, Index>(step, arguments, stream);
  }
}

}  // namespace

cudaError_t launch_grouped(const LayerStep& step, const PlanLayer& layer, const PlanRun* runs, cudaStream_t stream) {
  for (int64_t r = 0; r < layer.runs; ++r) {
    const RunArguments arguments{layer, runs[layer.first_run + r]};
    const bool stored = arguments.run.value_offset >= 0, narrow = layer.index_bits == 16;
    const auto launch = narrow ? (stored ? launch_run<true, uint16_t> : launch_run<false, uint16_t>)
                               : (stored ? launch_run<true, uint32_t> : launch_run<false, uint32_t>);
    if (const cudaError_t error = launch(step, arguments, stream); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace spdnn::cuda
