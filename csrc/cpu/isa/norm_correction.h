// Reciprocal norms, and the terms of the gradients that come from normalization.
#pragma once
#include <cmath>
#include <limits>

#include "kernels.h"
#include "simd.h"

namespace {

using gistops::SlotMatrix;

template <class T>
void rnorms(const T* squares, int64_t n, T* out) {
  using V = typename Simd<T>::V;
  constexpr T kSmallest = static_cast<T>(gistops::kMinNorm), kLargest = static_cast<T>(1 / gistops::kMinNorm);
  constexpr T kInfinity = std::numeric_limits<T>::infinity(), kNaN = std::numeric_limits<T>::quiet_NaN();
  for (int64_t k = 0; k < n; ++k) out[k] = std::sqrt(squares[k]);  // no comparison: GCC vectorizes it
  for_each_vector<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
    const V norm = load<V>(out + k, lanes);
    const V finite = norm == kInfinity ? V{} + kNaN : 1 / norm;
    store(out + k, norm < kSmallest ? V{} + kLargest : finite, lanes);
  });
}

// R rows at once share the loads of delta, and the sums dd.
template <class T, int R>
GISTOPS_INLINE void norm_correction_rows(const T* w, int64_t width, int64_t d, const T* delta, SlotMatrix<T> t,
                                         const T* hf, T* dw, T* dd) {
  using V = typename Simd<T>::V;
  for_each_vector<Simd<T>::N>(width, [&](int64_t e, int lanes) GISTOPS_INLINE_LAMBDA {
    V center[R], total[R];
    for (int i = 0; i < R; ++i) {
      center[i] = load<V>(w + i * d + e, lanes);
      total[i] = center[i] * t.data[i];
    }
    for (int64_t j = 1; j < t.slots; ++j) {
      const V displacement = load<V>(delta + (j - 1) * d + e, lanes);
      V sum = {};
      for (int i = 0; i < R; ++i) {
        const V term = (center[i] + displacement) * t.data[j * t.ld + i];
        total[i] += term;
        sum += term;
      }
      if (dd) store(dd + (j - 1) * d + e, load<V>(dd + (j - 1) * d + e, lanes) - sum, lanes);
    }
    if (dw)
      for (int i = 0; i < R; ++i) store(dw + i * d + e, load<V>(hf + i * d + e, lanes) - total[i], lanes);
  });
}

template <class T>
void norm_correction(const T* w, int64_t rows, int64_t d, const T* delta, SlotMatrix<T> t, const T* hf, T* dw, T* dd) {
  constexpr int R = 4;
  constexpr int64_t kStrip = 512;  // dimensions: m strips of delta and dd stay in L1 while the rows pass
  for (int64_t e = 0; e < d; e += kStrip) {
    const int64_t width = d - e < kStrip ? d - e : kStrip;
    const auto rows_from = [&]<int COUNT>(int64_t k) GISTOPS_INLINE_LAMBDA {
      norm_correction_rows<T, COUNT>(w + k * d + e, width, d, delta + e, {t.data + k, t.ld, t.slots},
                                     dw ? hf + k * d + e : nullptr, dw ? dw + k * d + e : nullptr,
                                     dd ? dd + e : nullptr);
    };
    int64_t k = 0;
    for (; k + R <= rows; k += R) rows_from.template operator()<R>(k);
    for (; k < rows; ++k) rows_from.template operator()<1>(k);
  }
}

template <class T>
void normalize_backward(T* g, const T* f, int64_t rows, int64_t d, const T* rnorm) {
  using V = typename Simd<T>::V;
  for (int64_t i = 0; i < rows; ++i) {
    if (rnorm[i] >= static_cast<T>(1 / gistops::kMinNorm)) continue;  // a clamped norm is constant
    V acc = {};
    for_each_vector<Simd<T>::N>(d, [&](int64_t e, int n) GISTOPS_INLINE_LAMBDA {
      acc += load<V>(g + i * d + e, n) * (load<V>(f + i * d + e, n) * rnorm[i]);
    });
    const T along = lane_sum<T>(acc) * rnorm[i];
    for_each_vector<Simd<T>::N>(d, [&](int64_t e, int n) GISTOPS_INLINE_LAMBDA {
      store(g + i * d + e, load<V>(g + i * d + e, n) - load<V>(f + i * d + e, n) * along, n);
    });
  }
}

}  // namespace
