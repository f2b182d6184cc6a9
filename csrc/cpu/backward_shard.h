// One worker's part of the backward. With G = dL/dlogits, z the logits and j* the winning slot:
//   H[i, k] = tau G R[j*, k] / |f_i|       S[i, j] = sum over k with j* = j of H[i, k]
//   T[j, k] = R[j, k]^2 sum over i with j* = j of G z
//   dw_k = (H' f)_k - sum_j T[j, k] u_kj,   ddelta_j = (S' f)_j - sum_k T[j, k] u_kj,   u_kj = w_k + delta_j
//   g = H w + S delta,   df_i = g_i - (g_i . f_i) f_i / |f_i|^2,   dtau = sum G z / tau
// Rotations: u_kj has the norm of w_k, and T sums over all slots. S and the sums over i give the gradients of the
// coefficients, and these add terms in the directions to dw and g (rotation.h).
// Sub-centers: dw_kj = sum over i with j* = j of H[i, k] f_i, - T[j, k] w_kj, and g_i = sum over k of H[i, k] w_kj*.
#pragma once
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "half_backward.h"
#include "scores.h"

namespace gistops {

// Pointers to the gradients, null where not needed: of input and centers in their storage formats, the others in the
// type of computation. displacements: of Problem::delta.
struct Gradients {
  void *input, *centers, *displacements, *tau;
  void* turns = nullptr;
};

inline void* gradient_row(void* gradient, const StoredMatrix& argument, int64_t row) {
  return static_cast<char*>(gradient) + row * argument.d * argument.element_size();
}

// A shard accumulates the gradients of its own classes, and partial sums of all other gradients over its classes.
// GradSource provides G, the logits and the slots: SavedScores (backward.h) from saved tensors, LossScores
// (cross_entropy.h) for a loss.
template <class T, class GradSource>
class BackwardShard {
 public:
  // first: this shard accumulates the input's gradient in out.input, if the formats allow it.
  BackwardShard(const Problem<T>& p, const Input<T>& input, const InputPairs& pairs, const Gradients& out, int64_t size,
                GradSource source, bool first)
      : g(out.input ? (p.half_backward() ? round_up(p.B, kPad) : p.B) * p.d : 0,
          first && p.input.template is<T>() ? static_cast<T*>(out.input) : nullptr),
        s((out.input || out.displacements) && p.num_shared() ? p.B * p.M : 0),
        dd(out.displacements ? p.num_shared() * p.d : 0), turns(p.is_rotation() ? 3 * (p.M - 1) : 0), p_(p),
        input_(input), pairs_(pairs), out_(out), size_(size), source_(std::move(source)),
        need_h_(out.input || out.centers), need_t_(out.centers || out.displacements),
        in_place_(p.centers.template is<T>()), h_(need_h_ ? std::min(kBlockRows, p.B) * size : 0),
        t_(need_t_ ? p.M * size : 0), block_dd_(out.displacements ? p.num_shared() * p.d : 0),
        dw_(out.centers && (!in_place_ || GradSource::kStashed) ? size * p.vectors_per_class() * p.d : 0),
        class_dots_(p.is_rotation() ? p.M * size : 0), class_coeffs_(p.is_rotation() ? 2 * p.M * size : 0),
        class_turns_(p, p.is_rotation() ? size : 0),
        half_products_(p, size, p.half_backward() && out.input, p.half_backward() && out.centers),
        vectors_(p.half_backward() ? group_size(p.d) * p.d : 0) {
    g.zero(), s.zero(), dd.zero(), turns.zero();
  }

  // Adds the classes [k, k + n).
  void add_block(int64_t k, int64_t n) {
    first_ = k, n_ = n;
    const T* w = source_.begin(k, n);  // null if the products are in half precision
    half_products_.begin(k, n);
    const int64_t vectors = n * p_.vectors_per_class();
    void* grad = out_.centers ? gradient_row(out_.centers, p_.centers, k * p_.vectors_per_class()) : nullptr;
    // Scores stashed in the gradient of the centers are read until the last row: accumulate elsewhere.
    T* dw = !grad ? nullptr : in_place_ && !GradSource::kStashed ? static_cast<T*>(grad) : dw_.get();
    // With one block of rows, subtract_norm_terms() reads the product where it lies and writes dw once.
    const bool one_product = p_.B > 0 && source_.rows_from(0) == p_.B && !p_.is_subcenter() && !p_.half_backward();
    if (dw && !one_product && (!p_.half_backward() || p_.B == 0)) std::fill_n(dw, vectors * p_.d, T(0));
    std::optional<Product<T>> hf;
    t_.zero();
    if (p_.is_rotation()) {
      for_each_group(w, [&](int64_t c, int64_t count, const T* group) {
        kernels<T>().dots(group, count, p_.d, p_.delta, p_.M, nullptr, class_dots_.get() + c * p_.M, p_.M);
      });
      class_turns_.set(class_dots_.get(), n);
      class_coeffs_.zero();
    }
    const std::vector<Pair> cancelled = cancelled_pairs();
    for (int64_t i = 0, rows = 0; i < p_.B; i += rows) {
      rows = source_.rows_from(i);
      const GradBlock<T> block = source_.rows(i, rows);
      T* reused = cancelled.empty() ? source_.reusable_grad() : nullptr;
      const Matrix<T> h{reused ? reused : h_.get(), block.rows, n, reused ? block.ld : size_};
      const Matrix<T> f = input_.rows(i, block.rows), classes{w, n, p_.d, p_.d};
      route(block, i, source_.r(), need_h_ ? const_cast<T*>(h.data) : nullptr, h.ld, cancelled.empty(), true);
      if (p_.is_subcenter()) {
        if (out_.input) kernels<T>().add_winners(block, h.data, h.ld, w, p_.M, p_.d, g.get() + i * p_.d);
        if (dw) kernels<T>().add_to_winners(block, h.data, h.ld, f.data, p_.M, p_.d, dw);
        continue;
      }
      if constexpr (std::is_same_v<T, float>) {
        if (p_.half_backward()) {
          if (dw) half_products_.centers(h, pairs_.rows(i, block.rows), dw, i > 0);
          if (!cancelled.empty()) add_cancelled(cancelled, block, w, i);
          if (out_.input) half_products_.add_input(h, g.get() + i * p_.d);
          continue;
        }
      }
      // The product for g comes first: hf keeps its memory.
      if (out_.input && cancelled.empty()) add_product(h, classes, g.get() + i * p_.d);
      if (dw && one_product) hf.emplace(h.t(), f, dw, p_.d);
      if (dw && !one_product) add_product(h.t(), f, dw);
      if (cancelled.empty()) continue;
      add_cancelled(cancelled, block, w, i);
      if (out_.input) add_product(h, classes, g.get() + i * p_.d);
    }
    if (need_t_) subtract_norm_terms(w, hf ? hf->data : dw, grad && in_place_ ? static_cast<T*>(grad) : dw);
  }

  Scratch<T> g, s, dd;    // [B, d], [B, M], [num_shared(), d]
  Scratch<double> turns;  // of a rotation: [3, M - 1]
  double tau = 0;         // sum of G z

 private:
  struct Pair {
    int64_t k, j;  // class within the block, and slot
  };

  // Writes h, unless it is null, and adds the rows [i, i + rows) of the block to s (if sum_s), and to t and tau (if
  // sum_t).
  void route(const GradBlock<T>& block, int64_t i, const SlotMatrix<T>& r, T* h, int64_t ld_h, bool sum_s, bool sum_t) {
    const T* scale = input_.scale.get() + i;
    if (p_.is_rotation())
      return kernels<T>().rotation_route_grad(block, class_turns_.coeffs(input_.q.get() + i * p_.M), r.data, scale,
                                              {.h = h,
                                               .ld_h = ld_h,
                                               .s = s.get() + i * p_.M,
                                               .class_a = class_coeffs_.get(),
                                               .class_b = class_coeffs_.get() + p_.M * size_,
                                               .ld_class = size_,
                                               .t = t_.get(),
                                               .tau = out_.tau ? &tau : nullptr});
    const bool need_s = p_.m && (out_.input || out_.displacements);
    kernels<T>().route_grad(block, r, scale,
                            {.h = h,
                             .ld_h = ld_h,
                             .s = sum_s && need_s ? s.get() + i * p_.M : nullptr,
                             .t = sum_t && need_t_ ? t_.get() : nullptr,
                             .ld_t = size_,
                             .tau = sum_t && out_.tau ? &tau : nullptr});
  }

  // The pairs of this block whose sums lose digits (norms.h).
  std::vector<Pair> cancelled_pairs() const {
    std::vector<Pair> pairs;
    const SlotMatrix<T> r = source_.r();
    const auto square = [&](int64_t j, int64_t c) {
      const T rnorm = r.data[j * r.ld + c];
      return is_clamped(rnorm) ? 0 : 1 / (rnorm * rnorm);  // a clamped norm hides the square
    };
    for (int64_t j = 1; j <= p_.m; ++j)
      for (int64_t c = 0; c < n_; ++c)
        if (cancels(square(j, c), square(0, c), input_.delta_squares[j - 1])) pairs.push_back({c, j});
    return pairs;
  }

  // Adds these pairs to g and dd one by one, and routes all others to h and s.
  void add_cancelled(const std::vector<Pair>& pairs, const GradBlock<T>& block, const T* w, int64_t i) {
    Scratch<T> r(p_.M * n_), u(p_.d);
    for (int64_t j = 0; j < p_.M; ++j) std::copy_n(source_.r().data + j * source_.r().ld, n_, r.get() + j * n_);
    for (const Pair& pair : pairs) {
      const T rnorm = std::exchange(r[pair.j * n_ + pair.k], T(0));
      const T* center = w ? w + pair.k * p_.d : p_.centers.template as<T>(first_ + pair.k, 1, vectors_.get());
      for (int64_t e = 0; e < p_.d; ++e) u[e] = center[e] + p_.delta[(pair.j - 1) * p_.d + e];
      for (int64_t row = 0; row < block.rows; ++row) {
        const int64_t entry = row * block.ld + pair.k;
        if (block.slots[entry] != pair.j) continue;
        const T h = block.grad[entry] * rnorm * input_.scale[i + row];
        const T* f = input_.f() + (i + row) * p_.d;
        for (int64_t e = 0; e < p_.d; ++e) {
          if (out_.input) g[(i + row) * p_.d + e] += h * u[e];
          if (out_.displacements) dd[(pair.j - 1) * p_.d + e] += h * f[e];
        }
      }
    }
    route(block, i, {.data = r.get(), .ld = n_, .slots = p_.M}, need_h_ ? h_.get() : nullptr, size_, true, false);
  }

  // Calls use(k, n, vectors) for the centers of the block: at once, or in groups that are converted in turn.
  template <class Use>
  void for_each_group(const T* w, Use use) const {
    for (int64_t k = 0, group = w ? n_ : group_size(p_.d); k < n_; k += group) {
      const int64_t n = std::min(group, n_ - k);
      use(k, n, w ? w : p_.centers.template as<T>(first_ + k, n, vectors_.get()));
    }
  }

  // dw = hf - sum_j T u_j, and the same terms in dd. Stores dw if it is not the gradient itself.
  void subtract_norm_terms(const T* w, const T* hf, T* dw) {
    const SlotMatrix<T> r = source_.r();
    for (int64_t j = 0; j < p_.M; ++j)
      for (int64_t c = 0; c < n_; ++c) {
        const T rnorm = r.data[j * r.ld + c];
        t_[j * size_ + c] *= is_clamped(rnorm) ? 0 : rnorm * rnorm;
      }
    if (p_.is_subcenter()) {
      Scratch<T> t(n_ * p_.M);  // one factor per row of w
      for (int64_t v = 0; v < n_ * p_.M; ++v) t[v] = t_[v % p_.M * size_ + v / p_.M];
      kernels<T>().norm_correction(w, n_ * p_.M, p_.d, nullptr, {.data = t.get(), .ld = 0, .slots = 1}, hf, dw,
                                   nullptr);
      if (dw && !in_place_)
        kernels<T>().store(dw, n_ * p_.M * p_.d, p_.centers.format,
                           gradient_row(out_.centers, p_.centers, first_ * p_.M));
      return;
    }
    // dd is summed per block first: in two levels, sums over many classes have smaller rounding errors.
    block_dd_.zero();
    T *grad_a = class_coeffs_.get(), *grad_b = class_coeffs_.get() + p_.M * size_;
    if (p_.is_rotation()) class_turns_.backward(grad_a, grad_b, grad_a, turns.get());
    for_each_group(w, [&](int64_t k, int64_t n, const T* vectors) {
      const T* product = dw ? hf + k * p_.d : nullptr;
      T *out = dw ? dw + k * p_.d : nullptr, *block_dd = out_.displacements ? block_dd_.get() : nullptr;
      if (p_.is_rotation()) {  // grad_a now holds the weights of the directions
        kernels<T>().rotation_correction(vectors, n, p_.d, p_.delta, t_.get() + k, {grad_a + k, size_, p_.M}, product,
                                         out, block_dd);
      } else {
        kernels<T>().norm_correction(vectors, n, p_.d, p_.delta, {t_.get() + k, size_, p_.m + 1}, product, out,
                                     block_dd);
      }
      if (dw && !in_place_)
        kernels<T>().store(out, n * p_.d, p_.centers.format, gradient_row(out_.centers, p_.centers, first_ + k));
    });
    if (out_.displacements) dd.add(block_dd_);
  }

  const Problem<T>& p_;
  const Input<T>& input_;
  const InputPairs& pairs_;
  const Gradients out_;
  const int64_t size_;
  GradSource source_;
  const bool need_h_, need_t_, in_place_;
  int64_t first_ = 0, n_ = 0;      // the current block: its first class, and the number of its classes
  Scratch<T> h_, t_;               // [rows, size], [M, size]
  Scratch<T> block_dd_, dw_;       // [num_shared(), d], [size, vectors per class, d]
  Scratch<T> class_dots_;          // of a rotation: [size, M]
  Scratch<T> class_coeffs_;        // of a rotation: [2, M, size], the gradients of the coefficients
  ClassTurns<T> class_turns_;      // of a rotation
  HalfProducts<T> half_products_;  // products in half precision, and
  Scratch<T> vectors_;             // a group of converted vectors
};

}  // namespace gistops
