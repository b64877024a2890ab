#include "cpu/network.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <utility>

#include "cpu/few_features.h"
#include "cpu/run_task.h"
#include "layout/plan_check.h"

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

// A weighted sum over a column's neurons, which tells most columns apart at the cost of one more output neuron.
struct ColumnHash {
  explicit ColumnHash(int64_t width) : indices(width), weights(width) {
    uint32_t random = 1;
    for (int64_t neuron = 0; neuron < width; ++neuron) {
      random = random * 1664525u + 1013904223u;
      indices[neuron] = static_cast<uint32_t>(neuron);
      weights[neuron] = 1.0f + static_cast<float>(random >> 8) * 0x1p-24f;
    }
  }

  std::vector<uint32_t> indices;
  std::vector<float> weights;
};

// After these layers equal columns are looked for: when a neuron has had so many edges, on average over the layers,
// that the search costs little beside them; then when it has had twice as many, each time, whether any were found or
// not.
std::vector<char> choose_merges(const PlanView& plan) {
  constexpr double kEdgesPerNeuron = 128, kEdgesPerSearch = 1 << 13;
  std::vector<char> merges(plan.header->layers, 0);
  if (!plan.header->merge_features) return merges;
  double edges = 0, due = kEdgesPerNeuron;
  for (int64_t l = 0; l + 1 < plan.header->layers; ++l) {
    const double outputs = static_cast<double>(std::max<int64_t>(plan.layers[l].outputs, 1));
    edges += static_cast<double>(plan.layers[l].multiplied_edges) / outputs;
    if (edges < due + kEdgesPerSearch / outputs) continue;
    merges[l] = 1;
    due = 2 * edges;
  }
  return merges;
}

// What the threads share.
struct Shared {
  Shared(const NetworkCall& network, const Kernels& selected, int threads)
      : call(network),
        kernels(selected),
        width(std::max<int64_t>(widest(call.plan), 1)),
        stride(choose_stride(2 * width, call.features, threads)),
        tiles((call.features + stride - 1) / stride),
        merges_after(choose_merges(call.plan)),
        column_hash(call.plan.header->merge_features ? width : 0),
        is_checked(call.plan.header->layers) {
    const PlanView& plan = call.plan;
    const int64_t tile_bytes = width * stride * static_cast<int64_t>(sizeof(float));
    const int64_t affordable = kMemory / tile_bytes - 2;  // beside the two tiles that the thread works on
    for (int64_t l = 0; l + 1 < plan.header->layers && static_cast<int64_t>(rooms_after.size()) < affordable; ++l) {
      const bool may_thin = plan.layers[l].prunable || plan.header->merge_features;
      if (may_thin && is_power_or_one_and_a_half(l + 1)) rooms_after.push_back(l);
    }
  }

  const NetworkCall& call;
  const Kernels& kernels;
  const int64_t width;   // neurons of the widest layer
  const int64_t stride;  // features of a tile
  const int64_t tiles;
  const std::vector<char> merges_after;  // layers after which equal columns are looked for
  const ColumnHash column_hash;
  std::vector<int64_t> rooms_after;           // layers that a waiting room follows
  std::vector<std::atomic<bool>> is_checked;  // layers whose indices name inputs that exist
  std::atomic<int64_t> next_tile{0};
  std::atomic<const char*> wrong{nullptr};  // with an index
  std::atomic<bool> out_of_memory{false};
  std::mutex active_mutex;
};

// One thread's share: tiles of features, each taken through all layers.
//
// Features die early, and some become equal. A tile that is half empty after some layer waits in that layer's room
// until others have filled it up; so the vectors stay full, and all columns of a tile are always at one layer. What is
// computed for a feature does not depend on its neighbours in the tile.
//
// Of columns found equal one goes on, with the bits that the others would have had, and they get its result at the end.
// The rooms bring survivors of many tiles together, so that equal features meet sooner or later.
class Worker {
 public:
  explicit Worker(Shared& shared)
      : shared_(shared),
        call_(shared.call),
        stride_(shared.stride),
        in_(shared.width * shared.stride),
        out_(shared.width * shared.stride),
        nonzero_(shared.stride),
        flags_(shared.stride),
        leader_of_(shared.stride),
        table_(4 * shared.stride),
        active_(call_.plan.header->layers) {}

  void run() {
    for (int64_t tile; !shared_.wrong && (tile = shared_.next_tile++) < shared_.tiles;) {
      const int64_t first = tile * stride_;
      load_tile(call_.input, first, std::min(stride_, call_.features - first), stride_, in_);
      advance(0);
    }
    for (int64_t layer : shared_.rooms_after) {
      auto room = rooms_.find(layer);
      if (room == rooms_.end() || room->second.columns.empty()) continue;
      std::swap(in_, room->second);
      room->second.columns.clear();
      advance(layer + 1);
    }
    copy_to_followers();
    add_active();
  }

 private:
  // Takes the tile `in_` from layer `first` to the end, or into a waiting room.
  void advance(int64_t first) {
    const int64_t layers = call_.plan.header->layers;
    for (int64_t l = first; l < layers; ++l) {
      if (!has_sound_indices(l)) return;
      compute(l);
      const std::vector<int> live = live_columns();
      for (int column : live) active_[l] += in_.columns[column].members;
      if (l + 1 == layers) return store(live);
      if (call_.plan.layers[l].prunable) {
        if (!keep_full(l, live)) return;
      } else if (shared_.merges_after[l]) {
        if (!keep_full(l, all_columns())) return;
      }
    }
  }

  // The kernels trust indices, and words are the caller's: a wrong one must not make them read elsewhere. Done when a
  // feature first comes to the layer, which reads the indices anyway; by two threads now and then.
  bool has_sound_indices(int64_t l) {
    if (shared_.is_checked[l]) return true;
    if (const char* wrong = check_indices(call_.plan, l, call_.words, shared_.kernels.largest_index)) {
      shared_.wrong = wrong;
      return false;
    }
    shared_.is_checked[l] = true;
    return true;
  }

  void compute(int64_t l) {
    const PlanLayer& layer = call_.plan.layers[l];
    std::fill(nonzero_.begin(), nonzero_.end(), 0u);
    for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
      RunTask task = task_of(layer, call_.plan.runs[r], call_.words);
      use_tiles(task);
      task.nonzero = nonzero_.data();
      shared_.kernels.run(task);
    }
    out_.columns = in_.columns;
    std::swap(in_, out_);
  }

  void use_tiles(RunTask& task) {
    task.in = in_.buffer.data();
    task.out = out_.buffer.data();
    task.stride = stride_;
    task.features = size(in_.columns);
  }

  template <typename T>
  static int64_t size(const std::vector<T>& vector) {
    return static_cast<int64_t>(vector.size());
  }

  bool is_live(size_t column) const { return (nonzero_[column] << 1) != 0; }  // -0.0 is zero

  std::vector<int> live_columns() const {
    std::vector<int> live;
    for (size_t column = 0; column < in_.columns.size(); ++column) {
      if (is_live(column)) live.push_back(static_cast<int>(column));
    }
    return live;
  }

  std::vector<int> all_columns() const {
    std::vector<int> all(in_.columns.size());
    std::iota(all.begin(), all.end(), 0);
    return all;
  }

  // After layer l, lets only `wanted` columns go on, and of equal ones but one, where that saves work. False: none is
  // left, or the rest waits in a room.
  bool keep_full(int64_t l, const std::vector<int>& wanted) {
    const int64_t width = call_.plan.layers[l].outputs;
    const bool has_room = std::binary_search(shared_.rooms_after.begin(), shared_.rooms_after.end(), l);
    const auto waits = [&](const std::vector<int>& kept) { return has_room && size(kept) <= stride_ / 2; };
    const auto saves = [&](const std::vector<int>& kept) {
      return waits(kept) || vectors(size(kept)) < vectors(size(in_.columns));
    };
    const bool merges = shared_.merges_after[l] && wanted.size() > 1;
    std::vector<int> kept = wanted;
    if (merges) kept = find_leaders(wanted, width);
    if (!saves(kept)) return true;
    if (merges) {
      kept = confirm_leaders(wanted, width);
      if (!saves(kept)) return true;
    }
    if (call_.plan.layers[l].prunable) write_dead_rows();
    if (merges) follow_leaders(wanted);
    if (kept.empty()) return false;
    if (waits(kept)) return wait(l, kept, width);
    move_columns(in_, kept, width, stride_, 0, in_);
    return true;
  }

  // Sets leader_of_ of each of `columns` to the first one of the same hash. Returns the leaders.
  std::vector<int> find_leaders(const std::vector<int>& columns, int64_t width) {
    hash_columns(width);
    const float* hashes = out_.buffer.data();
    const auto hash = [hashes](int column) {  // as bits: an infinite one, too
      uint32_t bits;
      std::memcpy(&bits, hashes + column, sizeof bits);
      return bits;
    };
    std::fill(table_.begin(), table_.end(), -1);
    std::vector<int> leaders;
    for (int column : columns) {
      size_t place = hash(column) * 0x9E3779B1u >> 7;
      while (table_[place % table_.size()] >= 0 && hash(table_[place % table_.size()]) != hash(column)) ++place;
      int& leader = table_[place % table_.size()];
      if (leader < 0) {
        leader = column;
        leaders.push_back(column);
      }
      leader_of_[column] = leader;
    }
    return leaders;
  }

  // Into row 0 of the tile that is not in use.
  void hash_columns(int64_t width) {
    RunTask task{};
    use_tiles(task);
    task.indices = shared_.column_hash.indices.data();
    task.index_bits = 32;
    task.values = shared_.column_hash.weights.data();
    task.group_outputs = 1;
    task.edges = width;
    task.groups = 1;
    task.lower = -INFINITY;
    task.upper = INFINITY;
    task.nonzero = flags_.data();
    shared_.kernels.run(task);
  }

  // Compares the columns with their leaders; one that differs, for all that its hash is the same, becomes a leader.
  // Returns the leaders.
  std::vector<int> confirm_leaders(const std::vector<int>& columns, int64_t width) {
    std::vector<char> has_followers(stride_, 0);
    for (int column : columns) has_followers[leader_of_[column]] |= leader_of_[column] != column;
    for (int leader : columns) {
      if (!has_followers[leader]) continue;
      compare_columns(in_, leader, width, stride_, flags_.data());
      for (int column : columns) {
        if (leader_of_[column] == leader && flags_[column]) leader_of_[column] = column;
      }
    }
    std::vector<int> leaders;
    std::copy_if(columns.begin(), columns.end(), std::back_inserter(leaders),
                 [this](int column) { return leader_of_[column] == column; });
    return leaders;
  }

  // To be called where followers leave the tile.
  void follow_leaders(const std::vector<int>& columns) {
    for (int column : columns) {
      const int leader = leader_of_[column];
      if (leader == column) continue;
      in_.columns[leader].members += in_.columns[column].members;
      followers_.push_back({in_.columns[column].feature, in_.columns[leader].feature});
    }
  }

  // Backwards: a leader that came to follow another did so later.
  void copy_to_followers() {
    const int64_t outputs = call_.plan.header->outputs;
    for (auto follower = followers_.rbegin(); follower != followers_.rend(); ++follower) {
      const auto [feature, leader] = *follower;
      call_.alive[feature] = call_.alive[leader];
      if (call_.activations) {
        std::copy_n(call_.activations + leader * outputs, outputs, call_.activations + feature * outputs);
      }
    }
  }

  int64_t vectors(int64_t columns) const { return (columns + shared_.kernels.lanes - 1) / shared_.kernels.lanes; }

  // True where the room is full: then its tile is `in_`, and what did not fit waits in its place.
  bool wait(int64_t l, const std::vector<int>& live, int64_t width) {
    auto [place, is_new] = rooms_.try_emplace(l, shared_.width * stride_);
    Tile& room = place->second;
    const int64_t waiting = size(room.columns);
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
    for (size_t column = 0; column < in_.columns.size(); ++column) {
      if (!is_live(column)) std::fill_n(call_.activations + in_.columns[column].feature * outputs, outputs, 0.0f);
    }
  }

  // After the last layer.
  void store(const std::vector<int>& live) {
    write_dead_rows();
    for (int column : live) call_.alive[in_.columns[column].feature] = true;
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
  std::vector<uint32_t> flags_;  // of columns, for use inside a function
  std::vector<int> leader_of_;   // of columns, between find_leaders and follow_leaders
  std::vector<int> table_;       // for find_leaders: a column at its hash, or at the next free place after it
  struct Follower {
    int64_t feature;
    int64_t leader;
  };
  std::vector<Follower> followers_;  // in the order in which they were found
  std::vector<int64_t> active_;
  std::map<int64_t, Tile> rooms_;
};

// Threads share the features. As run_few_features.
const char* run_tiles(const NetworkCall& call, const Kernels& kernels, int helpers, const ScheduleTask& schedule) {
  Shared shared(call, kernels, helpers + 1);
  share_work(static_cast<int>(std::min<int64_t>(helpers, shared.tiles - 1)), schedule, [&shared] {
    if (shared.next_tile >= shared.tiles) return;
    try {
      Worker(shared).run();
    } catch (const std::bad_alloc&) {
      shared.out_of_memory = true;
    }
  });
  if (shared.out_of_memory) throw std::bad_alloc();
  return shared.wrong;
}

}  // namespace

std::string run_network(const NetworkCall& call, int helpers, const ScheduleTask& schedule) {
  const char* error = nullptr;
  const Kernels* kernels = select_kernels(&error);
  if (!kernels) return error;
  std::fill_n(call.alive, call.features, false);
  if (call.active) std::fill_n(call.active, call.plan.header->layers, 0);
  try {
    const char* wrong = are_few_features(call) ? run_few_features(call, *kernels, helpers, schedule)
                                               : run_tiles(call, *kernels, helpers, schedule);
    if (!wrong) return "";
    return std::string("the plan's words were changed since it was built: ") + wrong + ": build it again";
  } catch (const std::bad_alloc&) {
    return "out of memory: a thread needs up to 64 MiB; use fewer features or threads";
  }
}

}  // namespace spdnn::cpu
