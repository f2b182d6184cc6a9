// The backward's first pass over logits [B, K].
#pragma once
#include "routing.cuh"

namespace gistops::cuda {

// A thread has every 32nd class of a tile of 128 classes; a warp takes one row at a time.
template <class T>
struct RouteLogitsShape {
  static constexpr int kThreads = RoutingShape::kThreads, kWarps = RoutingShape::kWarps, kSlots = RoutingShape::kSlots;
  static constexpr int kClassesPerThread = 4, kClasses = kWarp * kClassesPerThread;
  static constexpr int kRows = 128 / static_cast<int>(sizeof(T));       // 128 bytes of a row of H
  static constexpr int kRound = 16 / static_cast<int>(sizeof(Sum<T>));  // slots whose sums are combined at a time
};

// Route the gradient of the logits: H and the partials of S, T and dtau. grad and logits are [B, K], of the type Z.
//
// Grid: (groups of class tiles, tiles of kRows rows). Block: 256 threads. Reads run along the classes; H is transposed
// in shared memory and written along the rows. A group of eight slots takes one pass over the tile.
template <class T, class Z>
__global__ void __launch_bounds__(RouteLogitsShape<T>::kThreads, sizeof(T) == 8 ? 1 : 2)
    route_logits_grad_kernel(RoutingShape shape, GradSource<T> in, const Z* grads, const Z* logits, RoutedSums<T> out) {
  using S = Sum<T>;
  using Shape = RouteLogitsShape<T>;
  constexpr int kSlots = Shape::kSlots, kClasses = Shape::kClasses, kRows = Shape::kRows;
  constexpr int kClassesPerThread = Shape::kClassesPerThread;
  constexpr int kPad = 4 / sizeof(T) ? 4 / sizeof(T) : 1;
  __shared__ __align__(16) T transposed[kClasses][kRows + kPad];
  __shared__ S partial[Shape::kWarps][Shape::kRound][kClasses];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t B = in.p.B(), K = in.p.K(), M = in.p.M(), row_tile = blockIdx.y, group = blockIdx.x;
  const int64_t first_row = row_tile * kRows;
  const int64_t first_tile = group * shape.tiles_per_group;
  const int64_t last_tile = min(first_tile + shape.tiles_per_group, shape.tiles);
  const S tau = load_tau(in.p.tau);
  S gz_sum = 0;
  bool cancelled = false;

  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t first_class = tile * kClasses;
    for (int64_t first = 0; first < M; first += kSlots) {
      S t[kClassesPerThread][kSlots] = {};
#pragma unroll 1
      for (int row = warp; row < kRows; row += Shape::kWarps) {
        const int64_t i = first_row + row;
        const S input_rnorm = i < B ? in.input_rnorms[i] : S(0);
        S s[kSlots] = {}, grad[kClassesPerThread], z[kClassesPerThread];
        int slot[kClassesPerThread];
#pragma unroll
        for (int c = 0; c < kClassesPerThread; ++c) {
          const int64_t k = first_class + c * kWarp + lane, at = i * in.score_row + k;
          const bool inside = k < K && i < B;
          grad[c] = inside ? wide(grads[at]) : S(0);
          z[c] = inside ? wide(logits[at]) : S(0);
          slot[c] = inside ? in.valid_slot(in.slots[at]) : 0;
        }
#pragma unroll
        for (int c = 0; c < kClassesPerThread; ++c) {
          const int64_t k = first_class + c * kWarp + lane;
          const S r = k < K ? in.center_rnorms[slot[c] * in.ldr + k] : S(0), gz = grad[c] * z[c];
          const S h = r < S(0) ? S(0) : tau * grad[c] * r * input_rnorm;
          if (first == 0) {
            const bool clamped = r >= max_rnorm<S>() || input_rnorm >= max_rnorm<S>();
            transposed[c * kWarp + lane][row] = rounded_weight<T>(h, clamped);
            gz_sum += gz;
            cancelled |= r < S(0);
          }
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            if (slot[c] == first + j) s[j] += h, t[c][j] += gz;
          }
        }
        const S sum = warp_sum_of_8(s, lane);
        const int64_t j = first + lane / 4;
        // The same lane accumulates this sum for all tiles of the group; no other thread reads or writes it.
        if (lane % 4 == 0 && j < M && i < B) {
          S* to = out.s + (group * M + j) * out.ld + i;
          *to = tile == first_tile ? sum : *to + sum;
        }
      }
#pragma unroll
      for (int round = 0; round < kSlots; round += Shape::kRound) {
        __syncthreads();
#pragma unroll
        for (int j = 0; j < Shape::kRound; ++j)
#pragma unroll
          for (int c = 0; c < kClassesPerThread; ++c) partial[warp][j][c * kWarp + lane] = t[c][round + j];
        __syncthreads();
        for (int e = thread; e < Shape::kRound * kClasses; e += Shape::kThreads) {
          const int64_t j = first + round + e / kClasses, k = first_class + e % kClasses;
          if (j >= M || k >= K) continue;
          S sum = 0;
#pragma unroll
          for (int w = 0; w < Shape::kWarps; ++w) sum += partial[w][e / kClasses][e % kClasses];
          out.t[(row_tile * M + j) * K + k] = sum;
        }
      }
    }
    // The barriers above have completed `transposed`. A lane copies one word of a row of H.
    static_assert(kRows * sizeof(T) == kWarp * sizeof(uint32_t));
    const int64_t words = out.ld * static_cast<int64_t>(sizeof(T)) / 4;
    const int64_t word = first_row * static_cast<int64_t>(sizeof(T)) / 4 + lane;
    for (int c = warp; c < kClasses; c += Shape::kWarps) {
      const int64_t k = first_class + c;
      if (k >= K || word >= words) break;
      reinterpret_cast<uint32_t*>(out.h + k * out.ld)[word] = reinterpret_cast<const uint32_t*>(transposed[c])[lane];
    }
    __syncthreads();
  }
  store_tau_partial(out, gz_sum, tau, cancelled && in.pairs_cancel);
}

}  // namespace gistops::cuda
