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
  static constexpr int kRound = (kSlots + 1) / 2;  // slots whose sums are combined at a time
  using Ring = ClassRing<S, Stream::kQuads, !kParked>;
  SoftmaxGradRow<S> rows[Stream::kRows];
  TargetMarks marks;
  alignas(16) S scales[Stream::kRows];  // tau / |f|
  union {
    Ring rings[Stream::kWarps];                                    // of scores
    alignas(16) S partial[Stream::kWarps][kRound][Stream::kRows];  // after them
  };
};

// Load the scores and slots of four rows of a class from shared memory.
template <bool kParked, class T, class Ring>
__device__ __forceinline__ void load_scores(const GradSource<T>& in, const Ring& ring, int stage, int row,
                                            Sum<T> (&z)[4], int (&slot)[4]) {
  if constexpr (kParked) {
    alignas(16) uint32_t bits[4];
    *reinterpret_cast<uint4*>(bits) = *reinterpret_cast<const uint4*>(&ring.sums[stage][row]);
#pragma unroll
    for (int e = 0; e < 4; ++e) z[e] = parked_score(bits[e]), slot[e] = static_cast<int>(parked_slot(bits[e]));
  } else {
    load_sums<true>(ring.sums[stage], row, 0, z);
    const uint32_t bytes = *reinterpret_cast<const uint32_t*>(&ring.slots[stage][row]);
#pragma unroll
    for (int e = 0; e < 4; ++e) slot[e] = in.valid_slot(static_cast<uint8_t>(bytes >> (8 * e)));
  }
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
  __shared__ Shared shared;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int B = static_cast<int>(in.p.B()), K = static_cast<int>(in.p.K()), M = static_cast<int>(in.p.M());
  const int group = static_cast<int>(blockIdx.x), ld = static_cast<int>(out.ld);
  const int group_classes = static_cast<int>(shape.tiles_per_group) * kWarps, begin = group * group_classes;
  const int end = min(begin + group_classes, K);
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
    const int thread_row = first_row + lane * 4;
    if (first_row >= B) break;
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
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = q * kQuadRows + lane * 4 + e;
        factor[q][e] = shared.rows[row].factor, shift[q][e] = shared.rows[row].shift;
      }
#pragma unroll 1
    for (int first = 0; first < M; first += kSlots) {
      S s[kSlots][kQuads][4] = {};
      const auto route = [&](int k, int stage, S value) {
        const bool is_target = shared.marks.get(k);
        const S bias = __shfl_sync(~0u, value, ClassValues<S>::kBiasLane);
        const S class_weight = smoothed ? __shfl_sync(~0u, value, ClassValues<S>::kWeightLane) : S(0);
        // A cancelled pair is not in H and S.
        const S rnorm = value < S(0) ? S(0) : value;
        lowest = value < lowest ? value : lowest;
        S t[kSlots] = {}, bias_grad = 0, margin_grad = 0;
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          if (q > 0 && first_row + q * kQuadRows >= B) break;
          S z[4], g[4];
          int slot[4];
          load_scores<kParked>(in, ring, stage, q * kQuadRows + lane * 4, z, slot);
#pragma unroll
          for (int e = 0; e < 4; ++e) g[e] = factor[q][e] * exp_of<T>(z[e] + bias - shift[q][e]);
          if (smoothed) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
              g[e] = fma(shared.rows[q * kQuadRows + lane * 4 + e].weight_grad, class_weight, g[e]);
          }
          if (is_target) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const SoftmaxGradRow<S>& row = shared.rows[q * kQuadRows + lane * 4 + e];
              if (row.target != k) {
                bias_grad += g[e];
                continue;
              }
              g[e] = row.target_grad * row.by_logit;
              bias_grad += row.target_grad, margin_grad += row.margin_grad;
              if (first == 0) gz_sum += row.tau_grad * tau;
            }
          } else if (has_bias) {
            bias_grad += (g[0] + g[1]) + (g[2] + g[3]);
          }
          S r[4], scale[4];
          load_sums<true>(shared.scales, q * kQuadRows + lane * 4, 0, scale);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (shuffled) {
              r[e] = __shfl_sync(~0u, rnorm, slot[e]);
            } else {
              const S in_memory = in.center_rnorms[slot[e] * in.ldr + k];
              r[e] = in_memory < S(0) ? S(0) : in_memory, cancelled |= in_memory < S(0);
            }
          }
          alignas(16) T h[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const S weight = g[e] * scale[e] * r[e];
            h[e] = rounded_weight<T>(weight, r[e] >= max_rnorm<S>() || magnitude(scale[e]) >= clamped_scale);
            const unsigned won = kSlots == 5 ? 1u << (slot[e] & 31) : 0;  // a bit per slot is cheaper to test
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
              const bool wins = kSlots == 5 ? won >> j & 1 : kSlots == 1 || slot[e] == first + j;
              if (wins) s[j][q][e] += weight, t[j] = fma(g[e], z[e], t[j]);
            }
          }
          if (first == 0 && thread_row + q * kQuadRows < ld)
            store_four(out.h + k * out.h_class + thread_row + q * kQuadRows, h);
        }
        const S sum = warp_sum_of<kSlots>(t, lane);
        const int j = first + warp_sum_index<kSlots>(lane);
        if (warp_sum_owner<kSlots>(lane) && j < M) {
          gz_sum += sum;
          S* to = out.t + (static_cast<int64_t>(blockIdx.y) * K + k) * M + j;
          *to = pass == 0 ? sum : *to + sum;  // this lane alone reads and writes it
        }
        if (first > 0) return;
        const auto store_class_sum = [&](S* sums, S value) {
          value = warp_sum(value);
          S* to = sums + static_cast<int64_t>(blockIdx.y) * K + k;
          if (lane == 0) *to = pass == 0 ? value : *to + value;
        };
        if (has_bias) store_class_sum(out.bias, bias_grad);
        if (has_margin) store_class_sum(out.margin, margin_grad);
      };
      const int first_class = begin + warp;
      const S* next_scores = in.scores + first_class * in.score_class + first_row;
      const uint8_t* next_slots = kParked ? nullptr : in.slots + first_class * in.score_class + first_row;
      const auto copy_next = [&](int k, int stage) {
        ring.copy(stage, k < end ? next_scores : nullptr, next_slots, ld - first_row, lane);
        next_scores += kWarps * in.score_class;
        if constexpr (!kParked) next_slots += kWarps * in.score_class;
      };
#pragma unroll
      for (int stage = 0; stage + 1 < kStages; ++stage) copy_next(first_class + stage * kWarps, stage);
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
      for (int round = 0; round < kSlots; round += kRound) {
        if (first + round >= M) break;
        __syncthreads();  // no warp reads scores, or sums of the round before
#pragma unroll
        for (int j = 0; j < kRound; ++j)
#pragma unroll
          for (int q = 0; q < kQuads; ++q)
            if (round + j < kSlots)
              store_sums<true>(shared.partial[warp][j], q * kQuadRows + lane * 4, 0, s[round + j][q]);
        __syncthreads();
        for (int e = thread; e < kRound * kRows; e += Stream::kThreads) {
          const int j = e / kRows, row = e % kRows;
          if (round + j >= kSlots || first + round + j >= M || first_row + row >= B) continue;
          S sum = 0;
#pragma unroll
          for (int w = 0; w < kWarps; ++w) sum += shared.partial[w][j][row];
          out.s[(static_cast<int64_t>(group) * M + first + round + j) * ld + first_row + row] = sum;
        }
      }
      __syncthreads();  // the next pass may overwrite the sums; parked: and with H the scores of this one
    }
  }
  cancelled |= lane < M && lane < ClassValues<S>::kMostSlots && lowest < S(0);
  store_tau_partial(out, gz_sum, tau, cancelled && in.pairs_cancel);
}

}  // namespace gistops::cuda
