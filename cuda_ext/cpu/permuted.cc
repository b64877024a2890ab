#include "cpu/permuted.h"

#include <algorithm>
#include <atomic>

namespace spdnn::cpu {

std::string run_permuted(const PermutedCall& call, int helpers, const ScheduleTask& schedule) {
  constexpr int64_t kPart = 1 << 15;  // long enough for a thread to be worth waking
  const int64_t parts = (call.count + kPart - 1) / kPart;
  std::atomic<int64_t> next_part{0};
  std::atomic<bool> outside{false};
  share_work(static_cast<int>(std::min<int64_t>(helpers, parts - 1)), schedule, [&] {
    for (int64_t part; (part = next_part++) < parts;) {
      const int64_t end = std::min(call.count, (part + 1) * kPart);
      bool wrong = false;
      for (int64_t k = part * kPart; k < end; ++k) {
        const int64_t from = call.order[k];
        const bool exists = from >= 0 && from < call.count;
        wrong |= !exists;
        call.result[k] = call.values[exists ? from : 0];
      }
      if (wrong) outside = true;
    }
  });
  return outside ? "the transposed index names an edge that does not exist" : "";
}

}  // namespace spdnn::cpu
