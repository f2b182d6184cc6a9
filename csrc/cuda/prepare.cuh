// Before the forward: what is made of the features and the displacements alone; and of the centres where there are more
// displacements than its products hold. A block takes a row.
#pragma once
#include "arguments.h"

namespace gistops::cuda {

constexpr int kPrepareThreads = 128;

// The sums over the block of each thread's x, in every thread; in an order of their own.
template <int N, class S>
__device__ __forceinline__ void block_sums(S (&x)[N]) {
  constexpr int kWarps = kPrepareThreads / kWarp;
  __shared__ S partial[kWarps][N];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const S sum = warp_sum(x[n]);
    if (lane == 0) partial[warp][n] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = partial[0][n];
    for (int w = 1; w < kWarps; ++w) x[n] += partial[w][n];
  }
  __syncthreads();  // all have read
}

// |x|^2, and x . delta_j for eight displacements at a time, given to `take(j, dot)` in the first thread. kVectors: as
// in tile.cuh.
template <bool kVectors, class T, class Take>
__device__ __forceinline__ Sum<T> row_products(const T* x, const Global<T>& delta, Take take) {
  constexpr int kGroup = 8, kPack = kVectors ? 16 / sizeof(T) : 1;
  using P = Pack<T, kPack>;
  Sum<T> square = 0;
  int64_t first = 0;
  do {
    Sum<T> sums[kGroup + 1] = {};  // the last: the square
#pragma unroll 2
    for (int64_t e = static_cast<int64_t>(threadIdx.x) * kPack; e < delta.cols; e += kPrepareThreads * kPack) {
      const P values = *reinterpret_cast<const P*>(x + e);
#pragma unroll
      for (int c = 0; c < kPack; ++c) sums[kGroup] = fma(wide(values.e[c]), wide(values.e[c]), sums[kGroup]);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (first + j >= delta.rows) break;
        const P moved = *reinterpret_cast<const P*>(delta.data + (first + j) * delta.ld + e);
#pragma unroll
        for (int c = 0; c < kPack; ++c) sums[j] = fma(wide(values.e[c]), wide(moved.e[c]), sums[j]);
      }
    }
    block_sums(sums);
    square = sums[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      if (threadIdx.x == 0 && first + j < delta.rows) take(first + j, sums[j]);
    first += kGroup;
  } while (first < delta.rows);
  return square;
}

// Blocks 0 .. B: a feature each; then one for each slot.
template <class T, bool kVectors>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(Problem<T> p, Prepared<T> out) {
  const int64_t row = blockIdx.x, B = p.B();
  if (row < B) {
    const Sum<T> square =
        row_products<kVectors>(p.input.data + row * p.input.ld, p.displacements,
                               [&](int64_t j, Sum<T> dot) { out.products[row * p.M() + j + 1] = dot; });
    if (threadIdx.x == 0) out.products[row * p.M()] = 0, out.input_rnorms[row] = clamped_rnorm(square);
  } else {
    const int64_t j = row - B;
    const Global<T> none{nullptr, 0, j ? p.d() : 0, 0};
    const Sum<T> square = row_products<kVectors>(p.displacements.data + (j ? j - 1 : 0) * p.displacements.ld, none,
                                                 [](int64_t, Sum<T>) {});
    if (threadIdx.x == 0) out.delta_squares[j] = square;
  }
}

// center_rnorms [M, K], negative where the pair cancels; out.center_rnorms is used for the products before that.
template <class T, bool kVectors>
__global__ void __launch_bounds__(kPrepareThreads)
    center_norms_kernel(Problem<T> p, Prepared<T> prepared, Sum<T>* center_rnorms) {
  const int64_t k = blockIdx.x;
  const T* w = p.centers.data + k * p.centers.ld;
  Sum<T>* r = center_rnorms + k;
  const Sum<T> square =
      row_products<kVectors>(w, p.displacements, [&](int64_t j, Sum<T> dot) { r[(j + 1) * p.K()] = dot; });
  if (threadIdx.x == 0) r[0] = clamped_rnorm(square);
  __syncthreads();
  for (int64_t j = 1; j < p.M(); ++j) {
    const Sum<T> delta_square = prepared.delta_squares[j], sum = square + delta_square + 2 * r[j * p.K()];
    Sum<T> rnorm = clamped_rnorm(sum);
    if (cancels(sum, square, delta_square)) {
      const T* delta = p.displacements.data + (j - 1) * p.displacements.ld;
      Sum<T> direct[1] = {};
      for (int64_t e = threadIdx.x; e < p.d(); e += kPrepareThreads) {
        const Sum<T> v = wide(w[e]) + wide(delta[e]);
        direct[0] = fma(v, v, direct[0]);
      }
      block_sums(direct);
      rnorm = -clamped_rnorm(direct[0]);
    }
    __syncthreads();  // all have read the product
    if (threadIdx.x == 0) r[j * p.K()] = rnorm;
  }
}

}  // namespace gistops::cuda
