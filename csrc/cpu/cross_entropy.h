// The parts of a cross-entropy, without a tensor [B, K]. With z the logits, y the target:
//   lse_others[i] = log sum over k != y_i of e^(z_ik + bias_k),   target_logits[i] = z[i, y_i],
//   and, if asked for, weighted_sums[i] = sum over k of weight_k z_ik.
// The caller computes the loss from these, and autograd the gradients of these three. G is then
//   grad_lse_others_i e^(z_ik + bias_k - lse_others_i) for k != y_i, grad_target_logits_i for k = y_i,
//   + grad_weighted_sums_i weight_k for all k.
// The sum must be complete before any G is known, so that the scores are needed twice: recomputed, or stashed.
#pragma once
#include <limits>
#include <vector>

#include "backward.h"
#include "logsumexp.h"
#include "scores.h"

namespace gistops {

// Scores kept from the forward to the backward in the buffer that will hold the gradient of the centers. For a block of
// n classes the memory of these classes holds, for the first `rows` rows, the norms [M, n], the scores [rows, n] and
// the slots [rows, n]. They fit for all rows while B is below about 0.8 d. A training step then takes the three matrix
// products of a linear layer, and no memory besides the gradients.
template <class T>
struct Stash {
  static constexpr int64_t kFewest = 64;  // fewer rows save less than their products, on their own, cost
  char* data;                         // null: there is no buffer, and the rows are divided as with one, for equal bits
  int64_t class_bytes = 0, rows = 0;  // rows: all of them, or a multiple of kPad

  Stash(const Problem<T>& p, void* buffer) : data(static_cast<char*>(buffer)) {
    class_bytes = p.vectors_per_class() * p.d * p.centers.element_size();
    if (class_bytes % sizeof(T) != 0) return;  // the scores would not be aligned
    const int64_t room = (class_bytes - p.M * static_cast<int64_t>(sizeof(T))) / static_cast<int64_t>(sizeof(T) + 1);
    rows = room >= p.B ? p.B : room >= kFewest ? room / kPad * kPad : 0;
  }
  // The number of rows to score at once, from row i on: of one block of rows, and all or none of them stashed.
  int64_t rows_from(int64_t i, int64_t B) const { return gistops::rows_from(i, i < rows ? rows : B); }
  bool holds(int64_t i) const { return data && i < rows; }
  bool holds_all(int64_t B) const { return data && B > 0 && rows == B; }
  // For the block of classes [k, k + n). The norms come first, so that they and the scores are aligned.
  T* norms(int64_t k) const { return reinterpret_cast<T*>(data + k * class_bytes); }
  T* scores(int64_t k, int64_t n, int64_t M, int64_t i) const { return norms(k) + (M + i) * n; }
  uint8_t* slots(int64_t k, int64_t n, int64_t M, int64_t i) const {
    return reinterpret_cast<uint8_t*>(norms(k) + (M + rows) * n) + i * n;
  }
};

// Sets the targets' scores in a block z [rows, n] of the classes [k, k + n) to -inf until it is destroyed.
template <class T>
class HiddenTargets {
 public:
  HiddenTargets(const int64_t* target, int64_t rows, int64_t k, int64_t n, T* z) {
    for (int64_t i = 0; i < rows; ++i) {
      if (target[i] < k || target[i] >= k + n) continue;
      T& score = z[i * n + target[i] - k];
      hidden_.push_back({.row = i, .place = &score, .score = score});
      score = -std::numeric_limits<T>::infinity();
    }
  }
  HiddenTargets(const HiddenTargets&) = delete;
  ~HiddenTargets() {
    for (const Entry& entry : hidden_) *entry.place = entry.score;
  }
  struct Entry {
    int64_t row;
    T* place;
    T score;
  };
  const std::vector<Entry>& entries() const { return hidden_; }

 private:
  std::vector<Entry> hidden_;
};

// The arguments of a cross-entropy besides those of the logits.
template <class T>
struct LossArguments {
  ClassTerms<T> classes;  // [K]
  const int64_t* target;  // [B], negative for ignored rows

  ClassTerms<T> block(int64_t k) const {
    return {.bias = classes.bias ? classes.bias + k : nullptr, .weight = classes.weight ? classes.weight + k : nullptr};
  }
};

// Outputs: lse_others, target_logits, weighted_sums [B]; the last is null without weight.
template <class T>
void cross_entropy_forward(const Problem<T>& p, const LossArguments<T>& loss, const Stash<T>& stash, T* lse_others,
                           T* target_logits, T* weighted_sums) {
  const Input<T> input(p);
  const int64_t threads = num_threads(p), chunk = std::min(kBlockRows, p.B);
  const int64_t scratch_rows = stash.holds_all(p.B) ? 0 : chunk;
  const Partition partition(p, threads, kLossBlockClasses);
  struct Shard {
    ClassBlock<T> block;
    Scratch<T> scores;       // [chunk, size]
    Scratch<uint8_t> slots;  // [chunk, size]
    Scratch<T> chunk_sums;   // [chunk]: the weighted sums of one block
    Scratch<double> sums;    // [B]: the sums over all blocks
    RunningLogSumExp<T> lse;
  };
  const int64_t workers = partition.workers(threads);
  std::vector<Shard> shards;
  shards.reserve(workers);
  for (int64_t i = 0; i < workers; ++i) {
    shards.push_back({.block = ClassBlock<T>(p, input, partition.size, chunk),
                      .scores = Scratch<T>(scratch_rows * partition.size),
                      .slots = Scratch<uint8_t>(scratch_rows * partition.size),
                      .chunk_sums = Scratch<T>(chunk),
                      .sums = Scratch<double>(weighted_sums ? p.B : 0),
                      .lse = RunningLogSumExp<T>(p.B)});
    shards[i].sums.zero();
  }
  std::fill_n(target_logits, p.B, T(0));
  partition.for_each_block(workers, [&](int64_t worker, int64_t k, int64_t n) {
    Shard& shard = shards[worker];
    shard.block.load(k, n);
    for (int64_t i = 0, rows = 0; i < p.B; i += rows) {
      rows = stash.rows_from(i, p.B);
      const bool stashed = stash.holds(i);
      T* z = stashed ? stash.scores(k, n, p.M, i) : shard.scores.get();
      shard.block.score(i, rows, z, stashed ? stash.slots(k, n, p.M, i) : shard.slots.get(), n);
      if (weighted_sums) {
        blas_product<T>({z, rows, n, n}, {loss.classes.weight + k, n, 1, 1}, 0, shard.chunk_sums.get(), 1);
        for (int64_t row = 0; row < rows; ++row) shard.sums[i + row] += shard.chunk_sums[row];
      }
      const HiddenTargets<T> hidden(loss.target + i, rows, k, n, z);
      for (const auto& entry : hidden.entries()) target_logits[i + entry.row] = entry.score;
      shard.lse.add(i, rows, z, n, loss.block(k).bias);
    }
    if (stash.holds(0)) shard.block.copy_rnorms(stash.norms(k), n);
  });
  std::vector<const RunningLogSumExp<T>*> parts;
  for (const Shard& shard : shards) parts.push_back(&shard.lse);
  RunningLogSumExp<T>::merge(parts, p.B, lse_others);
  for (int64_t i = 0; i < p.B; ++i)
    if (lse_others[i] == std::numeric_limits<T>::infinity()) lse_others[i] = std::numeric_limits<T>::quiet_NaN();
  if (!weighted_sums) return;
  for (int64_t i = 0; i < p.B; ++i) {
    double sum = 0;
    for (const Shard& shard : shards) sum += shard.sums[i];
    weighted_sums[i] = static_cast<T>(sum);
  }
}

// Values per row for the backward, [B] each: lse_others as computed by the forward, and the gradients of the three
// parts. grad_weighted_sums is null without weight.
template <class T>
struct LossRows {
  const T *lse_others, *grad_lse_others, *grad_target_logits, *grad_weighted_sums;
};

// Implements GradSource: provides G from stashed or recomputed scores.
template <class T, bool STASHED>
class LossScores {
 public:
  static constexpr bool kStashed = STASHED;
  LossScores(const Problem<T>& p, const Input<T>& input, const LossArguments<T>& loss, const LossRows<T>& rows,
             T* grad_bias, const Stash<T>& stash, int64_t size)
      : p_(p), loss_(loss), rows_(rows), grad_bias_(grad_bias), stash_(stash), size_(size),
        block_(p, input, size, std::min(kBlockRows, p.B)), g_(std::min(kBlockRows, p.B) * size),
        scores_(stash.holds_all(p.B) ? 0 : std::min(kBlockRows, p.B) * size),
        slots_(stash.holds_all(p.B) ? 0 : std::min(kBlockRows, p.B) * size),
        converted_(p.half_backward() ? 0 : p.centers.template scratch_elements<T>(size * p.vectors_per_class())) {}

  const T* begin(int64_t k, int64_t n) {
    first_ = k, n_ = n;
    if (grad_bias_) std::fill_n(grad_bias_ + k, n, T(0));
    if (!stash_.holds_all(p_.B)) block_.load(k, n);
    if (p_.half_backward()) return nullptr;
    if (!stash_.holds_all(p_.B) && block_.w()) return block_.w();
    return p_.centers.template as<T>(k * p_.vectors_per_class(), n * p_.vectors_per_class(), converted_.get());
  }
  SlotMatrix<T> r() const {
    if (!stash_.holds_all(p_.B)) return block_.r();
    return {.data = stash_.norms(first_), .ld = n_, .slots = p_.M};
  }
  // The number of rows that rows() takes at once, from row i on.
  int64_t rows_from(int64_t i) const { return stash_.rows_from(i, p_.B); }
  GradBlock<T> rows(int64_t i, int64_t rows) {
    const bool stashed = stash_.holds(i);
    T* z = stashed ? stash_.scores(first_, n_, p_.M, i) : scores_.get();
    uint8_t* slots = stashed ? stash_.slots(first_, n_, p_.M, i) : slots_.get();
    if (!stashed) block_.score(i, rows, z, slots, n_);
    const HiddenTargets<T> hidden(loss_.target + i, rows, first_, n_, z);
    const RowTerms<T> row_terms{.lse = rows_.lse_others + i,
                                .grad_lse = rows_.grad_lse_others + i,
                                .grad_sums = rows_.grad_weighted_sums ? rows_.grad_weighted_sums + i : nullptr};
    kernels<T>().softmax_grad(z, rows, n_, loss_.block(first_), row_terms, g_.get(),
                              grad_bias_ ? grad_bias_ + first_ : nullptr);
    for (const auto& entry : hidden.entries()) g_[entry.place - z] += rows_.grad_target_logits[i + entry.row];
    return {.grad = g_.get(), .logits = z, .slots = slots, .ld = n_, .rows = rows, .n = n_};
  }
  T* reusable_grad() const { return g_.get(); }

 private:
  const Problem<T>& p_;
  const LossArguments<T> loss_;
  const LossRows<T> rows_;
  T* grad_bias_;
  const Stash<T> stash_;
  int64_t size_, first_ = 0, n_ = 0;
  ClassBlock<T> block_;
  Scratch<T> g_, scores_;
  Scratch<uint8_t> slots_;
  Scratch<T> converted_;
};

// out.centers may be the stash: the scores are then read from there before the gradient takes their place.
template <class T>
void cross_entropy_backward(const Problem<T>& p, const LossArguments<T>& loss, const LossRows<T>& rows,
                            const Stash<T>& stash, const Gradients& out, T* grad_bias) {
  const Input<T> input(p);
  const int64_t threads = num_threads(p);
  const Partition partition(p, threads, kLossBlockClasses);
  const auto run = [&]<bool STASHED>() {
    run_shards(p, input, out, partition, partition.workers(threads),
               [&] { return LossScores<T, STASHED>(p, input, loss, rows, grad_bias, stash, partition.size); });
  };
  stash.data ? run.template operator()<true>() : run.template operator()<false>();
}

}  // namespace gistops
