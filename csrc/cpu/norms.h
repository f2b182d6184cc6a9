// Norms that are clamped, and pairs whose norms lose digits.
#pragma once
#include "isa/kernels.h"

namespace gistops {

// A clamped norm is constant: it has no gradient.
template <class T>
bool is_clamped(T rnorm) {
  return rnorm >= static_cast<T>(1 / kMinNorm);
}

// If w_k is close to -delta_j, sums of separate terms for w_k and delta_j lose digits: |w|^2 + 2 w.delta + |delta|^2 in
// the forward, H w + S delta in the backward. Such cancelled pairs are rare. They are computed from the sum
// w_k + delta_j. A square that rounding has made negative counts, and so does a NaN.
template <class T>
bool cancels(T square, T center_square, T delta_square) {
  return !(square >= (center_square + delta_square) / 8);
}

}  // namespace gistops
