// The scores of a block of classes, from which logits, losses and the top k are computed.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "equal_slots.h"
#include "gemm.h"
#include "half_product.h"
#include "norms.h"
#include "partition.h"
#include "problem.h"
#include "rotation.h"
#include "scratch.h"

namespace gistops {

// The input's values that all classes need. The norm is a factor of the row, so that no normalized copy is made.
template <class T>
class Input {
 public:
  explicit Input(const Problem<T>& p)
      : q(p.B * p.M), rnorm(p.B), scale(p.B), delta_squares(p.m), p_(p),
        converted_(p.input.template scratch_elements<T>(p.B)), columns_(p.half ? round_up(p.B, kPad) * p.d / 2 : 0) {
    kernels<T>().dots(p.delta, p.m, p.d, nullptr, 0, delta_squares.get(), nullptr, 0);
    compute();
    if (p.half) pack_columns();
  }
  const T* f() const { return p_.input.template is<T>() ? static_cast<const T*>(p_.input.data) : converted_.get(); }
  Matrix<T> rows(int64_t i, int64_t n) const { return {f() + i * p_.d, n, p_.d, p_.d}; }
  // The rows [i, i + n) as columns, for a product in half precision: [d, n], where n is rounded up to kPad. i is a
  // multiple of kPad, and the rows lie within one chunk of kBlockRows rows, as those of rows_from().
  Pairs columns(int64_t i, int64_t n) const {
    const int64_t chunk = i / kBlockRows * kBlockRows, ld = padded_rows(chunk);
    return {columns_.get() + chunk * p_.d / 2 + i - chunk, p_.d / 2, round_up(n, kPad), ld};
  }

  Scratch<T> q;              // [B, M]: f_i . delta_j, 0 in slot 0 of a translation
  Scratch<T> rnorm, scale;   // [B]: 1 / |f_i|, tau / |f_i|
  Scratch<T> delta_squares;  // [m]: |delta_j|^2

 private:
  int64_t padded_rows(int64_t chunk) const { return round_up(std::min(kBlockRows, p_.B - chunk), kPad); }

  // Transposes each chunk as a matrix of pairs of dimensions, which have the size of a float.
  void pack_columns() const {
    const int64_t d = p_.d / 2;
    parallel_for(0, ceil_div(p_.B, kBlockRows), ceil_div(kWorkPerThread, kBlockRows * d), [&](int64_t c, int64_t end) {
      for (; c < end; ++c) {
        const int64_t chunk = c * kBlockRows, rows = std::min(kBlockRows, p_.B - chunk), ld = padded_rows(chunk);
        uint32_t* out = columns_.get() + chunk * d;
        kernels<float>().transpose(static_cast<const float*>(p_.input.row(chunk)), rows, d, d,
                                   reinterpret_cast<float*>(out), ld);
        for (int64_t e = 0; e < d; ++e) std::fill(out + e * ld + rows, out + (e + 1) * ld, 0);
      }
    });
  }

  void compute() const {
    constexpr int64_t kGrain = 16;  // rows that a thread converts, then reads again from its own cache
    const int64_t grains_per_thread = ceil_div(kWorkPerThread, kGrain * p_.d * p_.M);
    parallel_for(0, ceil_div(p_.B, kGrain), grains_per_thread, [&](int64_t first, int64_t last) {
      T squares[kGrain];
      for (int64_t begin = first * kGrain; begin < std::min(last * kGrain, p_.B); begin += kGrain) {
        const int64_t n = std::min(kGrain, p_.B - begin);
        const T* f =
            p_.input.template as<T>(begin, n, converted_.get() + (p_.input.template is<T>() ? 0 : begin * p_.d));
        T* shared_dots = q.get() + (begin + 1) * p_.M - p_.num_shared();
        kernels<T>().dots(f, n, p_.d, p_.delta, p_.num_shared(), squares, shared_dots, p_.M);
        kernels<T>().rnorms(squares, n, &rnorm[begin]);
        for (int64_t i = begin; i < begin + n; ++i) {
          scale[i] = p_.tau * rnorm[i];
          if (!p_.is_rotation()) q[i * p_.M] = 0;
          if (has_nan(i)) scale[i] = std::numeric_limits<T>::quiet_NaN();
        }
      }
    });
  }

  // True if a slot j >= 1 of the row is NaN. The comparisons of the maximum would drop this NaN, so that it goes into
  // the scale of the row.
  bool has_nan(int64_t i) const {
    const T* end = q.get() + (i + 1) * p_.M;
    return std::any_of(end - p_.num_shared(), end, [](T x) { return std::isnan(x); });
  }

  const Problem<T>& p_;
  Scratch<T> converted_;
  Scratch<uint32_t> columns_;
};

// A block of classes: the norms of their vectors, and their scores.
template <class T>
class ClassBlock {
 public:
  // size: classes per block, at most. rows: rows per call of score(), at most.
  ClassBlock(const Problem<T>& p, const Input<T>& input, int64_t size, int64_t rows)
      : p_(p), input_(input), size_(size),
        converted_(p.centers.template scratch_elements<T>(p.half ? group_size(p.d) : size * p.vectors_per_class())),
        squares_(size * p.vectors_per_class()), dots_(size * p.num_shared()), slot_squares_(size), r_(size * p.M),
        turns_(p, p.is_rotation() ? size : 0), product_(p.half             ? half_vectors() * round_up(rows, kPad)
                                                        : p.is_subcenter() ? size * p.M * rows
                                                                           : 0) {}

  // Loads the classes [first, first + n) and computes their norms.
  void load(int64_t first, int64_t n) {
    first_ = first, n_ = n;
    cancelled_.clear();
    if (p_.is_subcenter()) equal_slots_.find(p_.centers, first, n, p_.M);
    const int64_t begin = first * p_.vectors_per_class(), vectors = n * p_.vectors_per_class();
    const bool direct = p_.centers.template is<T>();
    if (p_.norms) {
      if (!p_.half) w_ = p_.centers.template as<T>(begin, vectors, converted_.get());
      return load_norms();
    }
    if (p_.bf16_dots)
      kernels<T>().dots_bf16(static_cast<const uint16_t*>(p_.centers.row(begin)), vectors, p_.d, p_.stored_delta, p_.m,
                             squares_.get(), dots_.get(), p_.m);
    const int64_t group = direct ? vectors : group_size(p_.d), shared = p_.num_shared();
    for (int64_t v = 0; v < vectors && !(p_.half && p_.bf16_dots); v += group) {
      const int64_t rows = std::min(group, vectors - v);
      const T* w = p_.centers.template as<T>(begin + v, rows, converted_.get() + (direct || p_.half ? 0 : v * p_.d));
      if (v == 0 && !p_.half) w_ = w;
      if (!p_.bf16_dots)
        kernels<T>().dots(w, rows, p_.d, p_.delta, shared, squares_.get() + v, dots_.get() + v * shared, shared);
    }
    if (p_.is_subcenter()) return subcenter_norms();
    translation_norms();
    if (p_.is_rotation()) rotation_norms();
  }

  // Writes the norms of load() for load_norms(): R [M, K] at these classes, negative for classes with a cancelled pair.
  void save_norms(T* norms) const {
    for (int64_t j = 0; j < p_.M; ++j) std::copy_n(r_.get() + j * size_, n_, norms + j * p_.K + first_);
    for (const int64_t k : cancelled_)
      for (int64_t j = 0; j < p_.M; ++j) norms[j * p_.K + first_ + k] *= -1;
  }

  // Copies R of this block to `out` [M, n] with row stride ld.
  void copy_rnorms(T* out, int64_t ld) const {
    for (int64_t j = 0; j < p_.M; ++j) std::copy_n(r_.get() + j * size_, n_, out + j * ld);
  }

  // Scores the rows [i, i + rows): logits and slots, both with row stride ld. slots may be null.
  void score(int64_t i, int64_t rows, T* logits, uint8_t* slots, int64_t ld) {
    const ScoreBlock<T> out{.logits = logits, .slots = slots, .ld = ld, .rows = rows, .n = n_};
    if (p_.half) {
      score_in_half(i, out);
    } else if (p_.is_subcenter()) {
      score_subcenters(input_.rows(i, rows), input_.scale.get() + i, out);
    } else {
      const Matrix<T> classes{w_, n_, p_.d, p_.d};
      const Product<T> product(input_.rows(i, rows), classes.t(), logits, ld);
      score_product(product.data, product.ld, i, out);
    }
    equal_slots_.replace(out);
  }

  // The vectors, in the type of computation; null if the products are in half precision.
  const T* w() const { return w_; }
  SlotMatrix<T> r() const { return {.data = r_.get(), .ld = size_, .slots = p_.M}; }

 private:
  void subcenter_norms() {
    for (int64_t j = 0; j < p_.M; ++j) {
      for (int64_t k = 0; k < n_; ++k) slot_squares_[k] = squares_[k * p_.M + j];
      kernels<T>().rnorms(slot_squares_.get(), n_, r_.get() + j * size_);
    }
  }

  // From save_norms().
  void load_norms() {
    for (int64_t k = 0; k < n_; ++k) {
      bool cancelled = false;
      for (int64_t j = 0; j < p_.M; ++j) {
        const T r = p_.norms[j * p_.K + first_ + k];
        cancelled |= r < 0;
        r_[j * size_ + k] = std::abs(r);
      }
      if (cancelled) cancelled_.push_back(k);
    }
  }

  // A rotation keeps |w_k|: all slots have the same norm.
  void rotation_norms() {
    turns_.set(dots_.get(), n_);
    for (int64_t k = 0; k < n_; ++k)
      if (turns_.has_nan(k)) set_nan(k);
    for (int64_t j = 1; j < p_.M; ++j) std::copy_n(r_.get(), n_, r_.get() + j * size_);
  }

  // From |w + delta|^2 = |w|^2 + 2 w.delta + |delta|^2, or from w + delta itself for classes with a cancelled pair. The
  // backward decides from these norms which pairs have cancelled, so they must be exact before any score is.
  void translation_norms() {
    const auto square = [&](int64_t j, int64_t k) {
      return squares_[k] + input_.delta_squares[j - 1] + 2 * dots_[k * p_.m + j - 1];
    };
    const auto cancelled = [&](int64_t j, int64_t k) {
      return cancels(square(j, k), squares_[k], input_.delta_squares[j - 1]);
    };
    const auto too_large = [&](int64_t j, int64_t k) { return square(j, k) > std::numeric_limits<T>::max(); };
    bool special = false;
    kernels<T>().rnorms(squares_.get(), n_, r_.get());
    for (int64_t j = 1; j <= p_.m; ++j) {
      for (int64_t k = 0; k < n_; ++k) {
        slot_squares_[k] = square(j, k);
        special |= cancelled(j, k);  // also a NaN
        special |= too_large(j, k);
      }
      kernels<T>().rnorms(slot_squares_.get(), n_, r_.get() + j * size_);
    }
    if (!special) return;
    for (int64_t k = 0; k < n_; ++k) {
      bool any_cancelled = false, finite = true;
      for (int64_t j = 1; j <= p_.m; ++j) any_cancelled |= cancelled(j, k), finite &= std::isfinite(square(j, k));
      if (!finite) set_nan(k);
      if (any_cancelled && finite) cancelled_.push_back(k);
    }
    if (cancelled_.empty()) return;
    Scratch<T> u(p_.M * p_.d), squares(p_.M), rnorms(p_.M);
    for (const int64_t k : cancelled_) {
      load_slots(k, u);
      kernels<T>().dots(u.get(), p_.M, p_.d, u.get(), 0, squares.get(), nullptr, 0);
      kernels<T>().rnorms(squares.get(), p_.M, rnorms.get());
      for (int64_t j = 0; j < p_.M; ++j) r_[j * size_ + k] = rnorms[j];
    }
  }

  // Writes w_k + delta_j for all slots j to u [M, d].
  void load_slots(int64_t k, const Scratch<T>& u) const {
    const T* w = w_ ? w_ + k * p_.d : p_.centers.template as<T>(first_ + k, 1, converted_.get());
    for (int64_t j = 0; j < p_.M; ++j)
      for (int64_t e = 0; e < p_.d; ++e) u[j * p_.d + e] = w[e] + (j ? p_.delta[(j - 1) * p_.d + e] : 0);
  }

  // Gives slot 0 of class k a NaN, which the comparisons of the maximum keep; they would drop a NaN of a slot j >= 1.
  void set_nan(int64_t k) { r_[k] = std::numeric_limits<T>::quiet_NaN(); }

  void score_subcenters(const Matrix<T>& f, const T* scale, const ScoreBlock<T>& out) {
    const Matrix<T> vectors{w_, n_ * p_.M, p_.d, p_.d};
    const Product<T> product(vectors, f.t(), product_.get(), f.rows);
    kernels<T>().max_over_subcenters(product.data, product.ld, out, r(), scale);
  }

  // Vectors per product in half precision, which stays in L1: those of one class at least.
  int64_t half_vectors() const { return std::max<int64_t>(64, p_.vectors_per_class()); }

  // Calls use(product, ld, k, n) with W f' of the vectors of n classes from k on, for all classes of the block. W is
  // the first operand, so that the centers are read as they are stored.
  template <class Use>
  void multiply_in_half(int64_t i, int64_t rows, Use use) const {
    if constexpr (std::is_same_v<T, float>) {
      const Pairs f = input_.columns(i, rows);
      const int64_t per_class = p_.vectors_per_class(), group = half_vectors() / per_class;
      for (int64_t k = 0; k < n_; k += group) {
        const int64_t n = std::min(group, n_ - k);
        half_product(p_.centers.format, p_.centers.row((first_ + k) * per_class), n * per_class, p_.d, f,
                     product_.get(), f.cols, false);
        use(product_.get(), f.cols, k, n);
      }
    }
  }

  void score_in_half(int64_t i, const ScoreBlock<T>& out) {
    multiply_in_half(i, out.rows, [&](const T* product, int64_t ld, int64_t k, int64_t n) {
      if (!p_.is_subcenter()) return kernels<T>().transpose(product, n, out.rows, ld, out.logits + k, out.ld);
      const ScoreBlock<T> part{out.logits + k, out.slots ? out.slots + k : nullptr, out.ld, out.rows, n};
      kernels<T>().max_over_subcenters(product, ld, part, {r_.get() + k, size_, p_.M}, input_.scale.get() + i);
    });
    if (!p_.is_subcenter()) score_product(out.logits, out.ld, i, out);
  }

  // From the product P of the rows from i on, which may lie in out.logits.
  void score_product(const T* product, int64_t ld, int64_t i, const ScoreBlock<T>& out) {
    const T *scale = input_.scale.get() + i, *q = input_.q.get() + i * p_.M;
    if (p_.is_rotation())
      return kernels<T>().rotation_max_over_slots(product, ld, out, turns_.coeffs(q), r_.get(), scale);
    kernels<T>().max_over_slots(product, ld, out, r(), q, scale);
    score_cancelled(input_.f() + i * p_.d, scale, out);
  }

  // Scores the classes with a cancelled pair again, from w_k + delta_j.
  void score_cancelled(const T* f, const T* scale, const ScoreBlock<T>& out) {
    if (cancelled_.empty()) return;
    const int64_t M = p_.M;
    Scratch<T> u(M * p_.d), scores(out.rows * M);
    for (const int64_t k : cancelled_) {
      load_slots(k, u);
      kernels<T>().dots(f, out.rows, p_.d, u.get(), M, nullptr, scores.get(), M);
      for (int64_t i = 0; i < out.rows; ++i) {
        T best = scores[i * M] * r_[k];
        uint8_t slot = 0;
        for (int64_t j = 1; j < M; ++j) {
          const T score = scores[i * M + j] * r_[j * size_ + k];
          if (score > best) best = score, slot = static_cast<uint8_t>(j);
        }
        out.logits[i * out.ld + k] = best * scale[i];
        if (out.slots) out.slots[i * out.ld + k] = slot;
      }
    }
  }

  const Problem<T>& p_;
  const Input<T>& input_;
  int64_t size_, first_ = 0, n_ = 0;
  Scratch<T> converted_;       // the vectors, or a group of them
  Scratch<T> squares_, dots_;  // |w|^2, w . delta_j
  Scratch<T> slot_squares_;    // |w + delta_j|^2 of one slot
  Scratch<T> r_;               // [M, size]: R = 1 / |w_k + delta_j|
  ClassTurns<T> turns_;        // of a rotation
  Scratch<T> product_;         // of sub-centers: [size M, rows]; in half precision: [half_vectors(), rows]
  const T* w_ = nullptr;
  EqualSlots equal_slots_;          // of sub-centers
  std::vector<int64_t> cancelled_;  // classes with a cancelled pair, within the block
};

}  // namespace gistops
