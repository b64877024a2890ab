#include "cpu/layer.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/tile.h"

namespace spdnn::cpu {

std::string run_layer(const LayerCall& call, int helpers, const ScheduleTask& schedule) {
  if (const char* wrong = check_rows(call.rows)) return wrong;
  const char* error = nullptr;
  const Kernels* kernels = select_kernels(&error);
  if (!kernels) return error;
  const auto [inputs, outputs, edges, indptr, indices] = call.rows;
  const int64_t stride = choose_stride(inputs + outputs, call.features, helpers + 1);
  const int64_t tiles = (call.features + stride - 1) / stride;
  ProductTask product{};
  product.rows = {indptr, indices, 0, outputs};
  product.values = call.single_value ? nullptr : call.values;
  product.value = call.single_value ? call.values[0] : 0.0f;
  product.bias = call.single_bias ? nullptr : call.bias;
  product.shared_bias = call.single_bias ? call.bias[0] : 0.0f;
  product.lower = call.lower;
  product.upper = call.upper;
  product.stride = stride;
  std::atomic<int64_t> next_tile{0};
  std::atomic<bool> out_of_memory{false};
  share_work(static_cast<int>(std::min<int64_t>(helpers, tiles - 1)), schedule, [&] {
    if (next_tile >= tiles) return;
    try {
      Tile in(inputs * stride), out(outputs * stride);
      std::vector<int> columns;
      ProductTask task = product;
      task.in = in.buffer.data();
      task.out = out.buffer.data();
      for (int64_t tile; (tile = next_tile++) < tiles;) {
        const int64_t first = tile * stride;
        task.features = std::min(stride, call.features - first);
        load_tile({call.in, InputType::kFloat32, inputs}, first, task.features, stride, in);
        kernels->rows->product(task);
        out.columns = in.columns;
        columns.resize(task.features);
        std::iota(columns.begin(), columns.end(), 0);
        store_rows(out, columns, stride, nullptr, outputs, call.out);
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  return out_of_memory ? "out of memory" : "";
}

}  // namespace spdnn::cpu
