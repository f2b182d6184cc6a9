// The backward, with H and T of DESIGN-style notation formed block by block (G = grad, c = logits / tau, j* = slot):
//   H[i, k] = tau G R[k, j*] / |f_i|       S[i, j] = sum over k with j* = j of H[i, k]
//   T[k, j] = R[k, j]^2 sum over i with j* = j of G logits
//   dw_k = (H' f)_k - sum_j T[k, j] u_kj    ddelta_j = (S' f)_j - sum_k T[k, j] u_kj    u_kj = w_k + delta_j
//   g = H w + S delta,  df_i = g_i - (g_i . f_i) f_i / |f_i|^2    dtau = sum G c
// Every sum over classes is made by one worker in order, and workers are added in order: the same bits each time.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "blas.h"
#include "block.h"

namespace gistops {

// Where to put the gradients; null where one is not needed. In the storage format of the argument.
struct Gradients {
  void *input, *centers, *displacements, *tau;
};

// One worker's share of the sums over classes.
template <class T>
struct Partial {
  Scratch<T> g, s, dd;  // [B, d], [B, M], [m, d]
  T tau = 0;
  Partial(int64_t g_size, int64_t s_size, int64_t dd_size) : g(g_size), s(s_size), dd(dd_size) {
    std::fill_n(s.get(), s_size, T(0));
    std::fill_n(dd.get(), dd_size, T(0));
  }
};

template <class T>
class Backward {
 public:
  Backward(const Problem<T>& p, const T* grad, const T* logits, const uint8_t* slots, const T* center_rnorms,
           const T* input_rnorms, const Gradients& out)
      : p_(p), grad_(grad), logits_(logits), slots_(slots), r_(center_rnorms), rnorm_(input_rnorms), out_(out),
        blocks_(p.K, torch::stable::get_num_threads()), converted_(p.input.template scratch_elements<T>(p.B)),
        scale_(p.B), f_(p.input.template as<T>(0, p.B, converted_.get())) {
    for (int64_t i = 0; i < p.B; ++i) scale_[i] = p.tau * rnorm_[i];
  }

  void run() {
    const bool sums = out_.input || out_.displacements;
    const int64_t workers = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(blocks_.count, 1));
    std::vector<Partial<T>> partials;
    for (int64_t i = 0; i < workers; ++i)
      partials.emplace_back(out_.input ? p_.B * p_.d : 0, sums ? p_.B * p_.M() : 0, out_.displacements ? p_.m * p_.d : 0);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        share(partials[i], blocks_.count * i / workers, blocks_.count * (i + 1) / workers);
    });
    finish(partials);
  }

 private:
  // Blocks [first, last) of classes: their own gradients whole, and their part of the sums over classes.
  void share(Partial<T>& sums, int64_t first, int64_t last) const {
    const int64_t M = p_.M(), size = blocks_.size;
    const bool products = out_.input || out_.centers, corrections = out_.centers || out_.displacements;
    const bool in_place = p_.centers.template is<T>();
    Scratch<T> h(products ? std::min(kRows, p_.B) * size : 0), t(corrections ? M * size : 0);
    Scratch<T> converted(p_.centers.template scratch_elements<T>(size));
    Scratch<T> dw_scratch(out_.centers && !in_place ? size * p_.d : 0), dd(out_.displacements ? p_.m * p_.d : 0);
    for (int64_t b = first; b < last; ++b) {
      const int64_t k = b * size, n = std::min(size, p_.K - k);
      const T* w = p_.centers.template as<T>(k, n, converted.get());
      T* dw = !out_.centers ? nullptr : in_place ? static_cast<T*>(out_.centers) + k * p_.d : dw_scratch.get();
      if (corrections) std::fill_n(t.get(), M * size, T(0));
      for (int64_t i = 0; i < p_.B; i += kRows) {
        const int64_t rows = std::min(kRows, p_.B - i), at = i * p_.K + k;
        kernels<T>().route(grad_ + at, logits_ + at, p_.K, slots_ + at, rows, n, r_ + k, p_.K, M, scale_.get() + i,
                           products ? h.get() : nullptr, size, out_.input || out_.displacements ? sums.s.get() + i * M : nullptr,
                           corrections ? t.get() : nullptr, size, out_.tau ? &sums.tau : nullptr);
        if (dw)
          blas::gemm<T>(blas::Op::transposed, blas::Op::none, n, p_.d, rows, h.get(), size, f_ + i * p_.d, p_.d, i > 0, dw, p_.d);
        if (out_.input)
          blas::gemm<T>(blas::Op::none, blas::Op::none, rows, p_.d, n, h.get(), size, w, p_.d, b > first, sums.g.get() + i * p_.d, p_.d);
      }
      if (!corrections) continue;
      for (int64_t j = 0; j < M; ++j)
        for (int64_t c = 0; c < n; ++c) {
          const T r = r_[j * p_.K + k + c];
          t[j * size + c] *= r >= static_cast<T>(1 / kMinNorm) ? 0 : r * r;  // a clamped norm is constant
        }
      if (dw && p_.B == 0) std::fill_n(dw, n * p_.d, T(0));
      // Sums over many classes are made in two levels, to keep rounding errors small.
      if (out_.displacements) std::fill_n(dd.get(), p_.m * p_.d, T(0));
      kernels<T>().correct(w, n, p_.d, p_.delta, M, t.get(), size, dw, out_.displacements ? dd.get() : nullptr);
      if (out_.displacements)
        for (int64_t e = 0; e < p_.m * p_.d; ++e) sums.dd[e] += dd[e];
      if (dw && !in_place)
        kernels<T>().store(dw, n * p_.d, p_.centers.format, const_cast<void*>(Stored{out_.centers, p_.centers.format, p_.K, p_.d}.row(k)));
    }
    if (out_.input && first == last) std::fill_n(sums.g.get(), p_.B * p_.d, T(0));
  }

  // Adds the workers' shares, in order, and what remains of the gradients of features, displacements and tau.
  void finish(std::vector<Partial<T>>& partials) const {
    const int64_t M = p_.M();
    const Partial<T>& sums = partials[0];
    T tau = sums.tau;
    for (size_t i = 1; i < partials.size(); ++i) {
      tau += partials[i].tau;
      if (out_.input || out_.displacements)
        for (int64_t e = 0; e < p_.B * M; ++e) sums.s[e] += partials[i].s[e];
      if (out_.displacements)
        for (int64_t e = 0; e < p_.m * p_.d; ++e) sums.dd[e] += partials[i].dd[e];
    }
    if (out_.tau) *static_cast<T*>(out_.tau) = tau / p_.tau;
    if (out_.displacements) {
      blas::gemm<T>(blas::Op::transposed, blas::Op::none, p_.m, p_.d, p_.B, sums.s.get() + 1, M, f_, p_.d, 1, sums.dd.get(), p_.d);
      std::copy_n(sums.dd.get(), p_.m * p_.d, static_cast<T*>(out_.displacements));
    }
    if (!out_.input) return;
    torch::stable::parallel_for(0, p_.B, 8, [&](int64_t begin, int64_t end) {
      T* g = sums.g.get() + begin * p_.d;
      for (size_t i = 1; i < partials.size(); ++i) {
        const T* other = partials[i].g.get() + begin * p_.d;
        for (int64_t e = 0; e < (end - begin) * p_.d; ++e) g[e] += other[e];
      }
      blas::gemm<T>(blas::Op::none, blas::Op::none, end - begin, p_.d, p_.m, sums.s.get() + begin * M + 1, M, p_.delta, p_.d, 1, g, p_.d);
      kernels<T>().project(g, f_ + begin * p_.d, end - begin, p_.d, rnorm_ + begin);
      kernels<T>().store(g, (end - begin) * p_.d, p_.input.format,
                         const_cast<void*>(Stored{out_.input, p_.input.format, p_.B, p_.d}.row(begin)));
    });
  }

  const Problem<T>& p_;
  const T *grad_, *logits_;
  const uint8_t* slots_;
  const T *r_, *rnorm_;
  const Gradients out_;
  const Partition blocks_;
  const Scratch<T> converted_, scale_;
  const T* f_;
};

}  // namespace gistops
