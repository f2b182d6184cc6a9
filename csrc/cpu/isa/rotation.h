// The maximum over the slots of a rotation in a block of scores, and its backward.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

using gistops::GradBlock;
using gistops::RotationCoeffs;
using gistops::RotationGrads;
using gistops::ScoreBlock;

template <class T>
void rotation_max_over_slots(const T* p, int64_t ld_p, ScoreBlock<T> out, RotationCoeffs<T> coeffs, const T* r,
                             const T* scale) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  for (int64_t i = 0; i < out.rows; ++i) {
    const T* input = coeffs.input + i * coeffs.slots;
    for_each_vector<Simd<T>::N>(out.n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
      const V product = load<V>(p + i * ld_p + k, lanes);
      V best = product;
      I slot = {};
      for (int64_t j = 1; j < coeffs.slots; ++j) {
        const V score = product + input[0] * load<V>(coeffs.class_a + j * coeffs.ld + k, lanes) +
                        input[j] * load<V>(coeffs.class_b + j * coeffs.ld + k, lanes);
        const I wins = score > best;
        best = wins ? score : best;
        slot = wins ? I{} + static_cast<int>(j) : slot;
      }
      store(out.logits + i * out.ld + k, best * load<V>(r + k, lanes) * scale[i], lanes);
      if (out.slots) store(out.slots + i * out.ld + k, __builtin_convertvector(slot, Bytes), lanes);
    });
  }
}

template <class T>
void rotation_route_grad(GradBlock<T> block, RotationCoeffs<T> coeffs, const T* r, const T* scale,
                         RotationGrads<T> out) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  V input_sums[256];
  for (int64_t i = 0; i < block.rows; ++i) {
    const T* input = coeffs.input + i * coeffs.slots;
    for (int64_t j = 0; j < coeffs.slots; ++j) input_sums[j] = V{};
    V gz_sum = {};
    for_each_vector<Simd<T>::N>(block.n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
      const V g = load<V>(block.grad + i * block.ld + k, lanes);
      const V gz = g * load<V>(block.logits + i * block.ld + k, lanes);
      const V h = g * load<V>(r + k, lanes) * scale[i];
      const I slot = __builtin_convertvector(load<Bytes>(block.slots + i * block.ld + k, lanes), I);
      if (out.h) store(out.h + i * out.ld_h + k, h, lanes);
      gz_sum += gz;
      store(out.t + k, load<V>(out.t + k, lanes) + gz, lanes);
      for (int64_t j = 1; j < coeffs.slots; ++j) {
        const V won = slot == static_cast<int>(j) ? h : V{};
        input_sums[0] += won * load<V>(coeffs.class_a + j * coeffs.ld + k, lanes);
        input_sums[j] += won * load<V>(coeffs.class_b + j * coeffs.ld + k, lanes);
        T *grad_a = out.class_a + j * out.ld_class + k, *grad_b = out.class_b + j * out.ld_class + k;
        store(grad_a, load<V>(grad_a, lanes) + won * input[0], lanes);
        store(grad_b, load<V>(grad_b, lanes) + won * input[j], lanes);
      }
    });
    for (int64_t j = 0; j < coeffs.slots; ++j) out.input[i * coeffs.slots + j] += lane_sum<T>(input_sums[j]);
    out.gz[i] += lane_sum<T>(gz_sum);
  }
}

}  // namespace
