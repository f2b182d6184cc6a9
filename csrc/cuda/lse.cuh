// The scores' part of a cross-entropy: of a tile of classes and each feature, the log-sum-exp of all scores but the
// target's as (maximum, sum of exponentials below it), the weighted sum of the scores, and the target's score. The
// scores take their products' place, for the backward.
#pragma once
#include "scores.cuh"
#include "warp_reduce.cuh"

namespace gistops::cuda {

// A block's tile: so many tiles of scores that the parts stay few.
struct LseShape {
  int64_t scores;  // tiles of them
  explicit LseShape(int64_t K) : scores(ceil_div(ceil_div(K, ScoresShape::kClasses), int64_t{1024})) {}
  __host__ __device__ int64_t classes() const { return scores * ScoresShape::kClasses; }
};

template <class S>
struct LossTerms {
  const int64_t* target;        // [B]
  const S *bias, *weight;       // [K], or null
  int64_t first, ignore_index;  // first: class of the run
  bool smoothed;

  // The target's place in the run of classes, or -1: then no class of it is hidden.
  __device__ __forceinline__ int place(int64_t i) const {
    const int64_t y = target[i], at = y - first;
    return y == ignore_index || at < 0 || at > 0x7fffffff ? -1 : static_cast<int>(at);
  }
};

// Of all classes. max null: only scores and slots are wanted.
template <class S>
struct LseParts {
  S *max, *total, *weighted;  // [tiles, B]; weighted with label smoothing alone
  S *weights, *biases;        // [tiles]: sums of weight and of weight bias, likewise
  S* target_logits;           // [B], where the target is in range
};

// -inf as 0: what may be subtracted from scores of which the largest is x.
template <class S>
__device__ __forceinline__ S finite_shift(S x) {
  return x == -kInfinity<S> ? S(0) : x;
}

template <class T>
__global__ void __launch_bounds__(ScoresShape::kThreads, sizeof(T) == 8 ? 1 : 2)
    lse_kernel(LseShape shape, Scoring<T> in, LossTerms<Sum<T>> terms, int64_t first_tile, LseParts<Sum<T>> out) {
  using S = Sum<T>;
  using Shape = ScoresShape;
  constexpr S kNone = -kInfinity<S>;
  __shared__ __align__(16) ScoresTile<S> tile;
  __shared__ S largest[Shape::kWarps][Shape::kFeatures];
  __shared__ S totals[Shape::kWarps][Shape::kFeatures];
  __shared__ S sums[Shape::kWarps][Shape::kFeatures];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int B = static_cast<int>(in.p.B()), K = static_cast<int>(in.p.K()), block = static_cast<int>(blockIdx.x);
  const int first_feature = static_cast<int>(blockIdx.y) * Shape::kFeatures, own = first_feature + lane * 4;
  const int begin = block * static_cast<int>(shape.classes()), end = min(begin + static_cast<int>(shape.classes()), K);
  int place[4];
  S max[4], total[4] = {}, weighted[4] = {};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    max[e] = kNone;
    place[e] = own + e < B ? terms.place(own + e) : -1;
  }
#pragma unroll 1
  for (int first_class = begin; first_class < end; first_class += Shape::kClasses) {
    S z[Shape::kOwn][4];
    int slot[Shape::kOwn][4];
    make_scores(in, tile, first_class, first_feature, z, slot);
    S bias[Shape::kOwn], weight[Shape::kOwn];
#pragma unroll
    for (int c = 0; c < Shape::kOwn; ++c) {
      const int k = first_class + warp + c * Shape::kWarps;
      bias[c] = terms.bias && k < K ? terms.bias[terms.first + k] : S(0);
      weight[c] = k >= K ? S(0) : terms.smoothed && terms.weight ? terms.weight[terms.first + k] : S(1);
      if (k >= K || own >= in.ld) continue;
      S values[4];
      alignas(4) uint8_t bytes[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        values[e] = own + e < B ? z[c][e] : S(0);
        bytes[e] = own + e < B ? static_cast<uint8_t>(slot[c][e]) : uint8_t{0};
      }
      store_sums<true>(in.products + int64_t{k} * in.ld + own, 0, 4, values);
      *reinterpret_cast<uchar4*>(in.slots + k * in.slot_class + own) = *reinterpret_cast<const uchar4*>(bytes);
    }
    if (!out.max) continue;
    constexpr bool kAgain = sizeof(S) == 8 && !kSqueezes;  // weights are read again rather than held in registers
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      S scores[Shape::kOwn], joint = max[e];
#pragma unroll
      for (int c = 0; c < Shape::kOwn; ++c) {
        const int k = first_class + warp + c * Shape::kWarps;
        scores[c] = k < K ? z[c][e] + bias[c] : kNone;
        if (k == place[e] && k < K) {
          scores[c] = kNone;
          out.target_logits[own + e] = z[c][e];
        }
        joint = scores[c] > joint ? scores[c] : joint;
        if (terms.smoothed && k < K) {
          if constexpr (kAgain) weight[c] = terms.weight ? terms.weight[terms.first + k] : S(1);
          weighted[e] = fma(weight[c], z[c][e], weighted[e]);
        }
      }
      const S shift = finite_shift(joint);
      S sum = total[e] * exp(max[e] - shift);
#pragma unroll
      for (int c = 0; c < Shape::kOwn; ++c) sum += exp(scores[c] - shift);  // NaN is here, if not in the maximum
      total[e] = sum, max[e] = joint;
    }
  }
  if (!out.max) return;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    largest[warp][lane * 4 + e] = max[e];
    totals[warp][lane * 4 + e] = total[e];
    sums[warp][lane * 4 + e] = weighted[e];
  }
  __syncthreads();
  const int64_t at = (first_tile + block) * B + first_feature + thread;
  if (thread < Shape::kFeatures && first_feature + thread < B) {
    S joint = largest[0][thread], total_of_all = 0, weighted_of_all = 0;
#pragma unroll
    for (int w = 1; w < Shape::kWarps; ++w) joint = largest[w][thread] > joint ? largest[w][thread] : joint;
    const S shift = finite_shift(joint);
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      total_of_all = fma(totals[w][thread], exp(largest[w][thread] - shift), total_of_all);
      weighted_of_all += sums[w][thread];
    }
    out.max[at] = joint, out.total[at] = total_of_all;
    if (terms.smoothed) out.weighted[at] = weighted_of_all;
  }
  if (!terms.smoothed || blockIdx.y > 0 || warp > 0) return;
  S weights = 0, biases = 0;
  for (int k = begin + lane; k < end; k += kWarp) {
    const S weight = terms.weight ? terms.weight[terms.first + k] : S(1);
    weights += weight;
    if (terms.bias) biases = fma(weight, terms.bias[terms.first + k], biases);
  }
  weights = warp_sum(weights), biases = warp_sum(biases);
  if (lane == 0) out.weights[first_tile + block] = weights, out.biases[first_tile + block] = biases;
}

}  // namespace gistops::cuda
