// A cross-entropy and its gradients, as sequences of launches and products.
#pragma once
#include "backward.cuh"
#include "lse.cuh"
#include "route_loss_grad.cuh"
#include "row_loss.cuh"

namespace gistops::cuda {

template <class T>
class LossSequence : private GradientSequence<T> {
  using Base = GradientSequence<T>;
  using Base::p_, Base::ld_, Base::stream_, Base::workspace_;
  using S = Sum<T>;

 public:
  LossSequence(const Arguments& a, const LossArguments& loss, Workspace& workspace) : Base(a, workspace), loss_(loss) {}

  void forward(const LossResults& results) {
    const LseShape shape(p_.K());
    const int64_t step = ceil_div(this->cached_classes(), shape.classes()) * shape.classes();
    const int64_t held = results.scores ? 0 : std::min(step, p_.K()), tiles = ceil_div(p_.K(), shape.classes());
    const int64_t rows = std::max<int64_t>(ceil_div(p_.B(), RowsShape<S>::kRows), 1);
    const int64_t smoothed = loss_.label_smoothing > 0;
    S *shared, *products, *parts, *rnorms = static_cast<S*>(results.center_rnorms);
    uint8_t* slots;
    int* ticket;
    LseParts<S> lse;
    Scratch(workspace_)
        .add(shared, p_.M() * ld_)
        .add(products, held * ld_)
        .add(slots, held * ld_)
        .add(lse.max, tiles * p_.B())
        .add(lse.total, tiles * p_.B())
        .add(lse.weighted, smoothed * tiles * p_.B())
        .add(lse.weights, smoothed * tiles)
        .add(lse.biases, smoothed * tiles)
        .add(lse.target_logits, p_.B())
        .add(parts, rows * 3)
        .add(ticket, 1)
        .take();
    for (int64_t first = 0; first < p_.K(); first += step) {
      const Problem<T> p = this->classes(first, step);
      const int64_t at = results.scores ? first * ld_ : 0;
      const Norms<S> norms{static_cast<S*>(results.input_rnorms), shared, ld_, rnorms + first, p_.K(),
                           first == 0 ? ticket : nullptr};
      this->norms(p, first == 0, norms);
      if (p_.B() > 0)
        make_scores(shape, p, first, shared, rnorms + first, static_cast<const S*>(results.input_rnorms),
                    (results.scores ? static_cast<S*>(results.scores) : products) + at,
                    (results.scores ? results.slots : slots) + at, lse);
    }
    const LossRows<S> out{p_.B(),
                          p_.K(),
                          p_.B() > 0 ? tiles : 0,
                          p_.tau,
                          static_cast<const S*>(loss_.margin),
                          loss_.each_margin,
                          loss_.margin_kind,
                          loss_.reduction,
                          static_cast<S>(loss_.label_smoothing),
                          static_cast<S*>(results.loss),
                          static_cast<S*>(results.lse),
                          static_cast<S*>(results.rows),
                          static_cast<S*>(results.scalars),
                          results.inside,
                          parts,
                          ticket};
    launch("rows", rows_kernel<S>, blocks(rows), RowsShape<S>::kThreads, 0, stream_, terms(0), lse, out);
  }

  void backward(const LossGrads& grads, const LossResults& saved, const Gradients& gradients, void* bias,
                void* margin) {
    if (p_.B() == 0) return clear(gradients, bias, margin);
    using Shape = PullClassesShape;
    const int64_t step =
        saved.scores ? p_.K() : std::min(p_.K(), ceil_div(limits.remade / ld_ + 1, Shape::kClasses) * Shape::kClasses);
    const typename Base::Further further{static_cast<S*>(bias), static_cast<S*>(margin), !loss_.each_margin};
    this->take(PullShape(step, p_.B(), Shape::kClasses, Shape::kFeatures), step, gradients, further, step < p_.K());
    const S *rnorms = static_cast<const S*>(saved.center_rnorms),
            *input_rnorms = static_cast<const S*>(saved.input_rnorms);
    S *shared = nullptr, *scores = static_cast<S*>(saved.scores), *unused;
    uint8_t* slots = saved.slots;
    if (!saved.scores) {
      Scratch(workspace_)
          .add(shared, p_.M() * ld_)
          .add(scores, step * ld_)
          .add(slots, step * ld_)
          .add(unused, p_.B())
          .take();
      const Norms<S> norms{unused, shared, ld_, nullptr, 0, nullptr};
      this->norms(p_, true, norms);
    }
    const LseParts<S> none{};
    for (int64_t first = 0; first < p_.K(); first += step) {
      const Problem<T> p = this->classes(first, step);
      if (!saved.scores)
        make_scores(LseShape(p_.K()), p, first, shared, rnorms + first, input_rnorms, scores, slots, none);
      const Pairs<T> pairs{
          p, rnorms + first, p_.K(), input_rnorms, scores, slots, ld_, 1, nullptr, softmax(grads, saved, first)};
      const PullShape shape(p.K(), p_.B(), Shape::kClasses, Shape::kFeatures);
      launch("pull", pull_classes_kernel<T>, blocks(shape.groups, shape.parts), Shape::kThreads, 0, stream_, shape,
             pairs, this->parts_);
      this->run(shape, pairs, gradients, further, first);
    }
    this->finish(gradients);
  }

 private:
  LossTerms<S> terms(int64_t first) const {
    return {loss_.target,
            static_cast<const S*>(loss_.class_bias),
            static_cast<const S*>(loss_.weight),
            first,
            loss_.ignore_index,
            loss_.label_smoothing > 0};
  }

  // Products, and scores in their place.
  void make_scores(const LseShape& shape, const Problem<T>& p, int64_t first, const S* shared, const S* rnorms,
                   const S* input_rnorms, S* scores, uint8_t* slots, const LseParts<S>& lse) {
    this->multiply_scores(p, scores);
    const Scoring<T> scoring{p, scores, ld_, shared, rnorms, p_.K(), input_rnorms, slots, ld_, 1};
    launch("lse", lse_kernel<T>, blocks(ceil_div(p.K(), shape.classes()), ceil_div(p_.B(), ScoresShape::kFeatures)),
           ScoresShape::kThreads, 0, stream_, shape, scoring, terms(first), first / shape.classes(), lse);
  }

  Softmax<S> softmax(const LossGrads& grads, const LossResults& saved, int64_t first) const {
    return {static_cast<const S*>(grads.loss),
            static_cast<const S*>(grads.lse),
            loss_.reduction == 0,
            1,
            static_cast<const S*>(saved.rows),
            static_cast<const S*>(saved.scalars),
            p_.B(),
            p_.K(),
            first,
            loss_.target,
            static_cast<const S*>(loss_.class_bias),
            static_cast<const S*>(loss_.weight),
            loss_.margin != nullptr,
            loss_.reduction == 1,
            loss_.ignore_index,
            static_cast<S>(loss_.label_smoothing)};
  }

  void clear(const Gradients& gradients, void* bias, void* margin) {
    Base::clear(gradients);
    const auto zero = [&](void* x, int64_t n) {
      if (x) check(cudaMemsetAsync(x, 0, n * sizeof(S), static_cast<cudaStream_t>(stream_)), "backward");
    };
    zero(bias, p_.K());
    zero(margin, loss_.each_margin ? p_.K() : 1);
  }

  const LossArguments& loss_;
};

}  // namespace gistops::cuda
