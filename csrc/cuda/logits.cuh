// The launches of the logits and their gradients.
#pragma once
#include "backward.cuh"
#include "fused_logits_launch.cuh"
#include "max_over_slots.cuh"
#include "route_logits_grad.cuh"

namespace gistops::cuda {

template <class T>
class LogitsLauncher : private BackwardLauncher<T> {
  using Base = BackwardLauncher<T>;
  using Base::p_, Base::ld_, Base::stream_, Base::workspace_;
  using S = Sum<T>;

 public:
  using BackwardLauncher<T>::BackwardLauncher;

  void forward(const LogitsResults& results) {
    if (p_.B() == 0 || p_.K() == 0) return;
    results.narrow ? forward_as<T>(results) : forward_as<S>(results);
  }

  void backward(const void* grad, const LogitsResults& saved, const Gradients& gradients) {
    const GradOutputs<T> out(gradients);
    if (p_.B() == 0 || p_.K() == 0) return this->clear(out);
    saved.narrow ? backward_from<T>(grad, saved, out) : backward_from<S>(grad, saved, out);
  }

 private:
  // Z: the type of the logits.
  template <class Z>
  void forward_as(const LogitsResults& results) {
    if constexpr (sizeof(T) == 2) {
      if (takes_fused_logits<T, Z>(p_, this->aligned())) return forward_fused<Z>(results);
    }
    const int64_t step = this->classes_with(limits.logits);
    S *input_dots, *products;
    Scratch(workspace_).add(input_dots, p_.M() * ld_).add(products, step * ld_).allocate();
    S *center_rnorms = static_cast<S*>(results.center_rnorms), *input_rnorms = static_cast<S*>(results.input_rnorms);
    for (int64_t first = 0; first < p_.K(); first += step) {
      const Problem<T> p = this->chunk(first, step);
      const NormOutputs<S> norms{.input_rnorms = input_rnorms,
                                 .input_dots = input_dots,
                                 .ld = ld_,
                                 .center_rnorms = center_rnorms + first,
                                 .ldr = p_.K(),
                                 .blocks_done = nullptr};
      uint8_t* slots = results.slots ? results.slots + first : nullptr;
      ScoreInputs<T> inputs = this->norms_and_products(p, first == 0, norms, products, slots);
      inputs.slot_class = 1, inputs.slot_row = p_.K();
      with_slots<T>(p.M(), [&](auto slot_count) {
        using Shape = LogitsShape<S, slot_count>;
        const auto launch_kernel = [&](auto kernel) {
          launch("max_over_slots", kernel, blocks(ceil_div(p.B(), Shape::kRows), ceil_div(p.K(), Shape::kClasses)),
                 Shape::kThreads, 0, stream_, inputs, static_cast<Z*>(results.logits) + first, p_.K());
        };
        results.slots ? launch_kernel(max_over_slots_kernel<T, Z, slot_count, true>)
                      : launch_kernel(max_over_slots_kernel<T, Z, slot_count, false>);
      });
    }
  }

  // The same by one kernel after the norms of the input.
  template <class Z>
  void forward_fused(const LogitsResults& results) {
    S *input_dots, *input_rnorms = static_cast<S*>(results.input_rnorms);
    Scratch(workspace_).add(input_dots, p_.M() * ld_).allocate();
    NormOutputs<S> norms{.input_rnorms = input_rnorms,
                         .input_dots = input_dots,
                         .ld = ld_,
                         .center_rnorms = nullptr,
                         .ldr = p_.K(),
                         .blocks_done = nullptr};
    this->launch_norms(p_, true, norms);
    norms.center_rnorms = static_cast<S*>(results.center_rnorms);
    ScoreInputs<T> inputs = this->score_inputs(p_, norms, nullptr, 0, results.slots);
    inputs.slot_class = 1, inputs.slot_row = p_.K();
    launch_fused_logits<T>(stream_, inputs, static_cast<Z*>(results.logits), norms.center_rnorms);
  }

  // Z: the type of the logits and of their gradient.
  template <class Z>
  void backward_from(const void* grad, const LogitsResults& saved, const GradOutputs<T>& out) {
    GradSource<T> source{.p = p_,
                         .center_rnorms = static_cast<const S*>(saved.center_rnorms),
                         .ldr = p_.K(),
                         .input_rnorms = static_cast<const S*>(saved.input_rnorms),
                         .scores = nullptr,
                         .slots = saved.slots,
                         .score_class = 1,
                         .score_row = p_.K(),
                         .grad = nullptr,
                         .softmax = {}};
    source.pairs_cancel = p_.m() > 0;
    if constexpr (__is_same(Z, S)) {
      source.grad = static_cast<const S*>(grad);
    } else {
      source.narrow_grad = static_cast<const T*>(grad);
    }
    using Shape = RouteLogitsShape<T>;
    const RoutingShape shape(p_.K(), p_.B(), Shape::kClasses, Shape::kRows);
    this->allocate(shape, p_.K(), out);
    launch("route_logits_grad", route_logits_grad_kernel<T, Z>, blocks(shape.groups, shape.row_tiles), Shape::kThreads,
           0, stream_, shape, source, static_cast<const Z*>(grad), static_cast<const Z*>(saved.logits),
           this->partials_);
    this->add_chunk(shape, source, out, 0);
    this->finish(out);
  }
};

}  // namespace gistops::cuda
