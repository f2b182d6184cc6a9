// The forward: logits[i, k] = tau * max_j (P[i, k] + Q[i, j]) R[k, j] / |f_i|, with P = f W' from BLAS in blocks, and
// the maximum taken while a block of P is in cache. The features' norm is a factor of the row, so that no
// normalised copy of them is made.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <vector>

#include "block.h"
#include "products.h"

namespace gistops {

// Norms of the features and their products with the displacements.
//   q [B, M]: f_i . delta_j, 0 in slot 0;   rnorm [B]: 1 / |f_i|;   scale [B]: tau / |f_i|
template <class T>
void project_features(const Problem<T>& p, T* converted, T* q, T* rnorm, T* scale) {
  constexpr int64_t kGrain = 16;  // rows: what a thread converts and reads again from its own cache
  const int64_t share = ceil_div(kWork, kGrain * p.d * p.M());
  torch::stable::parallel_for(0, ceil_div(p.B, kGrain), share, [&](int64_t first, int64_t last) {
    T squares[kGrain];
    for (int64_t begin = first * kGrain; begin < std::min(last * kGrain, p.B); begin += kGrain) {
      const int64_t n = std::min(kGrain, p.B - begin);
      const T* f = p.input.template as<T>(begin, n, converted + (p.input.template is<T>() ? 0 : begin * p.d));
      kernels<T>().dots(f, n, p.d, p.delta, p.m, squares, q + begin * p.M() + 1, p.M());
      for (int64_t i = begin; i < begin + n; ++i) {
        rnorm[i] = clamped_rnorm(squares[i - begin]);
        scale[i] = p.tau * rnorm[i];
        q[i * p.M()] = 0;
        // A comparison would drop a NaN of slot j >= 1: it goes into the row's factor instead.
        for (int64_t j = 1; j <= p.m; ++j)
          if (std::isnan(q[i * p.M() + j])) scale[i] = std::numeric_limits<T>::quiet_NaN();
      }
    }
  });
}

// One block of classes: their vectors' norms, from |w + delta|^2 = |w|^2 + 2 w.delta + |delta|^2.
template <class T>
class CenterBlock {
 public:
  CenterBlock(const Problem<T>& p, const T* delta_squares, int64_t size)
      : p_(p), delta_squares_(delta_squares), size_(size), converted_(p.centers.template scratch_elements<T>(size)),
        squares_(size), dots_(size * p.m), r_(size * p.M()) {}

  void load(int64_t first, int64_t n) {
    constexpr int64_t kGroup = 16;  // rows converted and read again from L1
    n_ = n;
    cancelled_.clear();
    const bool direct = p_.centers.template is<T>();
    for (int64_t k = 0; k < n; k += direct ? n : kGroup) {
      const int64_t rows = direct ? n : std::min(kGroup, n - k);
      const T* w = p_.centers.template as<T>(first + k, rows, converted_.get() + (direct ? 0 : k * p_.d));
      if (k == 0) w_ = w;
      kernels<T>().dots(w, rows, p_.d, p_.delta, p_.m, squares_.get() + k, dots_.get() + k * p_.m, p_.m);
    }
    for (int64_t k = 0; k < n; ++k) {
      r_[k] = clamped_rnorm(squares_[k]);
      bool cancelled = false;
      for (int64_t j = 1; j <= p_.m; ++j) {
        const T square = squares_[k] + delta_squares_[j - 1] + 2 * dots_[k * p_.m + j - 1];
        r_[j * size_ + k] = clamped_rnorm(square);
        cancelled |= cancels(square, squares_[k], delta_squares_[j - 1]);
        // As in project_features: slot 0 carries NaN to the maximum.
        if (std::isnan(square) || !std::isfinite(delta_squares_[j - 1])) r_[k] = std::numeric_limits<T>::quiet_NaN();
      }
      if (cancelled) cancelled_.push_back(k);
    }
  }

  // Scores the classes that hold a cancelled pair again. f, scale, logits, slots: of `rows` features.
  void score_cancelled(const T* f, int64_t rows, const T* scale, T* logits, int64_t ld, uint8_t* slots) {
    if (cancelled_.empty()) return;
    const int64_t M = p_.M();
    Scratch<T> u(M * p_.d), squares(M), scores(rows * M);
    for (const int64_t k : cancelled_) {
      for (int64_t j = 0; j < M; ++j)
        for (int64_t e = 0; e < p_.d; ++e) u[j * p_.d + e] = w_[k * p_.d + e] + (j ? p_.delta[(j - 1) * p_.d + e] : 0);
      kernels<T>().dots(u.get(), M, p_.d, u.get(), 0, squares.get(), nullptr, 0);
      for (int64_t j = 0; j < M; ++j)
        if (!std::isnan(r_[k])) r_[j * size_ + k] = clamped_rnorm(squares[j]);
      kernels<T>().dots(f, rows, p_.d, u.get(), M, nullptr, scores.get(), M);
      for (int64_t i = 0; i < rows; ++i) {
        T best = scores[i * M] * r_[k];
        uint8_t slot = 0;
        for (int64_t j = 1; j < M; ++j) {
          const T score = scores[i * M + j] * r_[j * size_ + k];
          if (score > best) best = score, slot = static_cast<uint8_t>(j);
        }
        logits[i * ld + k] = best * scale[i];
        slots[i * ld + k] = slot;
      }
    }
  }

  const T* w() const { return w_; }
  const T* r() const { return r_.get(); }  // [M, size]

 private:
  const Problem<T>& p_;
  const T* delta_squares_;
  int64_t size_, n_ = 0;
  Scratch<T> converted_, squares_, dots_, r_;
  const T* w_ = nullptr;
  std::vector<int64_t> cancelled_;
};

// logits [B, K], slots [B, K], center_rnorms [M, K], input_rnorms [B]
template <class T>
void forward(const Problem<T>& p, T* logits, uint8_t* slots, T* center_rnorms, T* input_rnorms) {
  const int64_t M = p.M(), threads = workers(p);
  const Kernels<T>& kern = kernels<T>();
  Scratch<T> converted(p.input.template scratch_elements<T>(p.B)), q(p.B * M), scale(p.B), delta_squares(p.m);
  kern.dots(p.delta, p.m, p.d, nullptr, 0, delta_squares.get(), nullptr, 0);
  project_features(p, converted.get(), q.get(), input_rnorms, scale.get());
  const T* f = p.input.template is<T>() ? static_cast<const T*>(p.input.data) : converted.get();

  // Threads share out the classes. Where there are too few, they share the rows too, and each makes the norms itself.
  const Partition blocks(p.K, threads);
  const int64_t groups = blocks.count >= threads ? 1
                                                 : std::clamp<int64_t>(threads / std::max<int64_t>(blocks.count, 1), 1,
                                                                       std::max<int64_t>(1, p.B / 64));
  const int64_t group_rows = ceil_div(p.B, groups);
  torch::stable::parallel_for(0, blocks.count * groups, 1, [&](int64_t begin, int64_t end) {
    CenterBlock<T> block(p, delta_squares.get(), blocks.size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / groups * blocks.size, n = std::min(blocks.size, p.K - k);
      const int64_t first = task % groups * group_rows, last = std::min(first + group_rows, p.B);
      block.load(k, n);
      for (int64_t i = first; i < last; i += kRows) {
        const int64_t rows = std::min(kRows, last - i);
        T* out = logits + i * p.K + k;
        uint8_t* out_slots = slots + i * p.K + k;
        const Matrix<T> features{f + i * p.d, rows, p.d, p.d}, classes{block.w(), n, p.d, p.d};
        const Product<T> product(features, classes.t(), out, p.K);
        kern.pool(product.data, product.ld, out, out_slots, p.K, rows, n, q.get() + i * M, block.r(), blocks.size, M,
                  scale.get() + i);
        block.score_cancelled(f + i * p.d, rows, scale.get() + i, out, p.K, out_slots);
      }
      if (first == 0)
        for (int64_t j = 0; j < M; ++j) std::copy_n(block.r() + j * blocks.size, n, center_rnorms + j * p.K + k);
    }
  });
}

}  // namespace gistops
