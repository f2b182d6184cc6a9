// The CPU ops that compute logits, their gradients, and the top k classes.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../backward.h"
#include "../forward.h"
#include "../topk.h"
#include "arguments.h"

namespace gistops {
namespace {

// No displacements, [0, d].
Tensor no_displacements(const Tensor& input) {
  return empty_on_device_of(input, {0, input.dim() == 2 ? input.size(1) : 0}, input.scalar_type());
}

using Logits = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void check_dims(const Tensor& centers, int64_t dims, const char* shape) {
  STD_TORCH_CHECK(centers.dim() == dims, "gistops: centers: expected shape ", shape, ", got ",
                  shape_text(centers.sizes()));
}

using OptionalDtype = std::optional<ScalarType>;

// The tensors that take logits and slots.
struct Scores {
  Tensor logits, slots;

  Scores(const Arguments& a, bool need_slots, const OptionalDtype& dtype)
      : logits(empty_on_device_of(a.input, {a.B(), a.K()}, dtype.value_or(a.compute))),
        slots(need_slots ? empty_on_device_of(a.input, {a.B(), a.K()}, ScalarType::Byte)
                         : empty_on_device_of(a.input, {0}, ScalarType::Byte)),
        out{logits.mutable_data_ptr(), format_of(logits, "logits_dtype"), need_slots ? data<uint8_t>(slots) : nullptr} {
  }

  StoredScores out;
};

Logits logits_and_norms(const Arguments& a, bool need_slots, const OptionalDtype& dtype) {
  const Scores scores(a, need_slots, dtype);
  const Tensor center_rnorms = empty_on_device_of(a.input, {a.M(), a.K()}, a.compute),
               input_rnorms = empty_on_device_of(a.input, {a.B()}, a.compute);
  a.dispatch([&]<class T>(T) { forward(a.problem<T>(), scores.out, data<T>(center_rnorms), data<T>(input_rnorms)); });
  return {scores.logits, scores.slots, center_rnorms, input_rnorms};
}

StoredMatrix stored(const Tensor& x, const char* name) {
  return {x.const_data_ptr(), format_of(x, name), x.size(0), x.size(1)};
}

GradientTensors logits_gradients(const Arguments& a, const Tensor& grad, const Tensor& logits, const Tensor& slots,
                                 const Tensor& center_rnorms, const Tensor& input_rnorms, bool need_input,
                                 bool need_centers, bool need_displacements, bool need_tau) {
  const Tensor G = a.checked(grad, {a.B(), a.K()}, "grad"), z = a.checked(logits, {a.B(), a.K()}, "logits"),
               j = a.checked(slots, {a.B(), a.K()}, ScalarType::Byte, "slots"),
               R = a.checked(center_rnorms, {a.M(), a.K()}, a.compute, "center_rnorms");
  a.checked(input_rnorms, {a.B()}, a.compute, "input_rnorms");  // not used here, but part of the forward's result
  const GradientTensors gradients(a, need_input, need_centers, need_displacements, need_tau);
  a.dispatch([&]<class T>(T) {
    backward(a.problem<T>(), stored(G, "grad"), stored(z, "logits"), values<uint8_t>(j), values<T>(R), gradients.out);
  });
  return gradients;
}

Logits logits_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements, const Tensor& tau,
                      bool /*allow_tf32*/, bool need_slots, OptionalDtype logits_dtype) {
  check_dims(centers, 2, "[K, d]");
  return logits_and_norms(Arguments(input, centers, displacements, tau), need_slots, logits_dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logits_backward(const Tensor& grad, const Tensor& input,
                                                           const Tensor& centers, const Tensor& displacements,
                                                           const Tensor& tau, const Tensor& logits, const Tensor& slots,
                                                           const Tensor& center_rnorms, const Tensor& input_rnorms,
                                                           bool need_input, bool need_centers, bool need_displacements,
                                                           bool need_tau, bool /*allow_tf32*/) {
  check_dims(centers, 2, "[K, d]");
  const GradientTensors g =
      logits_gradients(Arguments(input, centers, displacements, tau), grad, logits, slots, center_rnorms, input_rnorms,
                       need_input, need_centers, need_displacements, need_tau);
  return {g.input, g.centers, converted(g.displacements, displacements.scalar_type()),
          converted(g.tau, tau.scalar_type())};
}

Logits subcenter_forward(const Tensor& input, const Tensor& centers, const Tensor& tau, bool /*allow_tf32*/,
                         bool need_slots, OptionalDtype logits_dtype) {
  check_dims(centers, 3, "[K, M, d]");
  return logits_and_norms(Arguments(input, centers, no_displacements(input), tau), need_slots, logits_dtype);
}

std::tuple<Tensor, Tensor, Tensor> subcenter_backward(const Tensor& grad, const Tensor& input, const Tensor& centers,
                                                      const Tensor& tau, const Tensor& logits, const Tensor& slots,
                                                      const Tensor& center_rnorms, const Tensor& input_rnorms,
                                                      bool need_input, bool need_centers, bool need_tau,
                                                      bool /*allow_tf32*/) {
  check_dims(centers, 3, "[K, M, d]");
  const GradientTensors g =
      logits_gradients(Arguments(input, centers, no_displacements(input), tau), grad, logits, slots, center_rnorms,
                       input_rnorms, need_input, need_centers, false, need_tau);
  return {g.input, g.centers, converted(g.tau, tau.scalar_type())};
}

Logits rotation_forward(const Tensor& input, const Tensor& centers, const Tensor& tau, const Tensor& directions,
                        const Tensor& turns, bool /*allow_tf32*/, bool need_slots, OptionalDtype logits_dtype) {
  return logits_and_norms(Arguments(input, centers, no_displacements(input), tau, directions, turns), need_slots,
                          logits_dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rotation_backward(
    const Tensor& grad, const Tensor& input, const Tensor& centers, const Tensor& tau, const Tensor& directions,
    const Tensor& turns, const Tensor& logits, const Tensor& slots, const Tensor& center_rnorms,
    const Tensor& input_rnorms, bool need_input, bool need_centers, bool need_tau, bool /*allow_tf32*/) {
  const GradientTensors g =
      logits_gradients(Arguments(input, centers, no_displacements(input), tau, directions, turns), grad, logits, slots,
                       center_rnorms, input_rnorms, need_input, need_centers, false, need_tau);
  return {g.input, g.centers, converted(g.tau, tau.scalar_type()), g.directions, g.turns};
}

Tensor center_norms_op(const Tensor& centers, const Tensor& displacements) {
  const int64_t d = centers.dim() > 0 ? centers.size(centers.dim() - 1) : 0;
  format_of(centers, "centers");
  STD_TORCH_CHECK(d >= 1, "gistops: centers: expected shape [K, d] with d >= 1, got ", shape_text(centers.sizes()));
  const Arguments a(empty_on_device_of(centers, {0, d}, centers.scalar_type()), centers, displacements,
                    torch::stable::fill_(empty_on_device_of(centers, {1}, ScalarType::Float), 1.0));
  const Tensor norms = empty_on_device_of(centers, {a.M(), a.K()}, a.compute);
  a.dispatch([&]<class T>(T) { center_norms(a.problem<T>(), data<T>(norms)); });
  return norms;
}

std::tuple<Tensor, Tensor> frozen_logits(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                         const Tensor& tau, const Tensor& norms, bool need_slots,
                                         OptionalDtype logits_dtype) {
  const Arguments a(input, centers, displacements, tau);
  const Tensor known = a.in_compute(norms, {a.M(), a.K()}, "norms");
  const Scores scores(a, need_slots, logits_dtype);
  a.dispatch([&]<class T>(T) {
    Problem<T> p = a.problem<T>();
    p.norms = values<T>(known);
    forward(p, scores.out, static_cast<T*>(nullptr), static_cast<T*>(nullptr));
  });
  return {scores.logits, scores.slots};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_op(const Tensor& input, const Tensor& centers,
                                                   const Tensor& displacements, const Tensor& tau,
                                                   OptionalTensor class_bias, OptionalTensor directions,
                                                   OptionalTensor turns, int64_t k, bool need_lse, bool /*allow_tf32*/,
                                                   OptionalTensor norms) {
  const Arguments a(input, centers, displacements, tau, directions, turns);
  const OptionalTensor bias = a.per_class(class_bias, "class_bias");
  STD_TORCH_CHECK(k >= 1 && k <= a.K(), "gistops: k: expected 1 to ", a.K(), ", got ", k);
  const Tensor top_values = empty_on_device_of(input, {a.B(), k}, a.compute),
               classes = empty_on_device_of(input, {a.B(), k}, ScalarType::Long),
               slots = empty_on_device_of(input, {a.B(), k}, ScalarType::Byte),
               lse = empty_on_device_of(input, {need_lse ? a.B() : 0}, a.compute);
  STD_TORCH_CHECK(!norms || !directions, "gistops: norms: expected None for rotations, got a tensor");
  if (norms) norms = a.in_compute(*norms, {a.M(), a.K()}, "norms");
  a.dispatch([&]<class T>(T) {
    Problem<T> p = a.problem<T>();
    p.norms = values_or_null<T>(norms);
    topk(p, values_or_null<T>(bias), k, data<T>(top_values), data<int64_t>(classes), data<uint8_t>(slots),
         need_lse ? data<T>(lse) : nullptr);
  });
  return {top_values, classes, slots, lse};
}

bool cpu_multiplies(ScalarType dtype) {
  return (dtype == ScalarType::BFloat16 && use_half_units(Format::bf16)) ||
         (dtype == ScalarType::Half && use_half_units(Format::f16));
}

std::string cpu_capability() {
  std::string lines = kernels<float>().name;
  for (const Choice& choice : {float32_choice(), half_choice(Format::bf16), half_choice(Format::f16)})
    lines += std::string("\n") + choice.why;
  return lines;
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
  m.impl("topk", TORCH_BOX(&gistops::topk_op));
}

STABLE_TORCH_LIBRARY_IMPL(gistops, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&gistops::cpu_capability));
  m.impl("cpu_multiplies", TORCH_BOX(&gistops::cpu_multiplies));
}
