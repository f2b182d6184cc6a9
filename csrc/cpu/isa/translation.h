// The maximum over the slots w_k + delta_j in a block of scores, and its backward.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

using gistops::GradBlock;
using gistops::RoutedGrads;
using gistops::ScoreBlock;
using gistops::SlotMatrix;

// R rows at once share the loads of r.
template <class T, int R>
GISTOPS_INLINE void max_over_slots_rows(int64_t first, const T* p, int64_t ld_p, ScoreBlock<T> out, SlotMatrix<T> r,
                                        const T* q, const T* scale) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  p += first * ld_p, q += first * r.slots, scale += first;
  T* logits = out.logits + first * out.ld;
  uint8_t* slots = out.slots ? out.slots + first * out.ld : nullptr;
  for_each_vector<Simd<T>::N>(out.n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
    V product[R], best[R];
    I slot[R] = {};
    const V r0 = load<V>(r.data + k, lanes);
    for (int i = 0; i < R; ++i) {
      product[i] = load<V>(p + i * ld_p + k, lanes);
      best[i] = product[i] * r0;
    }
    for (int64_t j = 1; j < r.slots; ++j) {
      const V rj = load<V>(r.data + j * r.ld + k, lanes);
      const I index = I{} + static_cast<int>(j);
      for (int i = 0; i < R; ++i) {
        const V score = (product[i] + q[i * r.slots + j]) * rj;
        const I wins = score > best[i];
        best[i] = wins ? score : best[i];
        slot[i] = wins ? index : slot[i];
      }
    }
    for (int i = 0; i < R; ++i) {
      store(logits + i * out.ld + k, best[i] * scale[i], lanes);
      if (slots) store(slots + i * out.ld + k, __builtin_convertvector(slot[i], Bytes), lanes);
    }
  });
}

template <class T>
void max_over_slots(const T* p, int64_t ld_p, ScoreBlock<T> out, SlotMatrix<T> r, const T* q, const T* scale) {
  int64_t i = 0;
  for (; i + 4 <= out.rows; i += 4) max_over_slots_rows<T, 4>(i, p, ld_p, out, r, q, scale);
  for (; i < out.rows; ++i) max_over_slots_rows<T, 1>(i, p, ld_p, out, r, q, scale);
}

// R rows at once share the loads of r, and the sums t: one load and store per R rows.
template <class T, int R, bool SUM_S, bool SUM_T>
GISTOPS_INLINE void route_grad_rows(int64_t first, GradBlock<T> block, SlotMatrix<T> r, const T* scale,
                                    RoutedGrads<T> out) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  const T *grad = block.grad + first * block.ld, *logits = block.logits + first * block.ld;
  const uint8_t* slots = block.slots + first * block.ld;
  T *h_out = out.h ? out.h + first * out.ld_h : nullptr, *s_out = SUM_S ? out.s + first * r.slots : nullptr;
  scale += first;
  V gz_sum = {}, s[SUM_S ? 256 : 1][R];
  if constexpr (SUM_S)
    for (int64_t j = 1; j < r.slots; ++j)
      for (int i = 0; i < R; ++i) s[j][i] = V{};
  for_each_vector<Simd<T>::N>(block.n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
    V g[R], gz[R], h[R];
    I slot[R];
    const V r0 = load<V>(r.data + k, lanes);
    for (int i = 0; i < R; ++i) {
      g[i] = load<V>(grad + i * block.ld + k, lanes);
      gz[i] = g[i] * load<V>(logits + i * block.ld + k, lanes);
      gz_sum += gz[i];
      slot[i] = __builtin_convertvector(load<Bytes>(slots + i * block.ld + k, lanes), I);
      h[i] = r0;
    }
    for (int64_t j = 1; j < r.slots; ++j) {
      const V rj = load<V>(r.data + j * r.ld + k, lanes);
      for (int i = 0; i < R; ++i) h[i] = slot[i] == static_cast<int>(j) ? rj : h[i];
    }
    for (int i = 0; i < R; ++i) {
      h[i] = g[i] * h[i] * scale[i];
      if (h_out) store(h_out + i * out.ld_h + k, h[i], lanes);
    }
    for (int64_t j = 0; j < r.slots; ++j) {
      V t = {};
      if constexpr (SUM_T) t = load<V>(out.t + j * out.ld_t + k, lanes);
      for (int i = 0; i < R; ++i) {
        const I won = slot[i] == static_cast<int>(j);
        if constexpr (SUM_T) t += won ? gz[i] : V{};
        if constexpr (SUM_S) s[j][i] += won ? h[i] : V{};
      }
      if constexpr (SUM_T) store(out.t + j * out.ld_t + k, t, lanes);
    }
  });
  if constexpr (SUM_S)
    for (int i = 0; i < R; ++i)
      for (int64_t j = 1; j < r.slots; ++j) s_out[i * r.slots + j] += lane_sum<T>(s[j][i]);
  if (out.tau) *out.tau += lane_sum<T>(gz_sum);
}

template <class T, bool SUM_S, bool SUM_T>
void route_grad_all(GradBlock<T> block, SlotMatrix<T> r, const T* scale, RoutedGrads<T> out) {
  int64_t i = 0;
  for (; i + 2 <= block.rows; i += 2) route_grad_rows<T, 2, SUM_S, SUM_T>(i, block, r, scale, out);
  for (; i < block.rows; ++i) route_grad_rows<T, 1, SUM_S, SUM_T>(i, block, r, scale, out);
}

template <class T>
void route_grad(GradBlock<T> block, SlotMatrix<T> r, const T* scale, RoutedGrads<T> out) {
  const auto run = out.s && out.t ? route_grad_all<T, true, true>
                   : out.s        ? route_grad_all<T, true, false>
                   : out.t        ? route_grad_all<T, false, true>
                                  : route_grad_all<T, false, false>;
  run(block, r, scale, out);
}

}  // namespace
