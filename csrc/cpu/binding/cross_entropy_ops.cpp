// The CPU ops that compute a cross-entropy, or its parts.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cross_entropy.h"
#include "../row_loss.h"
#include "arguments.h"

namespace gistops {
namespace {

using Parts = std::tuple<Tensor, Tensor, Tensor>;
using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using PartGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The arguments that the ops have in common, from input to ignore_index. stash, if not null, is the memory that will
// hold the gradient of centers.
struct LossCall {
  Arguments a;
  OptionalTensor bias, weight;
  Tensor target;  // -1 in ignored rows
  ScalarType displacements_dtype, tau_dtype, bias_dtype;

  LossCall(const Tensor& input, const Tensor& centers, const Tensor& displacements, const Tensor& tau,
           const OptionalTensor& class_bias, const OptionalTensor& directions, const OptionalTensor& turns,
           const Tensor& y, const OptionalTensor& class_weight, int64_t ignore_index)
      : a(input, centers, displacements, tau, directions, turns), bias(a.per_class(class_bias, "class_bias")),
        weight(a.per_class(class_weight, "weight")), target(empty_on_device_of(a.input, {a.B()}, ScalarType::Long)),
        displacements_dtype(displacements.scalar_type()), tau_dtype(tau.scalar_type()),
        bias_dtype(class_bias ? class_bias->scalar_type() : a.compute) {
    STD_TORCH_CHECK(y.scalar_type() == ScalarType::Long || y.scalar_type() == ScalarType::Int,
                    "gistops: target: expected int64 or int32, got ", torch::headeronly::toString(y.scalar_type()));
    const Tensor given = a.checked(converted(y, ScalarType::Long), {a.B()}, ScalarType::Long, "target");
    for (int64_t i = 0; i < a.B(); ++i) {
      const int64_t k = values<int64_t>(given)[i];
      STD_TORCH_CHECK(k == ignore_index || (k >= 0 && k < a.K()), "gistops: target: expected 0 to ", a.K() - 1,
                      " or ignore_index ", ignore_index, ", got ", k, " at position ", i);
      data<int64_t>(target)[i] = k == ignore_index ? -1 : k;
    }
  }

  template <class T>
  LossArguments<T> loss() const {
    return {.classes = {.bias = values_or_null<T>(bias), .weight = values_or_null<T>(weight)},
            .target = values<int64_t>(target)};
  }

  template <class T>
  Stash<T> stash_in(const Problem<T>& p, const Tensor* stash) const {
    if (!stash) return {p, nullptr};
    a.checked(*stash, a.centers.sizes(), a.centers.scalar_type(), "stash");
    STD_TORCH_CHECK(
        stash->is_contiguous() && reinterpret_cast<uintptr_t>(stash->const_data_ptr()) % alignof(double) == 0,
        "gistops: stash: expected contiguous memory at a multiple of ", alignof(double), " bytes");
    return {p, stash->mutable_data_ptr()};
  }

  Parts forward(const Tensor* stash) const {
    const Tensor lse_others = empty_on_device_of(a.input, {a.B()}, a.compute),
                 target_logits = empty_on_device_of(a.input, {a.B()}, a.compute),
                 weighted_sums = empty_on_device_of(a.input, {weight ? a.B() : 0}, a.compute);
    a.dispatch([&]<class T>(T) {
      const Problem<T> p = a.problem<T>();
      cross_entropy_forward(p, loss<T>(), stash_in(p, stash), data<T>(lse_others), data<T>(target_logits),
                            weight ? data<T>(weighted_sums) : nullptr);
    });
    return {lse_others, target_logits, weighted_sums};
  }

  // row_weight: the class weights of the targets; `weight` is that of the smoothed part.
  Loss whole_loss(const Tensor& stash, const OptionalTensor& row_weight, int64_t reduction) const {
    STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "gistops: reduction: expected 0 to 2, got ", reduction);
    const OptionalTensor class_weight = a.per_class(row_weight, "weight");
    const Parts parts = forward(&stash);
    const Tensor &lse_others = std::get<0>(parts), &target_logits = std::get<1>(parts);
    const auto kind = static_cast<Reduction>(reduction);
    const Tensor lse = empty_on_device_of(a.input, {a.B()}, a.compute),
                 loss_slopes = empty_on_device_of(a.input, {2, a.B()}, a.compute),
                 lse_slopes = empty_on_device_of(a.input, {2, a.B()}, a.compute),
                 loss = kind == Reduction::none ? empty_on_device_of(a.input, {a.B()}, a.compute)
                                                : empty_on_device_of(a.input, {}, a.compute);
    a.dispatch([&]<class T>(T) {
      RowLoss<T>{.B = a.B(),
                 .reduction = kind,
                 .target = values<int64_t>(target),
                 .lse_others = values<T>(lse_others),
                 .target_logits = values<T>(target_logits),
                 .weight = values_or_null<T>(class_weight)}
          .compute(data<T>(loss), data<T>(lse), data<T>(loss_slopes), data<T>(lse_slopes));
    });
    return {loss, lse, lse_others, loss_slopes, lse_slopes};
  }

  PartGradients backward(const Tensor& grad_lse_others, const Tensor& grad_target_logits,
                         const Tensor& grad_weighted_sums, const Tensor& lse_others, bool need_input, bool need_centers,
                         bool need_displacements, bool need_tau, bool need_bias, const Tensor* stash) const {
    const Tensor lse = a.checked(lse_others, {a.B()}, a.compute, "lse_others"),
                 grad_lse = a.checked(grad_lse_others, {a.B()}, a.compute, "grad_lse_others"),
                 grad_target = a.checked(grad_target_logits, {a.B()}, a.compute, "grad_target_logits"),
                 grad_sums = a.checked(grad_weighted_sums, {weight ? a.B() : 0}, a.compute, "grad_weighted_sums"),
                 grad_bias = empty_on_device_of(a.input, {need_bias && bias ? a.K() : 0}, a.compute);
    const GradientTensors g(a, need_input, need_centers, need_displacements, need_tau, stash);
    a.dispatch([&]<class T>(T) {
      const Problem<T> p = a.problem<T>();
      const LossRows<T> rows{.lse_others = values<T>(lse),
                             .grad_lse_others = values<T>(grad_lse),
                             .grad_target_logits = values<T>(grad_target),
                             .grad_weighted_sums = weight ? values<T>(grad_sums) : nullptr};
      cross_entropy_backward(p, loss<T>(), rows, stash_in(p, stash), g.out,
                             grad_bias.numel() ? data<T>(grad_bias) : nullptr);
    });
    return {g.input,
            g.centers,
            converted(g.displacements, displacements_dtype),
            converted(g.tau, tau_dtype),
            converted(grad_bias, bias_dtype),
            g.directions,
            g.turns};
  }
};

Parts cross_entropy_parts_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                  const Tensor& tau, OptionalTensor class_bias, OptionalTensor directions,
                                  OptionalTensor turns, const Tensor& target, OptionalTensor weight,
                                  int64_t ignore_index, bool /*allow_tf32*/) {
  return LossCall(input, centers, displacements, tau, class_bias, directions, turns, target, weight, ignore_index)
      .forward(nullptr);
}

Parts stashed_cross_entropy_parts_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                          const Tensor& tau, OptionalTensor class_bias, OptionalTensor directions,
                                          OptionalTensor turns, const Tensor& target, OptionalTensor weight,
                                          int64_t ignore_index, const Tensor& stash) {
  return LossCall(input, centers, displacements, tau, class_bias, directions, turns, target, weight, ignore_index)
      .forward(&stash);
}

Loss stashed_cross_entropy_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                   const Tensor& tau, OptionalTensor directions, OptionalTensor turns,
                                   const Tensor& target, OptionalTensor weight, int64_t reduction, int64_t ignore_index,
                                   const Tensor& stash) {
  return LossCall(input, centers, displacements, tau, {}, directions, turns, target, {}, ignore_index)
      .whole_loss(stash, weight, reduction);
}

PartGradients cross_entropy_parts_backward(const Tensor& grad_lse_others, const Tensor& grad_target_logits,
                                           const Tensor& grad_weighted_sums, const Tensor& input, const Tensor& centers,
                                           const Tensor& displacements, const Tensor& tau, OptionalTensor class_bias,
                                           OptionalTensor directions, OptionalTensor turns, const Tensor& target,
                                           OptionalTensor weight, int64_t ignore_index, const Tensor& lse_others,
                                           bool need_input, bool need_centers, bool need_displacements, bool need_tau,
                                           bool need_bias, bool /*allow_tf32*/) {
  return LossCall(input, centers, displacements, tau, class_bias, directions, turns, target, weight, ignore_index)
      .backward(grad_lse_others, grad_target_logits, grad_weighted_sums, lse_others, need_input, need_centers,
                need_displacements, need_tau, need_bias, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> stashed_cross_entropy_parts_backward(
    const Tensor& grad_lse_others, const Tensor& grad_target_logits, const Tensor& grad_weighted_sums,
    const Tensor& input, const Tensor& centers, const Tensor& displacements, const Tensor& tau,
    OptionalTensor class_bias, OptionalTensor directions, OptionalTensor turns, const Tensor& target,
    OptionalTensor weight, int64_t ignore_index, const Tensor& lse_others, bool need_input, bool need_displacements,
    bool need_tau, bool need_bias, const Tensor& stash) {
  const auto [grad_input, grad_centers, grad_displacements, grad_tau, grad_bias, grad_directions, grad_turns] =
      LossCall(input, centers, displacements, tau, class_bias, directions, turns, target, weight, ignore_index)
          .backward(grad_lse_others, grad_target_logits, grad_weighted_sums, lse_others, need_input, true,
                    need_displacements, need_tau, need_bias, &stash);
  return {grad_input, grad_displacements, grad_tau, grad_bias, grad_directions, grad_turns};
}

}  // namespace
}  // namespace gistops

STABLE_TORCH_LIBRARY_IMPL(gistops, CPU, m) {
  m.impl("cross_entropy_parts_forward", TORCH_BOX(&gistops::cross_entropy_parts_forward));
  m.impl("cross_entropy_parts_backward", TORCH_BOX(&gistops::cross_entropy_parts_backward));
  m.impl("stashed_cross_entropy_parts_forward", TORCH_BOX(&gistops::stashed_cross_entropy_parts_forward));
  m.impl("stashed_cross_entropy_forward", TORCH_BOX(&gistops::stashed_cross_entropy_forward));
  m.impl("stashed_cross_entropy_parts_backward", TORCH_BOX(&gistops::stashed_cross_entropy_parts_backward));
}
