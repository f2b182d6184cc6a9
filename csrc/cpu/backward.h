// The backward, with H and T formed block by block (G = dL/dlogits, j* = slot):
//   H[i, k] = tau G R[k, j*] / |f_i|       S[i, j] = sum over k with j* = j of H[i, k]
//   T[k, j] = R[k, j]^2 sum over i with j* = j of G logits
//   dw_k = (H' f)_k - sum_j T[k, j] u_kj    ddelta_j = (S' f)_j - sum_k T[k, j] u_kj    u_kj = w_k + delta_j
//   g = H w + S delta,  df_i = g_i - (g_i . f_i) f_i / |f_i|^2    dtau = sum G c
// and for free centres dw_kj = (H_j' f)_k - T[k, j] w_kj, g = sum_j H_j w_j, with H_j = H where j* = j, else 0.
// Every sum over classes is made by one worker in order, and workers are added in order: the same bits each time.
//
// Where G and the logits come from is a Source's to know: saved tensors (below), or a loss (cross_entropy.h).
#pragma once
#include <optional>
#include <utility>
#include <vector>

#include "scores.h"

namespace gistops {

// Where to put the gradients; null where one is not needed. In the storage format of the argument.
// x and y, of tables, are in the type of computation.
struct Gradients {
  void *input, *centers, *displacements, *tau;
  void *x = nullptr, *y = nullptr;
};

inline void* at(void* gradient, const Stored& argument, int64_t row) {
  return static_cast<char*>(gradient) + row * argument.d * argument.element_size();
}

// Some rows of a block, all with row stride ld. h, if not null, is where H may go: grad itself, no longer needed.
template <class T>
struct Rows {
  const T *grad, *logits;
  const uint8_t* slots;
  int64_t ld;
  T* h;
};

// What the forward saved and autograd brought, as whole tensors.
template <class T>
class Saved {
 public:
  static constexpr bool kParked = false;
  // grad, logits, slots: [B, K]; center_rnorms: [M, K]
  Saved(const Problem<T>& p, const T* grad, const T* logits, const uint8_t* slots, const T* center_rnorms, int64_t size)
      : p_(p), grad_(grad), logits_(logits), slots_(slots), center_rnorms_(center_rnorms),
        converted_(p.centers.template scratch_elements<T>(size * p.stored())) {}

  const T* begin(int64_t k, int64_t n) {  // -> w [n, stored, d]
    k_ = k;
    return p_.centers.template as<T>(k * p_.stored(), n * p_.stored(), converted_.get());
  }
  const T* r() const { return center_rnorms_ + k_; }
  int64_t ld_r() const { return p_.K; }
  Rows<T> rows(int64_t i, int64_t) const {
    const int64_t begin = i * p_.K + k_;
    return {grad_ + begin, logits_ + begin, slots_ + begin, p_.K, nullptr};
  }

 private:
  const Problem<T>& p_;
  const T *grad_, *logits_;
  const uint8_t* slots_;
  const T* center_rnorms_;
  int64_t k_ = 0;
  Scratch<T> converted_;
};

// One worker: a run of blocks of classes, with their own gradients, and its share of the sums over all classes.
template <class T, class Source>
class Worker {
 public:
  // first: it makes its share of the features' gradient where the sum will be, if the types allow.
  Worker(const Problem<T>& p, const Features<T>& features, const Gradients& out, int64_t size, Source source,
         bool first)
      : g(out.input ? p.B * p.d : 0, first && p.input.template is<T>() ? static_cast<T*>(out.input) : nullptr),
        s((out.input || out.displacements) && p.m ? p.B * p.M() : 0), dd(out.displacements ? p.m * p.d : 0),
        dx(p.table_slots ? p.B * p.M() : 0), moments(p.table_slots ? p.B : 0), p_(p), features_(features), out_(out),
        size_(size), source_(std::move(source)), products_(out.input || out.centers),
        corrections_(out.centers || out.displacements || p.table_slots), in_place_(p.centers.template is<T>()),
        h_(products_ ? std::min(kRows, p.B) * size : 0), t_(corrections_ ? p.M() * size : 0),
        block_dd_(out.displacements ? p.m * p.d : 0),
        dw_(out.centers && (!in_place_ || Source::kParked) ? size * p.stored() * p.d : 0),
        dy_(2 * p.table_slots * size), piece_(p.free_slots ? size * p.d : 0),
        selected_(p.free_slots ? std::min(kRows, p.B) * size : 0) {
    g.zero(), s.zero(), dd.zero(), dx.zero(), moments.zero();
  }

  // Classes [k, k + n).
  void run(int64_t k, int64_t n) {
    const T* w = source_.begin(k, n);
    const int64_t vectors = n * p_.stored();
    void* final = out_.centers ? at(out_.centers, p_.centers, k * p_.stored()) : nullptr;
    // What is parked where the gradients go (cross_entropy.h) is read until the last row: sums are made aside then.
    T* dw = !final ? nullptr : in_place_ && !Source::kParked ? static_cast<T*>(final) : dw_.get();
    const bool one_product = p_.B > 0 && p_.B <= kRows && !p_.free_slots;  // then dw is written once, by correct()
    if (dw && !one_product) std::fill_n(dw, vectors * p_.d, T(0));
    std::optional<Product<T>> hf;
    t_.zero(), dy_.zero();
    k_ = k;
    const std::vector<Pair> apart = cancelled(n);
    for (int64_t i = 0; i < p_.B; i += kRows) {
      const int64_t count = std::min(kRows, p_.B - i);
      const Rows<T> rows = source_.rows(i, count);
      const bool reuse = rows.h && apart.empty();
      const Matrix<T> h{reuse ? rows.h : h_.get(), count, n, reuse ? rows.ld : size_}, f = features_.rows(i, count),
                                                                                       classes{w, n, p_.d, p_.d};
      T* h_out = !products_ ? nullptr : const_cast<T*>(h.data);
      route(rows, n, i, count, source_.r(), source_.ld_r(), h_out, h.ld, apart.empty(), true);
      if (p_.free_slots) {
        add_free(h, rows, w, n, i, count, dw);
        continue;
      }
      if (out_.input && apart.empty()) add_product(h, classes, g.get() + i * p_.d);  // first: hf keeps its memory
      if (dw && one_product) hf.emplace(h.t(), f, dw, p_.d);
      if (dw && !one_product) add_product(h.t(), f, dw);
      if (apart.empty()) continue;
      add_apart(apart, rows, w, n, i, count);
      if (out_.input) add_product(h, classes, g.get() + i * p_.d);
    }
    T* corrected = final && in_place_ ? static_cast<T*>(final) : dw;
    if (out_.y)
      for (int64_t row = 0; row < 2 * p_.M(); ++row)
        std::copy_n(dy_.get() + row * size_, n, static_cast<T*>(out_.y) + row * p_.K + k);
    if (corrections_) correct(w, n, hf ? hf->data : dw, corrected);
    if (final && !in_place_) kernels<T>().store(dw, vectors * p_.d, p_.centers.format, final);
  }

  Scratch<T> g, s, dd;      // [B, d], [B, M], [m, d]
  Scratch<T> dx;            // [B, M], of tables
  Scratch<double> moments;  // [B], of tables: sum over classes of G logits
  double tau = 0;

 private:
  struct Pair {
    int64_t k, j;  // class, within the block, and slot
  };

  // h, and, if asked for, the sums of these rows of the block.
  void route(const Rows<T>& rows, int64_t n, int64_t i, int64_t count, const T* r, int64_t ld_r, T* h, int64_t ld_h,
             bool shares, bool moments) {
    if (p_.table_slots)
      return kernels<T>().rotation_route_grad(rows.grad, rows.logits, rows.ld, rows.slots, count, n, p_.tables(i, k_),
                                              r, features_.scale.get() + i, h, ld_h, dx.get() + i * p_.M(), dy_.get(),
                                              dy_.get() + p_.M() * size_, size_, t_.get(), this->moments.get() + i);
    kernels<T>().route_grad(rows.grad, rows.logits, rows.ld, rows.slots, count, n, r, ld_r, p_.M(),
                            features_.scale.get() + i, h, ld_h,
                            shares && p_.m && (out_.input || out_.displacements) ? s.get() + i * p_.M() : nullptr,
                            moments && corrections_ ? t_.get() : nullptr, size_, moments && out_.tau ? &tau : nullptr);
  }

  // The pairs of this block whose sums would cancel (block.h).
  std::vector<Pair> cancelled(int64_t n) const {
    std::vector<Pair> pairs;
    const auto square = [&](int64_t j, int64_t c) {
      const T r = source_.r()[j * source_.ld_r() + c];
      return 1 / (r * r);
    };
    for (int64_t j = 1; j <= p_.m; ++j)
      for (int64_t c = 0; c < n; ++c)
        if (cancels(square(j, c), square(0, c), features_.delta_squares[j - 1])) pairs.push_back({c, j});
    return pairs;
  }

  // Leaves these pairs out of h and s, and adds them to g and dd one by one.
  void add_apart(const std::vector<Pair>& pairs, const Rows<T>& rows, const T* w, int64_t n, int64_t i, int64_t count) {
    Scratch<T> r(p_.M() * n), u(p_.d);
    for (int64_t j = 0; j < p_.M(); ++j) std::copy_n(source_.r() + j * source_.ld_r(), n, r.get() + j * n);
    for (const Pair& pair : pairs) {
      const T rnorm = std::exchange(r[pair.j * n + pair.k], T(0));
      for (int64_t e = 0; e < p_.d; ++e) u[e] = w[pair.k * p_.d + e] + p_.delta[(pair.j - 1) * p_.d + e];
      for (int64_t row = 0; row < count; ++row) {
        const int64_t entry = row * rows.ld + pair.k;
        if (rows.slots[entry] != pair.j) continue;
        const T weight = rows.grad[entry] * rnorm * features_.scale[i + row];
        const T* f = features_.f() + (i + row) * p_.d;
        for (int64_t e = 0; e < p_.d; ++e) {
          if (out_.input) g[(i + row) * p_.d + e] += weight * u[e];
          if (out_.displacements) dd[(pair.j - 1) * p_.d + e] += weight * f[e];
        }
      }
    }
    route(rows, n, i, count, r.get(), n, products_ ? h_.get() : nullptr, size_, true, false);
  }

  // Free centres: the products of each slot with its share of h.
  void add_free(const Matrix<T>& h, const Rows<T>& rows, const T* w, int64_t n, int64_t i, int64_t count, T* dw) {
    if (!products_) return;
    const int64_t M = p_.M();
    for (int64_t j = 0; j < M; ++j) {
      kernels<T>().mask_slot(h.data, h.ld, rows.slots, rows.ld, count, n, static_cast<int>(j), selected_.get());
      const Matrix<T> hj{selected_.get(), count, n, n}, vectors{pack_slot(p_, w, n, j, piece_.get()), n, p_.d, p_.d};
      if (out_.input) add_product(hj, vectors, g.get() + i * p_.d);
      if (!dw) continue;
      const Product<T> hf(hj.t(), features_.rows(i, count), piece_.get(), p_.d);
      for (int64_t c = 0; c < n; ++c)
        for (int64_t e = 0; e < p_.d; ++e) dw[(c * M + j) * p_.d + e] += hf.data[c * hf.ld + e];
    }
  }

  // What the norms of the vectors take away.
  void correct(const T* w, int64_t n, const T* hf, T* dw) {
    for (int64_t j = 0; j < p_.M(); ++j)
      for (int64_t c = 0; c < n; ++c) {
        const T r = source_.r()[j * source_.ld_r() + c];
        t_[j * size_ + c] *= r >= static_cast<T>(1 / kMinNorm) ? 0 : r * r;  // a clamped norm is constant
      }
    if (p_.table_slots) return kernels<T>().norm_correction(w, n, p_.d, nullptr, 1, t_.get(), size_, hf, dw, nullptr);
    if (p_.free_slots) {
      Scratch<T> t(n * p_.M());  // one factor for each row of w
      for (int64_t v = 0; v < n * p_.M(); ++v) t[v] = t_[v % p_.M() * size_ + v / p_.M()];
      return kernels<T>().norm_correction(w, n * p_.M(), p_.d, nullptr, 1, t.get(), 0, hf, dw, nullptr);
    }
    // Sums over many classes are made in two levels, to keep rounding errors small.
    block_dd_.zero();
    kernels<T>().norm_correction(w, n, p_.d, p_.delta, p_.M(), t_.get(), size_, hf, dw,
                                 out_.displacements ? block_dd_.get() : nullptr);
    if (out_.displacements) dd.add(block_dd_);
  }

  const Problem<T>& p_;
  const Features<T>& features_;
  const Gradients out_;
  const int64_t size_;
  Source source_;
  const bool products_, corrections_, in_place_;
  int64_t k_ = 0;
  Scratch<T> h_, t_, block_dd_, dw_;
  Scratch<T> dy_;                // of tables: [2, M, size]
  Scratch<T> piece_, selected_;  // of free centres: [size, d], [rows, size]
};

// Adds the workers' shares, in order, and makes of them the gradients of features, displacements and tau.
template <class T, class Source>
void finish(const Problem<T>& p, const Features<T>& features, const Gradients& out,
            const std::vector<Worker<T, Source>>& workers) {
  const int64_t M = p.M();
  const Worker<T, Source>& sums = workers[0];
  double tau = sums.tau;
  for (size_t i = 1; i < workers.size(); ++i) {
    tau += workers[i].tau;
    sums.s.add(workers[i].s);
    sums.dd.add(workers[i].dd);
    sums.dx.add(workers[i].dx);
    sums.moments.add(workers[i].moments);
  }
  for (int64_t i = 0; i < (p.table_slots ? p.B : 0); ++i) tau += sums.moments[i];
  if (out.x) std::copy_n(sums.dx.get(), p.B * M, static_cast<T*>(out.x));
  if (out.tau) *static_cast<T*>(out.tau) = static_cast<T>(tau / p.tau);
  if (out.displacements) {
    const Matrix<T> s{sums.s.get() + 1, p.B, p.m, M};
    add_product(s.t(), features.rows(0, p.B), sums.dd.get());
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
    if (p.m) {
      const Matrix<T> s{sums.s.get() + begin * M + 1, rows, p.m, M}, structure{p.delta, p.m, p.d, p.d};
      add_product(s, structure, g);
    }
    if (p.table_slots) {  // what the features' norm takes away includes the tables' terms
      for (int64_t i = begin; i < end; ++i) {
        const T r = features.rnorm[i];
        const T along = r >= static_cast<T>(1 / kMinNorm) ? 0 : static_cast<T>(sums.moments[i]) * r * r;
        for (int64_t e = 0; e < p.d; ++e) g[(i - begin) * p.d + e] -= along * features.f()[i * p.d + e];
      }
    } else {
      kernels<T>().normalize_backward(g, features.f() + begin * p.d, rows, p.d, features.rnorm.get() + begin);
    }
    void* final = at(out.input, p.input, begin);
    if (g != final) kernels<T>().store(g, rows * p.d, p.input.format, final);
  });
}

// Runs workers over all classes; source(i) makes that of worker i.
template <class T, class Make>
void backward(const Problem<T>& p, const Features<T>& features, const Gradients& out, const Partition& blocks,
              int64_t count, Make source) {
  std::vector<Worker<T, decltype(source(0))>> shares;
  shares.reserve(count);
  for (int64_t i = 0; i < count; ++i) shares.emplace_back(p, features, out, blocks.size, source(i), i == 0);
  blocks.each(count, [&](int64_t i, int64_t k, int64_t n) { shares[i].run(k, n); });
  finish(p, features, out, shares);
}

// From the forward's logits [B, K], slots [B, K] and center_rnorms [M, K].
template <class T>
void backward(const Problem<T>& p, const T* grad, const T* logits, const uint8_t* slots, const T* center_rnorms,
              const Gradients& out) {
  const Features<T> features(p);
  const int64_t threads = workers(p);
  const Partition blocks(p.K, p.stored(), threads);
  backward(p, features, out, blocks, std::clamp<int64_t>(blocks.count, 1, threads),
           [&](int64_t) { return Saved<T>(p, grad, logits, slots, center_rnorms, blocks.size); });
}

}  // namespace gistops
