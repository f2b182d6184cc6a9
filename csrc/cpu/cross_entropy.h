// The parts of a cross-entropy, without a tensor [B, K]:
//   lse_i = log sum over k != y_i of e^(z_ik + bias_k),   z_i,y_i,   and, if asked for, sum over k of weight_k z_ik
// with z the logits and y the target. The caller makes the loss of these, and autograd its gradients from the three
// that come back: G[i, k] = grad_lse_i e^(z_ik + bias_k - lse_i) for k != y_i, + grad_target_i for k = y_i,
// + grad_sums_i weight_k.
//
// The sum must be complete before any G is known, so the scores are needed twice. They are made twice, or parked: where
// the gradient of the centres will lie, which has d elements a class, and B scores of a class fit if B is below d. Then
// a training step takes the three products of a linear layer and no memory beyond the gradients'.
#pragma once
#include <limits>
#include <vector>

#include "backward.h"
#include "log_sums.h"
#include "scores.h"

namespace gistops {

template <class T>
struct LossTerms {
  const T *bias, *weight;  // [K] or null
  const int64_t* target;   // [B], negative: none
};

// Scores parked in `data`, memory of the size of centers: for a block of n classes, at its classes' place, the scores
// of the first `rows` features, [rows, n], their slots, [rows, n], and the norms of the block, [M, n].
template <class T>
struct Parking {
  char* data = nullptr;
  int64_t row_bytes = 0, rows = 0;  // of a class

  Parking() = default;
  Parking(const Problem<T>& p, void* memory) : data(static_cast<char*>(memory)) {
    row_bytes = p.stored() * p.d * p.centers.element_size();
    if (row_bytes % sizeof(T) != 0) return;  // the scores would not be aligned
    const int64_t room = (row_bytes - p.M() * static_cast<int64_t>(sizeof(T))) / static_cast<int64_t>(sizeof(T) + 1);
    rows = room >= p.B ? p.B : std::max<int64_t>(room, 0) / kRows * kRows;
  }
  bool holds(int64_t i) const { return i < rows; }
  bool holds_all(int64_t B) const { return B > 0 && rows == B; }
  // All for the block of classes [k, k + n). Norms first: they and the scores stay aligned.
  T* norms(int64_t k) const { return reinterpret_cast<T*>(data + k * row_bytes); }
  T* scores(int64_t k, int64_t n, int64_t M, int64_t i) const { return norms(k) + (M + i) * n; }
  uint8_t* slots(int64_t k, int64_t n, int64_t M, int64_t i) const {
    return reinterpret_cast<uint8_t*>(norms(k) + (M + rows) * n) + i * n;
  }
};

// Hides the target's score, while in scope, from the rows of a block.
template <class T>
class HiddenTargets {
 public:
  HiddenTargets(const int64_t* target, int64_t rows, int64_t k, int64_t n, T* z) {
    for (int64_t i = 0; i < rows; ++i) {
      if (target[i] < k || target[i] >= k + n) continue;
      T& score = z[i * n + target[i] - k];
      hidden_.push_back({i, &score, score});
      score = -std::numeric_limits<T>::infinity();
    }
  }
  HiddenTargets(const HiddenTargets&) = delete;
  ~HiddenTargets() {
    for (const Entry& entry : hidden_) *entry.place = entry.score;
  }
  struct Entry {
    int64_t i;  // row
    T* place;
    T score;
  };
  const std::vector<Entry>& entries() const { return hidden_; }

 private:
  std::vector<Entry> hidden_;
};

// lse, target_logits [B]; sums [B], or null.
template <class T>
void loss_forward(const Problem<T>& p, const LossTerms<T>& terms, const Parking<T>& parking, T* lse, T* target_logits,
                  T* sums) {
  const Features<T> features(p);
  const int64_t threads = workers(p), chunk = std::min(kRows, p.B), unparked = parking.holds_all(p.B) ? 0 : chunk;
  const Partition blocks(p.K, p.stored(), threads, kLossClasses);
  struct Share {
    ClassBlock<T> block;
    Scratch<T> scores, weighed;  // [chunk, size], [chunk]
    Scratch<uint8_t> slots;      // [chunk, size]
    Scratch<double> sums;        // [B]
    LogSums<T> log_sums;
  };
  const int64_t count = std::clamp<int64_t>(blocks.count, 1, threads);
  std::vector<Share> shares;
  shares.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    shares.push_back({ClassBlock<T>(p, features, blocks.size, chunk), Scratch<T>(unparked * blocks.size),
                      Scratch<T>(chunk), Scratch<uint8_t>(unparked * blocks.size), Scratch<double>(sums ? p.B : 0),
                      LogSums<T>(p.B)});
    shares[i].sums.zero();
  }
  std::fill_n(target_logits, p.B, T(0));
  blocks.each(count, [&](int64_t worker, int64_t k, int64_t n) {
    Share& share = shares[worker];
    share.block.load(k, n);
    for (int64_t i = 0; i < p.B; i += kRows) {
      const int64_t rows = std::min(kRows, p.B - i);
      const bool parked = parking.holds(i);
      T* z = parked ? parking.scores(k, n, p.M(), i) : share.scores.get();
      share.block.score(i, rows, z, parked ? parking.slots(k, n, p.M(), i) : share.slots.get(), n);
      if (sums) {
        blas_product<T>({z, rows, n, n}, {terms.weight + k, n, 1, 1}, 0, share.weighed.get(), 1);
        for (int64_t row = 0; row < rows; ++row) share.sums[i + row] += share.weighed[row];
      }
      const HiddenTargets<T> hidden(terms.target + i, rows, k, n, z);
      for (const auto& entry : hidden.entries()) target_logits[i + entry.i] = entry.score;
      share.log_sums.add(i, rows, z, n, terms.bias ? terms.bias + k : nullptr);
    }
    if (parking.rows)
      for (int64_t j = 0; j < p.M(); ++j) std::copy_n(share.block.r() + j * blocks.size, n, parking.norms(k) + j * n);
  });
  std::vector<const LogSums<T>*> log_sums;
  for (const Share& share : shares) log_sums.push_back(&share.log_sums);
  LogSums<T>::finish(log_sums, p.B, lse);
  if (!sums) return;
  for (int64_t i = 0; i < p.B; ++i) {
    double weighed = 0;
    for (const Share& share : shares) weighed += share.sums[i];
    sums[i] = static_cast<T>(weighed);
  }
}

// What comes back from autograd: [B] each; sums may be null.
template <class T>
struct LossGrads {
  const T *lse, *target, *sums;
};

// The Source of a Worker: G from scores made again, or parked.
template <class T, bool PARKED>
class LossSource {
 public:
  static constexpr bool kParked = PARKED;
  LossSource(const Problem<T>& p, const Features<T>& features, const LossTerms<T>& terms, const LossGrads<T>& grads,
             const T* lse, T* bias_gradient, const Parking<T>& parking, int64_t size)
      : p_(p), terms_(terms), grads_(grads), lse_(lse), bias_gradient_(bias_gradient), parking_(parking), size_(size),
        block_(p, features, size, std::min(kRows, p.B)), g_(std::min(kRows, p.B) * size),
        scores_(parking.holds_all(p.B) ? 0 : std::min(kRows, p.B) * size),
        slots_(parking.holds_all(p.B) ? 0 : std::min(kRows, p.B) * size),
        converted_(p.centers.template scratch_elements<T>(size * p.stored())) {}

  const T* begin(int64_t k, int64_t n) {
    k_ = k, n_ = n;
    if (bias_gradient_) std::fill_n(bias_gradient_ + k, n, T(0));
    again_ = !parking_.holds_all(p_.B);
    if (again_) {
      block_.load(k, n);
      return block_.w();
    }
    return p_.centers.template as<T>(k * p_.stored(), n * p_.stored(), converted_.get());
  }
  const T* r() const { return again_ ? block_.r() : parking_.norms(k_); }
  int64_t ld_r() const { return again_ ? size_ : n_; }

  Rows<T> rows(int64_t i, int64_t rows) {
    const bool parked = parking_.holds(i);
    T* z = parked ? parking_.scores(k_, n_, p_.M(), i) : scores_.get();
    uint8_t* slots = parked ? parking_.slots(k_, n_, p_.M(), i) : slots_.get();
    if (!parked) block_.score(i, rows, z, slots, n_);
    const HiddenTargets<T> hidden(terms_.target + i, rows, k_, n_, z);
    kernels<T>().softmax_grad(z, n_, rows, n_, terms_.bias ? terms_.bias + k_ : nullptr,
                              grads_.sums ? terms_.weight + k_ : nullptr, lse_ + i, grads_.lse + i,
                              grads_.sums ? grads_.sums + i : nullptr, g_.get(),
                              bias_gradient_ ? bias_gradient_ + k_ : nullptr);
    for (const auto& entry : hidden.entries()) g_[entry.place - z] += grads_.target[i + entry.i];
    return {g_.get(), z, slots, n_, g_.get()};
  }

 private:
  const Problem<T>& p_;
  const LossTerms<T> terms_;
  const LossGrads<T> grads_;
  const T* lse_;
  T* bias_gradient_;
  const Parking<T> parking_;
  int64_t size_, k_ = 0, n_ = 0;
  bool again_ = true;
  ClassBlock<T> block_;
  Scratch<T> g_, scores_;
  Scratch<uint8_t> slots_;
  Scratch<T> converted_;
};

// out.centers may be what is parked: then scores are taken from there, and the gradient takes their place.
template <class T>
void loss_backward(const Problem<T>& p, const LossTerms<T>& terms, const LossGrads<T>& grads, const T* lse,
                   const Parking<T>& parking, const Gradients& out, T* bias_gradient) {
  const Features<T> features(p);
  const int64_t threads = workers(p);
  const Partition blocks(p.K, p.stored(), threads, kLossClasses);
  const int64_t count = std::clamp<int64_t>(blocks.count, 1, threads);
  const auto run = [&]<bool PARKED>() {
    backward(p, features, out, blocks, count, [&](int64_t) {
      return LossSource<T, PARKED>(p, features, terms, grads, lse, bias_gradient, parking, blocks.size);
    });
  };
  parking.data ? run.template operator()<true>() : run.template operator()<false>();
}

}  // namespace gistops
