// The CPU operators: tensors in, tensors out. Shapes and devices were checked in gistops/_checks.py; what is checked
// again here is what memory safety rests on, for callers who reach the operators without it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <tuple>

#include "backward.h"
#include "forward.h"

namespace gistops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Format format_of(const Tensor& x) {
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

bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

Tensor like(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
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

  Arguments(const Tensor& f, const Tensor& w, const Tensor& delta, const Tensor& t)
      : input(torch::stable::contiguous(f)), centers(torch::stable::contiguous(w)), displacements(delta), tau(t),
        wide(is_double(f) || is_double(w) || is_double(delta)), compute(wide ? ScalarType::Double : ScalarType::Float) {
    STD_TORCH_CHECK(blas_available(),
                    "gistops: this PyTorch exports no BLAS (sgemm_, dgemm_); use backend='reference'");
    STD_TORCH_CHECK(
        f.dim() == 2 && w.dim() == 2 && delta.dim() == 2 && f.size(1) == w.size(1) && f.size(1) == delta.size(1),
        "gistops: expected input [B, d], centers [K, d] and displacements [m, d]");
    STD_TORCH_CHECK(delta.size(0) < 256, "gistops: expected at most 255 displacements");
    STD_TORCH_CHECK(t.numel() == 1, "gistops: expected tau of one element");
    STD_TORCH_CHECK(f.is_cpu() && w.is_cpu() && delta.is_cpu() && t.is_cpu(), "gistops: expected tensors on the CPU");
    displacements = torch::stable::contiguous(torch::stable::to(displacements, compute));
    tau = torch::stable::to(tau, compute);
  }

  template <class T>
  Problem<T> problem() const {
    const int64_t d = input.size(1);
    return {{input.const_data_ptr(), format_of(input), input.size(0), d},
            {centers.const_data_ptr(), format_of(centers), centers.size(0), d},
            values<T>(displacements),
            input.size(0),
            centers.size(0),
            d,
            displacements.size(0),
            *values<T>(tau)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> constellation_forward(const Tensor& input, const Tensor& centers,
                                                                 const Tensor& displacements, const Tensor& tau,
                                                                 bool /*allow_tf32*/) {
  const Arguments a(input, centers, displacements, tau);
  const int64_t B = input.size(0), K = centers.size(0), M = displacements.size(0) + 1;
  const Tensor logits = like(input, {B, K}, a.compute), slots = like(input, {B, K}, ScalarType::Byte);
  const Tensor center_rnorms = like(input, {M, K}, a.compute), input_rnorms = like(input, {B}, a.compute);
  const auto run = [&]<class T>(T) {
    forward(a.problem<T>(), data<T>(logits), data<uint8_t>(slots), data<T>(center_rnorms), data<T>(input_rnorms));
  };
  a.wide ? run(double()) : run(float());
  return {logits, slots, center_rnorms, input_rnorms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> constellation_backward(
    const Tensor& grad, const Tensor& input, const Tensor& centers, const Tensor& displacements, const Tensor& tau,
    const Tensor& logits, const Tensor& slots, const Tensor& center_rnorms, const Tensor& input_rnorms, bool need_input,
    bool need_centers, bool need_displacements, bool need_tau, bool /*allow_tf32*/) {
  const Arguments a(input, centers, displacements, tau);
  const int64_t B = input.size(0), K = centers.size(0), M = displacements.size(0) + 1;
  const auto matrix = [&](const Tensor& x, int64_t rows, int64_t cols, ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.size(0) == rows && x.size(1) == cols && x.scalar_type() == dtype,
                    "gistops: ", name, ": expected the forward's shape [", rows, ", ", cols, "] and dtype");
    return torch::stable::contiguous(x);
  };
  const Tensor G = matrix(grad, B, K, a.compute, "grad"), z = matrix(logits, B, K, a.compute, "logits");
  const Tensor j = matrix(slots, B, K, ScalarType::Byte, "slots");
  const Tensor R = matrix(center_rnorms, M, K, a.compute, "center_rnorms");
  STD_TORCH_CHECK(input_rnorms.is_cpu() && input_rnorms.dim() == 1 && input_rnorms.size(0) == B &&
                      input_rnorms.scalar_type() == a.compute,
                  "gistops: input_rnorms: expected the forward's shape [", B, "] and dtype");
  const Tensor n = torch::stable::contiguous(input_rnorms);

  const auto gradient = [](bool needed, const Tensor& x, ScalarType dtype) {
    return needed ? torch::stable::new_empty(x, x.sizes(), dtype) : torch::stable::new_empty(x, {0}, x.scalar_type());
  };
  const Tensor df = gradient(need_input, a.input, input.scalar_type()),
               dw = gradient(need_centers, a.centers, centers.scalar_type());
  Tensor dd = gradient(need_displacements, a.displacements, a.compute), dt = gradient(need_tau, a.tau, a.compute);
  const Gradients out{need_input ? df.mutable_data_ptr() : nullptr, need_centers ? dw.mutable_data_ptr() : nullptr,
                      need_displacements && a.displacements.numel() ? dd.mutable_data_ptr() : nullptr,
                      need_tau ? dt.mutable_data_ptr() : nullptr};
  const auto run = [&]<class T>(T) {
    const Saved<T> saved{values<T>(G), values<T>(z), values<uint8_t>(j), values<T>(R), values<T>(n)};
    backward(a.problem<T>(), saved, out);
  };
  a.wide ? run(double()) : run(float());
  return {df, dw, torch::stable::to(dd, displacements.scalar_type()), torch::stable::to(dt, tau.scalar_type())};
}

std::string cpu_capability() {
  return std::string(kernels<float>().name) + (use_onednn() ? ", products by oneDNN" : ", products by BLAS");
}

}  // namespace
}  // namespace gistops

STABLE_TORCH_LIBRARY_IMPL(gistops, CPU, m) {
  m.impl("constellation_forward", TORCH_BOX(&gistops::constellation_forward));
  m.impl("constellation_backward", TORCH_BOX(&gistops::constellation_backward));
}

STABLE_TORCH_LIBRARY_IMPL(gistops, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&gistops::cpu_capability));
}
