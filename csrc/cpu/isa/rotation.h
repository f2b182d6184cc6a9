// Scores with two small tables: the vectors of class k are w_k + y0[j, k] a + y1[j, k] b_j with shared a and b_j, and
// x[i, 0] = f_i . a, x[i, j] = f_i . b_j.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

template <class T>
void rotation_max_over_slots(const T* p, int64_t ld_p, T* logits, uint8_t* slots, int64_t ld, int64_t rows, int64_t n,
                             const gistops::Tables<T>& tables, const T* r, const T* scale) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  for (int64_t i = 0; i < rows; ++i) {
    const T* x = tables.x + i * tables.slots;
    for_each_vector<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
      const V product = load<V>(p + i * ld_p + k, lanes);
      V best = product;
      I slot = {};
      for (int64_t j = 1; j < tables.slots; ++j) {
        const V score = product + x[0] * load<V>(tables.y0 + j * tables.ld + k, lanes) +
                        x[j] * load<V>(tables.y1 + j * tables.ld + k, lanes);
        const I wins = score > best;
        best = wins ? score : best;
        slot = wins ? I{} + static_cast<int>(j) : slot;
      }
      store(logits + i * ld + k, best * load<V>(r + k, lanes) * scale[i], lanes);
      store(slots + i * ld + k, __builtin_convertvector(slot, Bytes), lanes);
    });
  }
}

template <class T>
void rotation_route_grad(const T* grad, const T* logits, int64_t ld, const uint8_t* slots, int64_t rows, int64_t n,
                         const gistops::Tables<T>& tables, const T* r, const T* scale, T* h, int64_t ld_h, T* dx,
                         T* dy0, T* dy1, int64_t ld_dy, T* t, double* moments) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  V shares[256];
  for (int64_t i = 0; i < rows; ++i) {
    const T* x = tables.x + i * tables.slots;
    for (int64_t j = 0; j < tables.slots; ++j) shares[j] = V{};
    V total = {};
    for_each_vector<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
      const V g = load<V>(grad + i * ld + k, lanes), moment = g * load<V>(logits + i * ld + k, lanes);
      const V weight = g * load<V>(r + k, lanes) * scale[i];
      const I slot = __builtin_convertvector(load<Bytes>(slots + i * ld + k, lanes), I);
      if (h) store(h + i * ld_h + k, weight, lanes);
      total += moment;
      store(t + k, load<V>(t + k, lanes) + moment, lanes);
      for (int64_t j = 1; j < tables.slots; ++j) {
        const V here = slot == static_cast<int>(j) ? weight : V{};
        shares[0] += here * load<V>(tables.y0 + j * tables.ld + k, lanes);
        shares[j] += here * load<V>(tables.y1 + j * tables.ld + k, lanes);
        store(dy0 + j * ld_dy + k, load<V>(dy0 + j * ld_dy + k, lanes) + here * x[0], lanes);
        store(dy1 + j * ld_dy + k, load<V>(dy1 + j * ld_dy + k, lanes) + here * x[j], lanes);
      }
    });
    for (int64_t j = 0; j < tables.slots; ++j) dx[i * tables.slots + j] += lane_sum<T>(shares[j]);
    moments[i] += lane_sum<T>(total);
  }
}

}  // namespace
