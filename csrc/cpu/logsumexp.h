// The log-sum-exp of rows of scores that arrive one block of classes at a time.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa/kernels.h"
#include "scratch.h"

namespace gistops {

template <class T>
class RunningLogSumExp {
 public:
  explicit RunningLogSumExp(int64_t rows) : max_(rows), sum_(rows) {
    std::fill_n(max_.get(), rows, kNone);
    sum_.zero();
  }

  // Adds z [rows, n] to rows [i, i + rows). bias is [n] or null.
  void add(int64_t i, int64_t rows, const T* z, int64_t n, const T* bias) const {
    kernels<T>().update_logsumexp(z, rows, n, bias, max_.get() + i, sum_.get() + i);
  }

  // Merges the partial results of all workers, as torch.logsumexp: a row without scores above -inf gives -inf, and a
  // row with a score of +inf and none of NaN gives +inf.
  static void merge(const std::vector<const RunningLogSumExp*>& parts, int64_t rows, T* lse) {
    for (int64_t i = 0; i < rows; ++i) {
      T max = kNone;
      for (const RunningLogSumExp* part : parts) max = std::max(max, part->max_[i]);
      const double shift = std::isinf(max) ? 0 : max;
      double sum = 0;
      for (const RunningLogSumExp* part : parts)  // the sum of a part without a maximum is e^-inf = 0, or NaN
        sum += part->sum_[i] * (part->max_[i] == kNone ? 1 : std::exp(part->max_[i] - shift));
      lse[i] = static_cast<T>(shift + std::log(sum));
    }
  }

 private:
  static constexpr T kNone = -std::numeric_limits<T>::infinity();
  Scratch<T> max_;
  Scratch<double> sum_;
};

}  // namespace gistops
