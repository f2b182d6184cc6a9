// The backward of all ops: the shards of the workers (backward_shard.h), and their reduction. Each shard adds its
// classes in order, and the shards are added in order: the results are bitwise deterministic.
#pragma once
#include <vector>

#include "backward_shard.h"

namespace gistops {

// Implements GradSource (a template parameter of the backward): provides G from autograd, and logits, slots and norms
// as saved by the forward.
template <class T>
class SavedScores {
 public:
  static constexpr bool kStashed = false;
  // grad, logits, slots: [B, K]. center_rnorms: [M, K]. size: classes per block, at most.
  SavedScores(const Problem<T>& p, const StoredMatrix& grad, const StoredMatrix& logits, const uint8_t* slots,
              const T* center_rnorms, int64_t size)
      : p_(p), grad_(grad), logits_(logits), slots_(slots), center_rnorms_(center_rnorms),
        direct_(grad.template is<T>() && logits.template is<T>()),
        converted_(p.half_backward() ? 0 : p.centers.template scratch_elements<T>(size * p.vectors_per_class())),
        block_grad_(direct_ ? 0 : std::min(kBlockRows, p.B) * size),
        block_logits_(direct_ ? 0 : std::min(kBlockRows, p.B) * size),
        block_slots_(direct_ ? 0 : std::min(kBlockRows, p.B) * size) {}

  // Moves to the classes [k, k + n); returns their vectors, or null if the products are in half precision.
  const T* begin(int64_t k, int64_t n) {
    first_ = k, n_ = n;
    if (p_.half_backward()) return nullptr;
    return p_.centers.template as<T>(k * p_.vectors_per_class(), n * p_.vectors_per_class(), converted_.get());
  }
  SlotMatrix<T> r() const { return {.data = center_rnorms_ + first_, .ld = p_.K, .slots = p_.M}; }
  // The number of rows that rows() takes at once, from row i on.
  int64_t rows_from(int64_t i) const { return std::min(kBlockRows, p_.B - i); }
  GradBlock<T> rows(int64_t i, int64_t rows) const {
    const uint8_t* slots = slots_ + i * p_.K + first_;
    if (direct_)
      return {.grad = static_cast<const T*>(grad_.row(i, first_)),
              .logits = static_cast<const T*>(logits_.row(i, first_)),
              .slots = slots,
              .ld = p_.K,
              .rows = rows,
              .n = n_};
    for (int64_t row = 0; row < rows; ++row) {
      kernels<T>().load(grad_.row(i + row, first_), grad_.format, n_, block_grad_.get() + row * n_);
      kernels<T>().load(logits_.row(i + row, first_), logits_.format, n_, block_logits_.get() + row * n_);
      std::copy_n(slots + row * p_.K, n_, block_slots_.get() + row * n_);
    }
    return {.grad = block_grad_.get(),
            .logits = block_logits_.get(),
            .slots = block_slots_.get(),
            .ld = n_,
            .rows = rows,
            .n = n_};
  }
  // The memory of the last block's grad, if it may be overwritten, else null.
  T* reusable_grad() const { return direct_ ? nullptr : block_grad_.get(); }

 private:
  const Problem<T>& p_;
  const StoredMatrix grad_, logits_;
  const uint8_t* slots_;
  const T* center_rnorms_;
  const bool direct_;  // grad and logits are in the type of computation; else blocks of them are converted
  int64_t first_ = 0, n_ = 0;
  Scratch<T> converted_, block_grad_, block_logits_;
  Scratch<uint8_t> block_slots_;
};

// Adds the partial sums of all shards to those of the first, and writes the gradients of the shared vectors, tau, the
// turns and the input.
template <class T, class GradSource>
void reduce_shards(const Problem<T>& p, const Input<T>& input, const Gradients& out,
                   const std::vector<BackwardShard<T, GradSource>>& shards) {
  const BackwardShard<T, GradSource>& sums = shards[0];
  double tau = sums.tau;
  for (size_t i = 1; i < shards.size(); ++i) {
    tau += shards[i].tau;
    sums.s.add(shards[i].s);
    sums.dd.add(shards[i].dd);
    sums.turns.add(shards[i].turns);
  }
  const int64_t shared = p.num_shared();
  if (out.turns) std::copy_n(sums.turns.get(), 3 * (p.M - 1), static_cast<T*>(out.turns));
  if (out.tau) *static_cast<T*>(out.tau) = static_cast<T>(tau / p.tau);
  if (out.displacements) {
    const Matrix<T> s{sums.s.get() + p.M - shared, p.B, shared, p.M};
    add_product(s.t(), input.rows(0, p.B), sums.dd.get());
    std::copy_n(sums.dd.get(), shared * p.d, static_cast<T*>(out.displacements));
  }
  if (!out.input) return;
  parallel_for(0, p.B, 8, [&](int64_t begin, int64_t end) {
    T* g = sums.g.get() + begin * p.d;
    const int64_t rows = end - begin;
    for (size_t i = 1; i < shards.size(); ++i) {
      const T* other = shards[i].g.get() + begin * p.d;
      for (int64_t e = 0; e < rows * p.d; ++e) g[e] += other[e];
    }
    if (shared) {
      const Matrix<T> s{sums.s.get() + (begin + 1) * p.M - shared, rows, shared, p.M},
          vectors{p.delta, shared, p.d, p.d};
      add_product(s, vectors, g);
    }
    kernels<T>().normalize_backward(g, input.f() + begin * p.d, rows, p.d, input.rnorm.get() + begin);
    void* grad = gradient_row(out.input, p.input, begin);
    if (g != grad) kernels<T>().store(g, rows * p.d, p.input.format, grad);
  });
}

// Runs one shard per worker over all classes. make_source() returns a shard's GradSource.
template <class T, class MakeSource>
void run_shards(const Problem<T>& p, const Input<T>& input, const Gradients& out, const Partition& partition,
                int64_t workers, MakeSource make_source) {
  const InputPairs pairs(p, p.half_backward() && out.centers);
  std::vector<BackwardShard<T, decltype(make_source())>> shards;
  shards.reserve(workers);
  for (int64_t i = 0; i < workers; ++i)
    shards.emplace_back(p, input, pairs, out, partition.size, make_source(), i == 0);
  partition.for_each_block(workers, [&](int64_t i, int64_t k, int64_t n) { shards[i].add_block(k, n); });
  reduce_shards(p, input, out, shards);
}

// The backward of the logits [B, K], from slots [B, K] and center_rnorms [M, K].
template <class T>
void backward(const Problem<T>& p, const StoredMatrix& grad, const StoredMatrix& logits, const uint8_t* slots,
              const T* center_rnorms, const Gradients& out) {
  const Input<T> input(p);
  const int64_t threads = num_threads(p);
  const Partition partition(p, threads);
  run_shards(p, input, out, partition, partition.workers(threads),
             [&] { return SavedScores<T>(p, grad, logits, slots, center_rnorms, partition.size); });
}

}  // namespace gistops
