#include <algorithm>

#include "rows.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

constexpr int kSquare = 32;  // features and neurons that a block transposes at a time
constexpr int kTransposeRows = 8;

__global__ void __launch_bounds__(kSquare* kTransposeRows)
    read_floats_kernel(InputFeatures input, int64_t features, float* target) {
  __shared__ float square[kSquare][kSquare + 1];
  const int64_t first_neuron = static_cast<int64_t>(blockIdx.x) * kSquare;
  for (int64_t tile = blockIdx.y; tile * kSquare < features; tile += gridDim.y) {
    for (int row = threadIdx.y; row < kSquare; row += kTransposeRows) {
      const int64_t feature = tile * kSquare + row, neuron = first_neuron + threadIdx.x;
      const bool inside = feature < features && neuron < input.inputs;
      square[row][threadIdx.x] = inside ? feature_at(input, feature, neuron) : 0.0f;
    }
    __syncthreads();
    for (int row = threadIdx.y; row < kSquare; row += kTransposeRows) {
      const int64_t neuron = first_neuron + row;
      if (neuron < input.inputs) {
        target[tiled_offset(tile * kSquare + threadIdx.x, neuron, input.inputs)] = square[threadIdx.x][row];
      }
    }
    __syncthreads();
  }
}

// Four bytes of a row, zeros where there is nothing.
__device__ __forceinline__ uint32_t four_bytes(const InputFeatures& input, int64_t features, int64_t feature,
                                               int64_t neuron) {
  if (feature >= features) return 0;
  const uint8_t* row = static_cast<const uint8_t*>(input.data) + feature * input.inputs;
  if (input.inputs % 4 == 0) {
    return neuron < input.inputs ? __ldg(reinterpret_cast<const uint32_t*>(row + neuron)) : 0;
  }
  uint32_t bytes = 0;
  for (int k = 0; k < 4 && neuron + k < input.inputs; ++k)
    bytes |= static_cast<uint32_t>(__ldg(row + neuron + k)) << 8 * k;
  return bytes;
}

// A square of 128 features and neurons at a time; four by four bytes change places in registers, words in shared
// memory.
__global__ void __launch_bounds__(kSquare* kTransposeRows)
    read_bytes_kernel(InputFeatures input, int64_t features, uint32_t* target) {
  __shared__ uint32_t square[4][kSquare][kSquare + 1];  // [neuron % 4][neuron / 4][four features]
  const int64_t first_neuron = static_cast<int64_t>(blockIdx.x) * kTile;
  const int lane = threadIdx.x;
  for (int64_t tile = blockIdx.y; tile * kTile < features; tile += gridDim.y) {
#pragma unroll
    for (int row = threadIdx.y; row < kSquare; row += kTransposeRows) {
      uint32_t of_feature[4];
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        of_feature[f] = four_bytes(input, features, tile * kTile + 4 * row + f, first_neuron + 4 * lane);
      }
      transpose_bytes(of_feature);
#pragma unroll
      for (int k = 0; k < 4; ++k) square[k][lane][row] = of_feature[k];
    }
    __syncthreads();
    for (int neuron = threadIdx.y; neuron < kTile && first_neuron + neuron < input.inputs; neuron += kTransposeRows) {
      target[(tile * input.inputs + first_neuron + neuron) * kSquare + lane] = square[neuron % 4][neuron / 4][lane];
    }
    __syncthreads();
  }
}

// A warp takes a word of 128 rows, its lanes their neurons.
__global__ void __launch_bounds__(kSquare* kTransposeRows)
    read_bits_kernel(InputFeatures input, int64_t features, uint4* target) {
  const int64_t row_words = (input.inputs + 31) / 32,
                word = static_cast<int64_t>(blockIdx.x) * kTransposeRows + threadIdx.y;
  if (word >= row_words) return;
  const int64_t neuron = word * 32 + threadIdx.x;
  for (int64_t tile = blockIdx.y; tile * kTile < features; tile += gridDim.y) {
    uint32_t bits[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int64_t feature = tile * kTile + part * 32 + threadIdx.x;
      const uint32_t row =
          feature < features ? __ldg(static_cast<const uint32_t*>(input.data) + feature * row_words + word) : 0;
      for (uint32_t k = 0; k < 32; ++k) {
        const uint32_t of_neuron = __ballot_sync(0xFFFFFFFFu, row >> k & 1u);
        if (threadIdx.x == k) bits[part] = of_neuron;
      }
    }
    if (neuron < input.inputs) target[tile * input.inputs + neuron] = uint4{bits[0], bits[1], bits[2], bits[3]};
  }
}

__global__ void __launch_bounds__(kSquare* kTransposeRows)
    write_output_kernel(const __grid_constant__ OutputStep step) {
  __shared__ float square[kSquare][kSquare + 1];
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * kSquare;
  const int64_t count = step.count ? *step.count : step.features;
  for (int64_t tile = blockIdx.y; tile * kSquare < count; tile += gridDim.y) {
    const int64_t slot = tile * kSquare + threadIdx.x;
    for (int row = threadIdx.y; row < kSquare; row += kTransposeRows) {
      const int64_t output = first_output + row;
      const bool inside = slot < count && output < step.outputs;
      square[row][threadIdx.x] = inside ? step.source[tiled_offset(slot, step.slot_of[output], step.width)] : 0.0f;
    }
    __syncthreads();
    for (int row = threadIdx.y; row < kSquare; row += kTransposeRows) {
      const int64_t row_slot = tile * kSquare + row, output = first_output + threadIdx.x;
      if (row_slot < count && output < step.outputs) {
        const int64_t id = step.ids ? step.ids[row_slot] : row_slot;
        step.activations[id * step.outputs + output] = square[threadIdx.x][row] * step.unit;
      }
    }
    __syncthreads();
  }
}

// Blocks of `neurons` and `features` that cover so many.
dim3 grid_of(int64_t neurons, int64_t block_neurons, int64_t features, int64_t block_features) {
  return dim3(static_cast<unsigned>((neurons + block_neurons - 1) / block_neurons),
              static_cast<unsigned>(std::min<int64_t>((features + block_features - 1) / block_features, 4096)));
}

}  // namespace

cudaError_t launch_read_input(const InputFeatures& input, int64_t features, float* target, cudaStream_t stream) {
  if (input.inputs == 0) return cudaSuccess;
  const dim3 grid = grid_of(input.inputs, kSquare, features, kSquare);
  read_floats_kernel<<<grid, dim3(kSquare, kTransposeRows), 0, stream>>>(input, features, target);
  return cudaGetLastError();
}

cudaError_t launch_read_narrow_input(const InputFeatures& input, int64_t features, void* target, cudaStream_t stream) {
  if (input.inputs == 0) return cudaSuccess;
  const dim3 threads(kSquare, kTransposeRows);
  if (input.type == InputType::kUint8) {
    const dim3 grid = grid_of(input.inputs, kTile, features, kTile);
    read_bytes_kernel<<<grid, threads, 0, stream>>>(input, features, static_cast<uint32_t*>(target));
  } else {
    const dim3 grid = grid_of(input.inputs, 32 * kTransposeRows, features, kTile);
    read_bits_kernel<<<grid, threads, 0, stream>>>(input, features, static_cast<uint4*>(target));
  }
  return cudaGetLastError();
}

cudaError_t launch_write_output(const OutputStep& step, cudaStream_t stream) {
  if (step.outputs == 0) return cudaSuccess;
  const dim3 grid = grid_of(step.outputs, kSquare, step.features, kSquare);
  write_output_kernel<<<grid, dim3(kSquare, kTransposeRows), 0, stream>>>(step);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
