// The target's logit with its margin, and its derivatives.
#pragma once
#include "device.cuh"

namespace gistops::cuda {

enum MarginKind { kLogitMargin, kCosineMargin, kAngleMargin };

template <class S>
struct MarginLogit {
  S value;
  S by_logit, by_tau, by_margin;  // derivatives of value
};

// The smallest normal number.
template <class S>
constexpr S kSmallestNormal = 1.17549435e-38f;
template <>
inline constexpr double kSmallestNormal<double> = 2.2250738585072014e-308;

// Lower the target's logit tau cos(theta) by a margin of one of three kinds: logit - margin, tau (cos(theta) - margin)
// or tau cos(theta + margin).
template <class S>
__device__ __forceinline__ MarginLogit<S> apply_margin(S logit, S tau, S margin, int kind) {
  if (kind == kLogitMargin) return {logit - margin, S(1), S(0), S(-1)};
  if (kind == kCosineMargin) return {logit - tau * margin, S(1), -margin, -tau};
  const S cosine = logit / tau, square = S(1) - cosine * cosine;
  const bool flat = square < kSmallestNormal<S>;
  // cospi and sinpi reduce the angle without the local memory that cos and sin take.
  const S turns = margin * S(0.318309886183790671537767526745), cosine_m = cospi(turns), sine_m = sinpi(turns);
  const S sine = sqrt(flat ? kSmallestNormal<S> : square);
  const bool beyond = turns > S(1) || (margin >= S(0) && cosine < -cosine_m);  // theta + margin is above pi
  const S value = beyond ? cosine - margin * sine_m : cosine * cosine_m - sine * sine_m;
  const S by_cosine = beyond ? S(1) : cosine_m + (flat ? S(0) : sine_m * cosine / sine);
  const S by_margin = beyond ? -sine_m - margin * cosine_m : -cosine * sine_m - sine * cosine_m;
  return {tau * value, by_cosine, value - cosine * by_cosine, tau * by_margin};
}

// Return log(1 + e^x), with full relative accuracy where e^x is small.
template <class S>
__device__ __forceinline__ S softplus(S x) {
  const S tail = log1p(exp(x > S(0) ? -x : x));
  return x > S(0) ? x + tail : tail;
}

// Return log(e^a + e^b). A NaN stays NaN, and minus infinity adds nothing.
template <class S>
__device__ __forceinline__ S logaddexp(S a, S b) {
  const S max = a > b ? a : b;
  return a == b && a == -kInfinity<S> ? a : max + softplus(a > b ? b - a : a - b);
}

}  // namespace gistops::cuda
