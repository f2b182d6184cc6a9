// Logits and their gradients, as sequences of launches and products.
#pragma once
#include "backward.cuh"
#include "max_over_slots.cuh"
#include "route_logits_grad.cuh"

namespace gistops::cuda {

template <class T>
class LogitsSequence : private GradientSequence<T> {
  using Base = GradientSequence<T>;
  using Base::p_, Base::ld_, Base::stream_, Base::workspace_;
  using S = Sum<T>;

 public:
  using GradientSequence<T>::GradientSequence;

  void forward(const Results& results) {
    if (p_.B() == 0 || p_.K() == 0) return;
    const int64_t step = this->cached_classes();
    S *shared, *products, *rnorms = static_cast<S*>(results.center_rnorms);
    Scratch(workspace_).add(shared, p_.M() * ld_).add(products, step * ld_).take();
    for (int64_t first = 0; first < p_.K(); first += step) {
      const Problem<T> p = this->classes(first, step);
      const Norms<S> norms{static_cast<S*>(results.input_rnorms), shared, ld_, rnorms + first, p_.K(), nullptr};
      this->norms(p, first == 0, norms);
      this->multiply_scores(p, products);
      const Scoring<T> scoring{p,
                               products,
                               ld_,
                               shared,
                               rnorms + first,
                               p_.K(),
                               static_cast<const S*>(results.input_rnorms),
                               results.slots + first,
                               1,
                               p_.K()};
      launch("pool", pool_kernel<T>, this->tiles(p.K()), ScoresShape::kThreads, 0, stream_, scoring,
             static_cast<S*>(results.logits) + first, p_.K());
    }
  }

  void backward(const void* grad, const Results& saved, const Gradients& gradients) {
    if (p_.B() == 0 || p_.K() == 0) return this->clear(gradients);
    const Pairs<T> pairs{p_,
                         static_cast<const S*>(saved.center_rnorms),
                         p_.K(),
                         static_cast<const S*>(saved.input_rnorms),
                         static_cast<const S*>(saved.logits),
                         saved.slots,
                         1,
                         p_.K(),
                         static_cast<const S*>(grad),
                         {}};
    using Shape = PullRowsShape<T>;
    const PullShape shape(p_.K(), p_.B(), Shape::kClasses, Shape::kFeatures);
    const typename Base::Further further{nullptr, nullptr, false};
    this->take(shape, p_.K(), gradients, further, false);
    launch("pull", pull_rows_kernel<T>, blocks(shape.groups, shape.parts), Shape::kThreads, 0, stream_, shape, pairs,
           this->parts_);
    this->run(shape, pairs, gradients, further, 0);
    this->finish(gradients);
  }
};

}  // namespace gistops::cuda
