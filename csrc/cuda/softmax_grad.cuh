// The gradient G of the loss with respect to the scores, from the scores and the statistics that the forward saved.
#pragma once
#include "device.cuh"

namespace gistops::cuda {

// Statistics of each row that the forward saves, [stats, B]. O is the log-sum-exp over all classes but the target, s
// the target's score with margin and bias.
//   kShift: O; inf if there is no other class, so that exp(z - O) is 0
//   kExcess: O - s; inf if the row is ignored
//   kByLogit, kByTau, kByMargin: with a margin, the derivatives of the target's lowered logit
enum RowStat { kShift, kExcess, kByLogit, kByTau, kByMargin };

// The gradient of one row, without the factors that depend on the class.
template <class S>
struct SoftmaxGradRow {
  S factor, weight_grad, shift;  // not the target: G = factor exp(z + bias - shift) + weight_grad weight
  S target_grad, by_logit;       // the target: G = target_grad by_logit; target_grad is with respect to its score
  S tau_grad, margin_grad;       // what the target's margin adds to these gradients
  int target;                    // its position in the chunk of classes, or -1
};

template <class S>
struct SoftmaxGrad {
  const S *grad_loss, *grad_lse;    // elements with the strides below, or null
  int64_t loss_stride, lse_stride;  // from row to row; 0 for a reduced loss
  const S* row_stats;               // [stats, B]
  const S* scalars;                 // [2]: the divisor of a mean; the sum of the weights of all classes
  int64_t B, classes, first_class;  // classes: all of them; first_class: of the chunk
  const int64_t* target;            // [B]
  const S *bias, *weight;           // [classes], or null
  bool has_margin, is_mean;
  int64_t ignore_index;
  S smoothing;

  __device__ __forceinline__ SoftmaxGradRow<S> row(int64_t i) const {
    // All loads but that of the weight come before any branch, so that they do not wait for each other.
    const S excess = row_stats[kExcess * B + i], shift = row_stats[kShift * B + i];
    const int64_t y = target[i];
    const S loss_grad = grad_loss ? grad_loss[i * loss_stride] : S(0);
    const S divisor = scalars[0], weight_sum = scalars[1];
    S lse_grad = grad_lse ? grad_lse[i * lse_stride] : S(0), nll_grad = 0, weight_grad = 0, target_weight = 1;
    const bool counted = y != ignore_index && y >= 0 && y < classes;
    if (grad_loss && weight && counted) target_weight = weight[y];
    const S p_others = S(1) / (S(1) + exp(-excess)), p_target = S(1) / (S(1) + exp(excess));
    if (grad_loss && counted) {
      nll_grad = is_mean ? loss_grad / divisor : loss_grad;
      if (smoothing > S(0)) {
        weight_grad = nll_grad * (-smoothing / static_cast<S>(classes));
        lse_grad -= weight_grad * weight_sum;
        nll_grad *= S(1) - smoothing;
      }
      nll_grad *= target_weight;
    }
    SoftmaxGradRow<S> out;
    out.shift = shift;
    out.factor = (nll_grad + lse_grad) * p_others;
    out.weight_grad = weight_grad;
    out.target_grad = lse_grad * p_target - nll_grad * p_others + weight_grad * target_weight;
    out.by_logit = has_margin ? row_stats[kByLogit * B + i] : S(1);
    out.tau_grad = has_margin ? out.target_grad * row_stats[kByTau * B + i] : S(0);
    out.margin_grad = has_margin ? out.target_grad * row_stats[kByMargin * B + i] : S(0);
    const int64_t at = counted ? y - first_class : -1;
    out.target = at < 0 || at > 0x7fffffff ? -1 : static_cast<int>(at);
    return out;
  }

  // Return the gradient of a row beyond the batch: G is 0.
  __device__ __forceinline__ SoftmaxGradRow<S> no_row() const {
    return {S(0), S(0), kInfinity<S>, S(0), S(0), S(0), S(0), -1};
  }

  // Return G for class k of the chunk, which is not the target, and its score z without bias.
  __device__ __forceinline__ S other_class_grad(const SoftmaxGradRow<S>& row, int64_t k, S z) const {
    const S score = bias ? z + bias[first_class + k] : z;
    const S g = row.factor * exp(score - row.shift);
    return weight ? fma(row.weight_grad, weight[first_class + k], g) : g + row.weight_grad;
  }
};

}  // namespace gistops::cuda
