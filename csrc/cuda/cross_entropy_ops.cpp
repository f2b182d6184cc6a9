// The cross-entropy on NVIDIA GPUs: tensors in, tensors out, on the current stream. The checks here are those that
// memory safety depends on; gistops/operators/cross_entropy.py describes the tensors.
#include <optional>

#include "binding.h"

namespace gistops::cuda {
namespace {

using Optional = std::optional<Tensor>;

// Return an argument, converted to a type, after a check of its shape and device.
Tensor checked(const Tensor& x, const Tensor& input, const Sizes& sizes, ScalarType dtype, const char* name) {
  check_shape(x, input, sizes, name, "shape");
  const ScalarType type = x.scalar_type();
  if (dtype != ScalarType::Long) check_floating(x, name);
  STD_TORCH_CHECK(dtype != ScalarType::Long || type == dtype || type == ScalarType::Int, "gistops: ", name,
                  ": expected int64 or int32, got ", torch::headeronly::toString(type));
  return converted(x, dtype);
}

struct CrossEntropyOptions {
  Tensor target;
  Optional class_bias, weight, margin;
  int64_t margin_kind, reduction, ignore_index;
  double label_smoothing;
};

const void* pointer(const Optional& x) { return x ? x->const_data_ptr() : nullptr; }

// The tensors of one call of a loss, checked, contiguous and of the types that the kernels take.
struct CrossEntropyCall : OpCall {
  Tensor target;
  Optional class_bias, weight, margin;
  LossArguments loss;

  CrossEntropyCall(const Tensor& input, const Tensor& centers, const Tensor& displacements, const Tensor& tau,
                   const CrossEntropyOptions& o)
      : OpCall(input, centers, displacements, tau),
        target(checked(o.target, input, {input.size(0)}, ScalarType::Long, "target")),
        class_bias(class_vector(o.class_bias, "class_bias")), weight(class_vector(o.weight, "weight")),
        margin(o.margin && o.margin->numel() == 1 ? scalar(*o.margin, "margin") : class_vector(o.margin, "margin")) {
    STD_TORCH_CHECK(centers.size(0) > 0, "gistops: centers: expected at least one class, got none");
    STD_TORCH_CHECK(o.margin_kind >= 0 && o.margin_kind <= 2 && o.reduction >= 0 && o.reduction <= 2,
                    "gistops: margin_kind, reduction: expected 0, 1 or 2, got ", o.margin_kind, " and ", o.reduction);
    loss = {.target = static_cast<const int64_t*>(target.const_data_ptr()),
            .class_bias = pointer(class_bias),
            .weight = pointer(weight),
            .margin = pointer(margin),
            .margin_per_class = margin && margin->numel() != 1,
            .margin_kind = static_cast<int>(o.margin_kind),
            .reduction = static_cast<int>(o.reduction),
            .ignore_index = o.ignore_index,
            .label_smoothing = o.label_smoothing};
  }

 private:
  Optional scalar(const Tensor& x, const char* name) const {
    return checked(x, input, x.dim() == 0 ? Sizes{} : Sizes(x.sizes().begin(), x.sizes().end()), sums, name);
  }
  Optional class_vector(const Optional& x, const char* name) const {
    if (!x) return std::nullopt;
    return checked(*x, input, {centers.size(0)}, sums, name);
  }
};

using CrossEntropyOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

CrossEntropyOutputs cross_entropy_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                          const Tensor& tau, const Tensor& target, Optional class_bias, Optional weight,
                                          Optional margin, int64_t margin_kind, int64_t reduction, int64_t ignore_index,
                                          double label_smoothing, bool keep, bool /*allow_tf32*/) {
  const CrossEntropyOptions options{target,      class_bias, weight,       margin,
                                    margin_kind, reduction,  ignore_index, label_smoothing};
  const CrossEntropyCall call(input, centers, displacements, tau, options);
  const int64_t B = input.size(0), K = centers.size(0), M = displacements.size(0) + 1;
  const Sizes score_sizes = keep ? Sizes{K, padded_rows(B)} : Sizes{0, 0};
  const Tensor loss = empty_on_device_of(input, reduction == 0 ? Sizes{B} : Sizes{}, call.sums),
               lse = empty_on_device_of(input, {B}, call.sums),
               targets_in_range = empty_on_device_of(input, {1}, ScalarType::Bool),
               scores = empty_on_device_of(input, score_sizes, call.sums),
               slots = empty_on_device_of(input, score_sizes, ScalarType::Byte),
               center_rnorms = empty_on_device_of(input, {M, K}, call.sums),
               input_rnorms = empty_on_device_of(input, {B}, call.sums),
               rows = empty_on_device_of(input, {margin ? 5 : 2, B}, call.sums),
               scalars = empty_on_device_of(input, {2}, call.sums);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  TorchWorkspace workspace(call);
  op_table(call.operands)
      .cross_entropy_forward(call.arguments(), call.loss,
                             {.loss = loss.mutable_data_ptr(),
                              .lse = lse.mutable_data_ptr(),
                              .targets_in_range = static_cast<bool*>(targets_in_range.mutable_data_ptr()),
                              .scores = keep ? scores.mutable_data_ptr() : nullptr,
                              .slots = keep ? static_cast<uint8_t*>(slots.mutable_data_ptr()) : nullptr,
                              .parked = false,
                              .center_rnorms = center_rnorms.mutable_data_ptr(),
                              .input_rnorms = input_rnorms.mutable_data_ptr(),
                              .row_stats = rows.mutable_data_ptr(),
                              .scalars = scalars.mutable_data_ptr()},
                             workspace);
  return {loss, lse, targets_in_range, scores, slots, center_rnorms, input_rnorms, rows, scalars};
}

using CrossEntropyGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

CrossEntropyGradients cross_entropy_backward(
    Optional grad_loss, Optional grad_lse, const Tensor& input, const Tensor& centers, const Tensor& displacements,
    const Tensor& tau, const Tensor& target, Optional class_bias, Optional weight, Optional margin,
    const Tensor& /*lse*/, const Tensor& scores, const Tensor& slots, const Tensor& center_rnorms,
    const Tensor& input_rnorms, const Tensor& rows, const Tensor& scalars, int64_t margin_kind, int64_t reduction,
    int64_t ignore_index, double label_smoothing, bool need_input, bool need_centers, bool need_displacements,
    bool need_tau, bool need_bias, bool need_margin, bool /*allow_tf32*/) {
  const CrossEntropyOptions options{target,      class_bias, weight,       margin,
                                    margin_kind, reduction,  ignore_index, label_smoothing};
  const CrossEntropyCall call(input, centers, displacements, tau, options);
  const int64_t B = input.size(0), K = centers.size(0), M = displacements.size(0) + 1;
  const bool kept = scores.numel() > 0;
  const auto saved = [&](const Tensor& x, const Sizes& sizes, ScalarType dtype, const char* name) {
    return checked_saved(x, input, sizes, dtype, name);
  };
  const Sizes score_sizes = kept ? Sizes{K, padded_rows(B)} : Sizes(scores.sizes().begin(), scores.sizes().end());
  const Tensor z = saved(scores, score_sizes, call.sums, "scores"),
               j = saved(slots, score_sizes, ScalarType::Byte, "slots"),
               R = saved(center_rnorms, {M, K}, call.sums, "center_rnorms"),
               n = saved(input_rnorms, {B}, call.sums, "input_rnorms"),
               stats = saved(rows, {margin ? 5 : 2, B}, call.sums, "rows"),
               sum_scalars = saved(scalars, {2}, call.sums, "scalars");
  for (const Tensor* x : {&z, &j})  // the kernels load 16 bytes at a time
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x->const_data_ptr()) % 16 == 0,
                    "gistops: scores, slots: expected memory at a multiple of 16 bytes, as the forward saved");
  const auto grad = [&](const Optional& x, const Sizes& sizes, const char* name) {
    return x ? Optional(checked(*x, input, sizes, call.sums, name)) : std::nullopt;
  };
  const Optional loss_grad = grad(grad_loss, reduction == 0 ? Sizes{B} : Sizes{}, "grad_loss"),
                 lse_grad = grad(grad_lse, {B}, "grad_lse");
  const auto gradient = [&](bool needed, const Tensor& x, ScalarType dtype) {
    return needed ? empty_on_device_of(x, x.sizes(), dtype) : empty_on_device_of(x, {0}, call.sums);
  };
  const bool bias_needed = need_bias && call.class_bias, margin_needed = need_margin && call.margin;
  const Tensor df = gradient(need_input, call.input, call.operands),
               dw = gradient(need_centers, call.centers, call.operands),
               dd = gradient(need_displacements, call.displacements, call.sums),
               dt = gradient(need_tau, call.tau, call.sums),
               db = gradient(bias_needed, bias_needed ? *call.class_bias : call.tau, call.sums),
               dm = gradient(margin_needed, margin_needed ? *call.margin : call.tau, call.sums);
  const auto data = [](bool needed, const Tensor& x) { return needed ? x.mutable_data_ptr() : nullptr; };
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  TorchWorkspace workspace(call);
  op_table(call.operands)
      .cross_entropy_backward(
          call.arguments(), call.loss, {pointer(loss_grad), pointer(lse_grad)},
          {.loss = nullptr,
           .lse = nullptr,
           .targets_in_range = nullptr,
           .scores = data(kept, z),
           .slots = static_cast<uint8_t*>(data(kept, j)),
           .parked = false,
           .center_rnorms = R.mutable_data_ptr(),
           .input_rnorms = n.mutable_data_ptr(),
           .row_stats = stats.mutable_data_ptr(),
           .scalars = sum_scalars.mutable_data_ptr()},
          {data(need_input, df), data(need_centers, dw), data(need_displacements, dd), data(need_tau, dt)},
          {data(bias_needed, db), data(margin_needed, dm)}, workspace);
  const auto as_argument = [](bool needed, const Tensor& g, const Tensor& x) {
    return needed ? converted(g, x.scalar_type()) : g;
  };
  return {as_argument(need_input, df, input),
          as_argument(need_centers, dw, centers),
          as_argument(need_displacements, dd, displacements),
          as_argument(need_tau, dt, tau),
          bias_needed ? converted(db, class_bias->scalar_type()) : db,
          margin_needed ? converted(dm, margin->scalar_type()) : dm};
}

}  // namespace
}  // namespace gistops::cuda

STABLE_TORCH_LIBRARY_IMPL(gistops, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&gistops::cuda::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&gistops::cuda::cross_entropy_backward));
}
