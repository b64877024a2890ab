#include "cpu/network.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <utility>

#include "cpu/kernels.h"

namespace spdnn::cpu {
namespace {

constexpr int64_t kMemory = int64_t{64} << 20;      // of a thread
constexpr int64_t kTileMemory = int64_t{16} << 20;  // of the two tiles a thread works on: a share of the last-level cache
constexpr int64_t kMaxStride = 64;                  // features of a tile
constexpr int64_t kMinStride = 16;                  // a vector of AVX-512

int64_t widest(const PlanView& plan) {
  int64_t width = plan.header->inputs;
  for (int64_t l = 0; l < plan.header->layers; ++l) width = std::max(width, plan.layers[l].outputs);
  return width;
}

// After these layers, counted from 1, sparsely filled tiles wait to be merged: 1, 2, 3, 4, 6, 8, 12, 16, 24 ...
bool is_power_or_one_and_a_half(int64_t layer) {
  const int64_t odd_part = layer / (layer & -layer);
  return odd_part == 1 || odd_part == 3;
}

// What the threads share.
struct Shared {
  explicit Shared(const NetworkCall& network, const Kernels& selected) : call(network), kernels(selected) {
    const PlanView& plan = call.plan;
    width = std::max<int64_t>(widest(plan), 1);
    stride = kMaxStride;
    while (stride > kMinStride && 2 * tile_bytes() > kTileMemory) stride /= 2;
    // Small inputs: no more columns than features, and tiles enough for all threads.
    const int64_t affordable = kMemory / tile_bytes() - 2;
    for (int64_t l = 0; l + 1 < plan.header->layers && static_cast<int64_t>(rooms_after.size()) < affordable; ++l) {
      if (plan.layers[l].prunable && is_power_or_one_and_a_half(l + 1)) rooms_after.push_back(l);
    }
  }

  int64_t tile_bytes() const { return width * stride * static_cast<int64_t>(sizeof(float)); }

  const NetworkCall& call;
  const Kernels& kernels;
  int64_t width = 0;
  int64_t stride = 0;
  std::vector<int64_t> rooms_after;  // layers that a waiting room follows
  std::atomic<int64_t> next_tile{0};
  std::atomic<bool> out_of_memory{false};
  std::mutex active_mutex;
};

// One thread's share: tiles of features, each taken through all layers.
//
// Features die early. A tile that is half empty after some layer waits in that layer's room until others have filled it
// up; so the vectors stay full, and all columns of a tile are always at one layer. What is computed for a feature does
// not depend on its neighbours in the tile.
class Worker {
 public:
  explicit Worker(Shared& shared)
      : shared_(shared),
        call_(shared.call),
        stride_(shared.stride),
        in_(shared.width * shared.stride),
        out_(shared.width * shared.stride),
        nonzero_(shared.stride),
        active_(call_.plan.header->layers) {}

  void run() {
    const int64_t tiles = (call_.features + stride_ - 1) / stride_;
    for (int64_t tile; (tile = shared_.next_tile++) < tiles;) {
      const int64_t first = tile * stride_;
      load_tile(call_.input, first, std::min(stride_, call_.features - first), stride_, in_);
      advance(0);
    }
    for (int64_t layer : shared_.rooms_after) {
      auto room = rooms_.find(layer);
      if (room == rooms_.end() || room->second.features.empty()) continue;
      std::swap(in_, room->second);
      room->second.features.clear();
      advance(layer + 1);
    }
    add_active();
  }

 private:
  // Takes the tile `in_` from layer `first` to the end, or into a waiting room.
  void advance(int64_t first) {
    const int64_t layers = call_.plan.header->layers;
    for (int64_t l = first; l < layers; ++l) {
      compute(l);
      const std::vector<int> live = live_columns();
      active_[l] += static_cast<int64_t>(live.size());
      if (l + 1 == layers) return store(live);
      if (!call_.plan.layers[l].prunable) continue;
      if (live.empty()) return;
      if (!keep_full(l, live)) return;
    }
  }

  void compute(int64_t l) {
    const PlanLayer& layer = call_.plan.layers[l];
    std::fill(nonzero_.begin(), nonzero_.end(), 0u);
    RunTask task{};
    task.index_bits = static_cast<int>(layer.index_bits);
    task.bias = layer.bias_offset < 0 ? nullptr : floats(layer.bias_offset);
    task.shared_bias = static_cast<float>(layer.bias);
    task.cap = static_cast<float>(call_.plan.header->cap);
    task.in = in_.buffer.data();
    task.out = out_.buffer.data();
    task.stride = stride_;
    task.features = static_cast<int64_t>(in_.features.size());
    task.nonzero = nonzero_.data();
    for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
      const PlanRun& run = call_.plan.runs[r];
      task.indices = call_.words + run.index_offset;
      task.values = run.value_offset < 0 ? nullptr : floats(run.value_offset);
      task.value = static_cast<float>(run.value);
      task.group_outputs = run.group_outputs;
      task.edges = run.edges;
      task.groups = run.groups;
      task.first_slot = run.first_slot;
      shared_.kernels.run(task);
    }
    out_.features = in_.features;
    std::swap(in_, out_);
  }

  const float* floats(int64_t offset) const { return reinterpret_cast<const float*>(call_.words + offset); }

  std::vector<int> live_columns() const {
    std::vector<int> live;
    for (size_t column = 0; column < in_.features.size(); ++column) {
      if (nonzero_[column] << 1) live.push_back(static_cast<int>(column));  // -0.0 is zero
    }
    return live;
  }

  // Drops the dead columns after layer l where that saves work. False: the tile waits in a room.
  bool keep_full(int64_t l, const std::vector<int>& live) {
    const int64_t width = call_.plan.layers[l].outputs, count = static_cast<int64_t>(live.size());
    const bool has_room = std::binary_search(shared_.rooms_after.begin(), shared_.rooms_after.end(), l);
    if (has_room && count <= stride_ / 2) return wait(l, live, width);
    const int64_t lanes = shared_.kernels.lanes;
    const int64_t vectors = (static_cast<int64_t>(in_.features.size()) + lanes - 1) / lanes;
    if ((count + lanes - 1) / lanes < vectors) move_columns(in_, live, width, stride_, 0, in_);
    return true;
  }

  // True where the room is full: then its tile is `in_`, and what did not fit waits in its place.
  bool wait(int64_t l, const std::vector<int>& live, int64_t width) {
    auto [place, is_new] = rooms_.try_emplace(l, shared_.width * stride_);
    Tile& room = place->second;
    const int64_t waiting = static_cast<int64_t>(room.features.size());
    const int64_t fitting = std::min<int64_t>(static_cast<int64_t>(live.size()), stride_ - waiting);
    move_columns(in_, {live.begin(), live.begin() + fitting}, width, stride_, waiting, room);
    if (waiting + fitting < stride_) return false;
    move_columns(in_, {live.begin() + fitting, live.end()}, width, stride_, 0, in_);
    std::swap(in_, room);
    return true;
  }

  // After the last layer.
  void store(const std::vector<int>& live) {
    const int64_t outputs = call_.plan.header->outputs;
    const int32_t* slot_of = reinterpret_cast<const int32_t*>(call_.words + call_.plan.header->slot_offset);
    for (int column : live) {
      const int64_t feature = in_.features[column];
      call_.alive[feature] = true;
      if (call_.activations) store_row(in_, column, stride_, slot_of, outputs, call_.activations + feature * outputs);
    }
  }

  void add_active() {
    if (!call_.active) return;
    std::lock_guard<std::mutex> lock(shared_.active_mutex);
    for (size_t l = 0; l < active_.size(); ++l) call_.active[l] += static_cast<int32_t>(active_[l]);
  }

  Shared& shared_;
  const NetworkCall& call_;
  int64_t stride_;
  Tile in_, out_;
  std::vector<uint32_t> nonzero_;
  std::vector<int64_t> active_;
  std::map<int64_t, Tile> rooms_;
};

}  // namespace

std::string run_network(const NetworkCall& call, int helpers, const ScheduleTask& schedule) {
  const char* error = nullptr;
  const Kernels* kernels = select_kernels(&error);
  if (!kernels) return error;
  // Rows of features that die are never written again.
  std::fill_n(call.alive, call.features, false);
  if (call.active) std::fill_n(call.active, call.plan.header->layers, 0);
  if (call.activations) std::fill_n(call.activations, call.features * call.plan.header->outputs, 0.0f);
  Shared shared(call, *kernels);
  const int64_t tiles = (call.features + shared.stride - 1) / shared.stride;
  share_work(static_cast<int>(std::min<int64_t>(helpers, tiles - 1)), schedule, [&shared, tiles] {
    if (shared.next_tile >= tiles) return;
    try {
      Worker(shared).run();
    } catch (const std::bad_alloc&) {
      shared.out_of_memory = true;
    }
  });
  return shared.out_of_memory ? "out of memory: a thread needs up to 64 MiB; use fewer features or threads" : "";
}

}  // namespace spdnn::cpu
