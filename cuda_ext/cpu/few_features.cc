#include "cpu/few_features.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <thread>
#include <vector>

#include "cpu/run_task.h"
#include "layout/plan_check.h"

namespace spdnn::cpu {
namespace {

constexpr int64_t kMostFeatures = 16;  // the narrowest tile that features are dealt out in

// Work is counted in reads of a vector of activations, of which a thread makes some in a nanosecond.
constexpr int64_t kWorthHelp = 1 << 17;     // of a call: to wake a thread takes as long as some of it
constexpr int64_t kSmallestPart = 1 << 13;  // to wait for other threads takes as long as some of it
constexpr int64_t kPartsOfThread = 4;       // for threads that come late or are held up
constexpr int64_t kCheckedEdges = 1 << 13;  // whose indices are checked at a time: they stay in the cache

// Features in a row of activations: rows are as narrow as the kernels have vectors.
int64_t stride_of(int64_t features) {
  if (features == 1) return 1;
  if (features <= 4) return 4;
  return features <= 8 ? 8 : kMostFeatures;
}

int64_t slices_of(const PlanRun& run) { return (run.groups + kSliceGroups - 1) / kSliceGroups; }

int64_t work_of_slice(const PlanRun& run, int64_t stride) {
  constexpr int64_t kVector = 16;
  return kSliceGroups * (run.edges + 1) * std::max<int64_t>(run.group_outputs * stride / kVector, 1);
}

int64_t work_of_layer(const PlanView& plan, const PlanLayer& layer, int64_t stride) {
  int64_t work = 0;
  for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
    work += slices_of(plan.runs[r]) * work_of_slice(plan.runs[r], stride);
  }
  return work;
}

// Slices of one layer: from a slice of a run to where the next part begins.
struct Part {
  int64_t layer;
  int64_t run;
  int64_t slice;
};

// The parts of all layers in order, one at least of each, then one that ends them.
std::vector<Part> cut_into_parts(const PlanView& plan, int64_t stride, int threads) {
  std::vector<Part> parts;
  for (int64_t l = 0; l < plan.header->layers; ++l) {
    const PlanLayer& layer = plan.layers[l];
    const int64_t share = work_of_layer(plan, layer, stride) / (kPartsOfThread * threads);
    const int64_t wanted = threads == 1 ? INT64_MAX : std::max(share, kSmallestPart);
    parts.push_back({l, layer.first_run, 0});
    int64_t work = 0;  // of the last part
    for (int64_t r = layer.first_run; r < layer.first_run + layer.runs; ++r) {
      const int64_t of_slice = work_of_slice(plan.runs[r], stride), slices = slices_of(plan.runs[r]);
      for (int64_t slice = 0; slice < slices;) {
        if (work >= wanted) {
          parts.push_back({l, r, slice});
          work = 0;
        }
        const int64_t taken = std::min((wanted - work - 1) / of_slice + 1, slices - slice);
        work += taken * of_slice;
        slice += taken;
      }
    }
  }
  parts.push_back({plan.header->layers, plan.header->runs, 0});
  return parts;
}

// Threads take the parts in their order. Who takes one of the next layer waits until all before it are done, by
// threads that are at work on them: so nobody waits for a helper that has not begun.
class FewFeatures {
 public:
  FewFeatures(const NetworkCall& call, const Kernels& kernels, int threads)
      : call_(call),
        plan_(call.plan),
        kernels_(kernels),
        stride_(stride_of(call.features)),
        parts_(cut_into_parts(plan_, stride_, threads)),
        first_part_(plan_.header->layers),
        live_(plan_.header->layers),
        tiles_{Tile(width_at(0) * stride_), Tile(width_at(1) * stride_)} {
    for (int64_t p = parts(); p-- > 0;) first_part_[parts_[p].layer] = p;
    if (stride_ == 1 && call.input.type == InputType::kFloat32) {
      input_ = static_cast<const float*>(call.input.data);
    } else {
      load_tile(call.input, 0, call.features, stride_, tiles_[0]);
      input_ = tiles_[0].buffer.data();
    }
  }

  // Threads that find something to do at a time.
  int64_t most_threads() const {
    int64_t most = 1;
    for (size_t l = 0; l < first_part_.size(); ++l) {
      const int64_t end = l + 1 < first_part_.size() ? first_part_[l + 1] : parts();
      most = std::max(most, end - first_part_[l]);
    }
    return most;
  }

  // On each of the threads. Throws nothing.
  void work() {
    for (int64_t p; (p = next_part_++) < parts();) {
      const int64_t l = parts_[p].layer;
      if (!wait_for_layers_before(l)) return;
      if (l > 0 && plan_.layers[l - 1].prunable && live_[l - 1] == 0) return stop(nullptr);
      if (const char* wrong = run_part(p)) return stop(wrong);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  const char* wrong() const { return wrong_; }

  // After all threads.
  void store() {
    const int64_t layers = plan_.header->layers, outputs = plan_.header->outputs;
    if (call_.active) {
      for (int64_t l = 0; l < layers; ++l) call_.active[l] = __builtin_popcount(live_[l]);
    }
    Tile& last = tiles_[layers % 2];
    std::vector<int> live;
    last.columns.resize(call_.features);
    for (int64_t feature = 0; feature < call_.features; ++feature) {
      last.columns[feature] = {feature};
      call_.alive[feature] = live_[layers - 1] >> feature & 1;
      if (call_.alive[feature]) {
        live.push_back(static_cast<int>(feature));
      } else if (call_.activations) {
        std::fill_n(call_.activations + feature * outputs, outputs, 0.0f);
      }
    }
    if (!call_.activations) return;
    const int32_t* slot_of = reinterpret_cast<const int32_t*>(call_.words + plan_.header->slot_offset);
    store_rows(last, live, stride_, slot_of, outputs, call_.activations);
  }

 private:
  int64_t parts() const { return static_cast<int64_t>(parts_.size()) - 1; }

  // Neurons of the widest activations that tile 0 or tile 1 holds.
  int64_t width_at(int64_t tile) const {
    int64_t width = tile == 0 ? plan_.header->inputs : 1;
    for (int64_t l = 1 - tile; l < plan_.header->layers; l += 2) width = std::max(width, plan_.layers[l].outputs);
    return width;
  }

  // False where there is nothing left to be done.
  bool wait_for_layers_before(int64_t l) const {
    constexpr int kSpins = 2000;
    for (int spins = 0; done_.load(std::memory_order_acquire) < first_part_[l]; ++spins) {
      if (is_over_) return false;
      if (spins >= kSpins) std::this_thread::yield();
    }
    return !is_over_;
  }

  void stop(const char* wrong) {
    if (wrong) wrong_ = wrong;
    is_over_ = true;
  }

  const char* run_part(int64_t p) {
    const Part &part = parts_[p], &next = parts_[p + 1];
    const int64_t l = part.layer;
    const PlanLayer& layer = plan_.layers[l];
    const int64_t end_run = layer.first_run + layer.runs;
    if (l + 1 == plan_.header->layers && p == first_part_[l]) {
      if (const char* wrong = check_slots(plan_, call_.words, kernels_.largest_index)) return wrong;
    }
    uint32_t nonzero[kMostFeatures] = {};
    for (int64_t r = part.run, first = part.slice; r < end_run && (r < next.run || next.layer == l); ++r, first = 0) {
      const bool is_last = next.layer == l && r == next.run;
      const int64_t end = is_last ? next.slice : slices_of(plan_.runs[r]);
      if (const char* wrong = run_slices(l, r, first, end, nonzero)) return wrong;
      if (is_last) break;
    }
    uint32_t live = 0;
    for (int64_t feature = 0; feature < call_.features; ++feature) {
      live |= static_cast<uint32_t>((nonzero[feature] << 1) != 0) << feature;  // -0.0 is zero
    }
    if ((live & ~live_[l].load(std::memory_order_relaxed)) != 0) live_[l].fetch_or(live, std::memory_order_relaxed);
    return nullptr;
  }

  const char* run_slices(int64_t l, int64_t r, int64_t first, int64_t end, uint32_t* nonzero) {
    const PlanLayer& layer = plan_.layers[l];
    const PlanRun& run = plan_.runs[r];
    RunTask whole = task_of(layer, run, call_.words);
    whole.in = l == 0 ? input_ : tiles_[l % 2].buffer.data();
    whole.out = tiles_[(l + 1) % 2].buffer.data();
    whole.stride = stride_;
    whole.features = call_.features;
    whole.nonzero = nonzero;
    const int64_t step = std::max<int64_t>(kCheckedEdges / (kSliceGroups * std::max<int64_t>(run.edges, 1)), 1);
    for (; first < end; first += step) {
      const RunTask task = cpu::slices_of(whole, first, std::min(first + step, end));
      if (const char* wrong =
              check_group_indices(layer, task.indices, task.groups * run.edges, kernels_.largest_index)) {
        return wrong;
      }
      kernels_.run(task);
    }
    return nullptr;
  }

  const NetworkCall& call_;
  const PlanView& plan_;
  const Kernels& kernels_;
  const int64_t stride_;
  const std::vector<Part> parts_;
  std::vector<int64_t> first_part_;          // of each layer
  std::vector<std::atomic<uint32_t>> live_;  // after each layer, a bit a feature
  Tile tiles_[2];                            // the inputs of even and of odd layers
  const float* input_;                       // of the first layer
  std::atomic<int64_t> next_part_{0};
  std::atomic<int64_t> done_{0};  // parts
  std::atomic<bool> is_over_{false};
  std::atomic<const char*> wrong_{nullptr};
};

}  // namespace

bool are_few_features(const NetworkCall& call) { return call.features >= 1 && call.features <= kMostFeatures; }

const char* run_few_features(const NetworkCall& call, const Kernels& kernels, int helpers,
                             const ScheduleTask& schedule) {
  int64_t work = 0;
  const int64_t stride = stride_of(call.features);
  for (int64_t l = 0; l < call.plan.header->layers; ++l) work += work_of_layer(call.plan, call.plan.layers[l], stride);
  if (work < kWorthHelp) helpers = 0;
  FewFeatures few(call, kernels, helpers + 1);
  share_work(static_cast<int>(std::min<int64_t>(helpers, few.most_threads() - 1)), schedule, [&few] { few.work(); });
  if (!few.wrong()) few.store();
  return few.wrong();
}

}  // namespace spdnn::cpu
