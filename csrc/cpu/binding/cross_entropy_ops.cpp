// The CPU operators that stream over classes: the parts of a cross-entropy, and the best k.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../cross_entropy.h"
#include "../topk.h"
#include "arguments.h"

namespace gistops {
namespace {

// A vector of classes, optional, in the type of computation.
std::optional<Tensor> of_classes(const Arguments& a, const std::optional<Tensor>& x, const char* name) {
  if (!x) return std::nullopt;
  return a.checked(torch::stable::to(*x, a.compute), {a.K()}, a.compute, name);
}

template <class T>
const T* values_or_null(const std::optional<Tensor>& x) {
  return x ? values<T>(*x) : nullptr;
}

struct Terms {
  std::optional<Tensor> bias, weight;
  Tensor target;  // -1: none

  Terms(const Arguments& a, const std::optional<Tensor>& b, const Tensor& y, const std::optional<Tensor>& w,
        int64_t ignore_index)
      : bias(of_classes(a, b, "class_bias")), weight(of_classes(a, w, "weight")),
        target(like(a.input, {a.B()}, ScalarType::Long)) {
    const Tensor given = a.checked(y, {a.B()}, ScalarType::Long, "target");
    for (int64_t i = 0; i < a.B(); ++i) {
      const int64_t k = values<int64_t>(given)[i];
      STD_TORCH_CHECK(k == ignore_index || (k >= 0 && k < a.K()), "target: expected 0 to ", a.K() - 1,
                      " or ignore_index ", ignore_index, ", got ", k, " at position ", i);
      data<int64_t>(target)[i] = k == ignore_index ? -1 : k;
    }
  }

  template <class T>
  LossArguments<T> loss() const {
    return {{values_or_null<T>(bias), values_or_null<T>(weight)}, values<int64_t>(target)};
  }
};

// Memory for the scores: one that will hold the gradient of centers.
void check_parked(const Arguments& a, const Tensor& parked) {
  STD_TORCH_CHECK(parked.is_cpu() && parked.is_contiguous() && parked.numel() == a.centers.numel() &&
                      parked.scalar_type() == a.centers.scalar_type(),
                  "gistops: stash: expected a contiguous tensor of the shape and dtype of centers");
}

template <class T>
Stash<T> stash(const Problem<T>& p, const Tensor* parked) {
  return parked ? Stash<T>(p, parked->mutable_data_ptr()) : Stash<T>();
}

using Optional = std::optional<Tensor>;
using Lse = std::tuple<Tensor, Tensor, Tensor>;
using LseGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the operators of the loss have in common: their arguments from input to ignore_index.
struct Call {
  Arguments a;
  Terms t;
  const Tensor *displacements, *tau;
  const Optional* bias;

  Call(const Tensor& input, const Tensor& centers, const Tensor& delta, const Tensor& temperature, const Optional& b,
       const Optional& x, const Optional& y, const Tensor& target, const Optional& weight, int64_t ignore_index)
      : a(input, centers, delta, temperature, x, y), t(a, b, target, weight, ignore_index), displacements(&delta),
        tau(&temperature), bias(&b) {}

  Lse forward(const Tensor* parked) const {
    const Tensor lse = like(a.input, {a.B()}, a.compute), target_logits = like(a.input, {a.B()}, a.compute),
                 sums = like(a.input, {t.weight ? a.B() : 0}, a.compute);
    if (parked) check_parked(a, *parked);
    a.dispatch([&]<class T>(T) {
      const Problem<T> p = a.problem<T>();
      cross_entropy_forward(p, t.loss<T>(), stash(p, parked), data<T>(lse), data<T>(target_logits),
                            t.weight ? data<T>(sums) : nullptr);
    });
    return {lse, target_logits, sums};
  }

  LseGradients backward(const Tensor& grad_lse, const Tensor& grad_target, const Tensor& grad_sums, const Tensor& lse,
                        bool need_input, bool need_centers, bool need_displacements, bool need_tau, bool need_bias,
                        const Tensor* parked) const {
    const Tensor of_lse = a.checked(grad_lse, {a.B()}, a.compute, "grad_lse_others"),
                 of_target = a.checked(grad_target, {a.B()}, a.compute, "grad_target_logits"),
                 of_sums = a.checked(grad_sums, {t.weight ? a.B() : 0}, a.compute, "grad_weighted_sums"),
                 sums = a.checked(lse, {a.B()}, a.compute, "lse_others");
    if (parked) check_parked(a, *parked);
    const GradientTensors g(a, need_input, need_centers, need_displacements, need_tau, parked);
    const Tensor of_bias = like(a.input, {need_bias && *bias ? a.K() : 0}, a.compute);
    a.dispatch([&]<class T>(T) {
      const Problem<T> p = a.problem<T>();
      const LossRows<T> rows{values<T>(sums), values<T>(of_lse), values<T>(of_target),
                             t.weight ? values<T>(of_sums) : nullptr};
      cross_entropy_backward(p, t.loss<T>(), rows, stash(p, parked), g.out,
                             of_bias.numel() ? data<T>(of_bias) : nullptr);
    });
    return {g.input,
            g.centers,
            torch::stable::to(g.displacements, displacements->scalar_type()),
            torch::stable::to(g.tau, tau->scalar_type()),
            *bias ? torch::stable::to(of_bias, (*bias)->scalar_type()) : of_bias,
            g.x,
            g.y};
  }
};

Lse cross_entropy_parts_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                const Tensor& tau, Optional class_bias, Optional input_coeffs, Optional class_coeffs,
                                const Tensor& target, Optional weight, int64_t ignore_index, bool /*allow_tf32*/) {
  return Call(input, centers, displacements, tau, class_bias, input_coeffs, class_coeffs, target, weight, ignore_index)
      .forward(nullptr);
}

Lse stashed_cross_entropy_parts_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                        const Tensor& tau, Optional class_bias, Optional input_coeffs,
                                        Optional class_coeffs, const Tensor& target, Optional weight,
                                        int64_t ignore_index, const Tensor& parked) {
  return Call(input, centers, displacements, tau, class_bias, input_coeffs, class_coeffs, target, weight, ignore_index)
      .forward(&parked);
}

LseGradients cross_entropy_parts_backward(const Tensor& grad_lse, const Tensor& grad_target, const Tensor& grad_sums,
                                          const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                          const Tensor& tau, Optional class_bias, Optional input_coeffs,
                                          Optional class_coeffs, const Tensor& target, Optional weight,
                                          int64_t ignore_index, const Tensor& lse, bool need_input, bool need_centers,
                                          bool need_displacements, bool need_tau, bool need_bias, bool /*allow_tf32*/) {
  return Call(input, centers, displacements, tau, class_bias, input_coeffs, class_coeffs, target, weight, ignore_index)
      .backward(grad_lse, grad_target, grad_sums, lse, need_input, need_centers, need_displacements, need_tau,
                need_bias, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> stashed_cross_entropy_parts_backward(
    const Tensor& grad_lse, const Tensor& grad_target, const Tensor& grad_sums, const Tensor& input,
    const Tensor& centers, const Tensor& displacements, const Tensor& tau, Optional class_bias, Optional input_coeffs,
    Optional class_coeffs, const Tensor& target, Optional weight, int64_t ignore_index, const Tensor& lse,
    bool need_input, bool need_displacements, bool need_tau, bool need_bias, const Tensor& parked) {
  const auto [of_input, of_centers, of_displacements, of_tau, of_bias, of_x, of_y] =
      Call(input, centers, displacements, tau, class_bias, input_coeffs, class_coeffs, target, weight, ignore_index)
          .backward(grad_lse, grad_target, grad_sums, lse, need_input, true, need_displacements, need_tau, need_bias,
                    &parked);
  return {of_input, of_displacements, of_tau, of_bias, of_x, of_y};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_op(const Tensor& input, const Tensor& centers,
                                                   const Tensor& displacements, const Tensor& tau, Optional class_bias,
                                                   Optional input_coeffs, Optional class_coeffs, int64_t k,
                                                   bool need_lse, bool /*allow_tf32*/, Optional norms) {
  const Arguments a(input, centers, displacements, tau, input_coeffs, class_coeffs);
  const Optional bias = of_classes(a, class_bias, "class_bias");
  STD_TORCH_CHECK(k >= 1 && k <= a.K(), "gistops: expected 1 <= k <= ", a.K(), ", got ", k);
  const Tensor of_best = like(input, {a.B(), k}, a.compute), classes = like(input, {a.B(), k}, ScalarType::Long),
               slots = like(input, {a.B(), k}, ScalarType::Byte), lse = like(input, {need_lse ? a.B() : 0}, a.compute);
  if (norms) norms = a.checked(torch::stable::to(*norms, a.compute), {a.M(), a.K()}, a.compute, "norms");
  a.dispatch([&]<class T>(T) {
    Problem<T> p = a.problem<T>();
    p.norms = values_or_null<T>(norms);
    topk(p, values_or_null<T>(bias), k, data<T>(of_best), data<int64_t>(classes), data<uint8_t>(slots),
         need_lse ? data<T>(lse) : nullptr);
  });
  return {of_best, classes, slots, lse};
}

}  // namespace
}  // namespace gistops

STABLE_TORCH_LIBRARY_IMPL(gistops, CPU, m) {
  m.impl("cross_entropy_parts_forward", TORCH_BOX(&gistops::cross_entropy_parts_forward));
  m.impl("cross_entropy_parts_backward", TORCH_BOX(&gistops::cross_entropy_parts_backward));
  m.impl("stashed_cross_entropy_parts_forward", TORCH_BOX(&gistops::stashed_cross_entropy_parts_forward));
  m.impl("stashed_cross_entropy_parts_backward", TORCH_BOX(&gistops::stashed_cross_entropy_parts_backward));
  m.impl("topk", TORCH_BOX(&gistops::topk_op));
}
