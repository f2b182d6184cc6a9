// The backward's first pass over the scores of a loss.
#pragma once
#include "class_stream.cuh"
#include "parked_scores.cuh"
#include "routing.cuh"

namespace gistops::cuda {

template <class T, int kSlots, bool kParked>
struct RouteLossShared {
  using Stream = ClassStream<T, kSlots>;
  using S = Sum<T>;
  // S of slot 0 is not needed. Only the variant of 8 slots takes several passes, of which one begins at slot 0.
  static constexpr int kFirstSum = kSlots == 8 ? 0 : 1, kSums = kSlots > 1 ? kSlots - kFirstSum : 1;
  static constexpr int kRound = kSums < 4 ? kSums : 4;  // slots whose sums are combined at a time
  using Ring = ClassRing<S, Stream::kQuads, !kParked>;
  SoftmaxGradRow<S> rows[Stream::kRows];
  TargetMarks marks;
  alignas(16) S scales[Stream::kRows];  // tau / |f|
  union {
    Ring rings[Stream::kWarps];                                    // of scores
    alignas(16) S partial[Stream::kWarps][kRound][Stream::kRows];  // after them
  };
};

// Load the scores and slots of four rows of a class from shared memory. Only the lowest three bits of a parked slot
// count.
template <bool kParked, class T, class Ring>
__device__ __forceinline__ void load_scores(const GradSource<T>& in, const Ring& ring, int stage, int row,
                                            Sum<T> (&z)[4], int (&slot)[4]) {
  if constexpr (kParked) {
    alignas(16) uint32_t bits[4];
    *reinterpret_cast<uint4*>(bits) = *reinterpret_cast<const uint4*>(&ring.sums[stage][row]);
#pragma unroll
    for (int e = 0; e < 4; ++e) z[e] = parked_score(bits[e]), slot[e] = static_cast<int>(bits[e]);
  } else {
    load_sums<true>(ring.sums[stage], row, 0, z);
    const uint32_t bytes = *reinterpret_cast<const uint32_t*>(&ring.slots[stage][row]);
#pragma unroll
    for (int e = 0; e < 4; ++e) slot[e] = in.valid_slot(static_cast<uint8_t>(bytes >> (8 * e)));
  }
}

// Return a number whose bit j + 1 is 1 for j = slot & 7, and 0 for every other j below 7. One rotation: the slot need
// not be masked. One instruction then moves the bits to predicates, but a test of bit 0 would take two more.
__device__ __forceinline__ uint32_t one_hot(int slot) {
  return __funnelshift_l(0x02020202u, 0x02020202u, static_cast<unsigned>(slot));
}

// Compute the gradient G of the loss with respect to the scores, and route it: H and the partials of S, T, dtau, and of
// the gradients of bias and margin.
//   kSlots: slots that a lane sums in registers; more take several passes over the classes
//   kParked: the scores lie where H goes; H then overwrites them, and M is at most kSlots
//
// Grid: (groups of tiles of eight classes, groups of shape.row_passes tiles of rows). Block: 256 threads.
template <class T, int kSlots, bool kParked>
__global__ void __launch_bounds__(ClassStream<T, kSlots>::kThreads, ClassStream<T, kSlots>::kBlocks)
    route_loss_grad_kernel(RoutingShape shape, GradSource<T> in, RoutedSums<T> out) {
  using S = Sum<T>;
  using Stream = ClassStream<T, kSlots>;
  using Shared = RouteLossShared<T, kSlots, kParked>;
  constexpr int kQuads = Stream::kQuads, kQuadRows = Stream::kQuadRows, kRows = Stream::kRows;
  constexpr int kWarps = Stream::kWarps, kStages = Shared::Ring::kStages;
  constexpr int kFirstSum = Shared::kFirstSum, kSums = Shared::kSums;
  constexpr bool kManyPasses = kSlots == 8;
  __shared__ Shared shared;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int B = static_cast<int>(in.p.B()), K = static_cast<int>(in.p.K()), M = static_cast<int>(in.p.M());
  const int group = static_cast<int>(blockIdx.x), ld = static_cast<int>(out.ld);
  const int group_classes = static_cast<int>(shape.tiles_per_group) * kWarps, begin = group * group_classes;
  const int end = min(begin + group_classes, K), first_class = begin + warp;
  const S tau = load_tau(in.p.tau), clamped_scale = magnitude(tau) * max_rnorm<S>();
  const bool smoothed = in.softmax.smoothing > S(0), has_bias = out.bias, has_margin = out.margin;
  const bool shuffled = kSlots < 8 || M <= ClassValues<S>::kMostSlots;
  const ClassValues<S> values(in.center_rnorms, in.ldr, M, in.softmax.bias, smoothed ? in.softmax.weight : nullptr,
                              in.softmax.first_class, lane);
  auto& ring = shared.rings[warp];
  S gz_sum = 0, lowest = 0;  // lowest: of the values of this lane
  bool cancelled = false;
  for (int pass = 0; pass < static_cast<int>(shape.row_passes); ++pass) {
    const int first_row = (static_cast<int>(blockIdx.y) * static_cast<int>(shape.row_passes) + pass) * kRows;
    const int lane_rows = ld - first_row - lane * 4;  // from the first row of this lane on
    if (first_row >= B) break;
    const bool few_rows = first_row + kQuadRows >= B;  // none in the second quad
    const S* next_scores = nullptr;
    const uint8_t* next_slots = nullptr;
    const auto copy_next = [&](int k, int stage) {
      ring.copy(k < end, stage, next_scores, next_slots, lane_rows, lane);
      next_scores += kWarps * in.score_class;
      if constexpr (!kParked) next_slots += kWarps * in.score_class;
    };
    const auto copy_first = [&] {
      next_scores = in.scores + first_class * in.score_class + first_row + lane * 4;
      if constexpr (!kParked) next_slots = in.slots + first_class * in.score_class + first_row + lane * 16;
#pragma unroll
      for (int stage = 0; stage + 1 < kStages; ++stage) copy_next(first_class + stage * kWarps, stage);
    };
    copy_first();
    shared.marks.clear(thread);
    __syncthreads();
    if (thread < kRows) {
      const bool inside = first_row + thread < B;
      shared.rows[thread] = inside ? in.softmax.row(first_row + thread) : in.softmax.no_row();
      shared.scales[thread] = inside ? tau * in.input_rnorms[first_row + thread] : S(0);
      if (shared.rows[thread].target >= 0) shared.marks.set(static_cast<unsigned>(shared.rows[thread].target));
    }
    __syncthreads();
    S factor[kQuads][4], shift[kQuads][4];
    bool large_shift = false;
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = q * kQuadRows + lane * 4 + e;
        factor[q][e] = shared.rows[row].factor, shift[q][e] = shared.rows[row].shift * kExpUnit<T>;
        large_shift |= is_large_exponent<T>(shared.rows[row].shift);
      }
    large_shift = __any_sync(~0u, large_shift);
#pragma unroll 1
    for (int first = 0; first < (kManyPasses ? M : 1); first += kSlots) {
      S s[kSums][kQuads][4] = {};
      T* next_h = out.h + first_class * out.h_class + first_row + lane * 4;
      S* next_t =
          out.t + (static_cast<int64_t>(blockIdx.y) * K + first_class) * M + first + warp_sum_index<kSlots>(lane);
      const bool has_t = warp_sum_owner<kSlots>(lane) && first + warp_sum_index<kSlots>(lane) < M;
      const auto route = [&](int k, int stage, S value) {
        const bool is_target = shared.marks.get(k);
        const S bias = __shfl_sync(~0u, value, ClassValues<S>::kBiasLane), scaled_bias = bias * kExpUnit<T>;
        // A cancelled pair is not in H and S.
        const S rnorm = value < S(0) ? S(0) : value;
        lowest = value < lowest ? value : lowest;
        S z[kQuads][4], g[kQuads][4];
        int slot[kQuads][4];
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          load_scores<kParked>(in, ring, stage, q * kQuadRows + lane * 4, z[q], slot[q]);
#pragma unroll
          for (int e = 0; e < 4; ++e) g[q][e] = factor[q][e] * exp_of_sum<T>(z[q][e], scaled_bias, shift[q][e]);
        }
        if (large_shift || is_large_exponent<T>(bias)) {
#pragma unroll
          for (int q = 0; q < kQuads; ++q)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              g[q][e] = factor[q][e] * exp_of<T>(z[q][e] + bias - shared.rows[q * kQuadRows + lane * 4 + e].shift);
        }
        S bias_grad = 0, margin_grad = 0;
        if (smoothed || is_target || has_bias) {
          const S class_weight = smoothed ? __shfl_sync(~0u, value, ClassValues<S>::kWeightLane) : S(0);
#pragma unroll
          for (int q = 0; q < kQuads; ++q) {
            if (q > 0 && few_rows) break;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const SoftmaxGradRow<S>& row = shared.rows[q * kQuadRows + lane * 4 + e];
              if (smoothed) g[q][e] = fma(row.weight_grad, class_weight, g[q][e]);
              if (!is_target || row.target != k) {
                bias_grad += g[q][e];
                continue;
              }
              g[q][e] = row.target_grad * row.by_logit;
              bias_grad += row.target_grad, margin_grad += row.margin_grad;
              if (first == 0) gz_sum += row.tau_grad * tau;
            }
          }
        }
        S t[kSlots] = {};
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          if (q > 0 && few_rows) break;
          S r[4], scale[4];
          load_sums<true>(shared.scales, q * kQuadRows + lane * 4, 0, scale);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if constexpr (kManyPasses && kParked) slot[q][e] &= 7;
            if constexpr (kSlots == 1) {
              r[e] = __shfl_sync(~0u, rnorm, 0);
            } else if constexpr (kSlots < 8) {
              r[e] = __shfl_sync(~0u, rnorm, slot[q][e], 8);  // every eight lanes have all values
            } else if (shuffled) {
              r[e] = __shfl_sync(~0u, rnorm, slot[q][e]);
            } else {
              const S in_memory = in.center_rnorms[slot[q][e] * in.ldr + k];
              r[e] = in_memory < S(0) ? S(0) : in_memory, cancelled |= in_memory < S(0);
            }
          }
          alignas(16) T h[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const S weight = g[q][e] * scale[e] * r[e];
            h[e] = rounded_weight<T>(weight, r[e] >= max_rnorm<S>() || magnitude(scale[e]) >= clamped_scale);
            const uint32_t won = one_hot(slot[q][e]);
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
              const bool wins = kSlots == 1 || (kSlots < 8 ? won >> (j + 1) & 1 : slot[q][e] == first + j);
              if (wins && j >= kFirstSum) s[j - kFirstSum][q][e] += weight;
              if (wins) t[j] = fma(g[q][e], z[q][e], t[j]);
            }
          }
          if (first == 0 && q * kQuadRows < lane_rows) store_four(next_h + q * kQuadRows, h);
        }
        const S sum = warp_sum_of<kSlots>(t, lane);
        if (has_t) {
          gz_sum += sum;
          *next_t = pass == 0 ? sum : *next_t + sum;  // this lane alone reads and writes it
        }
        next_h += kWarps * out.h_class, next_t += kWarps * M;
        if (first > 0) return;
        const auto store_class_sum = [&](S* sums, S value) {
          value = warp_sum(value);
          S* to = sums + static_cast<int64_t>(blockIdx.y) * K + k;
          if (lane == 0) *to = pass == 0 ? value : *to + value;
        };
        if (has_bias) store_class_sum(out.bias, bias_grad);
        if (has_margin) store_class_sum(out.margin, margin_grad);
      };
      if (first > 0) copy_first();
      S next_value = first_class < end ? values(first_class) : S(0);
      int stage = 0;
#pragma unroll 1
      for (int k = first_class; k < end; k += kWarps) {
        ring.wait();  // parked: all lanes have the scores that H overwrites
        copy_next(k + (kStages - 1) * kWarps, stage == 0 ? kStages - 1 : stage - 1);
        const S value = next_value;
        if (k + kWarps < end) next_value = values(k + kWarps);
        route(k, stage, value);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      copy_async_wait<0>();
      // Sum over the warps.
      constexpr int kRound = Shared::kRound;
#pragma unroll
      for (int round = 0; kSlots > 1 && round < kSums; round += kRound) {
        const int first_slot = first + round + kFirstSum;
        if (first_slot >= M) break;
        __syncthreads();  // no warp reads scores, or sums of the round before
#pragma unroll
        for (int j = 0; j < kRound; ++j)
#pragma unroll
          for (int q = 0; q < kQuads; ++q)
            if (round + j < kSums)
              store_sums<true>(shared.partial[warp][j], q * kQuadRows + lane * 4, 0, s[round + j][q]);
        __syncthreads();
#pragma unroll 1
        for (int e = thread; e < kRound * kRows; e += Stream::kThreads) {
          const int j = e / kRows, row = e % kRows;
          if (round + j >= kSums || first_slot + j >= M || first_row + row >= B) continue;
          S sum = 0;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) sum += shared.partial[w][j][row];
          out.s[(static_cast<int64_t>(group) * M + first_slot + j) * ld + first_row + row] = sum;
        }
      }
      __syncthreads();  // the next pass may overwrite the sums; parked: and with H the scores of this one
    }
  }
  cancelled |= lane < M && lane < ClassValues<S>::kMostSlots && lowest < S(0);
  store_tau_partial(out, gz_sum, tau, cancelled && in.pairs_cancel);
}

}  // namespace gistops::cuda
