// Finds features whose activations are equal, bit for bit: from there on they agree, so one of each class goes on, and
// the others get its result at the end.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "activity.h"

namespace spdnn::cuda {

// What is known of the classes. Arrays of the workspace, of one entry a feature if nothing else is said.
struct FeatureClasses {
  uint64_t* hashes;      // of each place in the list of features in work
  int32_t* candidates;   // of each place: that of the first feature found with the same hash, perhaps itself
  int32_t* table;        // places by their hash, -1 where free; so all of it between searches
  int64_t table_places;  // a power of two, at least twice the features
  int32_t* leader_of;    // of each feature: the one that it follows, or itself
  int32_t* members;      // of each feature: how many it stands for
};

// Places of the table for so many features.
int64_t table_places(int64_t features);

struct EqualStep {
  FeatureClasses classes;
  const float* source;    // tiles
  int64_t width;          // neurons of `source`
  uint8_t* flags;         // those of `activity`
  ActivityStep activity;  // the lists, and where the shorter ones go; no flag is that of the step at the launch
};

// Looks for equal features among those in work, and drops all but one of each class from the lists.
cudaError_t launch_equal_features(const EqualStep& step, cudaStream_t stream);

// Gives each follower the result of the feature that stands for it.
cudaError_t launch_expand(const FeatureClasses& classes, int64_t features, bool* alive, float* activations,
                          int64_t outputs, cudaStream_t stream);

}  // namespace spdnn::cuda
