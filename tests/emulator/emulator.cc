// Runs the threads of a block as fibers: one goes on until it waits, then another, in random order.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

namespace emulator {
namespace {

constexpr size_t kStackBytes = 32 * 1024;  // the address sanitizer clears its notes of a stack at every switch to it
constexpr size_t kGuardBytes = 1024;       // at its end, for threads that need more
constexpr char kGuard = 0x5A;
constexpr int kWarp = 32;

struct Copy {
  void* target;
  const void* source;
  int bytes;
};

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  dim3 thread;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> closed_copies;
};

struct Meeting {
  uint64_t words[2][kWarp];  // of this exchange and the last, which some lane may still read
  int turn = 0;
  int arrived = 0;
};

struct Warp {
  Meeting all;
  Meeting parts[kWarp];  // of lanes that meet without the others, by the first of them
};

uint64_t random_state = 1;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<char> shared_memory;
ucontext_t scheduler;
const std::function<void()>* running_kernel;
size_t current, threads, live, waiting;

size_t random_below(size_t limit) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<size_t>(random_state >> 33) % limit;
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::exit(3);
}

bool overflowed(const Fiber& fiber) {
  const char* stack = fiber.stack.get();
  return stack[0] != kGuard || std::memcmp(stack, stack + 1, kGuardBytes - 1) != 0;  // a byte unlike the next
}

void run_thread() {
  (*running_kernel)();
  if (overflowed(fibers[current])) fail("a thread's stack is too small: raise kStackBytes");
  fibers[current].state = State::kDone;
  swapcontext(&fibers[current].context, &scheduler);
}

void wait(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

void start_threads(dim3 block) {
  threads = live = static_cast<size_t>(block.x) * block.y * block.z;
  waiting = 0;
  if (fibers.size() < threads) fibers.resize(threads);
  warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  for (size_t t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.state = State::kReady;
    fiber.thread = dim3(static_cast<unsigned>(t % block.x), static_cast<unsigned>(t / block.x % block.y),
                        static_cast<unsigned>(t / block.x / block.y));
    fiber.open_copies.clear();
    fiber.closed_copies.clear();
    getcontext(&fiber.context);
    std::memset(fiber.stack.get(), kGuard, kGuardBytes);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, run_thread, 0);
  }
}

void run_block() {
  std::vector<size_t> ready;
  while (live > 0) {
    ready.clear();
    for (size_t t = 0; t < threads; ++t) {
      if (fibers[t].state == State::kReady) ready.push_back(t);
    }
    if (ready.empty()) fail("threads wait for ever: a barrier or a warp operation that not all of them reach");
    for (size_t left = ready.size(); left > 0; --left) {
      std::swap(ready[random_below(left)], ready[left - 1]);
      current = ready[left - 1];
      threadIdx = fibers[current].thread;
      swapcontext(&scheduler, &fibers[current].context);
      if (fibers[current].state == State::kDone) --live;
      if (live > 0 && waiting == live) {  // threads that have ended count as arrived
        waiting = 0;
        for (size_t t = 0; t < threads; ++t) {
          if (fibers[t].state == State::kAtBlockBarrier) fibers[t].state = State::kReady;
        }
      }
    }
  }
}

}  // namespace

void seed(uint64_t value) { random_state = value; }

void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const std::function<void()>& kernel) {
  if (grid.x * grid.y * grid.z == 0 || block.x * block.y * block.z == 0) fail("a launch without threads");
  if (block.x * block.y * block.z % kWarp != 0) fail("a block that is no whole number of warps");
  gridDim = grid;
  blockDim = block;
  running_kernel = &kernel;
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  for (size_t b = 0; b < blocks; ++b) {
    blockIdx = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                    static_cast<unsigned>(b / grid.x / grid.y));
    std::vector<char>(shared_bytes, '\xFF').swap(shared_memory);  // NaN
    start_threads(block);
    run_block();
  }
}

void* dynamic_shared() { return shared_memory.data(); }

void block_barrier() {
  ++waiting;
  wait(State::kAtBlockBarrier);
}

const uint64_t* exchange(uint64_t word, uint32_t lanes) {
  const size_t first = current / kWarp * kWarp;
  if (!(lanes >> (current - first) & 1)) fail("a lane meets others that do not wait for it");
  Warp& warp = warps[current / kWarp];
  Meeting& meeting = lanes == kAllLanes ? warp.all : warp.parts[__builtin_ctz(lanes)];
  const uint64_t* words = meeting.words[meeting.turn];
  meeting.words[meeting.turn][current - first] = word;
  if (++meeting.arrived < __builtin_popcount(lanes)) {
    wait(State::kAtWarpBarrier);
    return words;
  }
  meeting.arrived = 0;
  meeting.turn = 1 - meeting.turn;
  for (size_t t = first; t < first + kWarp; ++t) {
    if (lanes >> (t - first) & 1 && fibers[t].state == State::kAtWarpBarrier) fibers[t].state = State::kReady;
  }
  return words;
}

// A copy is made when it is waited for, and no sooner: a wait that is missing shows.
void start_copy(void* target, const void* source, int bytes) {
  if (reinterpret_cast<uintptr_t>(target) % bytes || reinterpret_cast<uintptr_t>(source) % bytes) {
    fail("an asynchronous copy that is not aligned");
  }
  fibers[current].open_copies.push_back({target, source, bytes});
}

void close_copies() {
  fibers[current].closed_copies.push_back(std::move(fibers[current].open_copies));
  fibers[current].open_copies.clear();
}

void finish_copies(int open_groups) {
  auto& groups = fibers[current].closed_copies;
  for (; groups.size() > static_cast<size_t>(open_groups); groups.pop_front()) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.target, copy.source, copy.bytes);
  }
}

}  // namespace emulator
