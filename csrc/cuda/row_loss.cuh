// The loss of each row from the partials of the log-sum-exp, and its reduction, in one launch.
//
// With O the log-sum-exp over all classes but the target, and s the target's score with margin and bias, the loss of a
// row is log(1 + exp(O - s)), which is accurate however small it is.
#pragma once
#include "lse_partials.cuh"
#include "margins.cuh"
#include "softmax_grad.cuh"

namespace gistops::cuda {

// A block takes 32 rows, one per lane; its warps split the partials.
template <class S>
struct RowLossShape {
  static constexpr int kThreads = sizeof(S) == 8 ? 512 : 1024, kRows = kWarp, kWarps = kThreads / kWarp;
  static constexpr int kUnroll = sizeof(S) == 8 ? 4 : 8;
};

template <class S>
struct RowLossArgs {
  int64_t B, classes, tiles;   // tiles: partials per row
  const S *tau, *margin;       // [1]; null, [1] or [classes]
  bool margin_per_class;       // margin is [classes]
  int margin_kind, reduction;  // reduction: 0 none, 1 mean, 2 sum
  S smoothing;
  S *loss, *lse;           // results: [B] or [1]; [B]
  S *row_stats, *scalars;  // results, for SoftmaxGrad: [2, B] or [5, B]; [2]
  bool* targets_in_range;  // result: [1]
  S* partials;             // scratch: [blocks, 3]
  int* blocks_done;        // scratch: [1], 0 before the launch
};

// Combine the partials [tiles, B] of each row, apply margin, bias, weight and label smoothing, and write the outputs.
//
// Grid: tiles of 32 rows. Block: kThreads. The last block to finish reduces the partial sums of all blocks, in order.
template <class S>
__global__ void __launch_bounds__(RowLossShape<S>::kThreads, 1)
    row_loss_kernel(LossTerms<S> terms, LsePartials<S> in, RowLossArgs<S> args) {
  using Shape = RowLossShape<S>;
  constexpr int kWarps = Shape::kWarps;
  __shared__ S maxima[kWarps][kWarp + 1];
  __shared__ S exp_sums[kWarps][kWarp + 1];
  __shared__ S weighted_sums[kWarps][kWarp + 1];
  __shared__ S class_sums[2][kWarp];
  __shared__ S rows_lse[kWarp], rows_weighted[kWarp];
  __shared__ int is_last_block;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * Shape::kRows + lane, B = args.B;
  const bool inside = i < B;
  // The first warp loads what it needs at the end before it waits for anything.
  const int64_t y = warp == 0 && inside ? terms.target[i] : terms.ignore_index;
  const bool ignored = y == terms.ignore_index, out_of_range = !ignored && (y < 0 || y >= args.classes);
  const bool counted = !ignored && !out_of_range;
  const S logit = counted ? in.target_logits[i] : S(0), bias = terms.bias && counted ? terms.bias[y] : S(0);
  const S weight = terms.weight && counted ? terms.weight[y] : S(1);
  S max = -kInfinity<S>, exp_sum = 0, weighted = 0, weights = 0, biases = 0;
  if (inside) {
#pragma unroll Shape::kUnroll
    for (int64_t tile = warp; tile < args.tiles; tile += kWarps) {
      const S next_max = in.max[tile * B + i], next_sum = in.sum[tile * B + i];
      if (terms.smoothed) weighted += in.weighted[tile * B + i];
      const S new_max = next_max > max ? next_max : max, shift = finite_or_zero(new_max);
      exp_sum = exp_sum * exp(max - shift) + next_sum * exp(next_max - shift);
      max = new_max;
    }
  }
  if (terms.smoothed) {
    for (int64_t tile = thread; tile < args.tiles; tile += Shape::kThreads)
      weights += in.weight_sums[tile], biases += in.bias_sums[tile];
    weights = warp_sum(weights), biases = warp_sum(biases);
  }
  maxima[warp][lane] = max, exp_sums[warp][lane] = exp_sum, weighted_sums[warp][lane] = weighted;
  if (lane == 0) class_sums[0][warp] = weights, class_sums[1][warp] = biases;
  __syncthreads();
  // A warp combines the partials of a row, one per lane.
  for (int row = warp; row < kWarp; row += kWarps) {
    const S lane_max = lane < kWarps ? maxima[lane][row] : -kInfinity<S>;
    max = lane_max;
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const S other = __shfl_xor_sync(~0u, max, lanes);
      max = other > max ? other : max;
    }
    exp_sum = warp_sum(lane < kWarps ? exp_sums[lane][row] * exp(lane_max - finite_or_zero(max)) : S(0));
    if (terms.smoothed) weighted = warp_sum(lane < kWarps ? weighted_sums[lane][row] : S(0));
    if (lane == 0) rows_lse[row] = max + log(exp_sum), rows_weighted[row] = weighted;
  }
  __syncthreads();
  if (warp == 0) {
    weights = warp_sum(lane < kWarps ? class_sums[0][lane] : S(0));
    biases = warp_sum(lane < kWarps ? class_sums[1][lane] : S(0));
    weighted = rows_weighted[lane];
    const S others_lse = rows_lse[lane];
    MarginLogit<S> target{logit, S(1), S(0), S(0)};
    if (args.margin) {
      const S margin = args.margin[args.margin_per_class && counted ? y : 0];
      target = apply_margin(logit, load_tau(args.tau), margin, args.margin_kind);
    }
    const S sum = target.value + bias, score = sum == kInfinity<S> ? sum - sum : sum;  // NaN, as in F.cross_entropy
    const S excess = others_lse - score;
    const S nll = softplus(excess), lse = ignored ? others_lse : logaddexp(others_lse, score);
    S loss = weight * nll;
    if (terms.smoothed) {
      // The sum of weight (lse - score) over the classes; functional/cross_entropy.py explains its order.
      const S target_term = bias == -kInfinity<S> ? lse - target.value : nll + bias;
      const S smooth_loss = lse * (weights - weight) - (weighted + biases) + weight * (logit + target_term);
      loss = (S(1) - args.smoothing) * loss + args.smoothing / static_cast<S>(args.classes) * smooth_loss;
    }
    if (ignored) loss = 0;
    if (inside) {
      args.row_stats[kShift * B + i] = others_lse == -kInfinity<S> ? kInfinity<S> : others_lse;
      args.row_stats[kExcess * B + i] = ignored ? kInfinity<S> : excess;
      if (args.margin) {
        args.row_stats[kByLogit * B + i] = target.by_logit;
        args.row_stats[kByTau * B + i] = target.by_tau;
        args.row_stats[kByMargin * B + i] = target.by_margin;
      }
      args.lse[i] = lse;
      if (args.reduction == 0) args.loss[i] = loss;
    }
    const S loss_sum = warp_sum(loss), weight_total = warp_sum(ignored ? S(0) : weight),
            out_of_range_count = warp_sum(out_of_range ? S(1) : S(0));
    if (lane == 0) {
      S* partial = args.partials + static_cast<int64_t>(blockIdx.x) * 3;
      partial[0] = loss_sum, partial[1] = weight_total, partial[2] = out_of_range_count;
      __threadfence();
      is_last_block = atomicAdd(args.blocks_done, 1) == static_cast<int>(gridDim.x) - 1;
    }
  }
  __syncthreads();
  if (!is_last_block || warp > 0) return;
  __threadfence();  // makes the other blocks' partials visible
  S loss_sum = 0, weight_total = 0, out_of_range_count = 0;
  for (int64_t block = lane; block < gridDim.x; block += kWarp) {
    const volatile S* partial = args.partials + block * 3;
    loss_sum += partial[0], weight_total += partial[1], out_of_range_count += partial[2];
  }
  loss_sum = warp_sum(loss_sum), weight_total = warp_sum(weight_total),
  out_of_range_count = warp_sum(out_of_range_count);
  if (lane > 0) return;
  // A mean over no weight is NaN, and so are its gradients, even if label smoothing makes the losses positive.
  const S divisor = weight_total == S(0) ? weight_total / weight_total : weight_total;
  args.scalars[0] = divisor, args.scalars[1] = weights;
  *args.targets_in_range = out_of_range_count == S(0);
  if (args.reduction) *args.loss = args.reduction == 1 ? loss_sum / divisor : loss_sum;
}

}  // namespace gistops::cuda
