// The maximum over slots that shared displacements make of a block of products, and its backward.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

// R rows at once share the loads of r.
template <class T, int R>
GISTOPS_INLINE void max_over_slots_rows(const T* p, int64_t ld_p, T* logits, uint8_t* slots, int64_t ld, int64_t n,
                                        const T* q, const T* r, int64_t ld_r, int64_t m_slots, const T* scale) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  for_each_vector<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
    V product[R], best[R];
    I slot[R] = {};
    const V r0 = load<V>(r + k, lanes);
    for (int i = 0; i < R; ++i) {
      product[i] = load<V>(p + i * ld_p + k, lanes);
      best[i] = product[i] * r0;
    }
    for (int64_t j = 1; j < m_slots; ++j) {
      const V rj = load<V>(r + j * ld_r + k, lanes);
      const I index = I{} + static_cast<int>(j);
      for (int i = 0; i < R; ++i) {
        const V score = (product[i] + q[i * m_slots + j]) * rj;
        const I wins = score > best[i];
        best[i] = wins ? score : best[i];
        slot[i] = wins ? index : slot[i];
      }
    }
    for (int i = 0; i < R; ++i) {
      store(logits + i * ld + k, best[i] * scale[i], lanes);
      store(slots + i * ld + k, __builtin_convertvector(slot[i], Bytes), lanes);
    }
  });
}

template <class T>
void max_over_slots(const T* p, int64_t ld_p, T* logits, uint8_t* slots, int64_t ld, int64_t rows, int64_t n,
                    const T* q, const T* r, int64_t ld_r, int64_t m_slots, const T* scale) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    max_over_slots_rows<T, 4>(p + i * ld_p, ld_p, logits + i * ld, slots + i * ld, ld, n, q + i * m_slots, r, ld_r,
                              m_slots, scale + i);
  for (; i < rows; ++i)
    max_over_slots_rows<T, 1>(p + i * ld_p, ld_p, logits + i * ld, slots + i * ld, ld, n, q + i * m_slots, r, ld_r,
                              m_slots, scale + i);
}

// R rows at once share the loads of r, and the sums t: one load and store for R rows.
template <class T, int R, bool SHARES, bool MOMENTS>
GISTOPS_INLINE void route_grad_rows(const T* grad, const T* logits, int64_t ld, const uint8_t* slots, int64_t n,
                                    const T* r, int64_t ld_r, int64_t m_slots, const T* scale, T* h, int64_t ld_h, T* s,
                                    T* t, int64_t ld_t, typename Simd<T>::V& total) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  V shares[SHARES ? 256 : 1][R];
  if constexpr (SHARES)
    for (int64_t j = 1; j < m_slots; ++j)
      for (int i = 0; i < R; ++i) shares[j][i] = V{};
  for_each_vector<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
    V g[R], moment[R], chosen[R];
    I slot[R];
    const V r0 = load<V>(r + k, lanes);
    for (int i = 0; i < R; ++i) {
      g[i] = load<V>(grad + i * ld + k, lanes);
      moment[i] = g[i] * load<V>(logits + i * ld + k, lanes);
      total += moment[i];
      slot[i] = __builtin_convertvector(load<Bytes>(slots + i * ld + k, lanes), I);
      chosen[i] = r0;
    }
    for (int64_t j = 1; j < m_slots; ++j) {
      const V rj = load<V>(r + j * ld_r + k, lanes);
      for (int i = 0; i < R; ++i) chosen[i] = slot[i] == static_cast<int>(j) ? rj : chosen[i];
    }
    for (int i = 0; i < R; ++i) {
      chosen[i] = g[i] * chosen[i] * scale[i];
      if (h) store(h + i * ld_h + k, chosen[i], lanes);
    }
    for (int64_t j = 0; j < m_slots; ++j) {
      V sum = {};
      if constexpr (MOMENTS) sum = load<V>(t + j * ld_t + k, lanes);
      for (int i = 0; i < R; ++i) {
        const I here = slot[i] == static_cast<int>(j);
        if constexpr (MOMENTS) sum += here ? moment[i] : V{};
        if constexpr (SHARES) shares[j][i] += here ? chosen[i] : V{};
      }
      if constexpr (MOMENTS) store(t + j * ld_t + k, sum, lanes);
    }
  });
  if constexpr (SHARES)
    for (int i = 0; i < R; ++i)
      for (int64_t j = 1; j < m_slots; ++j) s[i * m_slots + j] += lane_sum<T>(shares[j][i]);
}

template <class T, bool SHARES, bool MOMENTS>
void route_grad_all(const T* grad, const T* logits, int64_t ld, const uint8_t* slots, int64_t rows, int64_t n,
                    const T* r, int64_t ld_r, int64_t m_slots, const T* scale, T* h, int64_t ld_h, T* s, T* t,
                    int64_t ld_t, double* tau) {
  constexpr int R = 2;
  int64_t i = 0;
  const auto rows_from = [&]<int COUNT>() GISTOPS_INLINE_LAMBDA {
    typename Simd<T>::V total = {};
    route_grad_rows<T, COUNT, SHARES, MOMENTS>(grad + i * ld, logits + i * ld, ld, slots + i * ld, n, r, ld_r, m_slots,
                                               scale + i, h ? h + i * ld_h : nullptr, ld_h,
                                               s ? s + i * m_slots : nullptr, t, ld_t, total);
    if (tau) *tau += lane_sum<T>(total);
  };
  for (; i + R <= rows; i += R) rows_from.template operator()<R>();
  for (; i < rows; ++i) rows_from.template operator()<1>();
}

template <class T>
void route_grad(const T* grad, const T* logits, int64_t ld, const uint8_t* slots, int64_t rows, int64_t n, const T* r,
                int64_t ld_r, int64_t m_slots, const T* scale, T* h, int64_t ld_h, T* s, T* t, int64_t ld_t,
                double* tau) {
  const auto run = s && t ? route_grad_all<T, true, true>
                   : s    ? route_grad_all<T, true, false>
                   : t    ? route_grad_all<T, false, true>
                          : route_grad_all<T, false, false>;
  run(grad, logits, ld, slots, rows, n, r, ld_r, m_slots, scale, h, ld_h, s, t, ld_t, tau);
}

}  // namespace
