// The scores of a block of classes, from which logits, losses and the top k are computed.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "gemm.h"
#include "norms.h"
#include "partition.h"
#include "problem.h"
#include "scratch.h"

namespace gistops {

// The input's values that all classes need. The norm is a factor of the row, so that no normalized copy is made.
template <class T>
class Input {
 public:
  explicit Input(const Problem<T>& p)
      : q(p.B * p.M), rnorm(p.B), scale(p.B), delta_squares(p.m), p_(p),
        converted_(p.input.template scratch_elements<T>(p.B)) {
    kernels<T>().dots(p.delta, p.m, p.d, nullptr, 0, delta_squares.get(), nullptr, 0);
    compute();
  }
  const T* f() const { return p_.input.template is<T>() ? static_cast<const T*>(p_.input.data) : converted_.get(); }
  Matrix<T> rows(int64_t i, int64_t n) const { return {f() + i * p_.d, n, p_.d, p_.d}; }

  Scratch<T> q;              // [B, M]: f_i . delta_j, 0 in slot 0
  Scratch<T> rnorm, scale;   // [B]: 1 / |f_i|, tau / |f_i|
  Scratch<T> delta_squares;  // [m]: |delta_j|^2

 private:
  void compute() const {
    constexpr int64_t kGrain = 16;  // rows that a thread converts, then reads again from its own cache
    const int64_t grains_per_thread = ceil_div(kWorkPerThread, kGrain * p_.d * p_.M);
    parallel_for(0, ceil_div(p_.B, kGrain), grains_per_thread, [&](int64_t first, int64_t last) {
      T squares[kGrain];
      for (int64_t begin = first * kGrain; begin < std::min(last * kGrain, p_.B); begin += kGrain) {
        const int64_t n = std::min(kGrain, p_.B - begin);
        const T* f =
            p_.input.template as<T>(begin, n, converted_.get() + (p_.input.template is<T>() ? 0 : begin * p_.d));
        kernels<T>().dots(f, n, p_.d, p_.delta, p_.m, squares, q.get() + begin * p_.M + 1, p_.M);
        for (int64_t i = begin; i < begin + n; ++i) {
          rnorm[i] = clamped_rnorm(squares[i - begin]);
          scale[i] = p_.tau * rnorm[i];
          q[i * p_.M] = 0;
          if (has_nan(i)) scale[i] = std::numeric_limits<T>::quiet_NaN();
        }
      }
    });
  }

  // True if a slot j >= 1 of the row is NaN. The comparisons of the maximum would drop this NaN, so that it goes into
  // the scale of the row.
  bool has_nan(int64_t i) const {
    const T* terms = p_.is_rotation() ? p_.input_coeffs + i * p_.M : q.get() + i * p_.M;
    const int64_t count = p_.is_rotation() ? p_.M : p_.m + 1;
    return std::any_of(terms, terms + count, [](T x) { return std::isnan(x); });
  }

  const Problem<T>& p_;
  Scratch<T> converted_;
};

// A block of classes: the norms of their vectors, and their scores.
template <class T>
class ClassBlock {
 public:
  // size: classes per block, at most. rows: rows per call of score(), at most.
  ClassBlock(const Problem<T>& p, const Input<T>& input, int64_t size, int64_t rows)
      : p_(p), input_(input), size_(size),
        converted_(p.centers.template scratch_elements<T>(size * p.vectors_per_class())),
        squares_(size * p.vectors_per_class()), dots_(size * p.m), r_(size * p.M),
        product_(p.is_subcenter() ? size * p.M * rows : 0) {}

  // Loads the classes [first, first + n) and computes their norms.
  void load(int64_t first, int64_t n) {
    constexpr int64_t kGroup = 16;  // vectors that are converted, then read again from L1
    first_ = first, n_ = n;
    cancelled_.clear();
    const int64_t begin = first * p_.vectors_per_class(), vectors = n * p_.vectors_per_class();
    const bool direct = p_.centers.template is<T>();
    if (p_.norms) {
      w_ = p_.centers.template as<T>(begin, vectors, converted_.get());
      return load_norms();
    }
    for (int64_t v = 0; v < vectors; v += direct ? vectors : kGroup) {
      const int64_t rows = direct ? vectors : std::min(kGroup, vectors - v);
      const T* w = p_.centers.template as<T>(begin + v, rows, converted_.get() + (direct ? 0 : v * p_.d));
      if (v == 0) w_ = w;
      kernels<T>().dots(w, rows, p_.d, p_.delta, p_.m, squares_.get() + v, dots_.get() + v * p_.m, p_.m);
    }
    if (p_.is_subcenter()) return subcenter_norms();
    translation_norms();
    if (p_.is_rotation()) rotation_norms();
  }

  // Writes the norms of load() for load_norms(): R [M, K] at these classes, negative for classes with a cancelled pair.
  void save_norms(T* norms) const {
    for (int64_t j = 0; j < p_.M; ++j) std::copy_n(r_.get() + j * size_, n_, norms + j * p_.K + first_);
    for (const int64_t k : cancelled_)
      for (int64_t j = 0; j < p_.M; ++j) norms[j * p_.K + first_ + k] *= -1;
  }

  // Copies R of this block to `out` [M, n] with row stride ld.
  void copy_rnorms(T* out, int64_t ld) const {
    for (int64_t j = 0; j < p_.M; ++j) std::copy_n(r_.get() + j * size_, n_, out + j * ld);
  }

  // Scores the rows [i, i + rows): logits and slots, both with row stride ld. slots may be null.
  void score(int64_t i, int64_t rows, T* logits, uint8_t* slots, int64_t ld) {
    const ScoreBlock<T> out{.logits = logits, .slots = slots, .ld = ld, .rows = rows, .n = n_};
    const Matrix<T> f = input_.rows(i, rows);
    const T* scale = input_.scale.get() + i;
    if (p_.is_subcenter()) return score_subcenters(f, scale, out);
    const Matrix<T> classes{w_, n_, p_.d, p_.d};
    const Product<T> product(f, classes.t(), logits, ld);
    if (p_.is_rotation())
      return kernels<T>().rotation_max_over_slots(product.data, product.ld, out, p_.coeffs(i, first_), r_.get(), scale);
    kernels<T>().max_over_slots(product.data, product.ld, out, r(), input_.q.get() + i * p_.M, scale);
    score_cancelled(f.data, scale, out);
  }

  const T* w() const { return w_; }
  SlotMatrix<T> r() const { return {.data = r_.get(), .ld = size_, .slots = p_.M}; }

 private:
  void subcenter_norms() {
    for (int64_t k = 0; k < n_; ++k)
      for (int64_t j = 0; j < p_.M; ++j) r_[j * size_ + k] = clamped_rnorm(squares_[k * p_.M + j]);
  }

  // From save_norms().
  void load_norms() {
    for (int64_t k = 0; k < n_; ++k) {
      bool cancelled = false;
      for (int64_t j = 0; j < p_.M; ++j) {
        const T r = p_.norms[j * p_.K + first_ + k];
        cancelled |= r < 0;
        r_[j * size_ + k] = std::abs(r);
      }
      if (cancelled) cancelled_.push_back(k);
    }
  }

  // A rotation keeps |w_k|: all slots have the same norm.
  void rotation_norms() {
    for (int64_t k = 0; k < n_; ++k)
      for (int64_t j = 1; j < p_.M; ++j) {
        const RotationCoeffs<T> coeffs = p_.coeffs(0, first_ + k);
        if (std::isnan(coeffs.class_a[j * coeffs.ld] + coeffs.class_b[j * coeffs.ld])) set_nan(k);
      }
    for (int64_t j = 1; j < p_.M; ++j) std::copy_n(r_.get(), n_, r_.get() + j * size_);
  }

  // From |w + delta|^2 = |w|^2 + 2 w.delta + |delta|^2, or from w + delta itself for classes with a cancelled pair. The
  // backward decides from these norms which pairs have cancelled, so they must be exact before any score is.
  void translation_norms() {
    for (int64_t k = 0; k < n_; ++k) {
      r_[k] = clamped_rnorm(squares_[k]);
      bool cancelled = false, has_nan = false;
      for (int64_t j = 1; j <= p_.m; ++j) {
        const T delta_square = input_.delta_squares[j - 1];
        const T square = squares_[k] + delta_square + 2 * dots_[k * p_.m + j - 1];
        r_[j * size_ + k] = clamped_rnorm(square);
        cancelled |= cancels(square, squares_[k], delta_square);
        has_nan |= !std::isfinite(square);
      }
      if (has_nan) set_nan(k);
      if (cancelled && !has_nan) cancelled_.push_back(k);
    }
    if (cancelled_.empty()) return;
    Scratch<T> u(p_.M * p_.d), squares(p_.M);
    for (const int64_t k : cancelled_) {
      load_slots(k, u);
      kernels<T>().dots(u.get(), p_.M, p_.d, u.get(), 0, squares.get(), nullptr, 0);
      for (int64_t j = 0; j < p_.M; ++j) r_[j * size_ + k] = clamped_rnorm(squares[j]);
    }
  }

  // Writes w_k + delta_j for all slots j to u [M, d].
  void load_slots(int64_t k, const Scratch<T>& u) const {
    for (int64_t j = 0; j < p_.M; ++j)
      for (int64_t e = 0; e < p_.d; ++e) u[j * p_.d + e] = w_[k * p_.d + e] + (j ? p_.delta[(j - 1) * p_.d + e] : 0);
  }

  // Gives slot 0 of class k a NaN, which the comparisons of the maximum keep; they would drop a NaN of a slot j >= 1.
  void set_nan(int64_t k) { r_[k] = std::numeric_limits<T>::quiet_NaN(); }

  void score_subcenters(const Matrix<T>& f, const T* scale, const ScoreBlock<T>& out) {
    const Matrix<T> vectors{w_, n_ * p_.M, p_.d, p_.d};
    const Product<T> product(vectors, f.t(), product_.get(), f.rows);
    kernels<T>().max_over_subcenters(product.data, product.ld, out, r(), scale);
  }

  // Scores the classes with a cancelled pair again, from w_k + delta_j.
  void score_cancelled(const T* f, const T* scale, const ScoreBlock<T>& out) {
    if (cancelled_.empty()) return;
    const int64_t M = p_.M;
    Scratch<T> u(M * p_.d), scores(out.rows * M);
    for (const int64_t k : cancelled_) {
      load_slots(k, u);
      kernels<T>().dots(f, out.rows, p_.d, u.get(), M, nullptr, scores.get(), M);
      for (int64_t i = 0; i < out.rows; ++i) {
        T best = scores[i * M] * r_[k];
        uint8_t slot = 0;
        for (int64_t j = 1; j < M; ++j) {
          const T score = scores[i * M + j] * r_[j * size_ + k];
          if (score > best) best = score, slot = static_cast<uint8_t>(j);
        }
        out.logits[i * out.ld + k] = best * scale[i];
        if (out.slots) out.slots[i * out.ld + k] = slot;
      }
    }
  }

  const Problem<T>& p_;
  const Input<T>& input_;
  int64_t size_, first_ = 0, n_ = 0;
  Scratch<T> converted_, squares_, dots_;  // the vectors, |w|^2, w . delta_j
  Scratch<T> r_;                           // [M, size]: R = 1 / |w_k + delta_j|
  Scratch<T> product_;                     // of sub-centers: [size M, rows]
  const T* w_ = nullptr;
  std::vector<int64_t> cancelled_;  // classes with a cancelled pair, within the block
};

}  // namespace gistops
