// Runs the threads of a block, or of all blocks of a cooperative launch, as fibers: one goes on until it waits, then
// another, in random order.
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
constexpr int kMostIdleRounds = 1000;  // in which all threads that can run wait for what others write

struct Copy {
  void* target;
  const void* source;
  int bytes;
};

enum class State { kReady, kPolling, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Block {
  dim3 index;
  std::vector<char> shared_memory;
  size_t live, waiting;  // threads
};

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
std::vector<Block> blocks;  // that run at a time
ucontext_t scheduler;
const std::function<void()>* running_kernel;
size_t current, threads;  // `threads` of each block, one block's fibers behind another's

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

Block& block_of(size_t fiber) { return blocks[fiber / threads]; }

bool can_run(const Fiber& fiber) { return fiber.state == State::kReady || fiber.state == State::kPolling; }

void start_threads(dim3 block) {
  const size_t count = blocks.size() * threads;
  if (fibers.size() < count) fibers.resize(count);
  warps.assign((count + kWarp - 1) / kWarp, Warp{});
  for (size_t f = 0; f < count; ++f) {
    Fiber& fiber = fibers[f];
    const size_t t = f % threads;
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

void resume(size_t fiber) {
  current = fiber;
  Block& block = block_of(fiber);
  threadIdx = fibers[fiber].thread;
  blockIdx = block.index;
  fibers[fiber].state = State::kReady;
  swapcontext(&scheduler, &fibers[fiber].context);
  if (fibers[fiber].state == State::kDone) --block.live;
  if (block.live == 0 || block.waiting < block.live) return;  // threads that have ended count as arrived
  block.waiting = 0;
  const size_t first = fiber / threads * threads;
  for (size_t f = first; f < first + threads; ++f) {
    if (fibers[f].state == State::kAtBlockBarrier) fibers[f].state = State::kReady;
  }
}

void run_blocks() {
  std::vector<size_t> ready;
  int idle_rounds = 0;
  const size_t count = blocks.size() * threads;
  const auto is_live = [](const Block& block) { return block.live > 0; };
  while (std::any_of(blocks.begin(), blocks.end(), is_live)) {
    ready.clear();
    for (size_t f = 0; f < count; ++f) {
      if (can_run(fibers[f])) ready.push_back(f);
    }
    if (ready.empty()) fail("threads wait for ever: a barrier or a warp operation that not all of them reach");
    bool idle = true;
    for (size_t left = ready.size(); left > 0; --left) {
      std::swap(ready[random_below(left)], ready[left - 1]);
      resume(ready[left - 1]);
      idle = idle && fibers[ready[left - 1]].state == State::kPolling;
    }
    idle_rounds = idle ? idle_rounds + 1 : 0;
    if (idle_rounds > kMostIdleRounds) fail("threads wait for ever: for what nobody writes");
  }
}

void begin(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  if (grid.x * grid.y * grid.z == 0 || block.x * block.y * block.z == 0) fail("a launch without threads");
  if (block.x * block.y * block.z % kWarp != 0) fail("a block that is no whole number of warps");
  gridDim = grid;
  blockDim = block;
  running_kernel = &kernel;
  threads = static_cast<size_t>(block.x) * block.y * block.z;
}

Block new_block(size_t number, size_t shared_bytes) {
  const dim3 index(static_cast<unsigned>(number % gridDim.x), static_cast<unsigned>(number / gridDim.x % gridDim.y),
                   static_cast<unsigned>(number / gridDim.x / gridDim.y));
  return {index, std::vector<char>(shared_bytes, '\xFF'), threads, 0};  // NaN
}

size_t count_of(dim3 grid) { return static_cast<size_t>(grid.x) * grid.y * grid.z; }

}  // namespace

void seed(uint64_t value) { random_state = value; }

void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const std::function<void()>& kernel) {
  begin(grid, block, kernel);
  for (size_t b = 0; b < count_of(grid); ++b) {
    blocks.clear();
    blocks.push_back(new_block(b, shared_bytes));
    start_threads(block);
    run_blocks();
  }
}

void launch_together(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  begin(grid, block, kernel);
  blocks.clear();
  for (size_t b = 0; b < count_of(grid); ++b) blocks.push_back(new_block(b, shared_bytes));
  start_threads(block);
  run_blocks();
}

void* dynamic_shared() { return block_of(current).shared_memory.data(); }

void let_others_run() { wait(State::kPolling); }

void block_barrier() {
  ++block_of(current).waiting;
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
