// The backward, with H and T of DESIGN-style notation formed block by block (G = grad, c = logits / tau, j* = slot):
//   H[i, k] = tau G R[k, j*] / |f_i|       S[i, j] = sum over k with j* = j of H[i, k]
//   T[k, j] = R[k, j]^2 sum over i with j* = j of G logits
//   dw_k = (H' f)_k - sum_j T[k, j] u_kj    ddelta_j = (S' f)_j - sum_k T[k, j] u_kj    u_kj = w_k + delta_j
//   g = H w + S delta,  df_i = g_i - (g_i . f_i) f_i / |f_i|^2    dtau = sum G c
// Every sum over classes is made by one worker in order, and workers are added in order: the same bits each time.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <utility>
#include <vector>

#include "block.h"
#include "products.h"

namespace gistops {

// Where to put the gradients; null where one is not needed. In the storage format of the argument.
struct Gradients {
  void *input, *centers, *displacements, *tau;
};

inline void* at(void* gradient, const Stored& argument, int64_t row) {
  return static_cast<char*>(gradient) + row * argument.d * argument.element_size();
}

// What the forward left, and what is made of it before the blocks.
template <class T>
struct Saved {
  const T *grad, *logits;                                            // [B, K]
  const uint8_t* slots;                                              // [B, K]
  const T *center_rnorms, *input_rnorms;                             // [M, K], [B]
  const T *f = nullptr, *scale = nullptr, *delta_squares = nullptr;  // [B, d], tau / |f_i| [B], [m]
};

// One worker: a run of blocks of classes, with their own gradients, and its share of the sums over all classes.
template <class T>
class Worker {
 public:
  Worker(const Problem<T>& p, const Saved<T>& saved, const Gradients& out, int64_t size)
      : g(out.input ? p.B * p.d : 0), s(out.input || out.displacements ? p.B * p.M() : 0),
        dd(out.displacements ? p.m * p.d : 0), p_(p), in_(saved), out_(out), size_(size),
        products_(out.input || out.centers), corrections_(out.centers || out.displacements),
        h_(products_ ? std::min(kRows, p.B) * size : 0), t_(corrections_ ? p.M() * size : 0),
        block_dd_(out.displacements ? p.m * p.d : 0), converted_(p.centers.template scratch_elements<T>(size)),
        dw_(out.centers ? p.centers.template scratch_elements<T>(size) : 0) {
    g.zero(), s.zero(), dd.zero();
  }

  // Classes [k, k + n).
  void run(int64_t k, int64_t n) {
    const T* w = p_.centers.template as<T>(k, n, converted_.get());
    const bool in_place = p_.centers.template is<T>();
    T* dw = !out_.centers ? nullptr : in_place ? static_cast<T*>(out_.centers) + k * p_.d : dw_.get();
    const bool one_product = p_.B > 0 && p_.B <= kRows;  // then dw is written once, by correct()
    if (dw && !one_product) std::fill_n(dw, n * p_.d, T(0));
    std::optional<Product<T>> hf;
    t_.zero();
    const std::vector<Pair> apart = cancelled(k, n);
    for (int64_t i = 0; i < p_.B; i += kRows) {
      const int64_t rows = std::min(kRows, p_.B - i);
      const Matrix<T> h{h_.get(), rows, n, size_}, features{in_.f + i * p_.d, rows, p_.d, p_.d},
          classes{w, n, p_.d, p_.d};
      route(k, n, i, rows, in_.center_rnorms + k, p_.K, apart.empty(), true);
      if (dw && one_product) hf.emplace(h.t(), features, dw, p_.d);
      if (dw && !one_product) add_product(h.t(), features, dw);
      if (!apart.empty()) add_apart(apart, w, k, n, i, rows);
      if (out_.input) add_product(h, classes, g.get() + i * p_.d);
    }
    if (corrections_) correct(w, k, n, hf ? hf->data : dw, dw);
    if (dw && !in_place) kernels<T>().store(dw, n * p_.d, p_.centers.format, at(out_.centers, p_.centers, k));
  }

  Scratch<T> g, s, dd;  // [B, d], [B, M], [m, d]
  double tau = 0;

 private:
  struct Pair {
    int64_t k, j;  // class, within the block, and slot
  };

  // h, and, if asked for, the sums of the block of grad at rows i and classes k.
  void route(int64_t k, int64_t n, int64_t i, int64_t rows, const T* r, int64_t ld_r, bool shares, bool moments) {
    const int64_t begin = i * p_.K + k;
    kernels<T>().route(in_.grad + begin, in_.logits + begin, p_.K, in_.slots + begin, rows, n, r, ld_r, p_.M(),
                       in_.scale + i, products_ ? h_.get() : nullptr, size_,
                       shares && (out_.input || out_.displacements) ? s.get() + i * p_.M() : nullptr,
                       moments && corrections_ ? t_.get() : nullptr, size_, moments && out_.tau ? &tau : nullptr);
  }

  // The pairs of this block whose sums would cancel (block.h).
  std::vector<Pair> cancelled(int64_t k, int64_t n) const {
    std::vector<Pair> pairs;
    const auto square = [&](int64_t j, int64_t c) {
      const T r = in_.center_rnorms[j * p_.K + k + c];
      return 1 / (r * r);
    };
    for (int64_t j = 1; j < p_.M(); ++j)
      for (int64_t c = 0; c < n; ++c)
        if (cancels(square(j, c), square(0, c), in_.delta_squares[j - 1])) pairs.push_back({c, j});
    return pairs;
  }

  // Leaves these pairs out of h and s, and adds them to g and dd one by one.
  void add_apart(const std::vector<Pair>& pairs, const T* w, int64_t k, int64_t n, int64_t i, int64_t rows) {
    Scratch<T> r(p_.M() * n), u(p_.d);
    for (int64_t j = 0; j < p_.M(); ++j) std::copy_n(in_.center_rnorms + j * p_.K + k, n, r.get() + j * n);
    for (const Pair& pair : pairs) {
      const T rnorm = std::exchange(r[pair.j * n + pair.k], T(0));
      for (int64_t e = 0; e < p_.d; ++e) u[e] = w[pair.k * p_.d + e] + p_.delta[(pair.j - 1) * p_.d + e];
      for (int64_t row = i; row < i + rows; ++row) {
        const int64_t entry = row * p_.K + k + pair.k;
        if (in_.slots[entry] != pair.j) continue;
        const T weight = in_.grad[entry] * rnorm * in_.scale[row];
        for (int64_t e = 0; e < p_.d; ++e) {
          if (out_.input) g[row * p_.d + e] += weight * u[e];
          if (out_.displacements) dd[(pair.j - 1) * p_.d + e] += weight * in_.f[row * p_.d + e];
        }
      }
    }
    route(k, n, i, rows, r.get(), n, true, false);
  }

  // What the norms of w_k + delta_j take away.
  void correct(const T* w, int64_t k, int64_t n, const T* hf, T* dw) {
    for (int64_t j = 0; j < p_.M(); ++j)
      for (int64_t c = 0; c < n; ++c) {
        const T r = in_.center_rnorms[j * p_.K + k + c];
        t_[j * size_ + c] *= r >= static_cast<T>(1 / kMinNorm) ? 0 : r * r;  // a clamped norm is constant
      }
    // Sums over many classes are made in two levels, to keep rounding errors small.
    block_dd_.zero();
    kernels<T>().correct(w, n, p_.d, p_.delta, p_.M(), t_.get(), size_, hf, dw,
                         out_.displacements ? block_dd_.get() : nullptr);
    if (out_.displacements) dd.add(block_dd_);
  }

  const Problem<T>& p_;
  const Saved<T> in_;
  const Gradients out_;
  const int64_t size_;
  const bool products_, corrections_;
  Scratch<T> h_, t_, block_dd_, converted_, dw_;
};

// Adds the workers' shares, in order, and makes of them the gradients of features, displacements and tau.
template <class T>
void finish(const Problem<T>& p, const Saved<T>& in, const Gradients& out, const std::vector<Worker<T>>& workers) {
  const int64_t M = p.M();
  const Worker<T>& sums = workers[0];
  double tau = sums.tau;
  for (size_t i = 1; i < workers.size(); ++i) {
    tau += workers[i].tau;
    sums.s.add(workers[i].s);
    sums.dd.add(workers[i].dd);
  }
  if (out.tau) *static_cast<T*>(out.tau) = static_cast<T>(tau / p.tau);
  if (out.displacements) {
    const Matrix<T> s{sums.s.get() + 1, p.B, p.m, M}, features{in.f, p.B, p.d, p.d};
    add_product(s.t(), features, sums.dd.get());
    std::copy_n(sums.dd.get(), p.m * p.d, static_cast<T*>(out.displacements));
  }
  if (!out.input) return;
  torch::stable::parallel_for(0, p.B, 8, [&](int64_t begin, int64_t end) {
    T* g = sums.g.get() + begin * p.d;
    const int64_t rows = end - begin;
    for (size_t i = 1; i < workers.size(); ++i) {
      const T* other = workers[i].g.get() + begin * p.d;
      for (int64_t e = 0; e < rows * p.d; ++e) g[e] += other[e];
    }
    const Matrix<T> s{sums.s.get() + begin * M + 1, rows, p.m, M}, structure{p.delta, p.m, p.d, p.d};
    add_product(s, structure, g);
    kernels<T>().project(g, in.f + begin * p.d, rows, p.d, in.input_rnorms + begin);
    kernels<T>().store(g, rows * p.d, p.input.format, at(out.input, p.input, begin));
  });
}

template <class T>
void backward(const Problem<T>& p, Saved<T> in, const Gradients& out) {
  Scratch<T> converted(p.input.template scratch_elements<T>(p.B)), scale(p.B), delta_squares(p.m);
  in.f = p.input.template as<T>(0, p.B, converted.get());
  for (int64_t i = 0; i < p.B; ++i) scale[i] = p.tau * in.input_rnorms[i];
  kernels<T>().dots(p.delta, p.m, p.d, nullptr, 0, delta_squares.get(), nullptr, 0);
  in.scale = scale.get(), in.delta_squares = delta_squares.get();

  const int64_t threads = workers(p);
  const Partition blocks(p.K, threads);
  const int64_t count = std::clamp<int64_t>(blocks.count, 1, threads);
  std::vector<Worker<T>> shares;
  shares.reserve(count);
  for (int64_t i = 0; i < count; ++i) shares.emplace_back(p, in, out, blocks.size);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t b = blocks.count * i / count; b < blocks.count * (i + 1) / count; ++b)
        shares[i].run(b * blocks.size, std::min(blocks.size, p.K - b * blocks.size));
  });
  finish(p, in, out, shares);
}

}  // namespace gistops
