#include "cpu/work_sharing.h"

#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>

namespace spdnn::cpu {
namespace {

struct Gate {
  std::mutex mutex;
  std::condition_variable all_left;
  int inside = 0;
  bool closed = false;

  bool enter() {
    std::lock_guard<std::mutex> lock(mutex);
    if (closed) return false;
    ++inside;
    return true;
  }

  void leave() {
    std::lock_guard<std::mutex> lock(mutex);
    if (--inside == 0) all_left.notify_all();
  }

  void close_and_wait() {
    std::unique_lock<std::mutex> lock(mutex);
    closed = true;
    all_left.wait(lock, [this] { return inside == 0; });
  }
};

}  // namespace

void share_work(int helpers, const ScheduleTask& schedule, const std::function<void()>& work) {
  auto gate = std::make_shared<Gate>();
  try {
    for (int helper = 0; helper < helpers; ++helper) {
      schedule([gate, &work] {
        if (!gate->enter()) return;  // `work` may be gone
        work();
        gate->leave();
      });
    }
  } catch (const std::bad_alloc&) {
    // Helpers are optional; to leave here would take `work` from those that have begun.
  }
  work();
  gate->close_and_wait();
}

}  // namespace spdnn::cpu
