#include "cpu/network.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "cpu/kernels.h"

namespace spdnn::cpu {
namespace {

constexpr int64_t kMemory = int64_t{64} << 20;  // of a thread

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
  Shared(const NetworkCall& network, const Kernels& selected, int threads)
      : call(network),
        kernels(selected),
        width(std::max<int64_t>(widest(call.plan), 1)),
        stride(choose_stride(2 * width, call.features, threads)),
        tiles((call.features + stride - 1) / stride) {
    const PlanView& plan = call.plan;
    const int64_t tile_bytes = width * stride * static_cast<int64_t>(sizeof(float));
    const int64_t affordable = kMemory / tile_bytes - 2;  // beside the two tiles that the thread works on
    for (int64_t l = 0; l + 1 < plan.header->layers && static_cast<int64_t>(rooms_after.size()) < affordable; ++l) {
      if (plan.layers[l].prunable && is_power_or_one_and_a_half(l + 1)) rooms_after.push_back(l);
    }
  }

  const NetworkCall& call;
  const Kernels& kernels;
  const int64_t width;   // neurons of the widest layer
  const int64_t stride;  // features of a tile
  const int64_t tiles;
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
    for (int64_t tile; (tile = shared_.next_tile++) < shared_.tiles;) {
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
      if (call_.plan.layers[l].prunable && !keep_full(l, live)) return;
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

  bool is_live(size_t column) const { return (nonzero_[column] << 1) != 0; }  // -0.0 is zero

  std::vector<int> live_columns() const {
    std::vector<int> live;
    for (size_t column = 0; column < in_.features.size(); ++column) {
      if (is_live(column)) live.push_back(static_cast<int>(column));
    }
    return live;
  }

  // Drops the dead columns after layer l where that saves work. False: none is left, or the rest waits in a room.
  bool keep_full(int64_t l, const std::vector<int>& live) {
    const int64_t width = call_.plan.layers[l].outputs, count = static_cast<int64_t>(live.size());
    const bool has_room = std::binary_search(shared_.rooms_after.begin(), shared_.rooms_after.end(), l);
    const bool waits = has_room && count <= stride_ / 2;
    if (!waits && vectors(count) == vectors(static_cast<int64_t>(in_.features.size()))) return true;
    write_dead_rows();
    if (count == 0) return false;
    if (waits) return wait(l, live, width);
    move_columns(in_, live, width, stride_, 0, in_);
    return true;
  }

  int64_t vectors(int64_t columns) const { return (columns + shared_.kernels.lanes - 1) / shared_.kernels.lanes; }

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

  // To be called where dead columns leave the tile: each row of the result is written once, by one thread.
  void write_dead_rows() {
    if (!call_.activations) return;
    const int64_t outputs = call_.plan.header->outputs;
    for (size_t column = 0; column < in_.features.size(); ++column) {
      if (!is_live(column)) std::fill_n(call_.activations + in_.features[column] * outputs, outputs, 0.0f);
    }
  }

  // After the last layer.
  void store(const std::vector<int>& live) {
    write_dead_rows();
    for (int column : live) call_.alive[in_.features[column]] = true;
    if (!call_.activations) return;
    const int32_t* slot_of = reinterpret_cast<const int32_t*>(call_.words + call_.plan.header->slot_offset);
    store_rows(in_, live, stride_, slot_of, call_.plan.header->outputs, call_.activations);
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
  std::fill_n(call.alive, call.features, false);
  if (call.active) std::fill_n(call.active, call.plan.header->layers, 0);
  Shared shared(call, *kernels, helpers + 1);
  share_work(static_cast<int>(std::min<int64_t>(helpers, shared.tiles - 1)), schedule, [&shared] {
    if (shared.next_tile >= shared.tiles) return;
    try {
      Worker(shared).run();
    } catch (const std::bad_alloc&) {
      shared.out_of_memory = true;
    }
  });
  return shared.out_of_memory ? "out of memory: a thread needs up to 64 MiB; use fewer features or threads" : "";
}

}  // namespace spdnn::cpu
