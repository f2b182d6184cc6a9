// The log-sum-exp of a block of scores, and the gradient of a cross-entropy.
#pragma once
#include <cmath>
#include <limits>

#include "kernels.h"
#include "simd.h"

namespace {

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  // ln 2 in two parts, so that n * kHigh is exact. Adding kMagic rounds to an integer in the low bits.
  static constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f, kMagic = 12582912.0f;
  static constexpr float kSmallest = -87.3f, kLargest = 89.0f;  // x of the smallest normal result, and of infinity
  static constexpr unsigned kBias = 127;
  static constexpr int kShift = 23, kTerms = 8;
};
template <>
struct ExpConstants<double> {
  static constexpr double kHigh = 6.93145751953125e-1, kLow = 1.42860682030941723212e-6, kMagic = 6755399441055744.0;
  static constexpr double kSmallest = -708.0, kLargest = 710.0;
  static constexpr unsigned kBias = 1023;
  static constexpr int kShift = 52, kTerms = 14;
};

// e^x = 2^n e^r with |r| <= ln 2 / 2 and the Taylor series of e^r; the error is at most two roundings. A NaN stays NaN,
// and a result below the smallest normal number is 0.
template <class T>
GISTOPS_INLINE typename Simd<T>::V exp_of(typename Simd<T>::V x) {
  using V = typename Simd<T>::V;
  using U = typename Simd<T>::U;  // unsigned: the bits of lanes that are discarded below may overflow
  using C = ExpConstants<T>;
  x = x > C::kLargest ? V{} + C::kLargest : x;
  const V rounded = x * static_cast<T>(1.4426950408889634) + C::kMagic;
  const V n = rounded - C::kMagic;
  const V r = (x - n * C::kHigh) - n * C::kLow;
  V sum = V{} + 1;
  for (int term = C::kTerms - 1; term > 0; --term) sum = 1 + sum * r * static_cast<T>(1.0 / term);
  U power;
  std::memcpy(&power, &rounded, sizeof(power));
  power = (power + C::kBias) << C::kShift;
  V scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return x < C::kSmallest ? V{} : sum * scale;
}

// n <= N scores with their bias; -inf in the lanes after the last score.
template <class T>
GISTOPS_INLINE typename Simd<T>::V biased(const T* z, const T* bias, int64_t k, int n) {
  using V = typename Simd<T>::V;
  V x = load<V>(z + k, n);
  if (bias) x += load<V>(bias + k, n);
  for (int i = n; i < Simd<T>::N; ++i) x[i] = -std::numeric_limits<T>::infinity();
  return x;
}

template <class T>
void update_logsumexp(const T* z, int64_t rows, int64_t n, const T* bias, T* max, double* sum) {
  using V = typename Simd<T>::V;
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < rows; ++i, z += n) {
    V largest = V{} + kNone;
    for_each_vector<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
      const V x = biased(z, bias, k, lanes);
      largest = x > largest ? x : largest;
    });
    T block = max[i];
    for (int lane = 0; lane < Simd<T>::N; ++lane) block = largest[lane] > block ? largest[lane] : block;
    if (block > max[i]) {
      if (max[i] != kNone) sum[i] *= std::exp(static_cast<double>(max[i]) - block);
      max[i] = block;
    }
    const T shift = std::isinf(block) ? 0 : block;
    V total = {};
    for_each_vector<Simd<T>::N>(
        n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA { total += exp_of<T>(biased(z, bias, k, lanes) - shift); });
    sum[i] += lane_sum<T>(total);
  }
}

template <class T>
void softmax_grad(const T* z, int64_t rows, int64_t n, gistops::ClassTerms<T> classes, gistops::RowTerms<T> row_terms,
                  T* grad, T* grad_bias) {
  using V = typename Simd<T>::V;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < rows; ++i) {
    const T lse = row_terms.lse[i], shift = lse == -kInfinity ? kInfinity : lse;  // no class: probability 0
    for_each_vector<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
      V g = exp_of<T>(biased(z + i * n, classes.bias, k, lanes) - shift) * row_terms.grad_lse[i];
      if (grad_bias) store(grad_bias + k, load<V>(grad_bias + k, lanes) + g, lanes);
      if (classes.weight) g += load<V>(classes.weight + k, lanes) * row_terms.grad_sums[i];
      store(grad + i * n + k, g, lanes);
    });
  }
}

template <class T>
bool any_above(const T* z, int64_t n, const T* bias, T bound) {
  using I = typename Simd<T>::I;
  I any = {};
  for_each_vector<Simd<T>::N>(
      n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA { any |= ~(biased(z, bias, k, lanes) <= bound); });
  for (int lane = 0; lane < Simd<T>::N; ++lane)
    if (any[lane]) return true;
  return false;
}

}  // namespace
