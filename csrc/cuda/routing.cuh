// How the backward's gradients are shared out: each goes to the vector that won.
//
//   H[k, i] = tau G |R[j*, k]| / |f_i|, in the operands' dtype, for the two products;  0 where the pair cancels
//   S[j, i] = sum of the same over k with j* = j, unrounded
//   T[k, j] = R^2 sum of G z over i with j* = j  (tau G c = G z, z the logits);  0 where the norm is clamped
//   tau's gradient: sum of G z / tau
//
// A run of classes is routed in two launches: parts of these sums, then their totals.
#pragma once
#include <algorithm>

#include "problem.cuh"
#include "softmax_grad.cuh"
#include "warp_reduce.cuh"

namespace gistops::cuda {

// The weight as H holds it. Of a zero vector, whose norm is clamped, it is up to 1e12 times the others: float16 holds
// it as its largest value, because infinity times a zero beside it would be NaN. Elsewhere infinity stays, which tells
// a gradient scaler to step back.
template <class T>
__device__ __forceinline__ T held_weight(Sum<T> h, Sum<T> center_rnorm, Sum<T> input_rnorm) {
  using S = Sum<T>;
  if constexpr (__is_same(T, f16)) {
    constexpr S kLargest = 65504;
    const bool clamped = center_rnorm >= max_rnorm<S>() || input_rnorm >= max_rnorm<S>();
    if (clamped && magnitude(h) > kLargest) h = h < S(0) ? -kLargest : kLargest;
  }
  return narrow<T>(h);
}

// What the gradient of the scores of a run of classes is made of; p.centers are those alone.
template <class T>
struct Pairs {
  using S = Sum<T>;
  Problem<T> p;
  const S* center_rnorms;  // [M, ldr]
  int64_t ldr;
  const S* input_rnorms;  // [B]
  const S* scores;        // logits of class k and feature i at k score_class + i score_row; slots likewise
  const uint8_t* slots;
  int64_t score_class, score_row;
  const S* grad;       // of the logits, where they lie; or null:
  Softmax<S> softmax;  // the gradient of a loss

  // For pairs that cancel: which slot won, and its weight; 0 for the others.
  __device__ __forceinline__ S apart(int64_t k, int64_t i, int& slot) const {
    const int64_t at = k * score_class + i * score_row;
    slot = slots[at];
    const S r = center_rnorms[slot * ldr + k];
    if (!(r < S(0))) return S(0);
    S g;
    if (grad) {
      g = grad[at];
    } else {
      const SoftmaxRow<S> row = softmax.row(i);
      g = k == row.target ? row.of_target * row.by_logit : softmax.gradient(row, k, scores[at]);
    }
    return *p.tau * g * magnitude(r) * input_rnorms[i];
  }
};

// First of parts, then in total.
template <class T>
struct Pulls {
  using S = Sum<T>;
  T* h;            // [K, ld]; zeros from B on
  int64_t ld;      // also of S
  S* s;            // [groups, M, ld], then [M, ld]
  S* t;            // [parts, M, K], then [K, M]
  S* tau;          // [blocks], then [1]
  int* cancelled;  // [blocks], then [1]: whether any pair cancels
  S* bias;         // [parts, K], then [K]; or null
  S* margin;       // [parts, K], then [K] or [1]; or null
};

struct PullShape {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kSlots = 8;
  int64_t tiles, tiles_a_group, groups, parts;

  // Enough blocks, but no more partials of S than that takes: with many parts there are few groups.
  PullShape(int64_t classes, int64_t features, int64_t tile_classes, int64_t tile_features)
      : tiles(ceil_div(classes, tile_classes)), parts(ceil_div(features, tile_features)) {
    const int64_t most = std::clamp<int64_t>(1024 / std::max<int64_t>(parts, 1), 8, 256);
    tiles_a_group = ceil_div(tiles, most);
    groups = ceil_div(tiles, tiles_a_group);
  }
  __host__ __device__ int64_t blocks() const { return groups * parts; }
};

// tau's part of a block, and whether any of its pairs cancels.
template <class T>
__device__ __forceinline__ void store_block(const Pulls<T>& out, Sum<T> moved, Sum<T> tau, bool cancelled) {
  using S = Sum<T>;
  __shared__ S partial[PullShape::kWarps];
  moved = warp_sum(moved);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = moved;
  const bool any = __syncthreads_or(cancelled);
  if (threadIdx.x == 0) {
    S sum = 0;
    for (int w = 0; w < PullShape::kWarps; ++w) sum += partial[w];
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    out.tau[block] = sum / tau;
    out.cancelled[block] = any;
  }
}

}  // namespace gistops::cuda
