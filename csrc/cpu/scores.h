// Scores of blocks of classes, for all that is made of them: logits, losses, the best k.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "block.h"
#include "gemm.h"

namespace gistops {

// What all classes need of the features. Their norm is a factor of the row, so that no normalised copy is made.
template <class T>
class Features {
 public:
  explicit Features(const Problem<T>& p)
      : q(p.B * p.M()), rnorm(p.B), scale(p.B), delta_squares(p.m), p_(p),
        converted_(p.input.template scratch_elements<T>(p.B)) {
    kernels<T>().dots(p.delta, p.m, p.d, nullptr, 0, delta_squares.get(), nullptr, 0);
    project();
  }
  const T* f() const { return p_.input.template is<T>() ? static_cast<const T*>(p_.input.data) : converted_.get(); }
  Matrix<T> rows(int64_t i, int64_t n) const { return {f() + i * p_.d, n, p_.d, p_.d}; }

  Scratch<T> q;              // [B, M]: f_i . delta_j, 0 in slot 0
  Scratch<T> rnorm, scale;   // [B]: 1 / |f_i|, tau / |f_i|
  Scratch<T> delta_squares;  // [m]

 private:
  void project() const {
    constexpr int64_t kGrain = 16;  // rows: what a thread converts and reads again from its own cache
    const int64_t share = ceil_div(kWork, kGrain * p_.d * p_.M());
    torch::stable::parallel_for(0, ceil_div(p_.B, kGrain), share, [&](int64_t first, int64_t last) {
      T squares[kGrain];
      for (int64_t begin = first * kGrain; begin < std::min(last * kGrain, p_.B); begin += kGrain) {
        const int64_t n = std::min(kGrain, p_.B - begin);
        const T* f =
            p_.input.template as<T>(begin, n, converted_.get() + (p_.input.template is<T>() ? 0 : begin * p_.d));
        kernels<T>().dots(f, n, p_.d, p_.delta, p_.m, squares, q.get() + begin * p_.M() + 1, p_.M());
        for (int64_t i = begin; i < begin + n; ++i) {
          rnorm[i] = clamped_rnorm(squares[i - begin]);
          scale[i] = p_.tau * rnorm[i];
          q[i * p_.M()] = 0;
          // A comparison would drop a NaN of slot j >= 1: it goes into the row's factor instead.
          for (int64_t j = 1; j <= p_.m; ++j)
            if (std::isnan(q[i * p_.M() + j])) scale[i] = std::numeric_limits<T>::quiet_NaN();
          for (int64_t j = 0; j < p_.table_slots; ++j)
            if (std::isnan(p_.x[i * p_.M() + j])) scale[i] = std::numeric_limits<T>::quiet_NaN();
        }
      }
    });
  }

  const Problem<T>& p_;
  Scratch<T> converted_;
};

// One block of classes: the norms of their vectors, and their scores.
template <class T>
class ClassBlock {
 public:
  // size: classes a block, at most; rows: features a call of score, at most.
  ClassBlock(const Problem<T>& p, const Features<T>& features, int64_t size, int64_t rows)
      : p_(p), features_(features), size_(size), converted_(p.centers.template scratch_elements<T>(size * p.stored())),
        squares_(size * p.stored()), dots_(size * p.m), r_(size * p.M()), product_(p.free_slots ? rows * size : 0),
        packed_(p.free_slots ? size * p.d : 0) {}

  // Classes [first, first + n).
  void load(int64_t first, int64_t n) {
    constexpr int64_t kGroup = 16;  // rows converted and read again from L1
    first_ = first, n_ = n;
    cancelled_.clear();
    const int64_t begin = first * p_.stored(), vectors = n * p_.stored();
    const bool direct = p_.centers.template is<T>();
    if (p_.norms) {
      w_ = p_.centers.template as<T>(begin, vectors, converted_.get());
      return known_norms(first);
    }
    for (int64_t v = 0; v < vectors; v += direct ? vectors : kGroup) {
      const int64_t rows = direct ? vectors : std::min(kGroup, vectors - v);
      const T* w = p_.centers.template as<T>(begin + v, rows, converted_.get() + (direct ? 0 : v * p_.d));
      if (v == 0) w_ = w;
      kernels<T>().dots(w, rows, p_.d, p_.delta, p_.m, squares_.get() + v, dots_.get() + v * p_.m, p_.m);
    }
    if (p_.free_slots) return free_norms();
    shared_norms();
    if (p_.table_slots) table_norms();
  }

  // What load made, for another time: R [M, K] at these classes, negative for all pairs of a class to be scored apart.
  void save_norms(int64_t first, T* norms) {
    for (int64_t j = 0; j < p_.M(); ++j) std::copy_n(r_.get() + j * size_, n_, norms + j * p_.K + first);
    for (const int64_t k : cancelled_)
      for (int64_t j = 0; j < p_.M(); ++j) norms[j * p_.K + first + k] *= -1;
  }

  // logits and slots, both with row stride ld, of the features [i, i + rows).
  void score(int64_t i, int64_t rows, T* logits, uint8_t* slots, int64_t ld) {
    const Matrix<T> f = features_.rows(i, rows);
    const T* scale = features_.scale.get() + i;
    if (p_.free_slots) {
      for (int64_t j = 0; j < p_.M(); ++j) {
        const Matrix<T> vectors{pack_slot(p_, w_, n_, j, packed_.get()), n_, p_.d, p_.d};
        const Product<T> product(f, vectors.t(), product_.get(), n_);
        kernels<T>().running_max(product.data, product.ld, rows, n_, r_.get() + j * size_, static_cast<int>(j),
                                 j + 1 == p_.M() ? scale : nullptr, logits, slots, ld);
      }
      return;
    }
    const Matrix<T> classes{w_, n_, p_.d, p_.d};
    const Product<T> product(f, classes.t(), logits, ld);
    if (p_.table_slots)
      return kernels<T>().rotation_max_over_slots(product.data, product.ld, logits, slots, ld, rows, n_,
                                                  p_.tables(i, first_), r_.get(), scale);
    kernels<T>().max_over_slots(product.data, product.ld, logits, slots, ld, rows, n_, features_.q.get() + i * p_.M(),
                                r_.get(), size_, p_.M(), scale);
    score_cancelled(f.data, rows, scale, logits, slots, ld);
  }

  const T* w() const { return w_; }
  const T* r() const { return r_.get(); }  // [M, size]

 private:
  void free_norms() {
    for (int64_t k = 0; k < n_; ++k)
      for (int64_t j = 0; j < p_.M(); ++j) r_[j * size_ + k] = clamped_rnorm(squares_[k * p_.M() + j]);
  }

  void known_norms(int64_t first) {
    for (int64_t k = 0; k < n_; ++k) {
      bool cancelled = false;
      for (int64_t j = 0; j < p_.M(); ++j) {
        const T r = p_.norms[j * p_.K + first + k];
        cancelled |= r < 0;
        r_[j * size_ + k] = std::abs(r);
      }
      if (cancelled) cancelled_.push_back(k);
    }
  }

  // Rotations keep |w_k|: all slots have its norm.
  void table_norms() {
    for (int64_t k = 0; k < n_; ++k)
      for (int64_t j = 1; j < p_.M(); ++j) {
        const Tables<T> tables = p_.tables(0, first_ + k);
        // As in Features: slot 0 carries NaN to the maximum.
        if (std::isnan(tables.y0[j * tables.ld] + tables.y1[j * tables.ld]))
          r_[k] = std::numeric_limits<T>::quiet_NaN();
      }
    for (int64_t j = 1; j < p_.M(); ++j) std::copy_n(r_.get(), n_, r_.get() + j * size_);
  }

  // From |w + delta|^2 = |w|^2 + 2 w.delta + |delta|^2.
  void shared_norms() {
    for (int64_t k = 0; k < n_; ++k) {
      r_[k] = clamped_rnorm(squares_[k]);
      bool cancelled = false;
      for (int64_t j = 1; j <= p_.m; ++j) {
        const T delta_square = features_.delta_squares[j - 1];
        const T square = squares_[k] + delta_square + 2 * dots_[k * p_.m + j - 1];
        r_[j * size_ + k] = clamped_rnorm(square);
        cancelled |= cancels(square, squares_[k], delta_square);
        // As in Features: slot 0 carries NaN to the maximum.
        if (std::isnan(square) || !std::isfinite(delta_square)) r_[k] = std::numeric_limits<T>::quiet_NaN();
      }
      if (cancelled) cancelled_.push_back(k);
    }
  }

  // Scores the classes that hold a cancelled pair again.
  void score_cancelled(const T* f, int64_t rows, const T* scale, T* logits, uint8_t* slots, int64_t ld) {
    if (cancelled_.empty()) return;
    const int64_t M = p_.M();
    Scratch<T> u(M * p_.d), squares(M), scores(rows * M);
    for (const int64_t k : cancelled_) {
      for (int64_t j = 0; j < M; ++j)
        for (int64_t e = 0; e < p_.d; ++e) u[j * p_.d + e] = w_[k * p_.d + e] + (j ? p_.delta[(j - 1) * p_.d + e] : 0);
      kernels<T>().dots(u.get(), M, p_.d, u.get(), 0, squares.get(), nullptr, 0);
      for (int64_t j = 0; j < M; ++j)
        if (!std::isnan(r_[k])) r_[j * size_ + k] = clamped_rnorm(squares[j]);
      kernels<T>().dots(f, rows, p_.d, u.get(), M, nullptr, scores.get(), M);
      for (int64_t i = 0; i < rows; ++i) {
        T best = scores[i * M] * r_[k];
        uint8_t slot = 0;
        for (int64_t j = 1; j < M; ++j) {
          const T score = scores[i * M + j] * r_[j * size_ + k];
          if (score > best) best = score, slot = static_cast<uint8_t>(j);
        }
        logits[i * ld + k] = best * scale[i];
        slots[i * ld + k] = slot;
      }
    }
  }

  const Problem<T>& p_;
  const Features<T>& features_;
  int64_t size_, first_ = 0, n_ = 0;
  Scratch<T> converted_, squares_, dots_, r_, product_, packed_;
  const T* w_ = nullptr;
  std::vector<int64_t> cancelled_;
};

}  // namespace gistops
