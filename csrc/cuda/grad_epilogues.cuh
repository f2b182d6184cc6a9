// The last kernels of the backward: the gradients of the input and of the displacements.
#pragma once
#include "cancelled.cuh"
#include "vector.cuh"
#include "warp_reduce.cuh"

namespace gistops::cuda {

struct EpilogueShape {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
};
struct DisplacementsEpilogueShape {
  static constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
};

// The coefficients of rotations and their gradients, [B, count] each: the sum of their products is that of H times the
// terms that the coefficients add to the products.
template <class S>
struct InputMoments {
  const S *coeffs = nullptr, *grads = nullptr;
  int64_t count = 0;
};

// Finish the gradient of the input:
//
//   g_i = sum_k H[k, i] w_k + sum_j S[j, i] delta_j        df_i = g_i - (g_i . f^_i) f^_i
//
// H and S contain 1 / |f_i|. They do not contain cancelled pairs, whose w_k + delta_j are added here.
//   product [B, d]: H'W of a chunk of classes; overwritten
//   total [B, d]: the sum over the chunks so far, read if `accumulate` and overwritten; null if there is one chunk
//   out [B, d]: null for all chunks except the last; s [M, ld] and moments are read for the last alone
//   moments: what g_i . f_i lacks, if the norm is not all through which f_i enters z beside its product
//
// Grid: B blocks, one row each. Block: 256 threads, which split the dims.
template <class T, bool kAligned>
__global__ void __launch_bounds__(EpilogueShape::kThreads, 1)
    grad_input_epilogue_kernel(GradSource<T> in, const Sum<T>* s, int64_t ld, const int* cancelled, Sum<T>* product,
                               Sum<T>* total, bool accumulate, T* out, InputMoments<Sum<T>> moments) {
  using S = Sum<T>;
  using Shape = EpilogueShape;
  constexpr int kPart = kVector<T>;
  __shared__ S partial[Shape::kWarps];
  __shared__ S weights[Shape::kThreads];
  __shared__ int slots[Shape::kThreads];
  const Problem<T>& p = in.p;
  const int64_t i = blockIdx.x, K = p.K(), m = p.m();
  const int thread = static_cast<int>(threadIdx.x), d = static_cast<int>(p.d());
  S* to = (total ? total : product) + i * d;
  for (int x = thread * kPart; x < d; x += Shape::kThreads * kPart) {
    S g[kPart], before[kPart] = {};
    load_sums<kAligned>(product + i * d, x, d, g);
    if (accumulate) load_sums<kAligned>(total + i * d, x, d, before);
#pragma unroll
    for (int e = 0; e < kPart; ++e) g[e] += before[e];
    for (int64_t j = 0; out && j < m; ++j) {
      S delta[kPart];
      load_vector<kAligned>(p.displacements.data + j * d, x, d, delta);
      const S weight = s[(j + 1) * ld + i];
#pragma unroll
      for (int e = 0; e < kPart; ++e) g[e] = fma(weight, delta[e], g[e]);
    }
    store_sums<kAligned>(to, x, d, g);
  }
  if (*cancelled) {
    for (int64_t first = 0; first < K; first += Shape::kThreads) {
      __syncthreads();
      int slot = 0;
      const S weight = cancelled_weight(in, first + thread, i, first + thread < K, slot);
      weights[thread] = weight, slots[thread] = slot;
      if (!__syncthreads_or(weight != S(0))) continue;
      for (int c = 0; c < Shape::kThreads; ++c) {
        if (weights[c] == S(0)) continue;
        const T *w = p.centers.data + (first + c) * d, *delta = p.displacements.data + (slots[c] - 1) * int64_t{d};
        for (int x = thread * kPart; x < d; x += Shape::kThreads * kPart)  // the elements that this thread wrote above
          for (int e = 0; e < kPart && x + e < d; ++e)
            to[x + e] = fma(weights[c], wide(w[x + e]) + wide(delta[x + e]), to[x + e]);
      }
    }
  }
  if (!out) return;
  const T* f = p.input.data + i * d;
  S dot = 0;
  for (int x = thread * kPart; x < d; x += Shape::kThreads * kPart) {
    S g[kPart], value[kPart];
    load_sums<kAligned>(to, x, d, g);
    load_vector<kAligned>(f, x, d, value);
#pragma unroll
    for (int e = 0; e < kPart; ++e) dot = fma(g[e], value[e], dot);
  }
  for (int64_t j = thread; j < moments.count; j += Shape::kThreads)
    dot = fma(moments.coeffs[i * moments.count + j], moments.grads[i * moments.count + j], dot);
  dot = warp_sum(dot);
  if (thread % kWarp == 0) partial[thread / kWarp] = dot;
  __syncthreads();
  S all = 0;
#pragma unroll
  for (int w = 0; w < Shape::kWarps; ++w) all += partial[w];
  const S rnorm = in.input_rnorms[i];
  const S projection = rnorm >= max_rnorm<S>() ? S(0) : all * rnorm * rnorm;  // a clamped norm is a constant
  for (int x = thread * kPart; x < d; x += Shape::kThreads * kPart) {
    S g[kPart], value[kPart];
    load_sums<kAligned>(to, x, d, g);
    load_vector<kAligned>(f, x, d, value);
#pragma unroll
    for (int e = 0; e < kPart; ++e) g[e] -= projection * value[e];
    store_vector<kAligned>(out + i * d, x, d, g);
  }
}

// Finish the gradient of the displacements [m, d]:
//
//   ddelta_j = sum_i S[j, i] f_i - the sum of the partials [tiles, m, d] that came with the gradient of the centers
//
// Grid: m ceil(d / 32) blocks; a block takes 32 dims of one displacement. Block: 1024 threads, a lane per dim; the
// warps split rows and partials. There are few blocks, so many warps shorten the chain of loads that wait for each
// other.
template <class T>
__global__ void __launch_bounds__(DisplacementsEpilogueShape::kThreads, 1)
    grad_displacements_epilogue_kernel(Problem<T> p, const Sum<T>* s, int64_t ld, const Sum<T>* partials, int64_t tiles,
                                       Sum<T>* out) {
  using S = Sum<T>;
  constexpr int kWarps = DisplacementsEpilogueShape::kWarps;
  __shared__ S partial[kWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t dim_tiles = ceil_div(p.d(), kWarp), B = p.B(), m = p.m();
  const int64_t j = blockIdx.x / dim_tiles, x = blockIdx.x % dim_tiles * kWarp + lane;
  S sum = 0;
  if (x < p.d()) {
#pragma unroll 8
    for (int64_t i = warp; i < B; i += kWarps) sum = fma(s[(j + 1) * ld + i], wide(p.input.data[i * p.d() + x]), sum);
#pragma unroll 8
    for (int64_t tile = warp; tile < tiles; tile += kWarps) sum -= partials[(tile * m + j) * p.d() + x];
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || x >= p.d()) return;
  S all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all += partial[w][lane];
  out[j * p.d() + x] = all;
}

}  // namespace gistops::cuda
