#include <algorithm>

#include "equal_features.h"
#include "tiles.cuh"

namespace spdnn::cuda {
namespace {

#ifndef SPDNN_FEATURE_HASH_MASK
#define SPDNN_FEATURE_HASH_MASK ~uint64_t{0}  // tests leave a few bits, to force collisions
#endif

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kExpandThreads = 256;
constexpr int kMostBlocks = 264;  // two on a multiprocessor of the largest devices; more find nothing to do, mostly
constexpr int kMostExpandBlocks = 4096;

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

// The sum over the block's warps of what each lane has, for the first warp.
__device__ uint64_t sum_over_warps(uint64_t value) {
  __shared__ uint64_t values[kWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  values[warp][lane] = value;
  __syncthreads();
  if (warp == 0) {
    for (int other = 1; other < kWarps; ++other) value += values[other][lane];
  }
  __syncthreads();
  return value;
}

// Enters a place into the table, unless one of the same hash stands there. Returns which one stands there.
__device__ int32_t enter(int32_t place, const FeatureClasses& classes) {
  const uint64_t hash = classes.hashes[place] & SPDNN_FEATURE_HASH_MASK;
  for (uint64_t at = hash;; ++at) {
    const int32_t occupant = atomicCAS(classes.table + (at & (classes.table_places - 1)), -1, place);
    if (occupant < 0) return place;
    if ((__ldcg(reinterpret_cast<const unsigned long long*>(classes.hashes + occupant)) & SPDNN_FEATURE_HASH_MASK) ==
        hash) {
      return occupant;
    }
  }
}

// Finds each place's candidate: the first one found with its hash, perhaps itself. A block for 32 features, a lane for
// each, whose neurons the warps share. `table` is -1 at the launch.
__global__ void __launch_bounds__(kThreads) candidates_kernel(const float* source, int64_t width, Places places,
                                                              const __grid_constant__ FeatureClasses classes) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t count = places.size();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * 32; first < count;
       first += static_cast<int64_t>(gridDim.x) * 32) {
    const int64_t place = first + lane;
    uint64_t sum = 0;
    if (place < count) {
      const float* column = source + tiled_offset(places.slot(place), 0, width);
#pragma unroll 8
      for (int64_t neuron = warp; neuron < width; neuron += kWarps) {
        sum += hash_of(neuron, __float_as_uint(column[neuron * kTile]));
      }
    }
    sum = sum_over_warps(sum);
    if (warp == 0 && place < count) {
      classes.hashes[place] = sum;
      __threadfence();  // who finds the place in the table finds its hash
      classes.candidates[place] = enter(static_cast<int32_t>(place), classes);
    }
  }
}

// Lets features that equal their candidate follow it, and flags the others, which go on: that the hash is the same does
// not say that they are. Leaves the table as the next search is to find it.
__global__ void __launch_bounds__(kThreads)
    follow_kernel(const float* source, int64_t width, Places places, const __grid_constant__ FeatureClasses classes,
                  uint8_t* flags, uint8_t differs) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t count = places.size();
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < classes.table_places;
       k += static_cast<int64_t>(gridDim.x) * kThreads) {
    classes.table[k] = -1;
  }
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * 32; first < count;
       first += static_cast<int64_t>(gridDim.x) * 32) {
    const int64_t place = first + lane;
    const int32_t candidate = place < count ? classes.candidates[place] : -1;
    uint64_t differences = 0;
    if (candidate >= 0 && candidate != place) {
      const float* mine = source + tiled_offset(places.slot(place), 0, width);
      const float* other = source + tiled_offset(places.slot(candidate), 0, width);
#pragma unroll 4
      for (int64_t neuron = warp; neuron < width; neuron += kWarps) {
        differences += __float_as_uint(mine[neuron * kTile]) != __float_as_uint(other[neuron * kTile]);
      }
    }
    differences = sum_over_warps(differences);
    if (warp > 0 || place >= count) continue;
    if (candidate == place || differences > 0) {
      flags[place] = differs;
      continue;
    }
    const int32_t id = places.id(place), leader = places.id(candidate);
    classes.leader_of[id] = leader;
    atomicAdd(classes.members + leader, classes.members[id]);
  }
}

// A warp for each feature. A leader may have come to follow another one later.
__global__ void __launch_bounds__(kExpandThreads)
    expand_kernel(const int32_t* leader_of, int64_t features, bool* alive, float* activations, int64_t outputs) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kExpandThreads + threadIdx.x) / 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kExpandThreads / 32);
  for (int64_t feature = first; feature < features; feature += step) {
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

unsigned blocks_for(int64_t items, int64_t items_of_block, int64_t most) {
  return static_cast<unsigned>(std::clamp<int64_t>((items + items_of_block - 1) / items_of_block, 1, most));
}

}  // namespace

int64_t table_places(int64_t features) {
  int64_t places = 2;
  while (places < 2 * features) places *= 2;
  return places;
}

cudaError_t launch_equal_features(const EqualStep& step, cudaStream_t stream) {
  const Places places = places_of(step);
  const unsigned blocks = blocks_for(step.activity.features, 32, kMostBlocks);
  candidates_kernel<<<blocks, kThreads, 0, stream>>>(step.source, step.width, places, step.classes);
  follow_kernel<<<blocks, kThreads, 0, stream>>>(step.source, step.width, places, step.classes, step.flags,
                                                 step.activity.flag);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  return launch_activity(step.activity, stream);
}

cudaError_t launch_expand(const FeatureClasses& classes, int64_t features, bool* alive, float* activations,
                          int64_t outputs, cudaStream_t stream) {
  const unsigned blocks = blocks_for(features, kExpandThreads / 32, kMostExpandBlocks);
  expand_kernel<<<blocks, kExpandThreads, 0, stream>>>(classes.leader_of, features, alive, activations, outputs);
  return cudaGetLastError();
}

}  // namespace spdnn::cuda
