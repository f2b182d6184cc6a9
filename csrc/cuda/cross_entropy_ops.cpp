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

// The outputs of a forward, without scores and slots.
struct ForwardTensors {
  Tensor loss, lse, targets_in_range, center_rnorms, input_rnorms, rows, scalars;
};

// Run the forward. scores, slots: memory for scores that the backward needs; null: they are not kept.
ForwardTensors run_forward(const CrossEntropyCall& call, void* scores, uint8_t* slots, bool parked) {
  const int64_t B = call.input.size(0), K = call.centers.size(0), M = call.displacements.size(0) + 1;
  const auto empty = [&](const Sizes& sizes, ScalarType dtype) { return empty_on_device_of(call.input, sizes, dtype); };
  const ForwardTensors out{.loss = empty(call.loss.reduction == 0 ? Sizes{B} : Sizes{}, call.sums),
                           .lse = empty({B}, call.sums),
                           .targets_in_range = empty({1}, ScalarType::Bool),
                           .center_rnorms = empty({M, K}, call.sums),
                           .input_rnorms = empty({B}, call.sums),
                           .rows = empty({call.margin ? 5 : 2, B}, call.sums),
                           .scalars = empty({2}, call.sums)};
  const torch::stable::accelerator::DeviceGuard guard(call.input.get_device_index());
  TorchWorkspace workspace(call);
  op_table(call.operands)
      .cross_entropy_forward(call.arguments(), call.loss,
                             {.loss = out.loss.mutable_data_ptr(),
                              .lse = out.lse.mutable_data_ptr(),
                              .targets_in_range = static_cast<bool*>(out.targets_in_range.mutable_data_ptr()),
                              .scores = scores,
                              .slots = slots,
                              .parked = parked,
                              .center_rnorms = out.center_rnorms.mutable_data_ptr(),
                              .input_rnorms = out.input_rnorms.mutable_data_ptr(),
                              .row_stats = out.rows.mutable_data_ptr(),
                              .scalars = out.scalars.mutable_data_ptr()},
                             workspace);
  return out;
}

void check_no_coeffs(const Optional& input_coeffs, const Optional& class_coeffs) {
  STD_TORCH_CHECK(!input_coeffs && !class_coeffs, "gistops: input_coeffs, class_coeffs: expected none");
}

using CrossEntropyOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

CrossEntropyOutputs cross_entropy_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                          const Tensor& tau, Optional input_coeffs, Optional class_coeffs,
                                          const Tensor& target, Optional class_bias, Optional weight, Optional margin,
                                          int64_t margin_kind, int64_t reduction, int64_t ignore_index,
                                          double label_smoothing, bool keep, bool /*allow_tf32*/) {
  check_no_coeffs(input_coeffs, class_coeffs);
  const CrossEntropyOptions options{target,      class_bias, weight,       margin,
                                    margin_kind, reduction,  ignore_index, label_smoothing};
  const CrossEntropyCall call(input, centers, displacements, tau, options);
  const Sizes score_sizes = keep ? Sizes{centers.size(0), padded_rows(input.size(0))} : Sizes{0, 0};
  const Tensor scores = empty_on_device_of(input, score_sizes, call.sums),
               slots = empty_on_device_of(input, score_sizes, ScalarType::Byte);
  const ForwardTensors out = run_forward(call, keep ? scores.mutable_data_ptr() : nullptr,
                                         keep ? static_cast<uint8_t*>(slots.mutable_data_ptr()) : nullptr, false);
  return {out.loss,         out.lse,  out.targets_in_range, scores, slots, out.center_rnorms,
          out.input_rnorms, out.rows, out.scalars};
}

bool scores_can_be_parked(const Tensor& input, const Tensor& centers, const Tensor& displacements) {
  const ScalarType operands = operand_type(input, centers, displacements);
  const bool half = operands == ScalarType::Half || operands == ScalarType::BFloat16;
  for (const Tensor* x : {&input, &centers, &displacements})
    if (!half || !x->is_cuda() || x->dim() != 2 || !x->is_contiguous()) return false;
  const Arguments a{.input = input.const_data_ptr(),
                    .centers = centers.const_data_ptr(),
                    .displacements = displacements.const_data_ptr(),
                    .tau = nullptr,
                    .B = input.size(0),
                    .K = centers.size(0),
                    .d = input.size(1),
                    .m = displacements.size(0),
                    .stream = nullptr};
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  return op_table(operands).cross_entropy_parks(a);
}

bool cross_entropy_parks(const Tensor& input, const Tensor& centers, const Tensor& displacements) {
  return asked_centers_tile() != 0 && scores_can_be_parked(input, centers, displacements);
}

// Return the memory of parked scores, after a check that they fit.
void* checked_stash(const CrossEntropyCall& call, const Tensor& stash) {
  check_shape(stash, call.input, {call.centers.size(0), call.centers.size(1)}, "stash", "the shape of centers");
  STD_TORCH_CHECK(stash.scalar_type() == call.operands && stash.is_contiguous(),
                  "gistops: stash: expected a contiguous tensor of the dtype of centers");
  void* data = stash.mutable_data_ptr();
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(data) % 16 == 0 && scores_can_be_parked(call.input, call.centers, call.displacements),
      "gistops: stash: expected sizes and memory in which scores can be parked");
  return data;
}

using ParkedOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ParkedOutputs parked_cross_entropy_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                           const Tensor& tau, const Tensor& target, Optional class_bias,
                                           Optional weight, Optional margin, int64_t margin_kind, int64_t reduction,
                                           int64_t ignore_index, double label_smoothing, Tensor stash) {
  const CrossEntropyOptions options{target,      class_bias, weight,       margin,
                                    margin_kind, reduction,  ignore_index, label_smoothing};
  const CrossEntropyCall call(input, centers, displacements, tau, options);
  const ForwardTensors out = run_forward(call, checked_stash(call, stash), nullptr, true);
  return {out.loss, out.lse, out.targets_in_range, out.center_rnorms, out.input_rnorms, out.rows, out.scalars};
}

using CrossEntropyGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What a backward gets beside the arguments of the forward.
struct BackwardTensors {
  Optional grad_loss, grad_lse;
  const Tensor &center_rnorms, &input_rnorms, &rows, &scalars;
  bool need_input, need_centers, need_displacements, need_tau, need_bias, need_margin;
};

// Run the backward. scores, slots: from the forward; null: they are recomputed. stash: memory of parked scores, which
// the gradient of the centers overwrites; or null.
CrossEntropyGradients run_backward(const CrossEntropyCall& call, const CrossEntropyOptions& options,
                                   const BackwardTensors& b, void* scores, uint8_t* slots, const Tensor* stash) {
  const Tensor& input = call.input;
  const int64_t B = input.size(0), K = call.centers.size(0), M = call.displacements.size(0) + 1;
  const auto saved = [&](const Tensor& x, const Sizes& sizes, const char* name) {
    return checked_saved(x, input, sizes, call.sums, name);
  };
  const Tensor R = saved(b.center_rnorms, {M, K}, "center_rnorms"), n = saved(b.input_rnorms, {B}, "input_rnorms"),
               stats = saved(b.rows, {call.margin ? 5 : 2, B}, "rows"), sum_scalars = saved(b.scalars, {2}, "scalars");
  const auto grad = [&](const Optional& x, const Sizes& sizes, const char* name) {
    return x ? Optional(checked(*x, input, sizes, call.sums, name)) : std::nullopt;
  };
  const Optional loss_grad = grad(b.grad_loss, call.loss.reduction == 0 ? Sizes{B} : Sizes{}, "grad_loss"),
                 lse_grad = grad(b.grad_lse, {B}, "grad_lse");
  const auto gradient = [&](bool needed, const Tensor& x, ScalarType dtype) {
    return needed ? empty_on_device_of(x, x.sizes(), dtype) : empty_on_device_of(x, {0}, call.sums);
  };
  const bool bias_needed = b.need_bias && call.class_bias, margin_needed = b.need_margin && call.margin;
  const Tensor df = gradient(b.need_input, input, call.operands),
               dw = stash ? *stash : gradient(b.need_centers, call.centers, call.operands),
               dd = gradient(b.need_displacements, call.displacements, call.sums),
               dt = gradient(b.need_tau, call.tau, call.sums),
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
           .scores = scores,
           .slots = slots,
           .parked = stash != nullptr,
           .center_rnorms = R.mutable_data_ptr(),
           .input_rnorms = n.mutable_data_ptr(),
           .row_stats = stats.mutable_data_ptr(),
           .scalars = sum_scalars.mutable_data_ptr()},
          {data(b.need_input, df), data(b.need_centers, dw), data(b.need_displacements, dd), data(b.need_tau, dt)},
          {data(bias_needed, db), data(margin_needed, dm)}, workspace);
  return {df,
          dw,
          dd,
          dt,
          bias_needed ? converted(db, options.class_bias->scalar_type()) : db,
          margin_needed ? converted(dm, options.margin->scalar_type()) : dm};
}

// Return a gradient in the type of its argument; one that is not needed is empty.
Tensor as_argument(bool needed, const Tensor& gradient, const Tensor& argument) {
  return needed ? converted(gradient, argument.scalar_type()) : gradient;
}

using AllGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

AllGradients cross_entropy_backward(Optional grad_loss, Optional grad_lse, const Tensor& input, const Tensor& centers,
                                    const Tensor& displacements, const Tensor& tau, Optional input_coeffs,
                                    Optional class_coeffs, const Tensor& target, Optional class_bias, Optional weight,
                                    Optional margin, const Tensor& /*lse*/, const Tensor& scores, const Tensor& slots,
                                    const Tensor& center_rnorms, const Tensor& input_rnorms, const Tensor& rows,
                                    const Tensor& scalars, int64_t margin_kind, int64_t reduction, int64_t ignore_index,
                                    double label_smoothing, bool need_input, bool need_centers, bool need_displacements,
                                    bool need_tau, bool need_bias, bool need_margin, bool /*allow_tf32*/) {
  check_no_coeffs(input_coeffs, class_coeffs);
  const CrossEntropyOptions options{target,      class_bias, weight,       margin,
                                    margin_kind, reduction,  ignore_index, label_smoothing};
  const CrossEntropyCall call(input, centers, displacements, tau, options);
  const bool kept = scores.numel() > 0;
  const Sizes score_sizes =
      kept ? Sizes{centers.size(0), padded_rows(input.size(0))} : Sizes(scores.sizes().begin(), scores.sizes().end());
  const Tensor z = checked_saved(scores, input, score_sizes, call.sums, "scores"),
               j = checked_saved(slots, input, score_sizes, ScalarType::Byte, "slots");
  for (const Tensor* x : {&z, &j})  // the kernels load 16 bytes at a time
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x->const_data_ptr()) % 16 == 0,
                    "gistops: scores, slots: expected memory at a multiple of 16 bytes, as the forward saved");
  const BackwardTensors tensors{.grad_loss = grad_loss,
                                .grad_lse = grad_lse,
                                .center_rnorms = center_rnorms,
                                .input_rnorms = input_rnorms,
                                .rows = rows,
                                .scalars = scalars,
                                .need_input = need_input,
                                .need_centers = need_centers,
                                .need_displacements = need_displacements,
                                .need_tau = need_tau,
                                .need_bias = need_bias,
                                .need_margin = need_margin};
  const auto [df, dw, dd, dt, db, dm] =
      run_backward(call, options, tensors, kept ? z.mutable_data_ptr() : nullptr,
                   kept ? static_cast<uint8_t*>(j.mutable_data_ptr()) : nullptr, nullptr);
  return {as_argument(need_input, df, input),
          as_argument(need_centers, dw, centers),
          as_argument(need_displacements, dd, displacements),
          as_argument(need_tau, dt, tau),
          empty_on_device_of(input, {0}, call.sums),
          empty_on_device_of(input, {0}, call.sums),
          db,
          dm};
}

using ParkedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

ParkedGradients parked_cross_entropy_backward(Optional grad_loss, Optional grad_lse, const Tensor& input,
                                              const Tensor& centers, const Tensor& displacements, const Tensor& tau,
                                              const Tensor& target, Optional class_bias, Optional weight,
                                              Optional margin, const Tensor& center_rnorms, const Tensor& input_rnorms,
                                              const Tensor& rows, const Tensor& scalars, int64_t margin_kind,
                                              int64_t reduction, int64_t ignore_index, double label_smoothing,
                                              bool need_input, bool need_displacements, bool need_tau, bool need_bias,
                                              bool need_margin, Tensor stash) {
  const CrossEntropyOptions options{target,      class_bias, weight,       margin,
                                    margin_kind, reduction,  ignore_index, label_smoothing};
  const CrossEntropyCall call(input, centers, displacements, tau, options);
  const BackwardTensors tensors{.grad_loss = grad_loss,
                                .grad_lse = grad_lse,
                                .center_rnorms = center_rnorms,
                                .input_rnorms = input_rnorms,
                                .rows = rows,
                                .scalars = scalars,
                                .need_input = need_input,
                                .need_centers = true,
                                .need_displacements = need_displacements,
                                .need_tau = need_tau,
                                .need_bias = need_bias,
                                .need_margin = need_margin};
  const auto [df, dw, dd, dt, db, dm] =
      run_backward(call, options, tensors, checked_stash(call, stash), nullptr, &stash);
  return {as_argument(need_input, df, input), as_argument(need_displacements, dd, displacements),
          as_argument(need_tau, dt, tau), db, dm};
}

}  // namespace
}  // namespace gistops::cuda

STABLE_TORCH_LIBRARY_IMPL(gistops, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&gistops::cuda::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&gistops::cuda::cross_entropy_backward));
  m.impl("cross_entropy_parks", TORCH_BOX(&gistops::cuda::cross_entropy_parks));
  m.impl("parked_cross_entropy_forward", TORCH_BOX(&gistops::cuda::parked_cross_entropy_forward));
  m.impl("parked_cross_entropy_backward", TORCH_BOX(&gistops::cuda::parked_cross_entropy_backward));
}
