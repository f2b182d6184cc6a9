// Tensors to the kernels' arguments. Shapes and devices were checked in gistops/_checks.py; what is checked again here
// is what memory safety rests on, for callers who reach the operators without it.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "../backward.h"
#include "../gemm.h"
#include "../problem.h"

namespace gistops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Format format_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Format::f32;
    case ScalarType::Double: return Format::f64;
    case ScalarType::Half: return Format::f16;
    case ScalarType::BFloat16: return Format::bf16;
    default: break;
  }
  STD_TORCH_CHECK(false, "gistops: expected float32, float16, bfloat16 or float64");
  return Format::f32;
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

inline Tensor like(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return torch::stable::new_empty(x, sizes, dtype);
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
const T* values(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// The operator's arguments, contiguous, with the small ones (delta, tau) in the dtype of computation.
struct Arguments {
  Tensor input, centers, displacements, tau;
  bool wide;  // float64
  ScalarType compute;

  std::optional<Tensor> x, y;  // tables [B, M] and [2, M, K], in the type of computation

  Arguments(const Tensor& f, const Tensor& w, const Tensor& delta, const Tensor& t,
            const std::optional<Tensor>& input_coeffs = std::nullopt,
            const std::optional<Tensor>& class_coeffs = std::nullopt)
      : input(torch::stable::contiguous(f)), centers(torch::stable::contiguous(w)), displacements(delta), tau(t),
        wide(is_double(f) || is_double(w) || is_double(delta)), compute(wide ? ScalarType::Double : ScalarType::Float) {
    STD_TORCH_CHECK(blas_available(),
                    "gistops: this PyTorch exports no BLAS (sgemm_, dgemm_); use backend='reference'");
    STD_TORCH_CHECK(f.dim() == 2 && (w.dim() == 2 || w.dim() == 3) && delta.dim() == 2 &&
                        f.size(1) == w.size(w.dim() - 1) && f.size(1) == delta.size(1),
                    "gistops: expected input [B, d], centers [K, d] or [K, M, d], and displacements [m, d]");
    STD_TORCH_CHECK(delta.size(0) < 256, "gistops: expected at most 255 displacements");
    STD_TORCH_CHECK(w.dim() == 2 || (delta.size(0) == 0 && w.size(1) >= 1 && w.size(1) <= 256),
                    "gistops: expected free centres, [K, M, d] with 1 <= M <= 256, without displacements");
    STD_TORCH_CHECK(t.numel() == 1, "gistops: expected tau of one element");
    STD_TORCH_CHECK(f.is_cpu() && w.is_cpu() && delta.is_cpu() && t.is_cpu(), "gistops: expected tensors on the CPU");
    displacements = torch::stable::contiguous(torch::stable::to(displacements, compute));
    tau = torch::stable::to(tau, compute);
    if (!input_coeffs || !class_coeffs) return;
    const int64_t slots = input_coeffs->dim() == 2 ? input_coeffs->size(1) : 0;
    STD_TORCH_CHECK(w.dim() == 2 && delta.size(0) == 0 && slots >= 1 && slots <= 256,
                    "gistops: expected tables of 1 to 256 slots without displacements");
    x = checked(torch::stable::to(*input_coeffs, compute), {B(), slots}, compute, "input_coeffs");
    y = checked(torch::stable::to(*class_coeffs, compute), {2, slots, K()}, compute, "class_coeffs");
  }

  int64_t B() const { return input.size(0); }
  int64_t K() const { return centers.size(0); }
  int64_t free_slots() const { return centers.dim() == 3 ? centers.size(1) : 0; }
  int64_t M() const { return free_slots() ? free_slots() : x ? x->size(1) : displacements.size(0) + 1; }

  template <class T>
  Problem<T> problem() const {
    const int64_t d = input.size(1), vectors = K() * (free_slots() ? free_slots() : 1);
    return {.input = {input.const_data_ptr(), format_of(input), B(), d},
            .centers = {centers.const_data_ptr(), format_of(centers), vectors, d},
            .delta = values<T>(displacements),
            .transform = free_slots() ? Transform::subcenter
                         : x          ? Transform::rotation
                                      : Transform::translation,
            .B = B(),
            .K = K(),
            .d = d,
            .m = displacements.size(0),
            .M = M(),
            .tau = *values<T>(tau),
            .input_coeffs = x ? values<T>(*x) : nullptr,
            .class_coeffs = y ? values<T>(*y) : nullptr};
  }

  // Runs run(T()) in the type of computation.
  template <class Run>
  void dispatch(Run run) const {
    wide ? run(double()) : run(float());
  }

  // x as the kernels take it, checked for what memory safety rests on.
  Tensor checked(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype,
                 const char* name) const {
    bool fits = x.is_cpu() && x.dim() == static_cast<int64_t>(sizes.size()) && x.scalar_type() == dtype;
    for (size_t e = 0; fits && e < sizes.size(); ++e) fits = x.size(static_cast<int64_t>(e)) == sizes[e];
    STD_TORCH_CHECK(fits, "gistops: ", name, ": expected the forward's shape, dtype and device (schema.cpp)");
    return torch::stable::contiguous(x);
  }
};

// The gradients asked for, in their arguments' shapes; an empty tensor for each of the others.
struct GradientTensors {
  Tensor input, centers, displacements, tau;
  Tensor x, y;  // of tables, always made; empty without
  Gradients out;

  // parked: memory for the gradient of centers, or null.
  GradientTensors(const Arguments& a, bool need_input, bool need_centers, bool need_displacements, bool need_tau,
                  const Tensor* parked = nullptr)
      : input(make(need_input, a.input, a.input.scalar_type())),
        centers(parked ? *parked : make(need_centers, a.centers, a.centers.scalar_type())),
        displacements(make(need_displacements, a.displacements, a.compute)), tau(make(need_tau, a.tau, a.compute)),
        x(make(a.x.has_value(), a.x ? *a.x : a.tau, a.compute)),
        y(make(a.y.has_value(), a.y ? *a.y : a.tau, a.compute)),
        out{need_input ? input.mutable_data_ptr() : nullptr,
            need_centers ? centers.mutable_data_ptr() : nullptr,
            need_displacements && a.displacements.numel() ? displacements.mutable_data_ptr() : nullptr,
            need_tau ? tau.mutable_data_ptr() : nullptr,
            a.x ? x.mutable_data_ptr() : nullptr,
            a.y ? y.mutable_data_ptr() : nullptr} {}

  static Tensor make(bool needed, const Tensor& x, ScalarType dtype) {
    return needed ? torch::stable::new_empty(x, x.sizes(), dtype) : torch::stable::new_empty(x, {0}, x.scalar_type());
  }
};

}  // namespace gistops
