// What forward and backward share: scratch memory, the partition of the work, and rows in the format of computation.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "isa/kernels.h"

namespace gistops {

constexpr int64_t kRows = 256;         // features a block: with kClasses, one block of scores stays in L2
constexpr int64_t kClasses = 512;      // classes a block, at most
constexpr int64_t kLossClasses = 192;  // of a loss, whose scratch memory should be small: as fast
constexpr int64_t kMinClasses = 64;    // fewer make the matrix product inefficient

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialised scratch, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : size_(n),
        data_(static_cast<T*>(std::aligned_alloc(64, ceil_div(std::max<int64_t>(n, 1) * sizeof(T), 64) * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  // Someone else's memory, if it is not null.
  Scratch(int64_t n, T* lent) : Scratch(lent ? 0 : n) {
    if (!lent) return;
    size_ = n;
    data_ = {lent, Free{false}};
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }
  void zero() const { std::fill_n(get(), size_, T(0)); }
  void add(const Scratch& other) const {
    for (int64_t i = 0; i < size_; ++i) data_[i] += other.data_[i];
  }

 private:
  struct Free {
    bool own = true;
    void operator()(T* p) const {
      if (own) std::free(p);
    }
  };
  int64_t size_;
  std::unique_ptr<T[], Free> data_;
};

// A row-major matrix as it is stored.
struct Stored {
  const void* data;
  Format format;
  int64_t rows, d;

  int64_t element_size() const { return format == Format::f64 ? 8 : format == Format::f32 ? 4 : 2; }
  const void* row(int64_t i) const { return static_cast<const char*>(data) + i * d * element_size(); }
  template <class T>
  bool is() const {
    return format == (sizeof(T) == 8 ? Format::f64 : Format::f32);
  }

  // Rows [begin, begin + n) for computation: where they lie, or converted into `scratch`.
  template <class T>
  const T* as(int64_t begin, int64_t n, T* scratch) const {
    if (is<T>()) return static_cast<const T*>(row(begin));
    kernels<T>().load(row(begin), format, n * d, scratch);
    return scratch;
  }
  template <class T>
  int64_t scratch_elements(int64_t n) const {
    return is<T>() ? 0 : n * d;
  }
};

// The arguments of the operator. A class has M = m + 1 slots, its centre and the centre with each displacement; or,
// where it has free_slots > 0, that many centres of its own and no displacements (sub-centres); or, where it has
// table_slots > 0, that many vectors by tables (isa/rotation.h), without displacements.
template <class T>
struct Problem {
  Stored input, centers;  // [B, d], [K, stored(), d]
  const T* delta;         // [m, d]
  int64_t B, K, d, m, free_slots;
  T tau;
  const T* norms = nullptr;  // [M, K]: R as center_norms() makes it, if that is known already
  int64_t table_slots = 0;
  const T *x = nullptr, *y = nullptr;  // tables [B, M] and [2, M, K]
  int64_t M() const { return free_slots ? free_slots : table_slots ? table_slots : m + 1; }
  Tables<T> tables(int64_t i, int64_t k) const { return {x + i * M(), y + k, y + M() * K + k, M(), K}; }
  int64_t stored() const { return free_slots ? free_slots : 1; }  // vectors a class in centers
};

// Free centres w [n, stored, d] of one slot, together: [n, d] in `packed`.
template <class T>
const T* pack_slot(const Problem<T>& p, const T* w, int64_t n, int64_t slot, T* packed) {
  for (int64_t k = 0; k < n; ++k) std::copy_n(w + (k * p.stored() + slot) * p.d, p.d, packed + k * p.d);
  return packed;
}

// Threads worth waking: one for kWork multiplications, some 40 us.
constexpr int64_t kWork = 1 << 21;

template <class T>
int64_t workers(const Problem<T>& p) {
  const double products = static_cast<double>(p.B) * p.K * p.stored() * p.d;
  return std::clamp<int64_t>(static_cast<int64_t>(std::min(products / kWork, 1e9)), 1,
                             torch::stable::get_num_threads());
}

// 1 / max(norm, 1e-12); NaN stays NaN.
template <class T>
T clamped_rnorm(T square) {
  const T norm = std::sqrt(square);
  return norm < static_cast<T>(kMinNorm) ? static_cast<T>(1 / kMinNorm) : 1 / norm;
}

// Where w_k is close to -delta_j, sums that hold w and delta apart lose digits: |w|^2 + 2 w.delta + |delta|^2 in the
// forward, H w + S delta in the backward. Such pairs, rare or none, are computed from w_k + delta_j written out.
template <class T>
bool cancels(T square, T center_square, T delta_square) {
  return square < (center_square + delta_square) / 8;
}

// Classes in blocks of equal size, the same number for each thread.
struct Partition {
  int64_t K, size, count;  // classes, classes a block, blocks
  Partition(int64_t classes, int64_t stored, int64_t threads, int64_t at_most = kClasses) : K(classes) {
    const int64_t per_thread = ceil_div(std::max<int64_t>(K, 1), threads);
    const int64_t blocks = threads * ceil_div(per_thread, std::max(at_most / stored, kMinClasses));
    size = std::max(kMinClasses, ceil_div(ceil_div(K, blocks), 16) * 16);
    count = ceil_div(K, size);
  }
  int64_t begin(int64_t block) const { return block * size; }
  int64_t classes(int64_t block) const { return std::min(size, K - block * size); }

  // Runs run(worker, first class, classes) for all blocks: each worker has a run of them, in order.
  template <class Run>
  void each(int64_t workers, Run run) const {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t b = count * i / workers; b < count * (i + 1) / workers; ++b) run(i, begin(b), classes(b));
    });
  }
};

}  // namespace gistops
