// The partition of the classes into blocks, and of the blocks among workers.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>

#include "half_product.h"
#include "problem.h"

namespace gistops {

constexpr int64_t kBlockRows = 256;         // rows per block: with kBlockClasses, a block of scores stays in L2
constexpr int64_t kBlockClasses = 512;      // classes per block, at most
constexpr int64_t kLossBlockClasses = 192;  // the same for a loss: as fast, with less scratch memory
constexpr int64_t kMinBlockClasses = 64;    // fewer make the matrix product inefficient
constexpr int64_t kPad = 16;                // the rows of a product in half precision are a multiple of this

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The number of rows to take at once, from row i up to `end`: they lie within one chunk of kBlockRows rows.
constexpr int64_t rows_from(int64_t i, int64_t end) { return std::min((i / kBlockRows + 1) * kBlockRows, end) - i; }

// Calls f(begin, end) for parts of [begin, end) in PyTorch's thread pool. The first exception of a part is rethrown;
// the stable ABI would lose its message.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::exception_ptr error;
  std::mutex mutex;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      f(first, last);
      release_half_units();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// The number of threads to use: one per kWorkPerThread multiply-adds, about 40 us.
constexpr int64_t kWorkPerThread = 1 << 21;

template <class T>
int64_t num_threads(const Problem<T>& p) {
  const double work = static_cast<double>(p.B) * p.K * p.vectors_per_class() * p.d;
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(work / kWorkPerThread, 1e9)), 1,
                             torch::stable::get_num_threads());
}

// Blocks of classes of equal size; their number is a multiple of the number of threads.
struct Partition {
  int64_t K, size, count;  // classes, classes per block, blocks
  template <class T>
  Partition(const Problem<T>& p, int64_t threads, int64_t max_size = kBlockClasses) : K(p.K) {
    const int64_t per_thread = ceil_div(std::max<int64_t>(K, 1), threads);
    const int64_t blocks = threads * ceil_div(per_thread, std::max(max_size / p.vectors_per_class(), kMinBlockClasses));
    size = std::max(kMinBlockClasses, ceil_div(ceil_div(K, blocks), 16) * 16);
    count = ceil_div(K, size);
  }
  int64_t workers(int64_t threads) const { return std::clamp<int64_t>(count, 1, threads); }
  int64_t begin(int64_t block) const { return block * size; }
  int64_t classes(int64_t block) const { return std::min(size, K - block * size); }

  // Calls run(worker, first class, classes) for all blocks. Each worker has consecutive blocks, in order, so that the
  // order of its sums is fixed.
  template <class Run>
  void for_each_block(int64_t workers, Run run) const {
    parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t b = count * i / workers; b < count * (i + 1) / workers; ++b) run(i, begin(b), classes(b));
    });
  }
};

}  // namespace gistops
