// The coefficients of the rotations of a block of classes. Slot j adds to f.w_k
//   (f.u) A[j, k] + (f.p_j) B[j, k],   A = a_j (w_k.u) - n_j (w_k.p_j),   B = b_j (w_k.p_j) + n_j (w_k.u),
// with directions u and p_j, and turns a, b and n (gistops/functional/transforms/rotation.py).
#pragma once
#include <cmath>

#include "problem.h"
#include "scratch.h"

namespace gistops {

template <class T>
class ClassTurns {
 public:
  // size: classes, at most; 0 if the problem is not a rotation.
  ClassTurns(const Problem<T>& p, int64_t size) : p_(p), size_(size), a_(p.M * size), b_(p.M * size) {}

  // dots: w_k . directions_j [n, M].
  void set(const T* dots, int64_t n) {
    dots_ = dots, n_ = n;
    for (int64_t k = 0; k < n; ++k)
      for (int64_t j = 1; j < p_.M; ++j) {
        const auto [a, b, turn] = turns(j);
        const T along = dots[k * p_.M], across = dots[k * p_.M + j];
        a_[j * size_ + k] = a * along - turn * across;
        b_[j * size_ + k] = b * across + turn * along;
      }
  }

  // True if a coefficient of class k is NaN.
  bool has_nan(int64_t k) const {
    for (int64_t j = 1; j < p_.M; ++j)
      if (std::isnan(a_[j * size_ + k] + b_[j * size_ + k])) return true;
    return false;
  }

  // input: of the rows, f_i . directions_j [rows, M].
  RotationCoeffs<T> coeffs(const T* input) const { return {input, a_.get(), b_.get(), p_.M, size_}; }

  // From the gradients of A and B, [M, n] with row stride `size`: their gradients with respect to the dots, to c [M, n]
  // with the same stride, and to the turns, added to grad_turns [3, M - 1].
  void backward(const T* grad_a, const T* grad_b, T* c, double* grad_turns) const {
    for (int64_t k = 0; k < n_; ++k) {
      const T along = dots_[k * p_.M];
      T sum = 0;
      for (int64_t j = 1; j < p_.M; ++j) {
        const auto [a, b, turn] = turns(j);
        const T across = dots_[k * p_.M + j], ga = grad_a[j * size_ + k], gb = grad_b[j * size_ + k];
        sum += a * ga + turn * gb;
        c[j * size_ + k] = b * gb - turn * ga;
        grad_turns[j - 1] += ga * along;
        grad_turns[p_.M - 1 + j - 1] += gb * across;
        grad_turns[2 * (p_.M - 1) + j - 1] += gb * along - ga * across;
      }
      c[k] = sum;
    }
  }

 private:
  struct Turn {
    T a, b, n;
  };
  Turn turns(int64_t j) const {
    const T* turn = p_.turns + j - 1;
    return {turn[0], turn[p_.M - 1], turn[2 * (p_.M - 1)]};
  }

  const Problem<T>& p_;
  int64_t size_, n_ = 0;
  Scratch<T> a_, b_;  // [M, size], from slot 1 on
  const T* dots_ = nullptr;
};

}  // namespace gistops
