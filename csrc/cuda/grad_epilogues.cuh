// The last pieces of the backward, over [B, d] and [m, d].
#pragma once
#include "routing.cuh"
#include "vector.cuh"

namespace gistops::cuda {

struct EndsShape {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
};

// g_i = sum_k H[k, i] w_k + sum_j S[j, i] delta_j, and df_i = g - (g . f^) f^; 1 / |f| is in H and S. A block a
// feature. Pairs that cancel are not in H and S: their vectors are added here.
//   product [B, d]: H' w of a run of classes, overwritten
//   total [B, d]:   what to add before the last run, or null; overwritten in its place
//   out: null for all runs but the last; s is then not used
template <class T, bool kAligned>
__global__ void __launch_bounds__(EndsShape::kThreads, 1)
    input_ends_kernel(Pairs<T> in, const Sum<T>* s, int64_t ld, const int* cancelled, Sum<T>* product, Sum<T>* total,
                      bool further, T* out) {
  using S = Sum<T>;
  using Shape = EndsShape;
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
    if (further) load_sums<kAligned>(total + i * d, x, d, before);
#pragma unroll
    for (int e = 0; e < kPart; ++e) g[e] += before[e];
    for (int64_t j = 0; out && j < m; ++j) {
      S delta[kPart];
      load_vector<kAligned>(p.displacements.data + j * d, x, d, delta);
      const S share = s[(j + 1) * ld + i];
#pragma unroll
      for (int e = 0; e < kPart; ++e) g[e] = fma(share, delta[e], g[e]);
    }
    store_sums<kAligned>(to, x, d, g);
  }
  if (*cancelled) {
    for (int64_t first = 0; first < K; first += Shape::kThreads) {
      __syncthreads();
      S weight = 0;
      int slot = 0;
      if (first + thread < K) weight = in.apart(first + thread, i, slot);
      weights[thread] = weight, slots[thread] = slot;
      if (!__syncthreads_or(weight != S(0))) continue;
      for (int c = 0; c < Shape::kThreads; ++c) {
        if (weights[c] == S(0)) continue;
        const T *w = p.centers.data + (first + c) * d, *delta = p.displacements.data + (slots[c] - 1) * int64_t{d};
        for (int x = thread * kPart; x < d; x += Shape::kThreads * kPart)  // its own elements, as above
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
  dot = warp_sum(dot);
  if (thread % kWarp == 0) partial[thread / kWarp] = dot;
  __syncthreads();
  S all = 0;
#pragma unroll
  for (int w = 0; w < Shape::kWarps; ++w) all += partial[w];
  const S rnorm = in.input_rnorms[i];
  const S along = rnorm >= max_rnorm<S>() ? S(0) : all * rnorm * rnorm;  // a clamped norm is a constant
  for (int x = thread * kPart; x < d; x += Shape::kThreads * kPart) {
    S g[kPart], value[kPart];
    load_sums<kAligned>(to, x, d, g);
    load_vector<kAligned>(f, x, d, value);
#pragma unroll
    for (int e = 0; e < kPart; ++e) g[e] -= along * value[e];
    store_vector<kAligned>(out + i * d, x, d, g);
  }
}

// dd_j = sum_i S[j, i] f_i - the sum of the centres' partials. A block takes 32 dimensions of one displacement; the
// eight threads of a dimension share out features and partials.
template <class T>
__global__ void __launch_bounds__(EndsShape::kThreads)
    displacement_ends_kernel(Problem<T> p, const Sum<T>* s, int64_t ld, const Sum<T>* partials, int64_t tiles,
                             Sum<T>* out) {
  using S = Sum<T>;
  constexpr int kRuns = EndsShape::kWarps;
  __shared__ S partial[kRuns][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, run = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t across = ceil_div(p.d(), kWarp), B = p.B(), m = p.m();
  const int64_t j = blockIdx.x / across, x = blockIdx.x % across * kWarp + lane;
  S sum = 0;
  if (x < p.d()) {
#pragma unroll 8
    for (int64_t i = run; i < B; i += kRuns) sum = fma(s[(j + 1) * ld + i], wide(p.input.data[i * p.d() + x]), sum);
#pragma unroll 8
    for (int64_t tile = run; tile < tiles; tile += kRuns) sum -= partials[(tile * m + j) * p.d() + x];
  }
  partial[run][lane] = sum;
  __syncthreads();
  if (run > 0 || x >= p.d()) return;
  S all = 0;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) all += partial[r][lane];
  out[j * p.d() + x] = all;
}

}  // namespace gistops::cuda
