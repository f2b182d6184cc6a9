// The maximum over the slots of a rotation in a block of scores, and its backward.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

using gistops::GradBlock;
using gistops::RotationCoeffs;
using gistops::RotationGrads;
using gistops::ScoreBlock;
using gistops::SlotMatrix;

// R rows at once share the loads of the classes' coefficients.
template <class T, int R>
GISTOPS_INLINE void rotation_max_rows(int64_t first, const T* p, int64_t ld_p, ScoreBlock<T> out,
                                      RotationCoeffs<T> coeffs, const T* r, const T* scale) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  p += first * ld_p, scale += first;
  const T* x = coeffs.input + first * coeffs.slots;
  T* logits = out.logits + first * out.ld;
  uint8_t* slots = out.slots ? out.slots + first * out.ld : nullptr;
  for_each_vector<Simd<T>::N>(out.n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
    V product[R], best[R];
    I slot[R] = {};
    for (int i = 0; i < R; ++i) best[i] = product[i] = load<V>(p + i * ld_p + k, lanes);
    for (int64_t j = 1; j < coeffs.slots; ++j) {
      const V a = load<V>(coeffs.class_a + j * coeffs.ld + k, lanes);
      const V b = load<V>(coeffs.class_b + j * coeffs.ld + k, lanes);
      const I index = I{} + static_cast<int>(j);
      for (int i = 0; i < R; ++i) {
        const V score = product[i] + x[i * coeffs.slots] * a + x[i * coeffs.slots + j] * b;
        const I wins = score > best[i];
        best[i] = wins ? score : best[i];
        slot[i] = wins ? index : slot[i];
      }
    }
    const V rnorm = load<V>(r + k, lanes);
    for (int i = 0; i < R; ++i) {
      store(logits + i * out.ld + k, best[i] * rnorm * scale[i], lanes);
      if (slots) store(slots + i * out.ld + k, __builtin_convertvector(slot[i], Bytes), lanes);
    }
  });
}

template <class T>
void rotation_max_over_slots(const T* p, int64_t ld_p, ScoreBlock<T> out, RotationCoeffs<T> coeffs, const T* r,
                             const T* scale) {
  int64_t i = 0;
  for (; i + 4 <= out.rows; i += 4) rotation_max_rows<T, 4>(i, p, ld_p, out, coeffs, r, scale);
  for (; i < out.rows; ++i) rotation_max_rows<T, 1>(i, p, ld_p, out, coeffs, r, scale);
}

// R rows at once share the loads of the classes' coefficients, and the sums of the classes.
template <class T, int R>
GISTOPS_INLINE void rotation_route_rows(int64_t first, GradBlock<T> block, RotationCoeffs<T> coeffs, const T* r,
                                        const T* scale, RotationGrads<T> out) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  const T *grad = block.grad + first * block.ld, *logits = block.logits + first * block.ld;
  const T* x = coeffs.input + first * coeffs.slots;
  const uint8_t* slots = block.slots + first * block.ld;
  T *h_out = out.h ? out.h + first * out.ld_h : nullptr, *s_out = out.s + first * coeffs.slots;
  scale += first;
  V gz_sum = {}, along[R] = {}, across[256][R];
  for (int64_t j = 1; j < coeffs.slots; ++j)
    for (int i = 0; i < R; ++i) across[j][i] = V{};
  for_each_vector<Simd<T>::N>(block.n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
    V h[R], t = load<V>(out.t + k, lanes);
    I slot[R];
    const V rnorm = load<V>(r + k, lanes);
    for (int i = 0; i < R; ++i) {
      const V g = load<V>(grad + i * block.ld + k, lanes), gz = g * load<V>(logits + i * block.ld + k, lanes);
      gz_sum += gz, t += gz;
      slot[i] = __builtin_convertvector(load<Bytes>(slots + i * block.ld + k, lanes), I);
      h[i] = g * rnorm * scale[i];
      if (h_out) store(h_out + i * out.ld_h + k, h[i], lanes);
    }
    store(out.t + k, t, lanes);
    for (int64_t j = 1; j < coeffs.slots; ++j) {
      const V a = load<V>(coeffs.class_a + j * coeffs.ld + k, lanes);
      const V b = load<V>(coeffs.class_b + j * coeffs.ld + k, lanes);
      T *grad_a = out.class_a + j * out.ld_class + k, *grad_b = out.class_b + j * out.ld_class + k;
      V sum_a = load<V>(grad_a, lanes), sum_b = load<V>(grad_b, lanes);
      for (int i = 0; i < R; ++i) {
        const V won = slot[i] == static_cast<int>(j) ? h[i] : V{};
        along[i] += won * a, across[j][i] += won * b;
        sum_a += won * x[i * coeffs.slots], sum_b += won * x[i * coeffs.slots + j];
      }
      store(grad_a, sum_a, lanes), store(grad_b, sum_b, lanes);
    }
  });
  for (int i = 0; i < R; ++i) {
    s_out[i * coeffs.slots] += lane_sum<T>(along[i]);
    for (int64_t j = 1; j < coeffs.slots; ++j) s_out[i * coeffs.slots + j] += lane_sum<T>(across[j][i]);
  }
  if (out.tau) *out.tau += lane_sum<T>(gz_sum);
}

template <class T>
void rotation_route_grad(GradBlock<T> block, RotationCoeffs<T> coeffs, const T* r, const T* scale,
                         RotationGrads<T> out) {
  constexpr int R = GISTOPS_VECTOR_BYTES == 64 ? 4 : 2;
  int64_t i = 0;
  for (; i + R <= block.rows; i += R) rotation_route_rows<T, R>(i, block, coeffs, r, scale, out);
  for (; i < block.rows; ++i) rotation_route_rows<T, 1>(i, block, coeffs, r, scale, out);
}

// R rows at once share the loads of the directions, and the sums dd.
template <class T, int R>
GISTOPS_INLINE void rotation_correction_rows(const T* w, int64_t width, int64_t d, const T* directions, const T* t,
                                             SlotMatrix<T> c, const T* hf, T* dw, T* dd) {
  using V = typename Simd<T>::V;
  for_each_vector<Simd<T>::N>(width, [&](int64_t e, int lanes) GISTOPS_INLINE_LAMBDA {
    V center[R], total[R];
    for (int i = 0; i < R; ++i) {
      center[i] = load<V>(w + i * d + e, lanes);
      total[i] = center[i] * -t[i];
    }
    for (int64_t j = 0; j < c.slots; ++j) {
      const V direction = load<V>(directions + j * d + e, lanes);
      V sum = load<V>(dd + j * d + e, lanes);
      for (int i = 0; i < R; ++i) {
        const T weight = c.data[j * c.ld + i];
        total[i] += direction * weight;
        sum += center[i] * weight;
      }
      store(dd + j * d + e, sum, lanes);
    }
    if (dw)
      for (int i = 0; i < R; ++i) store(dw + i * d + e, load<V>(hf + i * d + e, lanes) + total[i], lanes);
  });
}

template <class T>
void rotation_correction(const T* w, int64_t rows, int64_t d, const T* directions, const T* t, SlotMatrix<T> c,
                         const T* hf, T* dw, T* dd) {
  constexpr int R = 4;
  constexpr int64_t kCorrectedStrip = 512;  // dimensions: strips of the directions and of dd stay in L1
  for (int64_t e = 0; e < d; e += kCorrectedStrip) {
    const int64_t width = d - e < kCorrectedStrip ? d - e : kCorrectedStrip;
    const auto rows_from = [&]<int COUNT>(int64_t k) GISTOPS_INLINE_LAMBDA {
      rotation_correction_rows<T, COUNT>(w + k * d + e, width, d, directions + e, t + k, {c.data + k, c.ld, c.slots},
                                         dw ? hf + k * d + e : nullptr, dw ? dw + k * d + e : nullptr, dd + e);
    };
    int64_t k = 0;
    for (; k + R <= rows; k += R) rows_from.template operator()<R>(k);
    for (; k < rows; ++k) rows_from.template operator()<1>(k);
  }
}

}  // namespace
