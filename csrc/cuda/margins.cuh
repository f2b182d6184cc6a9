// The target's logit with its margin, and what follows from it.
#pragma once
#include "device.cuh"

namespace gistops::cuda {

enum MarginKind { kLogitMargin, kCosineMargin, kAngleMargin };

template <class S>
struct Lowered {
  S value, by_logit, by_tau, by_margin;  // and its derivatives
};

template <class S>
constexpr S kLeastNormal = 1.17549435e-38f;
template <>
inline constexpr double kLeastNormal<double> = 2.2250738585072014e-308;

template <class S>
__device__ __forceinline__ Lowered<S> lowered(S logit, S tau, S margin, int kind) {
  if (kind == kLogitMargin) return {logit - margin, S(1), S(0), S(-1)};
  if (kind == kCosineMargin) return {logit - tau * margin, S(1), -margin, -tau};
  const S cosine = logit / tau, square = S(1) - cosine * cosine;
  const bool flat = square < kLeastNormal<S>;
  // By half turns: the reduction of any angle to one turn needs no memory.
  const S turns = margin * S(0.318309886183790671537767526745), cosine_m = cospi(turns), sine_m = sinpi(turns);
  const S sine = sqrt(flat ? kLeastNormal<S> : square);
  const bool beyond = cosine < -cosine_m;  // the angle and its margin are more than half a turn
  const S value = beyond ? cosine - margin * sine_m : cosine * cosine_m - sine * sine_m;
  const S by_cosine = beyond ? S(1) : cosine_m + (flat ? S(0) : sine_m * cosine / sine);
  const S by_margin = beyond ? -sine_m - margin * cosine_m : -cosine * sine_m - sine * cosine_m;
  return {tau * value, by_cosine, value - cosine * by_cosine, tau * by_margin};
}

// log(1 + e^x), with the digits of e^x where that is small.
template <class S>
__device__ __forceinline__ S log1p_of_exp(S x) {
  const S tail = log1p(exp(x > S(0) ? -x : x));
  return x > S(0) ? x + tail : tail;
}

}  // namespace gistops::cuda
