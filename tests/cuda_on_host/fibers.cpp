// Runs a grid cluster by cluster: all threads of a cluster are fibers that take turns in a random, seeded order.
// Compiled without sanitizers, whose instrumentation takes a jump between stacks for an error.
#include <cuda_runtime.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "fibers.hpp"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_cuda {

std::mt19937 random_order;
int multiprocessors = 4;
int shared_bytes_per_block = 48 * 1024;

namespace {

constexpr std::size_t kStack = 64 * 1024;

struct Fiber;

struct Barrier {
  std::size_t expected = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  Barrier barrier;
  std::uint64_t given[kLanes];
  std::uint64_t seen[kLanes];
};

struct Block {
  unsigned index;
  Barrier barrier;
  bool gathering = false;
  bool gathered = false;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> memory;  // of exactly the size asked for, so that ASan sees a step outside
};

using Place = void* [5];  // where to go on: of __builtin_setjmp, which unlike swapcontext makes no system call

struct Fiber {
  Place place;
  ucontext_t start;
  void* stack;
  Block* block;
  unsigned thread;
  bool started = false;
  bool done = false;
};

Place scheduler;
const void* scheduler_stack;
std::size_t scheduler_stack_size;
Fiber* current;
std::vector<Fiber*> ready;
Barrier cluster;
const std::function<void()>* body;

void* new_stack() {
  void* const stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) std::abort();
  return stack;
}

[[noreturn, gnu::noinline]] void go(Place place) { __builtin_longjmp(place, 1); }

[[gnu::noinline]] void switch_to_scheduler() {
  if (__builtin_setjmp(current->place) == 0) go(scheduler);
}

[[gnu::noinline]] void switch_to_current() {
  if (__builtin_setjmp(scheduler) != 0) return;
  if (current->started) go(current->place);
  current->started = true;
  setcontext(&current->start);
  std::abort();
}

void to_scheduler() {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(current->done ? nullptr : &fake_stack, scheduler_stack, scheduler_stack_size);
  switch_to_scheduler();
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*body)();
  current->done = true;
  to_scheduler();
}

void resume(Fiber* fiber) {
  current = fiber;
  threadIdx.x = fiber->thread;
  blockIdx.x = fiber->block->index;
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber->stack, kStack);
  switch_to_current();
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// The last to arrive does what completes the barrier, then all go on.
template <typename Complete>
void wait(Barrier& barrier, const Complete& complete) {
  if (barrier.waiting.size() + 1 < barrier.expected) {
    barrier.waiting.push_back(current);
    to_scheduler();
    return;
  }
  complete();
  ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
  maybe_yield();
}

void run_until_done(std::size_t threads) {
  const bool one_warp_ahead = random_order() % 2 == 0;
  for (std::size_t done = 0; done < threads;) {
    if (ready.empty()) {
      std::fputs("deadlock: some threads wait at a barrier that the others never reach\n", stderr);
      std::abort();
    }
    // In half of the launches a warp mostly runs on while it can, far ahead of the others; else all keep in step.
    if (!one_warp_ahead || random_order() % 1024 == 0) std::swap(ready[random_order() % ready.size()], ready.back());
    Fiber* const fiber = ready.back();
    ready.pop_back();
    resume(fiber);
    done += fiber->done ? 1 : 0;
  }
}

}  // namespace

void maybe_yield() {
  if (random_order() % 2 == 0) return;
  ready.push_back(current);
  to_scheduler();
}

const std::uint64_t* exchange(std::uint64_t mine) {
  Warp& warp = current->block->warps[threadIdx.x / kLanes];
  warp.given[threadIdx.x % kLanes] = mine;
  wait(warp.barrier, [&] { std::memcpy(warp.seen, warp.given, sizeof warp.seen); });
  return warp.seen;
}

bool wait_for_block(bool predicate) {
  Block& block = *current->block;
  block.gathering |= predicate;
  wait(block.barrier, [&] {
    block.gathered = block.gathering;
    block.gathering = false;
  });
  return block.gathered;
}

void wait_for_cluster() { wait(cluster, [] {}); }

unsigned char* shared_memory() { return current->block->memory.get(); }

void run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  static std::vector<void*> stacks;
  const unsigned per_cluster = config.numAttrs > 0 ? config.attrs[0].val.clusterDim.x : 1;
  const unsigned threads = config.blockDim.x;
  if (threads % kLanes != 0 || config.gridDim.x % per_cluster != 0) std::abort();
  while (stacks.size() < static_cast<std::size_t>(per_cluster) * threads) stacks.push_back(new_stack());
  body = &thread;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  for (unsigned first = 0; first < config.gridDim.x; first += per_cluster) {
    std::vector<Block> blocks(per_cluster);
    std::vector<Fiber> fibers(static_cast<std::size_t>(per_cluster) * threads);
    cluster.expected = fibers.size();
    for (unsigned b = 0; b < per_cluster; ++b) {
      blocks[b].index = first + b;
      blocks[b].barrier.expected = threads;
      blocks[b].warps.resize(threads / kLanes);
      for (Warp& warp : blocks[b].warps) warp.barrier.expected = kLanes;
      blocks[b].memory.reset(new unsigned char[config.dynamicSmemBytes]);
      std::memset(blocks[b].memory.get(), 0xab, config.dynamicSmemBytes);
    }
    for (std::size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[i];
      fiber.stack = stacks[i];
      fiber.block = &blocks[i / threads];
      fiber.thread = static_cast<unsigned>(i % threads);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack;
      fiber.start.uc_stack.ss_size = kStack;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, fiber_main, 0);
      ready.push_back(&fiber);
    }
    run_until_done(fibers.size());
  }
}

}  // namespace host_cuda

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = host_cuda::multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    default: *value = host_cuda::shared_bytes_per_block; break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return value <= host_cuda::shared_bytes_per_block ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t*) {
  *clusters = 1;
  return cudaSuccess;
}
