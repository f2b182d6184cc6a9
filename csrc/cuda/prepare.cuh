// Before the forward: what is made of the features and the displacements alone; and of the centres where there are more
// displacements than its products hold. A warp takes a row.
#pragma once
#include "arguments.h"

namespace gistops::cuda {

constexpr int kPrepareThreads = 128;

// |x|^2, and x . delta_j for eight displacements at a time, given to `take(j, dot)` in every lane.
template <class T, class Take>
__device__ __forceinline__ Sum<T> row_products(const T* x, const Global<T>& delta, int lane, Take take) {
  constexpr int kGroup = 8;
  Sum<T> square = 0;
  for (int64_t e = lane; e < delta.cols; e += kWarp) square = fma(wide(x[e]), wide(x[e]), square);
  for (int64_t first = 0; first < delta.rows; first += kGroup) {
    Sum<T> dots[kGroup] = {};
    for (int64_t e = lane; e < delta.cols; e += kWarp) {
      const Sum<T> value = wide(x[e]);
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (first + j < delta.rows) dots[j] = fma(value, wide(delta.data[(first + j) * delta.ld + e]), dots[j]);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const Sum<T> dot = warp_sum(dots[j]);
      if (first + j < delta.rows) take(first + j, dot);
    }
  }
  return warp_sum(square);
}

// Warps 0 .. B: a feature each; then one for each displacement.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(Problem<T> p, Prepared<T> out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kPrepareThreads + threadIdx.x) / kWarp;
  if (row < p.B()) {
    Sum<T>* products = out.products + row * p.M();
    const Sum<T> square =
        row_products(p.input.data + row * p.input.ld, p.displacements, lane, [&](int64_t j, Sum<T> dot) {
          if (lane == 0) products[j + 1] = dot;
        });
    if (lane == 0) {
      products[0] = 0;
      out.input_rnorms[row] = clamped_rnorm(square);
    }
  } else if (row - p.B() < p.M()) {
    const int64_t j = row - p.B();
    const Global<T> none{nullptr, 0, p.d(), 0};
    const T* delta = p.displacements.data + (j - 1) * p.displacements.ld;
    const Sum<T> square = j ? row_products(delta, none, lane, [](int64_t, Sum<T>) {}) : Sum<T>(0);
    if (lane == 0) out.delta_squares[j] = square;
  }
}

// center_rnorms [M, K], negative where the pair cancels; out.center_rnorms is used for the products before that.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads)
    center_norms_kernel(Problem<T> p, Prepared<T> prepared, Sum<T>* center_rnorms) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t k = (static_cast<int64_t>(blockIdx.x) * kPrepareThreads + threadIdx.x) / kWarp;
  if (k >= p.K()) return;
  const T* w = p.centers.data + k * p.centers.ld;
  Sum<T>* r = center_rnorms + k;
  const Sum<T> square = row_products(w, p.displacements, lane, [&](int64_t j, Sum<T> dot) {
    if (lane == 0) r[(j + 1) * p.K()] = dot;
  });
  if (lane == 0) r[0] = clamped_rnorm(square);
  __syncwarp();
  for (int64_t j = 1; j < p.M(); ++j) {
    const Sum<T> delta_square = prepared.delta_squares[j], sum = square + delta_square + 2 * r[j * p.K()];
    Sum<T> rnorm;
    if (cancels(sum, square, delta_square)) {
      const T* delta = p.displacements.data + (j - 1) * p.displacements.ld;
      Sum<T> direct = 0;
      for (int64_t e = lane; e < p.d(); e += kWarp) {
        const Sum<T> v = wide(w[e]) + wide(delta[e]);
        direct = fma(v, v, direct);
      }
      rnorm = -clamped_rnorm(warp_sum(direct));
    } else {
      rnorm = clamped_rnorm(sum);
    }
    __syncwarp();  // all have read the product
    if (lane == 0) r[j * p.K()] = rnorm;
  }
}

}  // namespace gistops::cuda
