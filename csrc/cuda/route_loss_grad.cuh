// The backward's first pass over the scores [K, ld] of a loss.
#pragma once
#include "routing.cuh"
#include "vector.cuh"

namespace gistops::cuda {

// A thread has four adjacent rows; a warp takes every eighth class of a tile of 64.
struct RouteLossShape {
  static constexpr int kThreads = RoutingShape::kThreads, kWarps = RoutingShape::kWarps, kSlots = RoutingShape::kSlots;
  static constexpr int kClasses = 64, kRowsPerThread = 4, kRows = kWarp * kRowsPerThread;
};

// Compute the gradient G of the loss with respect to the scores, and route it: H and the partials of S, T, dtau, and of
// the gradients of bias and margin.
//
// Grid: (groups of class tiles, tiles of 128 rows). Block: 256 threads. A group of eight slots takes one pass over the
// class tiles.
template <class T>
__global__ void __launch_bounds__(RouteLossShape::kThreads, sizeof(T) == 8 ? 1 : 2)
    route_loss_grad_kernel(RoutingShape shape, GradSource<T> in, RoutedSums<T> out) {
  using S = Sum<T>;
  using Shape = RouteLossShape;
  constexpr int kRowsPerThread = Shape::kRowsPerThread, kSlots = Shape::kSlots;
  __shared__ S t_tile[kSlots][Shape::kClasses];
  __shared__ S rnorms[kSlots][Shape::kClasses];  // used if there are no more slots than this
  __shared__ S partial[Shape::kWarps][Shape::kRows];
  __shared__ SoftmaxGradRow<S> rows[Shape::kRows];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t B = in.p.B(), K = in.p.K(), M = in.p.M(), row_tile = blockIdx.y, group = blockIdx.x;
  const int64_t first_row = row_tile * Shape::kRows, thread_row = first_row + lane * kRowsPerThread;
  const int64_t first_tile = group * shape.tiles_per_group;
  const int64_t last_tile = min(first_tile + shape.tiles_per_group, shape.tiles);
  const S tau = load_tau(in.p.tau);
  const bool weighted = in.softmax.weight, smoothed = in.softmax.smoothing > S(0);
  if (thread < Shape::kRows && first_row + thread < B) rows[thread] = in.softmax.row(first_row + thread);
  __syncthreads();
  S factor[kRowsPerThread], shift[kRowsPerThread], weight_grad[kRowsPerThread], input_rnorm[kRowsPerThread];
  int target[kRowsPerThread];
#pragma unroll
  for (int e = 0; e < kRowsPerThread; ++e) {
    const bool inside = thread_row + e < B;
    const SoftmaxGradRow<S>& row = rows[lane * kRowsPerThread + e];
    factor[e] = inside ? row.factor : S(0);
    shift[e] = inside ? row.shift : S(0);
    weight_grad[e] = inside ? row.weight_grad : S(0);
    target[e] = inside ? row.target : -1;
    input_rnorm[e] = inside ? in.input_rnorms[thread_row + e] : S(0);
  }
  const bool inside = thread_row < out.ld, one_pass = M <= kSlots;
  // Scores and slots of the next class are loaded while those of the current one are in use.
  S next_z[kRowsPerThread] = {};
  alignas(4) uint8_t next_slot[kRowsPerThread] = {};
  const auto prefetch = [&](int64_t k) {
    if (!inside || k >= K) return;
    load_sums<true>(in.scores + k * in.score_class + thread_row, 0, kRowsPerThread, next_z);
    *reinterpret_cast<uchar4*>(next_slot) =
        *reinterpret_cast<const uchar4*>(in.slots + k * in.score_class + thread_row);
  };
  S gz_sum = 0;
  bool cancelled = false;
  for (int64_t first = 0; first < M; first += kSlots) {
    S s[kRowsPerThread][kSlots] = {};
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t first_class = tile * Shape::kClasses;
      if (one_pass) {
        for (int e = thread; e < kSlots * Shape::kClasses; e += Shape::kThreads) {
          const int64_t j = e / Shape::kClasses, k = first_class + e % Shape::kClasses;
          if (j < M && k < K) rnorms[j][e % Shape::kClasses] = in.center_rnorms[j * in.ldr + k];
        }
        __syncthreads();
      }
      prefetch(first_class + warp);
#pragma unroll 1
      for (int c = warp; c < Shape::kClasses; c += Shape::kWarps) {
        const int64_t k = first_class + c;
        if (k >= K) break;
        S z[kRowsPerThread], t[kSlots] = {}, bias_grad = 0, margin_grad = 0;
        uint8_t slot[kRowsPerThread];
        alignas(16) T h[kRowsPerThread] = {};
#pragma unroll
        for (int e = 0; e < kRowsPerThread; ++e) z[e] = next_z[e], slot[e] = in.valid_slot(next_slot[e]);
        prefetch(k + Shape::kWarps);
        const S bias = in.softmax.bias ? in.softmax.bias[in.softmax.first_class + k] : S(0);
        const S class_weight = weighted && smoothed ? in.softmax.weight[in.softmax.first_class + k] : S(1);
#pragma unroll
        for (int e = 0; e < kRowsPerThread; ++e) {
          if (thread_row + e >= B) continue;
          S g = fma(weight_grad[e], class_weight, factor[e] * exp(z[e] + bias - shift[e]));
          S margin_gz = 0;  // tau times the gradient that reaches tau through the margin
          if (k == target[e]) {
            const SoftmaxGradRow<S>& row = rows[lane * kRowsPerThread + e];
            bias_grad += row.target_grad;
            g = row.target_grad * row.by_logit;
            margin_gz = row.tau_grad * tau;
            margin_grad += row.margin_grad;
          } else {
            bias_grad += g;
          }
          const S r = one_pass ? rnorms[slot[e]][c] : in.center_rnorms[slot[e] * in.ldr + k], gz = g * z[e];
          const S weight = r < S(0) ? S(0) : tau * g * r * input_rnorm[e];
          h[e] = rounded_weight<T>(weight, r, input_rnorm[e]);
          cancelled |= r < S(0);
          if (first == 0) gz_sum += gz + margin_gz;
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            if (slot[e] == first + j) s[e][j] += weight, t[j] += gz;
          }
        }
        const S sum = warp_sum_of_8(t, lane);
        if (lane % 4 == 0) t_tile[lane / 4][c] = sum;
        if (first > 0) continue;
        if (inside) store_four(out.h + k * out.ld + thread_row, h);
        if (out.bias) {
          bias_grad = warp_sum(bias_grad);
          if (lane == 0) out.bias[row_tile * K + k] = bias_grad;
        }
        if (out.margin) {
          margin_grad = warp_sum(margin_grad);
          if (lane == 0) out.margin[row_tile * K + k] = margin_grad;
        }
      }
      __syncthreads();
      for (int e = thread; e < kSlots * Shape::kClasses; e += Shape::kThreads) {
        const int64_t j = first + e / Shape::kClasses, k = first_class + e % Shape::kClasses;
        if (j < M && k < K) out.t[(row_tile * M + j) * K + k] = t_tile[e / Shape::kClasses][e % Shape::kClasses];
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      if (first + j >= M) break;
#pragma unroll
      for (int e = 0; e < kRowsPerThread; ++e) partial[warp][lane * kRowsPerThread + e] = s[e][j];
      __syncthreads();
      const int64_t i = first_row + thread;
      if (thread < Shape::kRows && i < B) {
        S sum = 0;
#pragma unroll
        for (int w = 0; w < Shape::kWarps; ++w) sum += partial[w][thread];
        out.s[(group * M + first + j) * out.ld + i] = sum;
      }
      __syncthreads();
    }
  }
  store_tau_partial(out, gz_sum, tau, cancelled);
}

}  // namespace gistops::cuda
