#include "cpu/sampled.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/tile.h"

namespace spdnn::cpu {
namespace {

// Rows at which parts begin that have about as many edges each; the last entry is the number of rows.
std::vector<int64_t> divide_rows(const CompressedRows& rows, int64_t parts) {
  std::vector<int64_t> firsts;
  for (int64_t part = 0; part <= parts; ++part) {
    const int64_t edge = rows.edges * part / parts;
    firsts.push_back(std::lower_bound(rows.indptr, rows.indptr + rows.outputs, edge) - rows.indptr);
  }
  firsts.back() = rows.outputs;
  return firsts;
}

}  // namespace

std::string run_sampled(const SampledCall& call, int helpers, const ScheduleTask& schedule) {
  if (const char* wrong = check_rows(call.rows)) return wrong;
  const char* error = nullptr;
  const Kernels* kernels = select_kernels(&error);
  if (!kernels) return error;
  constexpr int64_t kStride = 64, kPartsOfThread = 4;
  const auto [inputs, outputs, edges, indptr, indices] = call.rows;
  const int64_t tiles = (call.features + kStride - 1) / kStride;
  Buffer in(tiles * inputs * kStride), out(tiles * outputs * kStride);
  std::atomic<int64_t> next_tile{0};
  share_work(static_cast<int>(std::min<int64_t>(helpers, tiles - 1)), schedule, [&] {
    for (int64_t tile; (tile = next_tile++) < tiles;) {
      const int64_t first = tile * kStride, count = std::min(kStride, call.features - first);
      transpose_rows(call.in + first * inputs, inputs, count, kStride, in.data() + tile * inputs * kStride);
      transpose_rows(call.out + first * outputs, outputs, count, kStride, out.data() + tile * outputs * kStride);
    }
  });
  const std::vector<int64_t> firsts = divide_rows(call.rows, kPartsOfThread * (helpers + 1));
  const int64_t parts = static_cast<int64_t>(firsts.size()) - 1;
  std::atomic<int64_t> next_part{0};
  share_work(helpers, schedule, [&] {
    for (int64_t part; (part = next_part++) < parts;) {
      SampledTask task{{indptr, indices, firsts[part], firsts[part + 1]}, nullptr, nullptr, kStride, call.result};
      std::fill(call.result + indptr[task.rows.first], call.result + indptr[task.rows.end], 0.0f);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        task.in = in.data() + tile * inputs * kStride;
        task.out = out.data() + tile * outputs * kStride;
        kernels->rows->sampled(task);
      }
    }
  });
  return "";
}

}  // namespace spdnn::cpu
