// The loss of rows without bias, margin and label smoothing, from the parts of a cross-entropy, and its derivatives.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

namespace gistops {

enum class Reduction { none, mean, sum };

// With O the log-sum-exp over all classes but the target, s the target's logit and x = O - s, the loss of a row is
// log(1 + e^x), which is accurate however small it is.
template <class T>
struct RowLoss {
  int64_t B;
  Reduction reduction;
  const int64_t* target;                // [B], negative for ignored rows
  const T *lse_others, *target_logits;  // [B]
  const T* weight;                      // of the classes, or null

  // Outputs, [B] unless noted:
  //   loss: [1] if it is reduced
  //   lse: of all classes
  //   loss_slopes, lse_slopes: [2, B], the derivatives of each with respect to O and to s
  void compute(T* loss, T* lse, T* loss_slopes, T* lse_slopes) const {
    double loss_sum = 0, weight_sum = 0;
    for (int64_t i = 0; i < B; ++i) {
      const T o = lse_others[i], s = target_logits[i];
      const bool ignored = target[i] < 0;
      const T w = ignored ? T(0) : weight ? weight[target[i]] : T(1);
      const T x = o - s, e = std::exp(-std::abs(x)), tail = std::log1p(e);
      const T large = 1 / (1 + e), small = e / (1 + e);  // the shares of e^O and e^s in e^lse, by size
      const T row_loss = ignored ? T(0) : w * (x > 0 ? x + tail : tail);
      lse_slopes[i] = ignored ? T(1) : x > 0 ? large : small;
      lse_slopes[B + i] = ignored ? T(0) : x > 0 ? small : large;
      lse[i] = ignored || (o == s && std::isinf(o)) ? o : (o > s ? o : s) + tail;
      loss_slopes[i] = ignored ? T(0) : w * lse_slopes[i];
      loss_slopes[B + i] = -loss_slopes[i];
      if (reduction == Reduction::none) loss[i] = row_loss;
      loss_sum += row_loss, weight_sum += w;
    }
    if (reduction == Reduction::none) return;
    *loss = static_cast<T>(reduction == Reduction::mean ? loss_sum / weight_sum : loss_sum);
    if (reduction == Reduction::sum) return;
    for (int64_t i = 0; i < 2 * B; ++i)
      if (target[i % B] >= 0) loss_slopes[i] = static_cast<T>(loss_slopes[i] / weight_sum);
  }
};

}  // namespace gistops
