// The first pass of the backward over logits [B, K]: reads along the classes, and turns the weights in shared memory,
// so that they are written along the features. A block takes 128 classes of a group of tiles and some features.
#pragma once
#include "routing.cuh"

namespace gistops::cuda {

template <class T>
struct PullRowsShape {
  static constexpr int kThreads = PullShape::kThreads, kWarps = PullShape::kWarps, kSlots = PullShape::kSlots;
  static constexpr int kOwn = 4, kClasses = kWarp * kOwn;
  static constexpr int kFeatures = 128 / static_cast<int>(sizeof(T));   // a row of turned weights is 128 bytes
  static constexpr int kRound = 16 / static_cast<int>(sizeof(Sum<T>));  // slots whose sums are combined at a time
};

template <class T>
__global__ void __launch_bounds__(PullRowsShape<T>::kThreads, sizeof(T) == 8 ? 1 : 2)
    pull_rows_kernel(PullShape shape, Pairs<T> in, Pulls<T> out) {
  using S = Sum<T>;
  using Shape = PullRowsShape<T>;
  constexpr int kOwn = Shape::kOwn, kSlots = Shape::kSlots, kClasses = Shape::kClasses, kFeatures = Shape::kFeatures;
  constexpr int kPad = 4 / sizeof(T) ? 4 / sizeof(T) : 1;
  __shared__ __align__(16) T turned[kClasses][kFeatures + kPad];
  __shared__ S partial[Shape::kWarps][Shape::kRound][kClasses];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t B = in.p.B(), K = in.p.K(), M = in.p.M(), part = blockIdx.y, group = blockIdx.x;
  const int64_t first_feature = part * kFeatures;
  const int64_t first_tile = group * shape.tiles_a_group;
  const int64_t last_tile = min(first_tile + shape.tiles_a_group, shape.tiles);
  const S tau = *in.p.tau;
  S all_moved = 0;
  bool cancelled = false;

  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t first_class = tile * kClasses;
    for (int64_t first = 0; first < M; first += kSlots) {
      S t[kOwn][kSlots] = {};
#pragma unroll 1
      for (int row = warp; row < kFeatures; row += Shape::kWarps) {
        const int64_t i = first_feature + row;
        const S input_rnorm = i < B ? in.input_rnorms[i] : S(0);
        S s[kSlots] = {}, grad[kOwn], z[kOwn];
        int slot[kOwn];
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          const int64_t k = first_class + c * kWarp + lane, at = i * in.score_row + k;
          const bool inside = k < K && i < B;
          grad[c] = inside ? in.grad[at] : S(0);
          z[c] = inside ? in.scores[at] : S(0);
          slot[c] = inside ? in.slots[at] : 0;
        }
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          const int64_t k = first_class + c * kWarp + lane;
          const S r = k < K ? in.center_rnorms[slot[c] * in.ldr + k] : S(0), moved = grad[c] * z[c];
          const S h = r < S(0) ? S(0) : tau * grad[c] * r * input_rnorm;
          if (first == 0) {
            turned[c * kWarp + lane][row] = held_weight<T>(h, r, input_rnorm);
            all_moved += moved;
            cancelled |= r < S(0);
          }
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            if (slot[c] == first + j) s[j] += h, t[c][j] += moved;
          }
        }
        const S sum = halving_sum(s, lane);
        const int64_t j = first + lane / 4;
        if (lane % 4 == 0 && j < M && i < B) {  // the same lane for all tiles: no other reads or writes this sum
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
          for (int c = 0; c < kOwn; ++c) partial[warp][j][c * kWarp + lane] = t[c][round + j];
        __syncthreads();
        for (int e = thread; e < Shape::kRound * kClasses; e += Shape::kThreads) {
          const int64_t j = first + round + e / kClasses, k = first_class + e % kClasses;
          if (j >= M || k >= K) continue;
          S sum = 0;
#pragma unroll
          for (int w = 0; w < Shape::kWarps; ++w) sum += partial[w][e / kClasses][e % kClasses];
          out.t[(part * M + j) * K + k] = sum;
        }
      }
    }
    // All of `turned` is there since the barriers above.
    static_assert(kFeatures * sizeof(T) == kWarp * sizeof(uint32_t));
    const int64_t words = out.ld * static_cast<int64_t>(sizeof(T)) / 4;
    const int64_t word = first_feature * static_cast<int64_t>(sizeof(T)) / 4 + lane;
    for (int c = warp; c < kClasses; c += Shape::kWarps) {
      const int64_t k = first_class + c;
      if (k >= K || word >= words) break;
      reinterpret_cast<uint32_t*>(out.h + k * out.ld)[word] = reinterpret_cast<const uint32_t*>(turned[c])[lane];
    }
    __syncthreads();
  }
  store_block(out, all_moved, tau, cancelled);
}

}  // namespace gistops::cuda
