// The products of the backward in half precision, g += H W and dw += H'f. They round H to the format of its operands.
#pragma once
#include "gemm.h"
#include "half_product.h"
#include "partition.h"
#include "problem.h"
#include "scratch.h"

namespace gistops {

// The rows of the input as pairs, [rows / 2, d]. All workers share them.
class InputPairs {
 public:
  template <class T>
  InputPairs(const Problem<T>& p, bool needed) : d_(p.d), pairs_(needed ? round_up(p.B, kPad) / 2 * p.d : 0) {
    if (!needed) return;
    pairs_.zero();
    parallel_for(0, ceil_div(p.B, kPad), ceil_div(kWorkPerThread, kPad * p.d), [&](int64_t begin, int64_t end) {
      const int64_t i = begin * kPad, rows = std::min(end * kPad, p.B) - i;
      kernels<T>().pair_rows(static_cast<const uint16_t*>(p.input.row(i)), rows, p.d, pairs_.get() + i / 2 * p.d);
    });
  }
  // The rows [i, i + n), for even i. n is rounded up to kPad, with rows of 0.
  Pairs rows(int64_t i, int64_t n) const { return {pairs_.get() + i / 2 * d_, round_up(n, kPad) / 2, d_, d_}; }

 private:
  int64_t d_;
  Scratch<uint32_t> pairs_;
};

// The products of a block of classes with rows of the input.
template <class T>
class HalfProducts {
 public:
  // classes: per block, at most. input, centers: the gradients that are asked for.
  HalfProducts(const Problem<T>& p, int64_t classes, bool input, bool centers)
      : centers_(p.centers), rows_(round_up(std::min(kBlockRows, p.B), kPad)), width_(round_up(classes, 2)),
        w_(input ? width_ / 2 * p.d : 0), h_(input || centers ? rows_ * width_ : 0),
        strip_(centers ? kStrip * rows_ : 0), need_input_(input) {}

  // Moves to the classes [k, k + n).
  void begin(int64_t k, int64_t n) {
    n_ = n;
    if (need_input_) kernels<T>().pair_rows(static_cast<const uint16_t*>(centers_.row(k)), n, centers_.d, w_.get());
  }

  // g [h.rows rounded up to kPad, d] += H W.
  void add_input(const Matrix<T>& h, float* g) const {
    const int64_t rows = round_up(h.rows, kPad), width = round_up(n_, 2);
    for (int64_t i = 0; i < h.rows; ++i) {
      kernels<T>().store(h.data + i * h.ld, n_, centers_.format, &h_[i * width]);
      if (width > n_) h_[i * width + n_] = 0;
    }
    std::fill(&h_[h.rows * width], &h_[rows * width], 0);
    half_product(centers_.format, h_.get(), rows, width, {w_.get(), width / 2, centers_.d, centers_.d}, g, centers_.d,
                 true);
  }

  // dw [n, d] = H'f, or += H'f if `add`.
  void centers(const Matrix<T>& h, const Pairs& f, float* dw, bool add) const {
    const int64_t rows = 2 * f.rows;
    for (int64_t c = 0; c < n_; c += kStrip) {
      const int64_t width = std::min(kStrip, n_ - c);
      kernels<T>().transpose(h.data + c, h.rows, width, h.ld, strip_.get(), rows);
      for (int64_t e = 0; e < width; ++e) std::fill(&strip_[e * rows + h.rows], &strip_[(e + 1) * rows], T(0));
      kernels<T>().store(strip_.get(), width * rows, centers_.format, &h_[c * rows]);
    }
    half_product(centers_.format, h_.get(), n_, rows, f, dw, centers_.d, add);
  }

 private:
  static constexpr int64_t kStrip = 16;  // classes of H that are transposed in L1

  const StoredMatrix centers_;
  int64_t rows_, width_, n_ = 0;
  Scratch<uint32_t> w_;  // pairs of classes: [width / 2, d]
  Scratch<uint16_t> h_;  // H [rows, width] or H' [width, rows], rounded
  Scratch<T> strip_;     // [kStrip, rows]
  bool need_input_;
};

}  // namespace gistops
