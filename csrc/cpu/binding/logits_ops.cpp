// The CPU operators that make or take logits.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../backward.h"
#include "../forward.h"
#include "arguments.h"

namespace gistops {
namespace {

// No displacements, [0, d].
Tensor none(const Tensor& input) { return like(input, {0, input.dim() == 2 ? input.size(1) : 0}, input.scalar_type()); }

using Logits = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Logits logits_and_norms(const Arguments& a) {
  const Tensor logits = like(a.input, {a.B(), a.K()}, a.compute),
               slots = like(a.input, {a.B(), a.K()}, ScalarType::Byte),
               center_rnorms = like(a.input, {a.M(), a.K()}, a.compute),
               input_rnorms = like(a.input, {a.B()}, a.compute);
  a.dispatch([&]<class T>(T) {
    forward(a.problem<T>(), data<T>(logits), data<uint8_t>(slots), data<T>(center_rnorms), data<T>(input_rnorms));
  });
  return {logits, slots, center_rnorms, input_rnorms};
}

GradientTensors gradients_of_logits(const Arguments& a, const Tensor& grad, const Tensor& logits, const Tensor& slots,
                                    const Tensor& center_rnorms, bool need_input, bool need_centers,
                                    bool need_displacements, bool need_tau) {
  const Tensor G = a.checked(grad, {a.B(), a.K()}, a.compute, "grad"),
               z = a.checked(logits, {a.B(), a.K()}, a.compute, "logits"),
               j = a.checked(slots, {a.B(), a.K()}, ScalarType::Byte, "slots"),
               R = a.checked(center_rnorms, {a.M(), a.K()}, a.compute, "center_rnorms");
  const GradientTensors gradients(a, need_input, need_centers, need_displacements, need_tau);
  a.dispatch([&]<class T>(T) {
    backward(a.problem<T>(), values<T>(G), values<T>(z), values<uint8_t>(j), values<T>(R), gradients.out);
  });
  return gradients;
}

Logits logits_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements, const Tensor& tau,
                      bool /*allow_tf32*/) {
  return logits_and_norms(Arguments(input, centers, displacements, tau));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logits_backward(const Tensor& grad, const Tensor& input,
                                                           const Tensor& centers, const Tensor& displacements,
                                                           const Tensor& tau, const Tensor& logits, const Tensor& slots,
                                                           const Tensor& center_rnorms, const Tensor& /*input_rnorms*/,
                                                           bool need_input, bool need_centers, bool need_displacements,
                                                           bool need_tau, bool /*allow_tf32*/) {
  const GradientTensors g = gradients_of_logits(Arguments(input, centers, displacements, tau), grad, logits, slots,
                                                center_rnorms, need_input, need_centers, need_displacements, need_tau);
  return {g.input, g.centers, torch::stable::to(g.displacements, displacements.scalar_type()),
          torch::stable::to(g.tau, tau.scalar_type())};
}

Logits subcenter_forward(const Tensor& input, const Tensor& centers, const Tensor& tau, bool /*allow_tf32*/) {
  return logits_and_norms(Arguments(input, centers, none(input), tau));
}

std::tuple<Tensor, Tensor, Tensor> subcenter_backward(const Tensor& grad, const Tensor& input, const Tensor& centers,
                                                      const Tensor& tau, const Tensor& logits, const Tensor& slots,
                                                      const Tensor& center_rnorms, const Tensor& /*input_rnorms*/,
                                                      bool need_input, bool need_centers, bool need_tau,
                                                      bool /*allow_tf32*/) {
  const GradientTensors g = gradients_of_logits(Arguments(input, centers, none(input), tau), grad, logits, slots,
                                                center_rnorms, need_input, need_centers, false, need_tau);
  return {g.input, g.centers, torch::stable::to(g.tau, tau.scalar_type())};
}

Logits rotation_forward(const Tensor& input, const Tensor& centers, const Tensor& tau, const Tensor& input_coeffs,
                        const Tensor& class_coeffs, bool /*allow_tf32*/) {
  return logits_and_norms(Arguments(input, centers, none(input), tau, input_coeffs, class_coeffs));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rotation_backward(
    const Tensor& grad, const Tensor& input, const Tensor& centers, const Tensor& tau, const Tensor& input_coeffs,
    const Tensor& class_coeffs, const Tensor& logits, const Tensor& slots, const Tensor& center_rnorms,
    const Tensor& /*input_rnorms*/, bool need_input, bool need_centers, bool need_tau, bool /*allow_tf32*/) {
  const GradientTensors g =
      gradients_of_logits(Arguments(input, centers, none(input), tau, input_coeffs, class_coeffs), grad, logits, slots,
                          center_rnorms, need_input, need_centers, false, need_tau);
  return {g.input, g.centers, torch::stable::to(g.tau, tau.scalar_type()), g.x, g.y};
}

Tensor center_norms_op(const Tensor& centers, const Tensor& displacements) {
  const int64_t d = centers.dim() > 0 ? centers.size(centers.dim() - 1) : 0;
  const Arguments a(like(centers, {0, d}, centers.scalar_type()), centers, displacements,
                    torch::stable::fill_(like(centers, {1}, ScalarType::Float), 1.0));
  const Tensor norms = like(centers, {a.M(), a.K()}, a.compute);
  a.dispatch([&]<class T>(T) { center_norms(a.problem<T>(), data<T>(norms)); });
  return norms;
}

std::tuple<Tensor, Tensor> frozen_logits(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                         const Tensor& tau, const Tensor& norms) {
  const Arguments a(input, centers, displacements, tau);
  const Tensor known = a.checked(torch::stable::to(norms, a.compute), {a.M(), a.K()}, a.compute, "norms");
  const Tensor logits = like(input, {a.B(), a.K()}, a.compute), slots = like(input, {a.B(), a.K()}, ScalarType::Byte);
  a.dispatch([&]<class T>(T) {
    Problem<T> p = a.problem<T>();
    p.norms = values<T>(known);
    forward(p, data<T>(logits), data<uint8_t>(slots), static_cast<T*>(nullptr), static_cast<T*>(nullptr));
  });
  return {logits, slots};
}

std::string cpu_capability() {
  return std::string(kernels<float>().name) + (use_onednn() ? ", products by oneDNN" : ", products by BLAS");
}

}  // namespace
}  // namespace gistops

STABLE_TORCH_LIBRARY_IMPL(gistops, CPU, m) {
  m.impl("logits_forward", TORCH_BOX(&gistops::logits_forward));
  m.impl("logits_backward", TORCH_BOX(&gistops::logits_backward));
  m.impl("subcenter_forward", TORCH_BOX(&gistops::subcenter_forward));
  m.impl("subcenter_backward", TORCH_BOX(&gistops::subcenter_backward));
  m.impl("rotation_forward", TORCH_BOX(&gistops::rotation_forward));
  m.impl("rotation_backward", TORCH_BOX(&gistops::rotation_backward));
  m.impl("center_norms", TORCH_BOX(&gistops::center_norms_op));
  m.impl("frozen_logits", TORCH_BOX(&gistops::frozen_logits));
}

STABLE_TORCH_LIBRARY_IMPL(gistops, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&gistops::cpu_capability));
}
