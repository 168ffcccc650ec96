// Runs every kernel of the processor over all kinds of rows; all answers must equal the first one's, bit by bit.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernel.hpp"
#include "topk.hpp"

using namespace geoengine::cpu;

namespace {

constexpr std::int64_t kRows = 150;
constexpr std::int64_t kBest = 9;

struct Data {
  std::vector<float> single;
  std::vector<std::uint16_t> half;
  std::vector<std::int8_t> bytes;
  std::vector<float> scales;
};

// Finite values of every exponent that does not overflow a sum.
Data draw(RowType type, std::int64_t d) {
  Data data;
  for (std::int64_t i = 0; i < kRows * d; ++i) {
    data.single.push_back(static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f);
    data.bytes.push_back(static_cast<std::int8_t>(std::rand() % 256 - 128));
    const int bits = std::rand();
    data.half.push_back(static_cast<std::uint16_t>(type == RowType::f16
                                                       ? (bits & 0x83ff) | (std::rand() % 30) << 10
                                                       : (bits & 0x807f) | (100 + std::rand() % 40) << 7));
  }
  data.scales.assign(kRows, 0.5f);
  return data;
}

const void* values(const Data& data, RowType type) {
  if (type == RowType::f32) return data.single.data();
  if (type == RowType::i8) return data.bytes.data();
  return data.half.data();
}

// Returns the number of answers that were equal, or -1.
int check(RowType type, std::int64_t d, bool unit, std::int64_t m) {
  const Data data = draw(type, d);
  const Rows rows = {values(data, type), type, kRows, d, d, type == RowType::i8 ? data.scales.data() : nullptr, unit};
  std::vector<std::int8_t> looked(static_cast<std::size_t>(kRows * d));
  std::vector<float> scales(kRows), errors(kRows), lengths(kRows);
  const Int8Look look = {looked.data(), d, scales.data(), errors.data(), lengths.data()};
  const bool can_look = type != RowType::i8;
  if (can_look && quantize_rows(rows, {looked.data(), scales.data(), errors.data(), lengths.data()}) >= 0) return -1;
  std::vector<float> first_scores;
  std::vector<std::int64_t> first_indices;
  int equal = 0;
  for (const Kernel* kernel : kernels()) {
    for (const Int8Look* with : {static_cast<const Int8Look*>(nullptr), can_look ? &look : nullptr}) {
      for (const std::int64_t threads : {1, 3}) {
        std::vector<float> scores(static_cast<std::size_t>(m * kBest));
        std::vector<std::int64_t> indices(scores.size());
        const Queries queries = {data.single.data(), m, kBest, scores.data(), indices.data()};
        const Candidates all = {nullptr, kRows, nullptr, kRows};
        if (cosine_topk(*kernel, rows, with, all, queries, threads).status != Status::ok) return -1;
        if (first_scores.empty()) {
          first_scores = scores;
          first_indices = indices;
        }
        if (std::memcmp(scores.data(), first_scores.data(), 4 * scores.size()) != 0 || indices != first_indices) {
          std::printf("differs: %s, type %d, d %d, %d queries\n", name(*kernel).c_str(), static_cast<int>(type),
                      static_cast<int>(d), static_cast<int>(m));
          return -1;
        }
        ++equal;
      }
    }
  }
  return equal;
}

}  // namespace

int main() {
  int equal = 0;
  for (const RowType type : {RowType::f32, RowType::f16, RowType::bf16, RowType::i8}) {
    for (const std::int64_t d : {1, 7, 15, 16, 17, 33, 63, 64, 65, 100, 130}) {
      for (const bool unit : {false, true}) {
        for (const std::int64_t m : {1, 2, 3, 5}) {
          const int found = check(type, d, unit, m);
          if (found < 0) return 1;
          equal += found;
        }
      }
    }
  }
  for (const Kernel* kernel : kernels()) std::printf("%s ", name(*kernel).c_str());
  std::printf("%d answers equal\n", equal);
}
