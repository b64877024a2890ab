// Shares work between the calling thread and helpers of a thread pool, without ever depending on the helpers.
#pragma once

#include <functional>

namespace spdnn::cpu {

// Hands a task to a thread pool, which may run it at any later time.
using ScheduleTask = std::function<void(std::function<void()>)>;

// Runs `work` on the calling thread and, where the pool has threads to spare, on up to `helpers` of its threads. `work`
// takes its share from a common counter until nothing is left. The caller waits only for helpers that have begun: on a
// pool whose threads all wait like this, work that was scheduled but has not begun would never begin (as XLA's pool
// does with several host devices). A helper that begins too late finds the work closed and touches nothing else. `work`
// must not throw.
void share_work(int helpers, const ScheduleTask& schedule, const std::function<void()>& work);

}  // namespace spdnn::cpu
