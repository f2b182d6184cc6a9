// The maximum over sub-centers, one slot at a time, and its backward.
#pragma once
#include <cstdint>

#include "simd.h"

namespace {

template <class T>
void running_max(const T* p, int64_t ld_p, int64_t rows, int64_t n, const T* r, int slot, const T* scale, T* best,
                 uint8_t* slots, int64_t ld) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  for (int64_t i = 0; i < rows; ++i)
    for_each_vector<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
      V score = load<V>(p + i * ld_p + k, lanes) * load<V>(r + k, lanes);
      I winner = {};
      if (slot > 0) {
        const V before = load<V>(best + i * ld + k, lanes);
        const I wins = (score > before) | ((score != score) & (before == before));  // NaN wins, and stays
        winner = wins ? I{} + slot : __builtin_convertvector(load<Bytes>(slots + i * ld + k, lanes), I);
        score = wins ? score : before;
      }
      store(best + i * ld + k, scale ? score * scale[i] : score, lanes);
      store(slots + i * ld + k, __builtin_convertvector(winner, Bytes), lanes);
    });
}

template <class T>
void mask_slot(const T* h, int64_t ld_h, const uint8_t* slots, int64_t ld, int64_t rows, int64_t n, int slot, T* out) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  for (int64_t i = 0; i < rows; ++i)
    for_each_vector<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
      const I here = __builtin_convertvector(load<Bytes>(slots + i * ld + k, lanes), I) == slot;
      store(out + i * n + k, here ? load<V>(h + i * ld_h + k, lanes) : V{}, lanes);
    });
}

}  // namespace
