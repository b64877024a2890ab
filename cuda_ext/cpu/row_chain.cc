#include "cpu/row_chain.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/compressed_rows.h"
#include "cpu/kernels.h"
#include "cpu/tile.h"

namespace spdnn::cpu {
namespace {

// The kernels trust indices, and words are the caller's: wrong ones must not make them read or write elsewhere. Returns
// what is wrong, or an empty string.
std::string check_words(const ChainCall& call, bool transposed) {
  const auto ints = [&](int64_t offset) { return reinterpret_cast<const int32_t*>(call.words + offset); };
  for (const RowsLayer& layer : call.rows) {
    const char* wrong =
        transposed
            ? check_rows(
                  {layer.outputs, layer.inputs, layer.edges, ints(layer.column_offset), ints(layer.output_offset)})
            : check_rows({layer.inputs, layer.outputs, layer.edges, ints(layer.row_offset), ints(layer.index_offset)});
    if (wrong) return std::string("the words for a plan's derivatives were changed since it was built: ") + wrong;
  }
  return "";
}

// One thread's tile on its way through the layers.
class Runner {
 public:
  Runner(const ChainCall& call, const RowKernels& kernels, int64_t stride)
      : call_(call),
        kernels_(kernels),
        stride_(stride),
        in_(call.rows.widest() * stride),
        out_(call.rows.widest() * stride) {}

  void load(int64_t first, int64_t count, int64_t width) {
    load_tile({call_.in, InputType::kFloat32, width}, first, count, stride_, in_);
  }

  void store(int64_t width) {
    std::vector<int> columns(in_.columns.size());
    std::iota(columns.begin(), columns.end(), 0);
    store_rows(in_, columns, stride_, nullptr, width, call_.out);
  }

  void forward(const RowsLayer& layer) {
    ProductTask task = product_by_output(layer);
    task.bias = floats(layer.bias_offset);
    task.lower = finite_bound(static_cast<float>(layer.lower));
    task.upper = finite_bound(static_cast<float>(layer.upper));
    multiply(task);
    if (layer.mask_words > 0) kernels_.store_mask(mask_task(layer));
  }

  void derivative(const RowsLayer& layer) {
    multiply(product_by_output(layer));
    mask(layer);
  }

  void transposed_derivative(const RowsLayer& layer) {
    mask(layer);
    multiply(product_of({ints(layer.column_offset), ints(layer.output_offset), 0, layer.inputs},
                        floats(layer.weight_offset)));
  }

 private:
  const int32_t* ints(int64_t offset) const { return reinterpret_cast<const int32_t*>(call_.words + offset); }
  const float* floats(int64_t offset) const { return reinterpret_cast<const float*>(call_.words + offset); }

  ProductTask product_by_output(const RowsLayer& layer) const {
    return product_of({ints(layer.row_offset), ints(layer.index_offset), 0, layer.outputs}, floats(layer.value_offset));
  }

  ProductTask product_of(const Rows& rows, const float* values) const {
    ProductTask task{};
    task.rows = rows;
    task.values = values;
    task.lower = -INFINITY;
    task.upper = INFINITY;
    task.stride = stride_;
    task.features = static_cast<int64_t>(in_.columns.size());
    return task;
  }

  void multiply(ProductTask task) {
    task.in = in_.buffer.data();
    task.out = out_.buffer.data();
    kernels_.product(task);
    out_.columns = in_.columns;
    std::swap(in_, out_);
  }

  void mask(const RowsLayer& layer) {
    if (layer.mask_words > 0) kernels_.apply_mask(mask_task(layer));
  }

  MaskTask mask_task(const RowsLayer& layer) {
    MaskTask task{};
    task.words_stride = call_.rows.mask_words();
    task.words = call_.masks + in_.columns.front().feature * task.words_stride + layer.mask_word;
    task.neurons = layer.outputs;
    task.lower = finite_bound(static_cast<float>(layer.lower));
    task.upper = finite_bound(static_cast<float>(layer.upper));
    task.tile = in_.buffer.data();
    task.stride = stride_;
    task.features = static_cast<int64_t>(in_.columns.size());
    return task;
  }

  const ChainCall& call_;
  const RowKernels& kernels_;
  const int64_t stride_;
  Tile in_, out_;
};

// Takes all tiles through `run`, each on one thread.
template <typename Run>
std::string run_tiles(const ChainCall& call, int64_t in_width, int64_t out_width, int helpers,
                      const ScheduleTask& schedule, const Run& run) {
  const char* error = nullptr;
  const Kernels* kernels = select_kernels(&error);
  if (!kernels) return error;
  const int64_t stride = choose_stride(2 * std::max<int64_t>(call.rows.widest(), 1), call.features, helpers + 1);
  const int64_t tiles = (call.features + stride - 1) / stride;
  std::atomic<int64_t> next_tile{0};
  std::atomic<bool> out_of_memory{false};
  share_work(static_cast<int>(std::min<int64_t>(helpers, tiles - 1)), schedule, [&] {
    if (next_tile >= tiles) return;
    try {
      Runner runner(call, *kernels->rows, stride);
      for (int64_t tile; (tile = next_tile++) < tiles;) {
        const int64_t first = tile * stride;
        runner.load(first, std::min(stride, call.features - first), in_width);
        run(runner);
        runner.store(out_width);
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  return out_of_memory ? "out of memory" : "";
}

}  // namespace

std::string run_chain(const ChainCall& call, int helpers, const ScheduleTask& schedule) {
  if (std::string wrong = check_words(call, false); !wrong.empty()) return wrong;
  return run_tiles(call, call.rows.inputs(), call.rows.outputs(), helpers, schedule, [&](Runner& runner) {
    for (const RowsLayer& layer : call.rows) runner.forward(layer);
  });
}

std::string run_chain_derivative(const ChainCall& call, bool transposed, int helpers, const ScheduleTask& schedule) {
  if (std::string wrong = check_words(call, transposed); !wrong.empty()) return wrong;
  const int64_t inputs = call.rows.inputs(), outputs = call.rows.outputs();
  if (transposed) {
    return run_tiles(call, outputs, inputs, helpers, schedule, [&](Runner& runner) {
      for (int64_t l = call.rows.count - 1; l >= 0; --l) runner.transposed_derivative(call.rows.layers[l]);
    });
  }
  return run_tiles(call, inputs, outputs, helpers, schedule, [&](Runner& runner) {
    for (const RowsLayer& layer : call.rows) runner.derivative(layer);
  });
}

}  // namespace spdnn::cpu
