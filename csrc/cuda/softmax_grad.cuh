// The gradient of a loss by its scores, from the scores and what the forward kept of each row.
#pragma once
#include "device.cuh"

namespace gistops::cuda {

// What the forward keeps of each row, [., B]: O the log-sum-exp of all classes but the target (inf where there is none,
// so that exp(z - O) is 0); O - s, with s the target's score, margin and bias included (inf where the row is ignored);
// and with a margin the derivatives of the lowered logit.
enum RowNote { kShift, kExcess, kByLogit, kByTau, kByMargin };

template <class S>
struct SoftmaxRow {
  S factor, of_sums, shift;  // G = factor exp(z + bias - shift) + of_sums weight, for all but the target
  S of_target, by_logit, of_tau, of_margin;  // of_target: by the target's score; by_logit: of that by its logit
  int target;                                // the target's place in the run of classes, or -1
};

template <class S>
struct Softmax {
  const S *grad_loss, *grad_lse;  // [B] by these steps, or null
  int64_t loss_step, lse_step;
  const S* rows;              // [., B]
  const S* scalars;           // [2]: what a mean divides by, and the sum of the weights of all classes
  int64_t B, classes, first;  // all classes; the first of the run
  const int64_t* target;      // [B]
  const S *bias, *weight;     // [classes], or null
  bool margin, mean;
  int64_t ignore_index;
  S smoothing;

  __device__ __forceinline__ SoftmaxRow<S> row(int64_t i) const {
    const S excess = rows[kExcess * B + i];
    const S others = S(1) / (S(1) + exp(-excess)), own = S(1) / (S(1) + exp(excess));
    const int64_t y = target[i];
    const bool counted = y != ignore_index && y >= 0 && y < classes;
    S of_lse = grad_lse ? grad_lse[i * lse_step] : S(0), of_loss = 0, of_sums = 0, share = 1;
    if (grad_loss && counted) {
      of_loss = grad_loss[i * loss_step];
      if (mean) of_loss /= scalars[0];
      if (weight) share = weight[y];
      if (smoothing > S(0)) {
        of_sums = of_loss * (-smoothing / static_cast<S>(classes));
        of_lse -= of_sums * scalars[1];
        of_loss *= S(1) - smoothing;
      }
      of_loss *= share;
    }
    SoftmaxRow<S> out;
    out.shift = rows[kShift * B + i];
    out.factor = (of_loss + of_lse) * others;
    out.of_sums = of_sums;
    out.of_target = of_lse * own - of_loss * others + of_sums * share;
    out.by_logit = margin ? rows[kByLogit * B + i] : S(1);
    out.of_tau = margin ? out.of_target * rows[kByTau * B + i] : S(0);
    out.of_margin = margin ? out.of_target * rows[kByMargin * B + i] : S(0);
    const int64_t place = counted ? y - first : -1;
    out.target = place < 0 || place > 0x7fffffff ? -1 : static_cast<int>(place);
    return out;
  }

  // Of a class that is not the target.
  __device__ __forceinline__ S gradient(const SoftmaxRow<S>& row, int64_t k, S z) const {
    const S score = bias ? z + bias[first + k] : z;
    const S g = row.factor * exp(score - row.shift);
    return weight ? fma(row.of_sums, weight[first + k], g) : g + row.of_sums;
  }
};

}  // namespace gistops::cuda
