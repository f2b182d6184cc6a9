// The first pass of the backward over scores [K, ld] of a loss: softmax, and where each gradient goes. A block takes 64
// classes of a group of tiles and 128 features; a warp takes every eighth class, a lane four features.
#pragma once
#include "routing.cuh"
#include "vector.cuh"

namespace gistops::cuda {

struct PullClassesShape {
  static constexpr int kThreads = PullShape::kThreads, kWarps = PullShape::kWarps, kSlots = PullShape::kSlots;
  static constexpr int kClasses = 64, kOwn = 4, kFeatures = kWarp * kOwn;
};

// Four values beside each other, narrowed.
template <class T>
__device__ __forceinline__ void store_four(T* to, const T (&values)[4]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(values);
  } else {
#pragma unroll
    for (int part = 0; part < 4; part += kVector<T>)
      *reinterpret_cast<uint4*>(to + part) = *reinterpret_cast<const uint4*>(values + part);
  }
}

template <class T>
__global__ void __launch_bounds__(PullClassesShape::kThreads, sizeof(T) == 8 ? 1 : 2)
    pull_classes_kernel(PullShape shape, Pairs<T> in, Pulls<T> out) {
  using S = Sum<T>;
  using Shape = PullClassesShape;
  constexpr int kOwn = Shape::kOwn, kSlots = Shape::kSlots;
  __shared__ S of_slots[kSlots][Shape::kClasses];
  __shared__ S rnorms[kSlots][Shape::kClasses];  // where there are no more slots
  __shared__ S partial[Shape::kWarps][Shape::kFeatures];
  __shared__ SoftmaxRow<S> rows[Shape::kFeatures];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t B = in.p.B(), K = in.p.K(), M = in.p.M(), part = blockIdx.y, group = blockIdx.x;
  const int64_t first_feature = part * Shape::kFeatures, own = first_feature + lane * kOwn;
  const int64_t first_tile = group * shape.tiles_a_group;
  const int64_t last_tile = min(first_tile + shape.tiles_a_group, shape.tiles);
  const S tau = *in.p.tau;
  const bool weighted = in.softmax.weight, smoothed = in.softmax.smoothing > S(0);
  if (thread < Shape::kFeatures && first_feature + thread < B) rows[thread] = in.softmax.row(first_feature + thread);
  __syncthreads();
  S factor[kOwn], shift[kOwn], of_sums[kOwn], input_rnorm[kOwn];
  int target[kOwn];
#pragma unroll
  for (int e = 0; e < kOwn; ++e) {
    const bool inside = own + e < B;
    const SoftmaxRow<S>& row = rows[lane * kOwn + e];
    factor[e] = inside ? row.factor : S(0);
    shift[e] = inside ? row.shift : S(0);
    of_sums[e] = inside ? row.of_sums : S(0);
    target[e] = inside ? row.target : -1;
    input_rnorm[e] = inside ? in.input_rnorms[own + e] : S(0);
  }
  // The next class's scores and slots are read while one's are at work.
  const bool inside = own < out.ld, few = M <= kSlots;
  S next_z[kOwn] = {};
  alignas(4) uint8_t next_slot[kOwn] = {};
  const auto read = [&](int64_t k) {
    if (!inside || k >= K) return;
    load_sums<true>(in.scores + k * in.score_class + own, 0, kOwn, next_z);
    *reinterpret_cast<uchar4*>(next_slot) = *reinterpret_cast<const uchar4*>(in.slots + k * in.score_class + own);
  };
  S all_moved = 0;
  bool cancelled = false;
  for (int64_t first = 0; first < M; first += kSlots) {
    S s[kOwn][kSlots] = {};
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t first_class = tile * Shape::kClasses;
      if (few) {
        for (int e = thread; e < kSlots * Shape::kClasses; e += Shape::kThreads) {
          const int64_t j = e / Shape::kClasses, k = first_class + e % Shape::kClasses;
          if (j < M && k < K) rnorms[j][e % Shape::kClasses] = in.center_rnorms[j * in.ldr + k];
        }
        __syncthreads();
      }
      read(first_class + warp);
#pragma unroll 1
      for (int c = warp; c < Shape::kClasses; c += Shape::kWarps) {
        const int64_t k = first_class + c;
        if (k >= K) break;
        S z[kOwn], t[kSlots] = {}, column = 0, of_margin = 0;
        uint8_t slot[kOwn];
        alignas(16) T h[kOwn] = {};
#pragma unroll
        for (int e = 0; e < kOwn; ++e) z[e] = next_z[e], slot[e] = next_slot[e];
        read(k + Shape::kWarps);
        const S bias = in.softmax.bias ? in.softmax.bias[in.softmax.first + k] : S(0);
        const S share = weighted && smoothed ? in.softmax.weight[in.softmax.first + k] : S(1);
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
          if (own + e >= B) continue;
          S g = fma(of_sums[e], share, factor[e] * exp(z[e] + bias - shift[e]));
          S moved_target = 0;
          if (k == target[e]) {
            const SoftmaxRow<S>& row = rows[lane * kOwn + e];
            column += row.of_target;
            g = row.of_target * row.by_logit;
            moved_target = row.of_tau * tau;
            of_margin += row.of_margin;
          } else {
            column += g;
          }
          const S r = few ? rnorms[slot[e]][c] : in.center_rnorms[slot[e] * in.ldr + k], moved = g * z[e];
          const S weight = r < S(0) ? S(0) : tau * g * r * input_rnorm[e];
          h[e] = held_weight<T>(weight, r, input_rnorm[e]);
          cancelled |= r < S(0);
          if (first == 0) all_moved += moved + moved_target;
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            if (slot[e] == first + j) s[e][j] += weight, t[j] += moved;
          }
        }
        const S sum = halving_sum(t, lane);
        if (lane % 4 == 0) of_slots[lane / 4][c] = sum;
        if (first > 0) continue;
        if (inside) store_four(out.h + k * out.ld + own, h);
        if (out.bias) {
          column = warp_sum(column);
          if (lane == 0) out.bias[part * K + k] = column;
        }
        if (out.margin) {
          of_margin = warp_sum(of_margin);
          if (lane == 0) out.margin[part * K + k] = of_margin;
        }
      }
      __syncthreads();
      for (int e = thread; e < kSlots * Shape::kClasses; e += Shape::kThreads) {
        const int64_t j = first + e / Shape::kClasses, k = first_class + e % Shape::kClasses;
        if (j < M && k < K) out.t[(part * M + j) * K + k] = of_slots[e / Shape::kClasses][e % Shape::kClasses];
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      if (first + j >= M) break;
#pragma unroll
      for (int e = 0; e < kOwn; ++e) partial[warp][lane * kOwn + e] = s[e][j];
      __syncthreads();
      const int64_t i = first_feature + thread;
      if (thread < Shape::kFeatures && i < B) {
        S sum = 0;
#pragma unroll
        for (int w = 0; w < Shape::kWarps; ++w) sum += partial[w][thread];
        out.s[(group * M + first + j) * out.ld + i] = sum;
      }
      __syncthreads();
    }
  }
  store_block(out, all_moved, tau, cancelled);
}

}  // namespace gistops::cuda
