// The log-sum-exp over classes, in partials: one (maximum, sum of exponentials) per tile of classes and row.
#pragma once
#include <algorithm>

#include "class_scores.cuh"
#include "parked_scores.cuh"

namespace gistops::cuda {

// A block takes a group of classes: so few that a chunk of `step` classes fills a large GPU, but so many that there are
// about 1024 partials per row at most.
struct LseShape {
  static constexpr int64_t kWarps = ClassStream<float, 1>::kWarps, kMostGroups = 256, kMostPartials = 1024;
  int64_t group_classes;
  LseShape(int64_t K, int64_t step)
      : group_classes(ceil_div(std::max(ceil_div(step, kMostGroups), ceil_div(K, kMostPartials)), kWarps) * kWarps) {}
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

// A shift below every finite score.
template <class S>
inline constexpr S kLowest = std::numeric_limits<S>::lowest();

// Return x, or 0 for -inf: a shift that keeps exp(z - shift) defined where every score is -inf.
template <class S>
__device__ __forceinline__ S finite_or_zero(S x) {
  return x == -kInfinity<S> ? S(0) : x;
}

template <class T, int kSlots>
struct LseShared {
  using Stream = ClassStream<T, kSlots>;
  using S = Sum<T>;
  int target[Stream::kRows];  // the row's target in the chunk, or -1
  TargetMarks marks;
  uint8_t slots[Stream::kWarps][Stream::kRows];  // of a class with a cancelled pair
  alignas(16) S weighted[Stream::kWarps][Stream::kRows];
  union {
    ClassRing<S, Stream::kQuads, false> rings[Stream::kWarps];  // of products
    struct {
      alignas(16) S shift[Stream::kWarps][Stream::kRows], exp_sum[Stream::kWarps][Stream::kRows];
    };  // after them
  };
};

// Compute the scores of a chunk of classes, and their partials of the log-sum-exp without the target. The scores
// replace the products, for the backward; the slots are stored beside them, or with them if kParked.
//
// A lane sums exp(z - shift), where the shift is a score so far, at most kHeadroom below the largest: the sum is
// rescaled only when a score exceeds it by more.
//
// Grid: (groups of shape.group_classes classes, tiles of rows). Block: 256 threads. The chunk's partials begin at
// first_partial.
template <class T, int kSlots, bool kParked>
__global__ void __launch_bounds__(ClassStream<T, kSlots>::kThreads, ClassStream<T, kSlots>::kBlocks)
    lse_partials_kernel(LseShape shape, ScoreInputs<T> in, LossTerms<Sum<T>> terms, int64_t first_partial,
                        LsePartials<Sum<T>> out) {
  using S = Sum<T>;
  using Stream = ClassStream<T, kSlots>;
  constexpr int kQuads = Stream::kQuads, kQuadRows = Stream::kQuadRows, kRows = Stream::kRows;
  constexpr int kWarps = Stream::kWarps, kStages = ClassRing<S, kQuads, false>::kStages;
  constexpr S kHeadroom = 16;
  __shared__ LseShared<T, kSlots> shared;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int B = static_cast<int>(in.p.B()), K = static_cast<int>(in.p.K()), group = static_cast<int>(blockIdx.x);
  const int first_row = static_cast<int>(blockIdx.y) * kRows, group_classes = static_cast<int>(shape.group_classes);
  const int begin = group * group_classes, end = min(begin + group_classes, K);
  const int lane_rows = static_cast<int>(in.ld) - first_row - lane * 4;  // from the first row of this lane on
  const bool tail = first_row + kRows > B, few_rows = first_row + kQuadRows >= B, has_sums = out.max;
  shared.marks.clear(thread);
  __syncthreads();
  if (thread < kRows) {
    shared.target[thread] = first_row + thread < B ? terms.target_in_chunk(first_row + thread) : -1;
    if (shared.target[thread] >= 0) shared.marks.set(shared.target[thread]);
  }
  __syncthreads();
  const ClassValues<S> values(in.center_rnorms, in.ldr, in.p.M(), terms.bias, terms.smoothed ? terms.weight : nullptr,
                              terms.first_class, lane);
  ClassScores<T, kSlots> scores(in, values, first_row, lane);
  S shift[kQuads][4], exp_sum[kQuads][4] = {};
#pragma unroll
  for (int q = 0; q < kQuads; ++q)
#pragma unroll
    for (int e = 0; e < 4; ++e) shift[q][e] = kLowest<S>, shared.weighted[warp][q * kQuadRows + lane * 4 + e] = S(0);
  S* z_to = in.products + (begin + warp) * in.score_class + first_row + lane * 4;
  uint8_t* slots_to = in.slots && !kParked ? in.slots + (begin + warp) * in.slot_class + first_row + lane * 4 : nullptr;
  const auto add = [&](const S* products, S value, int k) {
    S z[kQuads][4];
    int slot[kQuads][4];
    scores(products, value, k, shared.slots[warp], z, slot);
    const bool is_target = shared.marks.get(k);
    const S bias = __shfl_sync(~0u, value, ClassValues<S>::kBiasLane);
    const S weight = terms.smoothed ? __shfl_sync(~0u, value, ClassValues<S>::kWeightLane) : S(0);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (q > 0 && few_rows) break;
      S x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = z[q][e] + bias - shift[q][e];
      if (is_target) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (shared.target[q * kQuadRows + lane * 4 + e] != k) continue;
          x[e] = -kInfinity<S>;
          if constexpr (kParked) z[q][e] = can_be_parked(z[q][e]);
          if (has_sums) out.target_logits[scores.row(q, e)] = z[q][e];
        }
      }
      bool exceeds = false;  // or is NaN
#pragma unroll
      for (int e = 0; e < 4; ++e) exceeds |= !(x[e] <= kHeadroom);
      if (__any_sync(~0u, exceeds)) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (kParked) z[q][e] = can_be_parked(z[q][e]);
          if (!(x[e] > kHeadroom)) continue;
          const S score = z[q][e] + bias;
          exp_sum[q][e] *= exp(shift[q][e] - score);
          shift[q][e] = score, x[e] = score - score;  // NaN if infinite
        }
      }
      if (q * kQuadRows < lane_rows)
        store_scores<kParked>(z_to + q * kQuadRows, kParked || !slots_to ? nullptr : slots_to + q * kQuadRows, z[q],
                              slot[q]);
      if (!has_sums) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) exp_sum[q][e] += exp_of<T>(x[e]);
      if (!terms.smoothed) continue;
      S weighted[4];
      S* sums = &shared.weighted[warp][q * kQuadRows + lane * 4];
      load_sums<true>(sums, 0, 0, weighted);
#pragma unroll
      for (int e = 0; e < 4; ++e) weighted[e] = fma(weight, z[q][e], weighted[e]);
      store_sums<true>(sums, 0, 0, weighted);
    }
  };
  auto& ring = shared.rings[warp];
  const S* next_products = in.products + (begin + warp) * in.score_class + first_row + lane * 4;
  const auto copy_next = [&](int k, int stage) {
    ring.copy(k < end, stage, next_products, nullptr, B - first_row - lane * 4, lane);
    next_products += kWarps * in.score_class;
  };
#pragma unroll
  for (int stage = 0; stage + 1 < kStages; ++stage) copy_next(begin + warp + stage * kWarps, stage);
  S next_value = begin + warp < end ? values(begin + warp) : S(0);
  int stage = 0;
#pragma unroll 1
  for (int k = begin + warp; k < end; k += kWarps) {
    ring.wait();
    if (tail) scores.clear_tail(ring.sums[stage]);
    copy_next(k + (kStages - 1) * kWarps, stage == 0 ? kStages - 1 : stage - 1);
    const S value = next_value;
    if (k + kWarps < end) next_value = values(k + kWarps);
    add(ring.sums[stage], value, k);
    z_to += kWarps * in.score_class;
    if (slots_to) slots_to += kWarps * in.slot_class;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  __syncthreads();
  if (!has_sums) return;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int row = q * kQuadRows + lane * 4;
    store_sums<true>(shared.shift[warp], row, 0, shift[q]);
    store_sums<true>(shared.exp_sum[warp], row, 0, exp_sum[q]);
  }
  __syncthreads();
  const int64_t at = (first_partial + group) * B + first_row + thread;
  if (thread < kRows && first_row + thread < B) {
    S max = shared.shift[0][thread], sum = 0, all_weighted = 0;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) max = shared.shift[w][thread] > max ? shared.shift[w][thread] : max;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum = fma(shared.exp_sum[w][thread], exp(shared.shift[w][thread] - max), sum);
      all_weighted += shared.weighted[w][thread];
    }
    out.max[at] = sum == S(0) ? -kInfinity<S> : max, out.sum[at] = sum;
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
  if (lane == 0) out.weight_sums[first_partial + group] = weights, out.bias_sums[first_partial + group] = biases;
}

}  // namespace gistops::cuda
