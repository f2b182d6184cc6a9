// The log-sum-exp over classes, in partials: one (maximum, sum of exponentials) per tile of classes and row.
#pragma once
#include "scores.cuh"
#include "warp_reduce.cuh"

namespace gistops::cuda {

// A block takes `tiles` tiles of scores of classes, so many that there are at most 1024 partials per row.
struct LseShape {
  int64_t tiles;
  explicit LseShape(int64_t K) : tiles(ceil_div(ceil_div(K, ScoresShape::kClasses), int64_t{1024})) {}
  __host__ __device__ int64_t classes() const { return tiles * ScoresShape::kClasses; }
};

template <class S>
struct LossTerms {
  const int64_t* target;   // [B]
  const S *bias, *weight;  // [K], or null
  int64_t first_class;     // of the chunk
  int64_t ignore_index;
  bool smoothed;  // label smoothing is on

  // Return the position of row i's target in the chunk of classes, or -1 if it is elsewhere or ignored.
  __device__ __forceinline__ int target_in_chunk(int64_t i) const {
    const int64_t y = target[i], at = y - first_class;
    return y == ignore_index || at < 0 || at > 0x7fffffff ? -1 : static_cast<int>(at);
  }
};

// Partials of all classes. max is null where only scores and slots are needed.
template <class S>
struct LsePartials {
  S *max, *sum;                // [tiles, B]: over scores, without the target's
  S* weighted;                 // [tiles, B]: sum of weight z, with label smoothing
  S *weight_sums, *bias_sums;  // [tiles]: sums of weight and of weight bias, with label smoothing
  S* target_logits;            // [B], set for targets in range
};

// Return x, or 0 for -inf: a shift that keeps exp(z - shift) defined where every score is -inf.
template <class S>
__device__ __forceinline__ S finite_or_zero(S x) {
  return x == -kInfinity<S> ? S(0) : x;
}

// Compute the scores of a chunk of classes, and their partials of the log-sum-exp without the target. The scores and
// slots [K, ld] replace the products, for the backward.
//
// Grid: (groups of shape.classes() classes, tiles of 128 rows). Block: 256 threads; a thread has four rows and every
// eighth class. The chunk's partials begin at first_partial.
template <class T>
__global__ void __launch_bounds__(ScoresShape::kThreads, sizeof(T) == 8 ? 1 : 2)
    lse_partials_kernel(LseShape shape, ScoreInputs<T> in, LossTerms<Sum<T>> terms, int64_t first_partial,
                        LsePartials<Sum<T>> out) {
  using S = Sum<T>;
  using Shape = ScoresShape;
  constexpr S kNone = -kInfinity<S>;
  __shared__ __align__(16) ScoresTile<S> tile;
  __shared__ S maxima[Shape::kWarps][Shape::kRows];
  __shared__ S exp_sums[Shape::kWarps][Shape::kRows];
  __shared__ S weighted_sums[Shape::kWarps][Shape::kRows];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int B = static_cast<int>(in.p.B()), K = static_cast<int>(in.p.K()), block = static_cast<int>(blockIdx.x);
  const int first_row = static_cast<int>(blockIdx.y) * Shape::kRows, thread_row = first_row + lane * 4;
  const int begin = block * static_cast<int>(shape.classes()), end = min(begin + static_cast<int>(shape.classes()), K);
  int target[4];
  S max[4], exp_sum[4] = {}, weighted[4] = {};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    max[e] = kNone;
    target[e] = thread_row + e < B ? terms.target_in_chunk(thread_row + e) : -1;
  }
#pragma unroll 1
  for (int first_class = begin; first_class < end; first_class += Shape::kClasses) {
    S z[Shape::kClassesPerThread][4];
    int slot[Shape::kClassesPerThread][4];
    compute_scores(in, tile, first_class, first_row, z, slot);
    S bias[Shape::kClassesPerThread], weight[Shape::kClassesPerThread];
#pragma unroll
    for (int c = 0; c < Shape::kClassesPerThread; ++c) {
      const int k = first_class + warp + c * Shape::kWarps;
      bias[c] = terms.bias && k < K ? terms.bias[terms.first_class + k] : S(0);
      weight[c] = k >= K ? S(0) : terms.smoothed && terms.weight ? terms.weight[terms.first_class + k] : S(1);
      if (k >= K || thread_row >= in.ld) continue;
      S values[4];
      alignas(4) uint8_t bytes[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        values[e] = thread_row + e < B ? z[c][e] : S(0);
        bytes[e] = thread_row + e < B ? static_cast<uint8_t>(slot[c][e]) : uint8_t{0};
      }
      store_sums<true>(in.products + int64_t{k} * in.ld + thread_row, 0, 4, values);
      *reinterpret_cast<uchar4*>(in.slots + k * in.slot_class + thread_row) = *reinterpret_cast<const uchar4*>(bytes);
    }
    if (!out.max) continue;
    // Reading the weights twice takes fewer registers.
    constexpr bool kReload = sizeof(S) == 8 && !kFitsIn128Registers;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      S scores[Shape::kClassesPerThread], new_max = max[e];
#pragma unroll
      for (int c = 0; c < Shape::kClassesPerThread; ++c) {
        const int k = first_class + warp + c * Shape::kWarps;
        scores[c] = k < K ? z[c][e] + bias[c] : kNone;
        if (k == target[e] && k < K) {
          scores[c] = kNone;
          out.target_logits[thread_row + e] = z[c][e];
        }
        new_max = scores[c] > new_max ? scores[c] : new_max;
        if (terms.smoothed && k < K) {
          if constexpr (kReload) weight[c] = terms.weight ? terms.weight[terms.first_class + k] : S(1);
          weighted[e] = fma(weight[c], z[c][e], weighted[e]);
        }
      }
      const S shift = finite_or_zero(new_max);
      S new_sum = exp_sum[e] * exp(max[e] - shift);
#pragma unroll
      for (int c = 0; c < Shape::kClassesPerThread; ++c)
        new_sum += exp(scores[c] - shift);  // a NaN that is not in the maximum shows here
      exp_sum[e] = new_sum, max[e] = new_max;
    }
  }
  if (!out.max) return;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    maxima[warp][lane * 4 + e] = max[e];
    exp_sums[warp][lane * 4 + e] = exp_sum[e];
    weighted_sums[warp][lane * 4 + e] = weighted[e];
  }
  __syncthreads();
  const int64_t at = (first_partial + block) * B + first_row + thread;
  if (thread < Shape::kRows && first_row + thread < B) {
    S new_max = maxima[0][thread], all_sum = 0, all_weighted = 0;
#pragma unroll
    for (int w = 1; w < Shape::kWarps; ++w) new_max = maxima[w][thread] > new_max ? maxima[w][thread] : new_max;
    const S shift = finite_or_zero(new_max);
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      all_sum = fma(exp_sums[w][thread], exp(maxima[w][thread] - shift), all_sum);
      all_weighted += weighted_sums[w][thread];
    }
    out.max[at] = new_max, out.sum[at] = all_sum;
    if (terms.smoothed) out.weighted[at] = all_weighted;
  }
  if (!terms.smoothed || blockIdx.y > 0 || warp > 0) return;
  S weights = 0, biases = 0;
  for (int k = begin + lane; k < end; k += kWarp) {
    const S weight = terms.weight ? terms.weight[terms.first_class + k] : S(1);
    weights += weight;
    if (terms.bias) biases = fma(weight, terms.bias[terms.first_class + k], biases);
  }
  weights = warp_sum(weights), biases = warp_sum(biases);
  if (lane == 0) out.weight_sums[first_partial + block] = weights, out.bias_sums[first_partial + block] = biases;
}

}  // namespace gistops::cuda
