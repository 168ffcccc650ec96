#include "topk.hpp"

#include <atomic>
#include <cstddef>

#include "plan.hpp"
#include "scan.cuh"

namespace geoengine::cuda {
namespace {

constexpr int kMostDevices = 64;

__device__ void write_answer(const Scan& scan, std::int64_t query, int slot, Key key) {
  scan.scores[query * scan.answers + slot] = score_of(key);
  scan.indices[query * scan.answers + slot] = position_of(key);
  if (slot == scan.k - 1) scan.next_bounds[query] = key;
}

// Writes the best of a query's parts, found by one block in `keys`, which has room for all of them: a candidate's place
// is the number of better ones, and in the other parts, best first, that is found by bisection.
__device__ void merge_few(const Scan& scan, Key* keys, std::int64_t query) {
  const int parts = static_cast<int>(scan.parts);
  const int total = scan.k * parts;
  const int threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < total; i += threads) {
    keys[i] = __ldcg(scan.partial + query * total + i);
  }
  for (int slot = static_cast<int>(threadIdx.x); slot < scan.k; slot += threads) {
    write_answer(scan, query, slot, kNoKey);  // where the list is shorter it stays
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < total; i += threads) {
    const Key key = keys[i];
    if (key == kNoKey) continue;
    int better = i / parts;
    for (int part = 0; part < parts; ++part) {
      if (part == i % parts) continue;
      int low = 0;
      for (int high = scan.k; low < high;) {
        const int middle = (low + high) / 2;
        if (keys[middle * parts + part] > key) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      better += low;
    }
    if (better < scan.k) write_answer(scan, query, better, key);
  }
}

// Writes the best of a query's parts, found by one block. The parts lie slot by slot, each part's best first: once all
// of them in turn have offered nothing, none has anything better left.
__device__ void merge_parts(const Scan& scan, const Selector& selector, std::int64_t query) {
  if (threadIdx.x == 0) clear(selector);
  __syncthreads();
  const Key* const partial = scan.partial + query * scan.k * scan.parts;
  const std::int64_t total = scan.k * scan.parts;
  std::int64_t idle = 0;
  for (std::int64_t base = 0; base < total && idle < scan.parts; base += selector.turn) {
    const std::int64_t i = base + threadIdx.x;
    bool pushed = false;
    if (static_cast<int>(threadIdx.x) < selector.turn && i < total) {
      const Key key = __ldcg(partial + i);
      pushed = key > *selector.threshold;
      if (pushed) push(selector, key);
    }
    idle += selector.turn;
    if (!__syncthreads_or(pushed)) continue;
    idle = 0;
    const bool full = static_cast<int>(*selector.count) > selector.capacity - selector.turn;
    __syncthreads();
    if (full) keep_best(selector);
  }
  keep_best(selector);

  const int found = static_cast<int>(*selector.count);
  for (int slot = static_cast<int>(threadIdx.x); slot < scan.k; slot += static_cast<int>(blockDim.x)) {
    write_answer(scan, query, slot, slot < found ? selector.keys[slot] : kNoKey);
  }
}

// A block scores one part of the lists of one tile of queries. Blocks of the same part run side by side, so that
// what one reads the others find in the cache; but a cluster's blocks are the parts of one tile.
template <typename T, int kQueries, bool kAligned, bool kCluster>
__global__ void __launch_bounds__(Shape<kQueries, kCluster>::kThreads, Shape<kQueries, kCluster>::kBlocks)
    scan_rows(const Scan scan) {
  using Chosen = Shape<kQueries, kCluster>;
  constexpr int kWarps = Chosen::kThreads / kWarp;
  // Vectors of each row in flight per thread: 512 values of 8 or 16 bits take one or two, and registers are few.
  constexpr int kAhead = !kCluster && kQueries == 1 && kVector<T> <= 8 ? 2 : 1;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const unsigned parts = static_cast<unsigned>(scan.parts);
  const unsigned tiles = static_cast<unsigned>(scan.tiles);
  const unsigned part = kCluster ? blockIdx.x % parts : blockIdx.x / tiles;
  const int first_query = static_cast<int>(kCluster ? blockIdx.x / parts : blockIdx.x % tiles) * kQueries;
  const List list = list_of(scan.problem, first_query);
  const auto begin = static_cast<unsigned>(static_cast<std::uint64_t>(list.length) * part / parts);
  const auto end = static_cast<unsigned>(static_cast<std::uint64_t>(list.length) * (part + 1) / parts);

  // §1 The queries; meanwhile a cluster's first rows set out from memory.
  if (kCluster) prefetch_rows<T>(scan, list, begin + warp * kRows, end, lane);
  const Tile tile = tile_in_shared_memory<kQueries>(scan, first_query);
  for (int query = warp; query < kQueries; query += kWarps) stage_query<T>(scan, tile, query, lane);
  __syncthreads();

  // §2 The rows, without a barrier for a whole turn.
  for (unsigned turn = begin; turn < end; turn += Chosen::kTurn) {
    bool full = false;
    for (int step = 0; step < Chosen::kSteps; ++step) {
      const unsigned first = turn + (step * kWarps + warp) * kRows;
      if (first >= end) break;
      full |= score_rows<T, kQueries, kAligned, kAhead>(scan, tile, list, first, end, Chosen::kTurn, lane);
    }
    if (!__syncthreads_or(full)) continue;
    for (int query = 0; query < kQueries; ++query) {
      const bool due = static_cast<int>(tile.counts[query]) > scan.capacity - Chosen::kTurn;
      if (due) keep_best(selector_of(scan, tile, query, Chosen::kTurn));
    }
    __syncthreads();  // every thread has read the counts that the next turn changes
  }

  // §3 The part's best.
  for (int query = 0; query < tile.queries; ++query) {
    const Selector selector = selector_of(scan, tile, query, Chosen::kTurn);
    keep_best(selector);
    const int found = static_cast<int>(*selector.count);
    Key* const partial = scan.partial + static_cast<std::int64_t>(first_query + query) * scan.k * scan.parts + part;
    for (int slot = static_cast<int>(threadIdx.x); slot < scan.k; slot += Chosen::kThreads) {
      partial[slot * scan.parts] = slot < found ? selector.keys[slot] : kNoKey;
    }
  }

  // §4 In a cluster, the first block merges.
  if (kCluster) {
    cluster_barrier();
    if (part != 0) return;
    if (scan.k * kClusterBlocks <= scan.capacity) {
      merge_few(scan, tile.keys, first_query);
    } else {
      merge_parts(scan, selector_of(scan, tile, 0, Chosen::kTurn), first_query);
    }
  }
}

__global__ void __launch_bounds__(kMergeThreads) merge(const Scan scan) {
  Key* const keys = reinterpret_cast<Key*>(block_memory());
  Key* const threshold = keys + scan.capacity;
  auto* const count = reinterpret_cast<unsigned*>(threshold + 1);
  merge_parts(scan, {keys, threshold, count, scan.capacity, kMergeThreads, scan.k}, blockIdx.x);
}

using Kernel = void (*)(Scan);

template <typename T>
Kernel kernel_of(const Plan& plan) {
  if (plan.cluster) return scan_rows<T, 1, true, true>;
  if (!plan.aligned) return scan_rows<T, 1, false, false>;
  if (plan.queries == 8) return scan_rows<T, 8, true, false>;
  return scan_rows<T, 1, true, false>;
}

Kernel kernel_of(Type type, const Plan& plan) {
  switch (type) {
    case Type::float32: return kernel_of<Float32>(plan);
    case Type::float16: return kernel_of<Float16>(plan);
    case Type::bfloat16: return kernel_of<BFloat16>(plan);
    default: return kernel_of<Int8>(plan);
  }
}

struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};
};

// The configuration points into itself: fill it where it stays.
cudaError_t configure(Launch& launch, Kernel kernel, std::int64_t blocks, int threads, std::size_t shared_bytes,
                      bool cluster) {
  launch.config.gridDim = dim3(static_cast<unsigned>(blocks));
  launch.config.blockDim = dim3(static_cast<unsigned>(threads));
  launch.config.dynamicSmemBytes = shared_bytes;
  if (cluster) {
    launch.cluster.id = cudaLaunchAttributeClusterDimension;
    launch.cluster.val.clusterDim.x = kClusterBlocks;
    launch.cluster.val.clusterDim.y = 1;
    launch.cluster.val.clusterDim.z = 1;
    launch.config.attrs = &launch.cluster;
    launch.config.numAttrs = 1;
  }
  constexpr std::size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes <= kWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes));
}

// Whether the cluster kernel can run: not where the driver translated it from PTX of before clusters, nor on a slice of
// a device too small for eight of the largest blocks side by side. Asked once per device.
cudaError_t clusters_fit(int device, bool* fit) {
  static std::atomic<signed char> known[kMostDevices];  // 0: not asked, 1: no, 2: yes
  const bool kept = device < kMostDevices;
  const int answer = kept ? known[device].load() : 0;
  if (answer != 0) {
    *fit = answer == 2;
    return cudaSuccess;
  }
  Plan plan{};
  plan.padded = static_cast<int>(kWidest);
  shape_into<1, true>(plan, kPass);
  const Kernel kernel = scan_rows<Float32, 1, true, true>;
  Launch launch;
  int clusters = 0;
  cudaFuncAttributes compiled{};
  cudaError_t error = cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess && compiled.ptxVersion >= 90) {
    error = configure(launch, kernel, kClusterBlocks, plan.threads, plan.shared_bytes, true);
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(kernel), &launch.config);
    }
  }
  if (error != cudaSuccess) return error;
  *fit = clusters > 0;
  if (kept) known[device].store(clusters > 0 ? 2 : 1);
  return cudaSuccess;
}

cudaError_t run(const Scan& scan, Kernel kernel, const Plan& plan, cudaStream_t stream) {
  Launch launch;
  const std::int64_t blocks = plan.parts * plan.tiles;
  cudaError_t error = configure(launch, kernel, blocks, plan.threads, plan.shared_bytes, plan.cluster);
  launch.config.stream = stream;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&launch.config, kernel, Scan(scan));
  if (error != cudaSuccess || plan.cluster) return error;

  Scan merged = scan;
  merged.capacity = selector_capacity(scan.k, kMergeThreads);
  const std::size_t bytes = sizeof(Key) * (static_cast<std::size_t>(merged.capacity) + 2);
  Launch second;
  error = configure(second, merge, scan.problem.m, kMergeThreads, bytes, false);
  second.config.stream = stream;
  return error == cudaSuccess ? cudaLaunchKernelEx(&second.config, merge, Scan(merged)) : error;
}

}  // namespace

cudaError_t describe(int device, Device* description) {
  int major = 0;
  bool clusters = false;
  const auto ask = [device](int* value, cudaDeviceAttr what) { return cudaDeviceGetAttribute(value, what, device); };
  cudaError_t error = ask(&description->multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) error = ask(&description->shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess) {
    error = ask(&description->shared_bytes_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  }
  if (error == cudaSuccess) error = ask(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess && major >= 9) error = clusters_fit(device, &clusters);
  description->clusters = clusters;
  return error;
}

std::size_t workspace_bytes(const Problem& problem, const Device& device) {
  if (problem.m == 0 || problem.k == 0) return 0;
  const std::size_t aligned = plan_bytes(problem, make_plan(problem, device, true));
  const std::size_t other = plan_bytes(problem, make_plan(problem, device, false));
  return aligned > other ? aligned : other;
}

cudaError_t topk(const Problem& problem, const Device& device, void* workspace, float* scores, std::int64_t* indices,
                 cudaStream_t stream) {
  if (problem.m == 0 || problem.k == 0) return cudaSuccess;
  const Plan plan = make_plan(problem, device, rows_aligned(problem));
  const Kernel kernel = kernel_of(problem.type, plan);
  Scan scan{};
  scan.problem = problem;
  scan.padded = plan.padded;
  scan.capacity = plan.capacity;
  scan.parts = plan.parts;
  scan.tiles = plan.tiles;
  scan.answers = problem.k;
  scan.partial = static_cast<Key*>(workspace);
  scan.next_bounds = scan.partial + problem.m * answers_per_pass(problem) * plan.parts;
  for (std::int64_t done = 0; done < problem.k; done += kPass) {
    scan.k = static_cast<int>(problem.k - done < kPass ? problem.k - done : kPass);
    scan.bounds = done > 0 ? scan.next_bounds : nullptr;
    scan.scores = scores + done;
    scan.indices = indices + done;
    const cudaError_t error = run(scan, kernel, plan, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace geoengine::cuda
