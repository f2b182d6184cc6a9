// From tensors to pointers. gistops/_checks.py has checked shapes and devices; the checks that memory safety depends on
// are repeated here, for callers of torch.ops.gistops.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <type_traits>
#include <utility>

#include "../../torch_calls.h"
#include "../backward.h"
#include "../gemm.h"
#include "../problem.h"

namespace gistops {

inline Format format_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Format::f32;
    case ScalarType::Double: return Format::f64;
    case ScalarType::Half: return Format::f16;
    case ScalarType::BFloat16: return Format::bf16;
    default: break;
  }
  STD_TORCH_CHECK(false, "gistops: ", name, ": expected float32, float16, bfloat16 or float64, got ",
                  torch::headeronly::toString(x.scalar_type()));
  return Format::f32;
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
const T* values(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
const T* values_or_null(const std::optional<Tensor>& x) {
  return x ? values<T>(*x) : nullptr;
}

using OptionalTensor = std::optional<Tensor>;

// The arguments of the logits, contiguous. All but input and centers are in the dtype of computation.
struct Arguments {
  Tensor input, centers, displacements, tau;
  Tensor stored_displacements;  // contiguous, as given
  bool is_float64;
  ScalarType compute;                // the dtype of computation
  OptionalTensor directions, turns;  // of a rotation: [M, d] and [3, M - 1]

  Arguments(const Tensor& f, const Tensor& w, const Tensor& delta, const Tensor& t, const OptionalTensor& x = {},
            const OptionalTensor& y = {})
      : input(f), centers(w), displacements(delta), tau(t), stored_displacements(delta),
        is_float64(is_double(f) || is_double(w) || is_double(delta)),
        compute(is_float64 ? ScalarType::Double : ScalarType::Float) {
    check(f, w, delta, t);
    input = converted(f, f.scalar_type()), centers = converted(w, w.scalar_type());
    displacements = converted(delta, compute), tau = converted(t, compute);
    stored_displacements = converted(delta, delta.scalar_type());
    STD_TORCH_CHECK(x.has_value() == y.has_value(), "gistops: directions, turns: expected both or neither");
    if (!x) return;
    const int64_t slots = x->dim() == 2 ? x->size(0) : 0;
    STD_TORCH_CHECK(w.dim() == 2 && delta.size(0) == 0 && slots >= 1 && slots <= 256,
                    "gistops: directions: expected shape [M, d] with 1 <= M <= 256, centers [K, d] and no "
                    "displacements, got ",
                    shape_text(x->sizes()), " with centers ", shape_text(w.sizes()), " and displacements ",
                    shape_text(delta.sizes()));
    directions = in_compute(*x, {slots, input.size(1)}, "directions");
    turns = in_compute(*y, {3, slots - 1}, "turns");
  }

  int64_t B() const { return input.size(0); }
  int64_t K() const { return centers.size(0); }
  int64_t M() const {
    return has_subcenters() ? centers.size(1) : directions ? directions->size(0) : displacements.size(0) + 1;
  }
  bool has_subcenters() const { return centers.dim() == 3; }

  template <class T>
  Problem<T> problem() const {
    const int64_t d = input.size(1);
    const Format format = format_of(input, "input");
    const bool half = std::is_same_v<T, float> && d % 2 == 0 && input.scalar_type() == centers.scalar_type() &&
                      use_half_units(format);
    // By centers and displacements alone: the norms of a frozen head have the same bits for any input.
    const bool bf16_dots = std::is_same_v<T, float> && !directions && centers.scalar_type() == ScalarType::BFloat16 &&
                           (displacements.size(0) == 0 || stored_displacements.scalar_type() == ScalarType::BFloat16) &&
                           use_half_units(Format::bf16);
    return {.input = {input.const_data_ptr(), format, B(), d},
            .centers = {centers.const_data_ptr(), format_of(centers, "centers"), K() * (has_subcenters() ? M() : 1), d},
            .delta = values<T>(directions.value_or(displacements)),
            .transform = has_subcenters() && M() > 1 ? Transform::subcenter  // M = 1 is a plain center
                         : directions                ? Transform::rotation
                                                     : Transform::translation,
            .B = B(),
            .K = K(),
            .d = d,
            .m = displacements.size(0),
            .M = M(),
            .tau = nonzero_tau(*values<T>(tau)),
            .turns = values_or_null<T>(turns),
            .half = half,
            .bf16_dots = bf16_dots,
            .stored_delta = values<uint16_t>(stored_displacements)};
  }

  // Calls run(T()) with the type of computation T.
  template <class Run>
  void dispatch(Run run) const {
    is_float64 ? run(double()) : run(float());
  }

  // Returns x, checked and contiguous.
  Tensor checked(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype,
                 const char* name) const {
    check_sizes(x, sizes, name);
    STD_TORCH_CHECK(x.scalar_type() == dtype, "gistops: ", name, ": expected ", torch::headeronly::toString(dtype),
                    ", got ", torch::headeronly::toString(x.scalar_type()));
    return converted(x, dtype);
  }

  // The same for any floating dtype.
  Tensor checked(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, const char* name) const {
    check_sizes(x, sizes, name);
    format_of(x, name);
    return converted(x, x.scalar_type());
  }

  // Returns x in the dtype of computation, checked and contiguous.
  Tensor in_compute(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, const char* name) const {
    check_sizes(x, sizes, name);
    format_of(x, name);
    return converted(x, compute);
  }
  OptionalTensor per_class(const OptionalTensor& x, const char* name) const {
    return x ? OptionalTensor(in_compute(*x, {K()}, name)) : OptionalTensor();
  }

 private:
  static void check(const Tensor& f, const Tensor& w, const Tensor& delta, const Tensor& t) {
    STD_TORCH_CHECK(blas_available(),
                    "gistops: this PyTorch exports no BLAS (sgemm_, dgemm_); use backend='reference'");
    const std::pair<const Tensor*, const char*> tensors[] = {
        {&f, "input"}, {&w, "centers"}, {&delta, "displacements"}, {&t, "tau"}};
    for (const auto& [x, name] : tensors) {
      check_device(*x, name);
      format_of(*x, name);
    }
    STD_TORCH_CHECK(f.dim() == 2 && f.size(1) >= 1, "gistops: input: expected shape [B, d] with d >= 1, got ",
                    shape_text(f.sizes()));
    const int64_t d = f.size(1);
    STD_TORCH_CHECK((w.dim() == 2 || w.dim() == 3) && w.size(w.dim() - 1) == d, "gistops: centers: expected shape [K, ",
                    d, "] or [K, M, ", d, "], got ", shape_text(w.sizes()));
    STD_TORCH_CHECK(delta.dim() == 2 && delta.size(1) == d, "gistops: displacements: expected shape [m, ", d, "], got ",
                    shape_text(delta.sizes()));
    STD_TORCH_CHECK(delta.size(0) < 256, "gistops: displacements: expected at most 255 rows, got ", delta.size(0));
    STD_TORCH_CHECK(w.dim() == 2 || (delta.size(0) == 0 && w.size(1) >= 1 && w.size(1) <= 256),
                    "gistops: centers: expected sub-centers [K, M, d] with 1 <= M <= 256 and no displacements, got ",
                    shape_text(w.sizes()), " with displacements ", shape_text(delta.sizes()));
    STD_TORCH_CHECK(t.numel() == 1, "gistops: tau: expected one element, got shape ", shape_text(t.sizes()));
    constexpr int64_t kMost = std::numeric_limits<int>::max();  // BLAS takes int
    STD_TORCH_CHECK(f.size(0) <= kMost && w.size(0) <= kMost && d <= kMost, "gistops: expected B, K and d up to ",
                    kMost, ", got input ", shape_text(f.sizes()), " and centers ", shape_text(w.sizes()));
  }

  static void check_device(const Tensor& x, const char* name) {
    STD_TORCH_CHECK(x.is_cpu(), "gistops: ", name, ": expected a tensor on the CPU");
  }

  static void check_sizes(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, const char* name) {
    check_device(x, name);
    STD_TORCH_CHECK(std::equal(x.sizes().begin(), x.sizes().end(), sizes.begin(), sizes.end()), "gistops: ", name,
                    ": expected shape ", shape_text(sizes), ", got ", shape_text(x.sizes()));
  }
};

// The needed gradients, in the shapes of their arguments; the others are empty tensors.
struct GradientTensors {
  Tensor input, centers, displacements, tau;
  Tensor directions, turns;  // always computed for a rotation, else empty
  Gradients out;

  // stash: memory for the gradient of centers, or null.
  GradientTensors(const Arguments& a, bool need_input, bool need_centers, bool need_displacements, bool need_tau,
                  const Tensor* stash = nullptr)
      : input(make(need_input, a.input, a.input.scalar_type())),
        centers(stash ? *stash : make(need_centers, a.centers, a.centers.scalar_type())),
        displacements(make(need_displacements, a.displacements, a.compute)), tau(make(need_tau, a.tau, a.compute)),
        directions(make(a.directions.has_value(), a.directions.value_or(a.tau), a.compute)),
        turns(make(a.turns.has_value(), a.turns.value_or(a.tau), a.compute)),
        out{.input = need_input ? input.mutable_data_ptr() : nullptr,
            .centers = need_centers ? centers.mutable_data_ptr() : nullptr,
            .displacements = a.directions                                    ? directions.mutable_data_ptr()
                             : need_displacements && a.displacements.numel() ? displacements.mutable_data_ptr()
                                                                             : nullptr,
            .tau = need_tau ? tau.mutable_data_ptr() : nullptr,
            .turns = a.turns ? turns.mutable_data_ptr() : nullptr} {}

  static Tensor make(bool needed, const Tensor& x, ScalarType dtype) {
    return needed ? empty_on_device_of(x, x.sizes(), dtype) : empty_on_device_of(x, {0}, x.scalar_type());
  }
};

}  // namespace gistops
