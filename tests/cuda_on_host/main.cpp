// Reads problems from the first file and writes the kernels' answers to the second; tests/test_kernels_cuda_host.py
// writes the one and reads the other.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fibers.hpp"
#include "plan.hpp"
#include "topk.hpp"

namespace cuda = geoengine::cuda;

namespace {

// In this order in the file, each eight bytes; lengths of the arrays that follow in bytes, -1 for none.
struct Header {
  std::int64_t type, query_type, n, d, row_stride, m, listed, longest, k, normalized;
  std::int64_t seed, multiprocessors, shared_bytes, clusters, offset;
  std::int64_t row_bytes, scale_bytes, query_bytes, number_bytes, segment_bytes;
};

// An array of exactly the bytes in the file, so that ASan sees a read outside it.
void* read_array(std::FILE* file, std::int64_t bytes, std::vector<void*>& owned) {
  if (bytes < 0) return nullptr;
  void* const array = std::malloc(static_cast<std::size_t>(bytes));
  owned.push_back(array);
  if (bytes > 0 && std::fread(array, static_cast<std::size_t>(bytes), 1, file) != 1) std::exit(3);
  return array;
}

// Rows at their stride behind `offset` bytes; far apart, in memory that is there only where it is used.
const void* place_rows(const Header& header, const unsigned char* packed, std::vector<void*>& owned) {
  const std::int64_t size = cuda::bytes_per_value(static_cast<cuda::Type>(header.type));
  const std::int64_t last = header.n > 0 ? (header.n - 1) * header.row_stride + header.d : 0;
  const auto bytes = static_cast<std::size_t>(header.offset + last * size);
  unsigned char* memory;
  if (bytes > (std::size_t{64} << 20)) {
    memory = static_cast<unsigned char*>(
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) std::exit(4);
  } else {
    memory = static_cast<unsigned char*>(std::malloc(bytes));
    owned.push_back(memory);
  }
  for (std::int64_t i = 0; i < header.n; ++i) {
    std::memcpy(memory + header.offset + i * header.row_stride * size, packed + i * header.d * size,
                static_cast<std::size_t>(header.d * size));
  }
  return memory + header.offset;
}

void answer(const Header& header, std::FILE* in, std::FILE* out) {
  std::vector<void*> owned;
  const auto* const packed = static_cast<const unsigned char*>(read_array(in, header.row_bytes, owned));
  cuda::Problem problem{};
  problem.type = static_cast<cuda::Type>(header.type);
  problem.rows = place_rows(header, packed, owned);
  problem.n = header.n;
  problem.d = header.d;
  problem.row_stride = header.row_stride;
  problem.scales = static_cast<const float*>(read_array(in, header.scale_bytes, owned));
  problem.query_type = static_cast<cuda::Type>(header.query_type);
  problem.queries = read_array(in, header.query_bytes, owned);
  problem.m = header.m;
  problem.row_numbers = static_cast<const std::int64_t*>(read_array(in, header.number_bytes, owned));
  problem.segments = static_cast<const std::int64_t*>(read_array(in, header.segment_bytes, owned));
  problem.listed = header.listed;
  problem.longest = header.longest;
  problem.k = header.k;
  problem.normalized = header.normalized != 0;

  host_cuda::random_order.seed(static_cast<unsigned>(header.seed));
  host_cuda::multiprocessors = static_cast<int>(header.multiprocessors);
  host_cuda::shared_bytes_per_block = static_cast<int>(header.shared_bytes);
  cuda::Device device{};
  if (cuda::describe(0, &device) != cudaSuccess || !device.clusters) std::exit(5);
  device.clusters = header.clusters != 0;

  const std::size_t bytes = cuda::workspace_bytes(problem, device);
  std::vector<unsigned char> workspace(bytes, 0xcd);
  const auto answers = static_cast<std::size_t>(problem.m * problem.k);
  std::vector<float> scores(answers, 42.0f);
  std::vector<std::int64_t> indices(answers, 42);
  const auto error = cuda::topk(problem, device, workspace.data(), scores.data(), indices.data(), nullptr);
  if (error != cudaSuccess) std::exit(6);
  for (void* const array : owned) std::free(array);

  cuda::Plan plan{};
  if (answers > 0) plan = cuda::make_plan(problem, device, cuda::rows_aligned(problem));
  const std::int64_t taken[] = {plan.queries, plan.aligned ? 1 : 0, plan.cluster ? 1 : 0, plan.parts};
  std::fwrite(taken, sizeof taken, 1, out);
  if (answers == 0) return;
  std::fwrite(scores.data(), sizeof(float), answers, out);
  std::fwrite(indices.data(), sizeof(std::int64_t), answers, out);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  std::FILE* const in = std::fopen(arguments[1], "rb");
  std::FILE* const out = std::fopen(arguments[2], "wb");
  if (in == nullptr || out == nullptr) return 2;
  Header header;
  while (std::fread(&header, sizeof header, 1, in) == 1) answer(header, in, out);
  std::fclose(in);
  return std::fclose(out);
}
