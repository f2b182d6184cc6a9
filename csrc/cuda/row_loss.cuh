// From the tiles' parts to the loss, in one launch: a block takes 32 rows, the last to end sums over all rows.
//
// With O the log-sum-exp of all classes but the target, and s the target's score, margin and bias included, a row's
// loss is log(1 + exp(O - s)), exact however small it is.
#pragma once
#include "lse.cuh"
#include "margins.cuh"
#include "softmax_grad.cuh"

namespace gistops::cuda {

template <class S>
struct RowsShape {
  static constexpr int kThreads = sizeof(S) == 8 ? 512 : 1024, kRows = kWarp, kRuns = kThreads / kWarp;
};

template <class S>
struct LossRows {
  int64_t B, classes, tiles;
  const S *tau, *margin;       // margin: null, or [1], or [classes]
  bool each_margin;            // the last
  int margin_kind, reduction;  // reduction: 0 none, 1 mean, 2 sum
  S smoothing;
  S *loss, *lse;      // [B] or [1]; [B]
  S *rows, *scalars;  // as in softmax_grad.cuh
  bool* inside;       // [1]: whether all targets are in range
  S* parts;           // [blocks, 3]
  int* ticket;        // 0 before the launch
};

template <class S>
__global__ void __launch_bounds__(RowsShape<S>::kThreads)
    rows_kernel(LossTerms<S> terms, LseParts<S> in, LossRows<S> out) {
  using Shape = RowsShape<S>;
  constexpr int kRuns = Shape::kRuns;
  __shared__ S largest[kRuns][kWarp];
  __shared__ S totals[kRuns][kWarp];
  __shared__ S sums[kRuns][kWarp];
  __shared__ S class_sums[2][kRuns];
  __shared__ int last;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, run = thread / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * Shape::kRows + lane, B = out.B;
  const bool inside = i < B;
  S max = -kInfinity<S>, total = 0, weighted = 0, weights = 0, biases = 0;
  if (inside) {
#pragma unroll 4
    for (int64_t tile = run; tile < out.tiles; tile += kRuns) {
      const S more = in.max[tile * B + i], more_total = in.total[tile * B + i];
      if (terms.smoothed) weighted += in.weighted[tile * B + i];
      const S joint = more > max ? more : max, shift = finite_shift(joint);
      total = total * exp(max - shift) + more_total * exp(more - shift);
      max = joint;
    }
  }
  if (terms.smoothed) {
    for (int64_t tile = thread; tile < out.tiles; tile += Shape::kThreads)
      weights += in.weights[tile], biases += in.biases[tile];
    weights = warp_sum(weights), biases = warp_sum(biases);
  }
  largest[run][lane] = max, totals[run][lane] = total, sums[run][lane] = weighted;
  if (lane == 0) class_sums[0][run] = weights, class_sums[1][run] = biases;
  __syncthreads();
  if (run == 0) {
    weights = biases = weighted = total = 0;
    for (int r = 1; r < kRuns; ++r) max = largest[r][lane] > max ? largest[r][lane] : max;
    const S shift = finite_shift(max);
    for (int r = 0; r < kRuns; ++r) {
      total = fma(totals[r][lane], exp(largest[r][lane] - shift), total);
      weighted += sums[r][lane], weights += class_sums[0][r], biases += class_sums[1][r];
    }
    const S others = max + log(total);
    const int64_t y = inside ? terms.target[i] : terms.ignore_index;
    const bool ignored = y == terms.ignore_index, astray = !ignored && (y < 0 || y >= out.classes);
    const bool counted = !ignored && !astray;
    const S logit = counted ? in.target_logits[i] : S(0);
    Lowered<S> low{logit, S(1), S(0), S(0)};
    if (out.margin) {
      const S margin = out.margin[out.each_margin && counted ? y : 0];
      low = lowered(logit, *out.tau, margin, out.margin_kind);
    }
    const S score = low.value + (terms.bias && counted ? terms.bias[y] : S(0));
    const S excess = others - score, weight = terms.weight && counted ? terms.weight[y] : S(1);
    S value = log1p_of_exp(excess);
    const S full = ignored ? others : score + value;
    value *= weight;
    if (terms.smoothed) {
      const S spread = full * weights - (weighted + weight * (low.value - logit) + biases);
      value = (S(1) - out.smoothing) * value + out.smoothing / static_cast<S>(out.classes) * spread;
    }
    if (ignored) value = 0;
    if (inside) {
      out.rows[kShift * B + i] = others == -kInfinity<S> ? kInfinity<S> : others;
      out.rows[kExcess * B + i] = ignored ? kInfinity<S> : excess;
      if (out.margin) {
        out.rows[kByLogit * B + i] = low.by_logit;
        out.rows[kByTau * B + i] = low.by_tau;
        out.rows[kByMargin * B + i] = low.by_margin;
      }
      out.lse[i] = full;
      if (out.reduction == 0) out.loss[i] = value;
    }
    const S losses = warp_sum(value), counts = warp_sum(ignored ? S(0) : weight),
            strays = warp_sum(astray ? S(1) : S(0));
    if (lane == 0) {
      S* part = out.parts + static_cast<int64_t>(blockIdx.x) * 3;
      part[0] = losses, part[1] = counts, part[2] = strays;
      __threadfence();
      last = atomicAdd(out.ticket, 1) == static_cast<int>(gridDim.x) - 1;
    }
  }
  __syncthreads();
  if (!last || run > 0) return;
  __threadfence();  // the other blocks' parts
  S losses = 0, counts = 0, strays = 0;
  for (int64_t block = lane; block < gridDim.x; block += kWarp) {
    const volatile S* part = out.parts + block * 3;
    losses += part[0], counts += part[1], strays += part[2];
  }
  losses = warp_sum(losses), counts = warp_sum(counts), strays = warp_sum(strays);
  if (lane > 0) return;
  out.scalars[0] = counts, out.scalars[1] = weights;
  *out.inside = strays == S(0);
  if (out.reduction) *out.loss = out.reduction == 1 ? losses / counts : losses;
}

}  // namespace gistops::cuda
