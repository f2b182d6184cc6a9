// The maximum over sub-centers in a block of scores, one slot per call, and its backward.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

using gistops::GradBlock;
using gistops::ScoreBlock;

template <class T>
void running_max(const T* p, int64_t ld_p, const T* r, int slot, const T* scale, ScoreBlock<T> out) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  for (int64_t i = 0; i < out.rows; ++i) {
    T* best = out.logits + i * out.ld;
    uint8_t* slots = out.slots ? out.slots + i * out.ld : nullptr;
    for_each_vector<Simd<T>::N>(out.n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
      V score = load<V>(p + i * ld_p + k, lanes) * load<V>(r + k, lanes);
      I winner = {};
      if (slot > 0) {
        const V before = load<V>(best + k, lanes);
        const I wins = (score > before) | ((score != score) & (before == before));  // the first NaN wins
        if (slots) winner = wins ? I{} + slot : __builtin_convertvector(load<Bytes>(slots + k, lanes), I);
        score = wins ? score : before;
      }
      store(best + k, scale ? score * scale[i] : score, lanes);
      if (slots) store(slots + k, __builtin_convertvector(winner, Bytes), lanes);
    });
  }
}

template <class T>
void mask_slot(GradBlock<T> block, const T* h, int64_t ld_h, int slot, T* out) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  for (int64_t i = 0; i < block.rows; ++i)
    for_each_vector<Simd<T>::N>(block.n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
      const I won = __builtin_convertvector(load<Bytes>(block.slots + i * block.ld + k, lanes), I) == slot;
      store(out + i * block.n + k, won ? load<V>(h + i * ld_h + k, lanes) : V{}, lanes);
    });
}

}  // namespace
