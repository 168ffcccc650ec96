// The k best of a stream of keys, kept by one block in shared memory.
#pragma once

#include "key.cuh"

namespace geoengine::cuda {

// Up to this many keys are sorted by counting, for each, how many are larger: two barriers and no exchange. More take
// a bitonic sort. No block has fewer threads.
constexpr int kCounted = 128;

// `keys` holds up to `capacity` candidates, a power of two; those at or below `*threshold` cannot be among the k best.
// Between two barriers a block pushes at most `turn` keys, and there is room for two turns above k.
struct Selector {
  Key* keys;
  Key* threshold;
  unsigned* count;
  int capacity;
  int turn;
  int k;
};

__host__ __device__ inline int selector_capacity(int k, int turn) { return power_of_two_from(k + 2 * turn); }

// Called by one thread; a barrier must follow before the first push.
__device__ inline void clear(const Selector& selector) {
  *selector.count = 0;
  *selector.threshold = kNoKey;
}

// True when another turn of pushes might not fit: some thread of the block sees it in the turn that fills the buffer.
__device__ inline bool push(const Selector& selector, Key key) {
  const unsigned slot = atomicAdd(selector.count, 1u);
  selector.keys[slot] = key;
  return static_cast<int>(slot) >= selector.capacity - selector.turn;
}

// Leaves the k largest of the first `count` keys in front, largest first. Needs count <= kCounted <= threads.
__device__ inline void sort_by_counting(const Selector& selector, int count) {
  const int thread = static_cast<int>(threadIdx.x);
  const Key mine = thread < count ? selector.keys[thread] : kNoKey;
  int larger = 0;
  if (thread < count) {
    for (int i = 0; i < count; ++i) larger += selector.keys[i] > mine ? 1 : 0;
  }
  __syncthreads();
  if (thread < count && larger < selector.k) selector.keys[larger] = mine;
  __syncthreads();
}

// Leaves the first `count` keys in front, largest first.
__device__ inline void sort_bitonic(const Selector& selector, int count) {
  const int threads = static_cast<int>(blockDim.x);
  const int length = power_of_two_from(count);
  for (int i = count + static_cast<int>(threadIdx.x); i < length; i += threads) selector.keys[i] = kNoKey;
  __syncthreads();
  for (int run = 2; run <= length; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int pair = static_cast<int>(threadIdx.x); pair < length / 2; pair += threads) {
        const int low = 2 * pair - (pair & (stride - 1));
        const Key a = selector.keys[low];
        const Key b = selector.keys[low + stride];
        if ((a < b) == ((low & run) == 0)) {
          selector.keys[low] = b;
          selector.keys[low + stride] = a;
        }
      }
      __syncthreads();
    }
  }
}

// Called by the whole block after a barrier that follows the last push; ends with a barrier. Keeps the k best, sorted.
__device__ inline void keep_best(const Selector& selector) {
  const int count = static_cast<int>(*selector.count);
  if (count <= kCounted) {
    sort_by_counting(selector, count);
  } else {
    sort_bitonic(selector, count);
  }
  if (threadIdx.x == 0 && count >= selector.k) {
    *selector.count = static_cast<unsigned>(selector.k);
    *selector.threshold = selector.keys[selector.k - 1];
  }
  __syncthreads();
}

}  // namespace geoengine::cuda
