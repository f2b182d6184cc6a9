// The last pieces of the backward, over [B, d] and [m, d].
#pragma once
#include "route.cuh"

namespace gistops::cuda {

constexpr int kInputThreads = 256, kDisplacementThreads = 1024;

// df_i = g - (g . f^) f^ with g = sum_k H[i, k] w_k + sum_j S[i, j] delta_j; 1 / |f| is in H and S. A block a feature.
// kVectors: as in tile.cuh.
//   product [B, d]: H w, overwritten with g
template <class T, bool kVectors>
__global__ void __launch_bounds__(kInputThreads, 1)
    input_kernel(RouteShape shape, Problem<T> p, Saved<T> saved, Routed<T> routed, Sum<T>* product, T* out) {
  using S = Sum<T>;
  constexpr int kWarps = kInputThreads / kWarp, kVector = kVectors ? 16 / static_cast<int>(sizeof(T)) : 1;
  using Values = Pack<T, kVector>;
  using Sums = Pack<S, kVector>;
  __shared__ S partial[kWarps];
  const int64_t i = blockIdx.x, d = p.d(), K = p.K();
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kVector, step = kInputThreads * kVector;
  const T* f = p.input.data + i * p.input.ld;
  const bool cancelled = *routed.cancelled;
  S dot = 0;
  for (int64_t x = first; x < d; x += step) {
    Sums& g = *reinterpret_cast<Sums*>(product + i * d + x);
    Sums sum = g;
#pragma unroll 4
    for (int64_t j = 1; j < p.M(); ++j) {
      const S s = routed.s[i * p.M() + j];
      const Values delta = *reinterpret_cast<const Values*>(p.displacements.data + (j - 1) * p.displacements.ld + x);
#pragma unroll
      for (int c = 0; c < kVector; ++c) sum.e[c] = fma(s, wide(delta.e[c]), sum.e[c]);
    }
    if (cancelled) {  // these pairs are not in H and S
      const int* flags = routed.flags + i / shape.rows_a_part() * shape.groups();
      for (int64_t k = 0; k < K; ++k) {
        if (k % shape.classes_a_group() == 0 && !flags[k / shape.classes_a_group()]) {
          k += shape.classes_a_group() - 1;
          continue;
        }
        const int64_t j = saved.slots[i * K + k];
        const S r = saved.center_rnorms[j * K + k];
        if (r >= S(0) || r != r) continue;
        const S h = routed_weight(*p.tau, saved.grad[i * K + k], r, saved.input_rnorms[i]);
        for (int c = 0; c < kVector; ++c) {
          const S w = wide(p.centers.data[k * p.centers.ld + x + c]);
          sum.e[c] = fma(h, w + wide(p.displacements.data[(j - 1) * p.displacements.ld + x + c]), sum.e[c]);
        }
      }
    }
    g = sum;
    const Values along = *reinterpret_cast<const Values*>(f + x);
#pragma unroll
    for (int c = 0; c < kVector; ++c) dot = fma(sum.e[c], wide(along.e[c]), dot);
  }
  dot = warp_sum(dot);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = dot;
  __syncthreads();
  S all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all += partial[w];
  const S rnorm = saved.input_rnorms[i];
  const S along = rnorm >= max_rnorm<S>() ? S(0) : all * rnorm * rnorm;  // a clamped norm is a constant
  for (int64_t x = first; x < d; x += step) {
    const Sums g = *reinterpret_cast<const Sums*>(product + i * d + x);
    const Values feature = *reinterpret_cast<const Values*>(f + x);
    Values made;
#pragma unroll
    for (int c = 0; c < kVector; ++c) made.e[c] = narrow<T>(g.e[c] - along * wide(feature.e[c]));
    *reinterpret_cast<Values*>(out + i * d + x) = made;
  }
}

// dd_j = sum_i S[i, j] f_i - the sum of the centres' partials. A block takes 32 dimensions of one displacement; the
// threads of a dimension share out features and partials.
template <class T>
__global__ void __launch_bounds__(kDisplacementThreads)
    displacements_kernel(Problem<T> p, Routed<T> routed, const Sum<T>* partials, int64_t tiles, Sum<T>* out) {
  using S = Sum<T>;
  constexpr int kRuns = kDisplacementThreads / kWarp;
  __shared__ S partial[kRuns][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, run = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t across = ceil_div(p.d(), kWarp), B = p.B();
  const int64_t j = blockIdx.x / across + 1, x = blockIdx.x % across * kWarp + lane;
  S sum = 0;
  if (x < p.d()) {
#pragma unroll 8
    for (int64_t i = run; i < B; i += kRuns)
      sum = fma(routed.s[i * p.M() + j], wide(p.input.data[i * p.input.ld + x]), sum);
#pragma unroll 8
    for (int64_t tile = run; tile < tiles; tile += kRuns) sum -= partials[(tile * p.m() + j - 1) * p.d() + x];
  }
  partial[run][lane] = sum;
  __syncthreads();
  if (run == 0 && x < p.d()) {
    S all = 0;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) all += partial[r][lane];
    out[(j - 1) * p.d() + x] = all;
  }
}

}  // namespace gistops::cuda
