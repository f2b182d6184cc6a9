// From the parts that a first pass of the backward leaves to the gradients, for a run of classes after another.
#pragma once
#include "grad_centers.cuh"
#include "grad_epilogues.cuh"
#include "norm_correction.cuh"
#include "op_launcher.cuh"
#include "reduce_partials.cuh"

namespace gistops::cuda {

template <class T>
class GradientSequence : protected Sequence<T> {
 public:
  using Sequence<T>::Sequence;

 protected:
  using Base = Sequence<T>;
  using Base::p_, Base::ld_, Base::stream_, Base::workspace_;
  using S = Sum<T>;

  // Of a loss beside `Gradients`; null where not needed.
  struct Further {
    S *bias, *margin;
    bool one_margin = false;
  };

  // Memory for runs of `classes` at most; several: they are more than one.
  void take(const PullShape& shape, int64_t classes, const Gradients& gradients, const Further& further, bool several) {
    several_ = several;
    step_ = kWhole ? classes : std::min(classes, cached_gradients());
    correct_ = CorrectShape(step_, across());
    const bool displacements = gradients.displacements && p_.m();
    const int64_t margins = further.margin ? shape.parts * classes : 0;
    // Every run, and in it every step, begins a tile.
    const int64_t runs = ceil_div(p_.K(), classes), tiles = ceil_div(step_, tile_classes()) * ceil_div(classes, step_);
    Scratch(workspace_)
        .add(parts_.h, classes * ld_)
        .add(parts_.s, shape.groups * p_.M() * ld_)
        .add(parts_.t, shape.parts * p_.M() * classes)
        .add(parts_.tau, shape.blocks())
        .add(parts_.cancelled, shape.blocks())
        .add(parts_.bias, further.bias ? shape.parts * classes : 0)
        .add(parts_.margin, margins)
        .add(totals_.s, p_.M() * ld_)
        .add(totals_.t, classes * p_.M())
        .add(totals_.tau, 1)
        .add(totals_.cancelled, 1)
        .add(product_, gradients.input ? p_.B() * p_.d() : 0)
        .add(total_, gradients.input && several ? p_.B() * p_.d() : 0)
        .add(partials_, displacements ? runs * tiles * p_.m() * p_.d() : 0)
        .take();
    if (!further.bias) parts_.bias = nullptr;
    if (!further.margin) parts_.margin = nullptr;
    if (!displacements) partials_ = nullptr;
    parts_.ld = totals_.ld = ld_;
    totals_.h = parts_.h;
    if (gradients.tau) totals_.tau = static_cast<S*>(gradients.tau);
    totals_.bias = further.bias, totals_.margin = further.margin;
    tiles_ = 0;
  }

  // All that the parts of a run of classes, whose first is `first`, contribute.
  void run(const PullShape& shape, const Pairs<T>& pairs, const Gradients& gradients, const Further& further,
           int64_t first) {
    const int64_t K = pairs.p.K();
    const bool last = first + K == p_.K();
    Pulls<T> out = totals_;
    if (out.bias) out.bias += first;
    if (out.margin && !further.one_margin) out.margin += first;
    const TotalsShape totals(ld_, K, p_.M());
    launch("totals", totals_kernel<T>, blocks(totals.blocks()), TotalsShape::kThreads, 0, stream_, totals, shape, pairs,
           parts_, out, further.one_margin, first > 0);
    if (gradients.input) {
      const Matrix left{parts_.h, p_.B(), K, 1, ld_}, right{pairs.p.centers.data, K, p_.d(), p_.d(), 1};
      workspace_.multiply(left, right, product_, p_.d());
      launch("input", this->aligned() ? input_ends_kernel<T, true> : input_ends_kernel<T, false>, blocks(p_.B()),
             EndsShape::kThreads, 0, stream_, pairs, static_cast<const S*>(totals_.s), ld_,
             static_cast<const int*>(totals_.cancelled), product_, several_ ? total_ : nullptr, first > 0,
             last ? static_cast<T*>(gradients.input) : nullptr);
    }
    if (!gradients.centers && !partials_) return;
    for (int64_t at = 0; at < K; at += step_) correct(pairs, static_cast<T*>(gradients.centers), first, at);
  }

  void finish(const Gradients& gradients) {
    if (!partials_) return;
    launch("displacements", displacement_ends_kernel<T>, blocks(p_.m() * ceil_div(p_.d(), kWarp)), EndsShape::kThreads,
           0, stream_, p_, static_cast<const S*>(totals_.s), ld_, static_cast<const S*>(partials_), tiles_,
           static_cast<S*>(gradients.displacements));
  }

  void clear(const Gradients& gradients) {
    const auto zero = [&](void* x, int64_t bytes) {
      if (x && bytes) check(cudaMemsetAsync(x, 0, bytes, static_cast<cudaStream_t>(stream_)), "backward");
    };
    zero(gradients.input, p_.B() * p_.d() * sizeof(T));
    zero(gradients.centers, p_.K() * p_.d() * sizeof(T));
    zero(gradients.displacements, p_.m() * p_.d() * sizeof(S));
    zero(gradients.tau, sizeof(S));
  }

  Pulls<T> parts_{}, totals_{};

 private:
  // Product and correction are one kernel: with half-precision operands, whose product PyTorch writes in float32. Else
  // the product lies where the gradient will.
  static constexpr bool kWhole = sizeof(T) == 2;

  int64_t tile_classes() const { return kWhole ? kCenterClasses : correct_.classes; }

  // The product with the features of some classes of a run, and its correction, while the one is in the cache.
  void correct(const Pairs<T>& pairs, T* centers, int64_t first, int64_t at) {
    Pairs<T> part = pairs;
    part.p.centers.data += at * p_.d();
    part.p.centers.rows = std::min(step_, pairs.p.K() - at);
    part.center_rnorms += at;
    part.scores += at * part.score_class, part.slots += at * part.score_class;
    if (part.grad) part.grad += at * part.score_class;
    part.softmax.first += at;
    const int64_t classes = part.p.K(), tiles = ceil_div(classes, tile_classes());
    T* out = centers ? centers + (first + at) * p_.d() : nullptr;
    S* partials = partials_ ? partials_ + tiles_ * p_.m() * p_.d() : nullptr;
    tiles_ += tiles;
    const S* t = totals_.t + at * p_.M();
    if constexpr (kWhole) {
      const CenterInputs<T> inputs{part, parts_.h + at * ld_, ld_, t, totals_.cancelled};
      const CenterGradients<T> outputs{out, partials};
      make_center_gradients(stream_, this->aligned(), inputs, outputs);
    } else {
      if (out) {
        const Matrix left{parts_.h + at * ld_, classes, p_.B(), ld_, 1},
            right{p_.input.data, p_.B(), p_.d(), p_.d(), 1};
        workspace_.multiply(left, right, out, p_.d());
      }
      launch("correct", this->aligned() ? correct_kernel<T, true> : correct_kernel<T, false>, blocks(tiles, across()),
             CorrectShape::kThreads, 0, stream_, correct_, part, t, static_cast<const int*>(totals_.cancelled), out,
             out, partials);
    }
  }

  int64_t across() const { return ceil_div(p_.d(), CorrectShape::kAcross * kVector<T>); }

  // So many classes' gradients stay in the cache of a large GPU from one kernel to the next.
  int64_t cached_gradients() const {
    if (p_.K() * p_.d() <= 2 * limits.cached) return p_.K();
    return std::max<int64_t>(limits.cached / p_.d() / CorrectShape::kMostClasses, 1) * CorrectShape::kMostClasses;
  }

  CorrectShape correct_{1, 1};
  bool several_ = false;
  int64_t step_ = 0, tiles_ = 0;
  S *product_ = nullptr, *total_ = nullptr, *partials_ = nullptr;
};

}  // namespace gistops::cuda
