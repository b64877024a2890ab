#include "cpu/layer.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <numeric>

#include "cpu/kernels.h"
#include "cpu/tile.h"

namespace spdnn::cpu {
namespace {

const char* check_rows(const LayerCall& call) {
  if (call.indptr[0] != 0 || call.indptr[call.outputs] != call.edges)
    return "indptr must rise from 0 to the number of edges";
  for (int64_t j = 0; j < call.outputs; ++j) {
    if (call.indptr[j + 1] < call.indptr[j]) return "indptr falls";
  }
  for (int64_t e = 0; e < call.edges; ++e) {
    if (call.indices[e] < 0 || call.indices[e] >= call.inputs)
      return "an edge names an input neuron that does not exist";
  }
  return nullptr;
}

// A row is a group of one output in a slice of its own: there the layout's order is the order of the edges.
void compute_tile(const LayerCall& call, const Kernels& kernels, const Tile& in, int64_t stride, Tile& out,
                  std::vector<uint32_t>& unused) {
  RunTask task{};
  task.index_bits = 32;
  task.group_outputs = task.groups = 1;
  task.value = call.single_value ? call.values[0] : 0.0f;
  task.shared_bias = call.single_bias ? call.bias[0] : 0.0f;
  task.bias = call.single_bias ? nullptr : call.bias;
  task.lower = call.lower;
  task.upper = call.upper;
  task.in = in.buffer.data();
  task.out = out.buffer.data();
  task.stride = stride;
  task.features = static_cast<int64_t>(in.columns.size());
  task.nonzero = unused.data();
  for (int64_t j = 0; j < call.outputs; ++j) {
    task.indices = call.indices + call.indptr[j];
    task.values = call.single_value ? nullptr : call.values + call.indptr[j];
    task.edges = call.indptr[j + 1] - call.indptr[j];
    task.first_slot = j;
    kernels.run(task);
  }
}

}  // namespace

std::string run_layer(const LayerCall& call, int helpers, const ScheduleTask& schedule) {
  if (const char* wrong = check_rows(call)) return wrong;
  const char* error = nullptr;
  const Kernels* kernels = select_kernels(&error);
  if (!kernels) return error;
  const int64_t stride = choose_stride(call.inputs + call.outputs, call.features, helpers + 1);
  const int64_t tiles = (call.features + stride - 1) / stride;
  std::atomic<int64_t> next_tile{0};
  std::atomic<bool> out_of_memory{false};
  share_work(static_cast<int>(std::min<int64_t>(helpers, tiles - 1)), schedule, [&] {
    if (next_tile >= tiles) return;
    try {
      Tile in(call.inputs * stride), out(call.outputs * stride);
      std::vector<uint32_t> nonzero(stride);
      std::vector<int> columns;
      for (int64_t tile; (tile = next_tile++) < tiles;) {
        const int64_t first = tile * stride, count = std::min(stride, call.features - first);
        load_tile({call.y, InputType::kFloat32, call.inputs}, first, count, stride, in);
        compute_tile(call, *kernels, in, stride, out, nonzero);
        out.columns = in.columns;
        columns.resize(count);
        std::iota(columns.begin(), columns.end(), 0);
        store_rows(out, columns, stride, nullptr, call.outputs, call.result);
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  return out_of_memory ? "out of memory" : "";
}

}  // namespace spdnn::cpu
