// log sum e^x over classes that come in blocks, for many rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "block.h"

namespace gistops {

template <class T>
class LogSums {
 public:
  explicit LogSums(int64_t rows) : max_(rows), sum_(rows) {
    std::fill_n(max_.get(), rows, kNone);
    sum_.zero();
  }

  // Rows [i, i + rows) of z [rows, n], contiguous; bias [n] or null.
  void add(int64_t i, int64_t rows, const T* z, int64_t n, const T* bias) const {
    kernels<T>().update_logsumexp(z, n, rows, n, bias, max_.get() + i, sum_.get() + i);
  }

  // The workers' shares together; -inf where there is no score, or none above that.
  static void finish(const std::vector<const LogSums*>& shares, int64_t rows, T* lse) {
    for (int64_t i = 0; i < rows; ++i) {
      T max = kNone;
      for (const LogSums* share : shares) max = std::max(max, share->max_[i]);
      const double shift = max == kNone ? 0 : max;
      double sum = 0;  // a share without a largest score holds e^-inf = 0, or NaN
      for (const LogSums* share : shares)
        sum += share->sum_[i] * (share->max_[i] == kNone ? 1 : std::exp(share->max_[i] - shift));
      lse[i] = static_cast<T>(shift + std::log(sum));
    }
  }

 private:
  static constexpr T kNone = -std::numeric_limits<T>::infinity();
  Scratch<T> max_;
  Scratch<double> sum_;
};

}  // namespace gistops
