#include <algorithm>

#include "equal_features.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

#ifndef SPDNN_FEATURE_HASH_MASK
#define SPDNN_FEATURE_HASH_MASK ~uint64_t{0}  // tests leave a few bits, to force collisions
#endif

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSliceNeurons = 512;  // neurons that one block looks at
constexpr int kMostBlocks = 528;    // of the grid's first dimension: those that find nothing to do cost time, too

// The features in work, as the kernels below see them.
struct Places {
  const int32_t* slots;
  const int32_t* ids;
  const int32_t* count;
  int64_t features;

  __device__ int64_t size() const { return count ? *count : features; }
  __device__ int64_t slot(int64_t place) const { return slots ? slots[place] : place; }
  __device__ int32_t id(int64_t place) const { return ids ? ids[place] : static_cast<int32_t>(place); }
};

Places places_of(const EqualStep& step) {
  return {step.activity.slots, step.activity.ids, step.activity.count, step.activity.features};
}

// A neuron's share of the hash. Shares are added up, in any order.
__device__ uint64_t hash_of(int64_t neuron, uint32_t bits) {
  uint64_t hash = (static_cast<uint64_t>(neuron) << 32 | bits) + 0x9E3779B97F4A7C15u;
  hash = (hash ^ hash >> 30) * 0xBF58476D1CE4E5B9u;
  hash = (hash ^ hash >> 27) * 0x94D049BB133111EBu;
  return hash ^ hash >> 31;
}

struct Slice {
  int64_t begin, end;  // neurons

  __device__ static Slice of_block(int64_t width) {
    const int64_t begin = static_cast<int64_t>(blockIdx.y) * kSliceNeurons;
    return {begin, min(begin + kSliceNeurons, width)};
  }
};

// A block for 32 features and a slice of the neurons, a lane for each feature. `hashes` are zero at the launch.
__global__ void __launch_bounds__(kThreads)
    hash_kernel(const float* source, int64_t width, Places places, uint64_t* hashes) {
  __shared__ uint64_t sums[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Slice slice = Slice::of_block(width);
  const int64_t count = places.size();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * 32; first < count;
       first += static_cast<int64_t>(gridDim.x) * 32) {
    const int64_t place = first + lane;
    uint64_t sum = 0;
    if (place < count) {
      const float* column = source + tiled_offset(places.slot(place), 0, width);
#pragma unroll 8
      for (int64_t neuron = slice.begin + warp; neuron < slice.end; neuron += kWarps) {
        sum += hash_of(neuron, __float_as_uint(column[neuron * kTile]));
      }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && place < count) {
      for (int other = 1; other < kWarps; ++other) sum += sums[other][lane];
      atomicAdd(reinterpret_cast<unsigned long long*>(hashes + place), static_cast<unsigned long long>(sum));
    }
    __syncthreads();
  }
}

// Enters each place into the table, unless one of the same hash stands there: that is its candidate. `table` is -1 at
// the launch.
__global__ void __launch_bounds__(kThreads)
    enter_kernel(Places places, const uint64_t* hashes, int32_t* table, uint64_t table_mask, int32_t* candidates) {
  const int64_t count = places.size();
  for (int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; place < count;
       place += static_cast<int64_t>(gridDim.x) * kThreads) {
    const uint64_t hash = hashes[place] & SPDNN_FEATURE_HASH_MASK;
    for (uint64_t at = hash;; ++at) {
      const int32_t occupant = atomicCAS(table + (at & table_mask), -1, static_cast<int32_t>(place));
      if (occupant >= 0 && (hashes[occupant] & SPDNN_FEATURE_HASH_MASK) != hash) continue;
      candidates[place] = occupant < 0 ? static_cast<int32_t>(place) : occupant;
      break;
    }
  }
}

// Flags features that differ from their candidate, for all that the hash is the same.
__global__ void __launch_bounds__(kThreads) compare_kernel(const float* source, int64_t width, Places places,
                                                           const int32_t* candidates, uint8_t* flags, uint8_t differs) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Slice slice = Slice::of_block(width);
  const int64_t count = places.size();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * 32; first < count;
       first += static_cast<int64_t>(gridDim.x) * 32) {
    const int64_t place = first + lane;
    const int32_t candidate = place < count ? candidates[place] : -1;
    if (candidate < 0 || candidate == place) continue;
    const float* mine = source + tiled_offset(places.slot(place), 0, width);
    const float* other = source + tiled_offset(places.slot(candidate), 0, width);
    bool equal = true;
#pragma unroll 4
    for (int64_t neuron = slice.begin + warp; neuron < slice.end; neuron += kWarps) {
      equal &= __float_as_uint(mine[neuron * kTile]) == __float_as_uint(other[neuron * kTile]);
    }
    if (!equal) flags[place] = differs;
  }
}

// Lets the features that equal their candidate follow it, and flags the others, which go on. Leaves hashes and table as
// the next search is to find them.
__global__ void __launch_bounds__(kThreads)
    follow_kernel(Places places, const int32_t* candidates, FeatureClasses classes, uint8_t* flags, uint8_t differs) {
  const int64_t count = places.size(), first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t k = first; k < classes.table_places; k += step) classes.table[k] = -1;
  for (int64_t place = first; place < count; place += step) {
    classes.hashes[place] = 0;
    const int32_t candidate = candidates[place];
    if (candidate == place) flags[place] = differs;
    if (flags[place] == differs) continue;
    const int32_t id = places.id(place), leader = places.id(candidate);
    classes.leader_of[id] = leader;
    atomicAdd(classes.members + leader, classes.members[id]);
  }
}

// A warp for each feature. A leader may have come to follow another one later.
__global__ void __launch_bounds__(kThreads)
    expand_kernel(const int32_t* leader_of, int64_t features, bool* alive, float* activations, int64_t outputs) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  for (int64_t feature = first; feature < features; feature += static_cast<int64_t>(gridDim.x) * kWarps) {
    int64_t leader = leader_of[feature];
    if (leader == feature) continue;
    for (int64_t next; (next = leader_of[leader]) != leader;) leader = next;
    if (lane == 0) alive[feature] = alive[leader];
    if (!activations) continue;
    for (int64_t j = lane; j < outputs; j += 32) {
      activations[feature * outputs + j] = activations[leader * outputs + j];
    }
  }
}

unsigned blocks_for(int64_t items, int64_t items_of_block) {
  return static_cast<unsigned>(std::clamp<int64_t>((items + items_of_block - 1) / items_of_block, 1, kMostBlocks));
}

}  // namespace

int64_t table_places(int64_t features) {
  int64_t places = 2;
  while (places < 2 * features) places *= 2;
  return places;
}

cudaError_t launch_equal_features(const EqualStep& step, cudaStream_t stream) {
  const FeatureClasses& classes = step.classes;
  const Places places = places_of(step);
  const int64_t features = step.activity.features;
  const dim3 slices(blocks_for(features, 32), static_cast<unsigned>((step.width + kSliceNeurons - 1) / kSliceNeurons));
  const unsigned blocks = blocks_for(features, kThreads);
  if (step.width > 0) hash_kernel<<<slices, kThreads, 0, stream>>>(step.source, step.width, places, classes.hashes);
  enter_kernel<<<blocks, kThreads, 0, stream>>>(places, classes.hashes, classes.table,
                                                static_cast<uint64_t>(classes.table_places - 1), classes.candidates);
  if (step.width > 0) {
    compare_kernel<<<slices, kThreads, 0, stream>>>(step.source, step.width, places, classes.candidates, step.flags,
                                                    step.activity.flag);
  }
  follow_kernel<<<blocks, kThreads, 0, stream>>>(places, classes.candidates, classes, step.flags, step.activity.flag);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  return launch_activity(step.activity, stream);
}

cudaError_t launch_expand(const FeatureClasses& classes, int64_t features, bool* alive, float* activations,
                          int64_t outputs, cudaStream_t stream) {
  expand_kernel<<<blocks_for(features, kWarps), kThreads, 0, stream>>>(classes.leader_of, features, alive, activations,
                                                                       outputs);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
