// The totals of what a first pass of the backward left in parts, and the gradients that are nothing else.
#pragma once
#include "routing.cuh"

namespace gistops::cuda {

// Blocks: first those of S, 32 sums each, whose parts are many; then those of the classes, a thread a sum; then one.
struct TotalsShape {
  static constexpr int kThreads = PullShape::kThreads, kRuns = kThreads / kWarp;
  int64_t features, classes;  // blocks

  TotalsShape(int64_t ld, int64_t K, int64_t M)
      : features(ceil_div(ld * M, kWarp)), classes(ceil_div(K * M, kThreads)) {}
  __host__ __device__ int64_t blocks() const { return features + classes + 1; }
};

// The sum of n values, by all threads of a block in fixed order; in every thread.
template <class S>
__device__ __forceinline__ S block_sum(const S* x, int64_t n, S (&partial)[TotalsShape::kRuns][kWarp]) {
  S sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += TotalsShape::kThreads) sum += x[i];
  sum = warp_sum(sum);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp][0] = sum;
  __syncthreads();
  S all = 0;
#pragma unroll
  for (int run = 0; run < TotalsShape::kRuns; ++run) all += partial[run][0];
  return all;
}

// further: out holds the totals of the runs of classes before this one; those of features are added to.
template <class T>
__global__ void __launch_bounds__(TotalsShape::kThreads)
    totals_kernel(TotalsShape shape, PullShape pulled, Pairs<T> in, Pulls<T> parts, Pulls<T> out, bool one_margin,
                  bool further) {
  using S = Sum<T>;
  constexpr int kRuns = TotalsShape::kRuns;
  __shared__ S partial[kRuns][kWarp];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, run = thread / kWarp;
  const int64_t block = blockIdx.x, K = in.p.K(), M = in.p.M();
  if (block < shape.features) {
    const int64_t at = block * kWarp + lane, all = M * out.ld;
    S sum = 0;
    if (at < all) {
#pragma unroll 4
      for (int64_t g = run; g < pulled.groups; g += kRuns) sum += parts.s[g * all + at];
    }
    partial[run][lane] = sum;
    __syncthreads();
    if (run > 0 || at >= all) return;
    sum = further ? out.s[at] : S(0);
#pragma unroll
    for (int r = 0; r < kRuns; ++r) sum += partial[r][lane];
    out.s[at] = at % out.ld < in.p.B() ? sum : S(0);
  } else if (block < shape.features + shape.classes) {
    const int64_t at = (block - shape.features) * TotalsShape::kThreads + thread;
    if (at < K * M) {
      const int64_t j = at / K, k = at % K;
      S sum = 0;
      for (int64_t part = 0; part < pulled.parts; ++part) sum += parts.t[part * K * M + at];
      const S r = in.center_rnorms[j * in.ldr + k];
      out.t[k * M + j] = magnitude(r) >= max_rnorm<S>() ? S(0) : sum * r * r;
    }
    if (at < K && out.bias) {
      S sum = 0;
      for (int64_t part = 0; part < pulled.parts; ++part) sum += parts.bias[part * K + at];
      out.bias[at] = sum;
    }
    if (at < K && out.margin && !one_margin) {
      S sum = 0;
      for (int64_t part = 0; part < pulled.parts; ++part) sum += parts.margin[part * K + at];
      out.margin[at] = sum;
    }
  } else {
    const S tau = block_sum(parts.tau, pulled.blocks(), partial);
    int any = 0;
    for (int64_t b = thread; b < pulled.blocks(); b += TotalsShape::kThreads) any |= parts.cancelled[b];
    any = __syncthreads_or(any);
    S margin = 0;
    if (out.margin && one_margin) margin = block_sum(parts.margin, pulled.parts * K, partial);
    if (thread > 0) return;
    *out.tau = further ? *out.tau + tau : tau;
    *out.cancelled = any;
    if (out.margin && one_margin) *out.margin = further ? *out.margin + margin : margin;
  }
}

}  // namespace gistops::cuda
