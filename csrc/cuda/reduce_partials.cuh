// The reduction of the partials that the backward's first pass leaves.
#pragma once
#include "routing.cuh"

namespace gistops::cuda {

// The grid: blocks for S, 32 sums each, because S has many partials; slot 0 is left out. Then blocks for T and the
// gradients of bias and margin, one sum per thread; then one block for dtau and a margin of one element.
struct ReduceShape {
  static constexpr int kThreads = RoutingShape::kThreads, kWarps = kThreads / kWarp;
  int64_t s_blocks, class_blocks;

  ReduceShape(int64_t ld, int64_t K, int64_t M)
      : s_blocks(ceil_div(ld * (M - 1), kWarp)), class_blocks(ceil_div(K * M, kThreads)) {}
  __host__ __device__ int64_t blocks() const { return s_blocks + class_blocks + 1; }
};

// Return the sum of n values to every thread of the block, in a fixed order.
template <class S>
__device__ __forceinline__ S block_sum(const S* x, int64_t n, S (&partial)[ReduceShape::kWarps][kWarp]) {
  S sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += ReduceShape::kThreads) sum += x[i];
  sum = warp_sum(sum);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp][0] = sum;
  __syncthreads();
  S all = 0;
#pragma unroll
  for (int w = 0; w < ReduceShape::kWarps; ++w) all += partial[w][0];
  return all;
}

// Add up the partials of a chunk of classes. Layouts: RoutedSums.
//   accumulate: add S, dtau and a margin of one element to those of the chunks before
//   scalar_margin: the margin has one element
//
// Grid: shape.blocks(), as described there. Block: 256 threads.
template <class T>
__global__ void __launch_bounds__(ReduceShape::kThreads)
    reduce_partials_kernel(ReduceShape shape, RoutingShape routing, GradSource<T> in, RoutedSums<T> partials,
                           RoutedSums<T> out, bool scalar_margin, bool accumulate) {
  using S = Sum<T>;
  constexpr int kWarps = ReduceShape::kWarps;
  __shared__ S partial[kWarps][kWarp];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t block = blockIdx.x, K = in.p.K(), M = in.p.M();
  if (block < shape.s_blocks) {
    const int64_t at = out.ld + block * kWarp + lane, count = M * out.ld;
    S sum = 0;
    if (at < count) {
#pragma unroll 16
      for (int64_t g = warp; g < routing.groups; g += kWarps) sum += partials.s[g * count + at];
    }
    partial[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || at >= count) return;
    sum = accumulate ? out.s[at] : S(0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w][lane];
    out.s[at] = at % out.ld < in.p.B() ? sum : S(0);
  } else if (block < shape.s_blocks + shape.class_blocks) {
    const int64_t at = (block - shape.s_blocks) * ReduceShape::kThreads + thread;
    if (at < K * M) {
      const int64_t j = partials.t_class_major ? at % M : at / K, k = partials.t_class_major ? at / M : at % K;
      S sum = 0;
      for (int64_t tile = 0; tile < routing.row_tiles; ++tile) sum += partials.t[tile * K * M + at];
      const S r = in.center_rnorms[j * in.ldr + k];
      out.t[k * M + j] = magnitude(r) >= max_rnorm<S>() ? S(0) : sum * r * r;
    }
    if (at < K && out.bias) {
      S sum = 0;
      for (int64_t tile = 0; tile < routing.row_tiles; ++tile) sum += partials.bias[tile * K + at];
      out.bias[at] = sum;
    }
    if (at < K && out.margin && !scalar_margin) {
      S sum = 0;
      for (int64_t tile = 0; tile < routing.row_tiles; ++tile) sum += partials.margin[tile * K + at];
      out.margin[at] = sum;
    }
  } else {
    const S tau = block_sum(partials.tau, routing.blocks(), partial);
    int any = 0;
    for (int64_t b = thread; b < routing.blocks(); b += ReduceShape::kThreads) any |= partials.cancelled[b];
    any = __syncthreads_or(any);
    S margin = 0;
    if (out.margin && scalar_margin) margin = block_sum(partials.margin, routing.row_tiles * K, partial);
    if (thread > 0) return;
    *out.tau = accumulate ? *out.tau + tau : tau;
    *out.cancelled = any;
    if (out.margin && scalar_margin) *out.margin = accumulate ? *out.margin + margin : margin;
  }
}

}  // namespace gistops::cuda
