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

// The arguments that forward and backward share, as the caller gave them.
struct CrossEntropyInputs {
  const Tensor &input, &centers, &displacements, &tau;
  Optional input_coeffs, class_coeffs;
  const Tensor& target;
  Optional class_bias, weight, margin;
  int64_t margin_kind, reduction, ignore_index;
  double label_smoothing;
};

const void* pointer(const Optional& x) { return x ? x->const_data_ptr() : nullptr; }

// The tensors of one call of a loss, checked, contiguous and of the types that the kernels take.
struct CrossEntropyCall : OpCall {
  const CrossEntropyInputs& given;
  Tensor target;
  Optional class_bias, weight, margin, input_coeffs, class_coeffs;
  LossArguments loss;

  explicit CrossEntropyCall(const CrossEntropyInputs& x)
      : OpCall(x.input, x.centers, x.displacements, x.tau, true), given(x),
        target(checked(x.target, input, {input.size(0)}, ScalarType::Long, "target")),
        class_bias(class_vector(x.class_bias, "class_bias")), weight(class_vector(x.weight, "weight")),
        margin(x.margin && x.margin->numel() == 1 ? scalar(*x.margin, "margin") : class_vector(x.margin, "margin")) {
    STD_TORCH_CHECK(centers.size(0) > 0, "gistops: centers: expected at least one class, got none");
    STD_TORCH_CHECK(x.margin_kind >= 0 && x.margin_kind <= 2 && x.reduction >= 0 && x.reduction <= 2,
                    "gistops: margin_kind, reduction: expected 0, 1 or 2, got ", x.margin_kind, " and ", x.reduction);
    check_coeffs();
    loss = {.target = static_cast<const int64_t*>(target.const_data_ptr()),
            .class_bias = pointer(class_bias),
            .weight = pointer(weight),
            .margin = pointer(margin),
            .margin_per_class = margin && margin->numel() != 1,
            .margin_kind = static_cast<int>(x.margin_kind),
            .reduction = static_cast<int>(x.reduction),
            .ignore_index = x.ignore_index,
            .label_smoothing = x.label_smoothing,
            .input_coeffs = pointer(input_coeffs),
            .class_coeffs = pointer(class_coeffs),
            .rotation_slots = input_coeffs ? input_coeffs->size(1) : 1};
  }

  // Return the rows of R.
  int64_t norms_per_class() const { return centers.dim() == 3 ? centers.size(1) : displacements.size(0) + 1; }

 private:
  Optional scalar(const Tensor& x, const char* name) const {
    return checked(x, input, x.dim() == 0 ? Sizes{} : Sizes(x.sizes().begin(), x.sizes().end()), sums, name);
  }
  Optional class_vector(const Optional& x, const char* name) const {
    if (!x) return std::nullopt;
    return checked(*x, input, {centers.size(0)}, sums, name);
  }
  void check_coeffs() {
    const Optional &x = given.input_coeffs, &y = given.class_coeffs;
    STD_TORCH_CHECK(bool(x) == bool(y), "gistops: input_coeffs, class_coeffs: expected both or neither, got one");
    if (!x) return;
    STD_TORCH_CHECK(centers.dim() == 2 && displacements.size(0) == 0,
                    "gistops: input_coeffs: expected centers [K, d] and no displacements, got ",
                    shape_text(centers.sizes()), " and ", shape_text(displacements.sizes()));
    const int64_t slots = x->dim() == 2 ? x->size(1) : 0;
    STD_TORCH_CHECK(slots >= 1 && slots <= 256, "gistops: input_coeffs: expected shape [B, M] with 1 <= M <= 256, got ",
                    shape_text(x->sizes()));
    input_coeffs = checked(*x, input, {input.size(0), slots}, sums, "input_coeffs");
    class_coeffs = checked(*y, input, {2, slots, centers.size(0)}, sums, "class_coeffs");
  }
};

// The outputs of a forward, without scores and slots.
struct ForwardTensors {
  Tensor loss, lse, targets_in_range, center_rnorms, input_rnorms, rows, scalars;
};

// Run the forward. scores, slots: memory for scores that the backward needs; null: they are not kept.
ForwardTensors run_forward(const CrossEntropyCall& call, void* scores, uint8_t* slots, bool parked) {
  const int64_t B = call.input.size(0), K = call.centers.size(0), M = call.norms_per_class();
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

using CrossEntropyOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

CrossEntropyOutputs cross_entropy_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                          const Tensor& tau, Optional input_coeffs, Optional class_coeffs,
                                          const Tensor& target, Optional class_bias, Optional weight, Optional margin,
                                          int64_t margin_kind, int64_t reduction, int64_t ignore_index,
                                          double label_smoothing, bool keep, bool /*allow_tf32*/) {
  const CrossEntropyInputs given{input,        centers,        displacements, tau,    input_coeffs, class_coeffs,
                                 target,       class_bias,     weight,        margin, margin_kind,  reduction,
                                 ignore_index, label_smoothing};
  const CrossEntropyCall call(given);
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

// Return true if the scores of a loss can be parked and the backward is not slower for it: one block then computes the
// gradient of all dims of its classes, and it takes many classes to fill a large GPU with such blocks.
bool cross_entropy_parks(const Tensor& input, const Tensor& centers, const Tensor& displacements) {
  constexpr int64_t kManyClasses = int64_t{2} * 132 * 128;  // two blocks of 128 classes per multiprocessor
  const int asked = asked_centers_tile();
  const bool wanted = asked < 0 ? centers.dim() == 2 && centers.size(0) >= kManyClasses : asked > 0;
  return wanted && scores_can_be_parked(input, centers, displacements);
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
  const CrossEntropyInputs given{input,        centers,        displacements, tau,    std::nullopt, std::nullopt,
                                 target,       class_bias,     weight,        margin, margin_kind,  reduction,
                                 ignore_index, label_smoothing};
  const CrossEntropyCall call(given);
  const ForwardTensors out = run_forward(call, checked_stash(call, stash), nullptr, true);
  return {out.loss, out.lse, out.targets_in_range, out.center_rnorms, out.input_rnorms, out.rows, out.scalars};
}

// What a backward gets beside the arguments of the forward, and the gradients that it computes.
struct BackwardTensors {
  Optional grad_loss, grad_lse;
  const Tensor &center_rnorms, &input_rnorms, &rows, &scalars;
  bool need_input, need_centers, need_displacements, need_tau, need_bias, need_margin;
};

// In the dtypes of their arguments; those of coefficients in that of the sums. Empty where not needed.
struct CrossEntropyGradients {
  Tensor input, centers, displacements, tau, input_coeffs, class_coeffs, class_bias, margin;
};

// Run the backward. scores, slots: from the forward; null: they are recomputed. stash: memory of parked scores, which
// the gradient of the centers overwrites; or null.
CrossEntropyGradients run_backward(const CrossEntropyCall& call, const BackwardTensors& b, void* scores, uint8_t* slots,
                                   const Tensor* stash) {
  const Tensor& input = call.input;
  const int64_t B = input.size(0), K = call.centers.size(0), M = call.norms_per_class();
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
  const auto gradient = [&](bool needed, const Optional& x, ScalarType dtype) {
    return needed && x ? empty_on_device_of(input, x->sizes(), dtype) : empty_on_device_of(input, {0}, call.sums);
  };
  const bool bias_needed = b.need_bias && call.class_bias, margin_needed = b.need_margin && call.margin;
  const Tensor df = gradient(b.need_input, input, call.operands),
               dw = stash ? *stash : gradient(b.need_centers, call.centers, call.operands),
               dd = gradient(b.need_displacements, call.displacements, call.sums),
               dt = gradient(b.need_tau, call.tau, call.sums), dx = gradient(true, call.input_coeffs, call.sums),
               dy = gradient(true, call.class_coeffs, call.sums),
               db = gradient(bias_needed, call.class_bias, call.sums),
               dm = gradient(margin_needed, call.margin, call.sums);
  const auto data = [](bool needed, const Tensor& x) { return needed ? x.mutable_data_ptr() : nullptr; };
  const bool rotates = call.input_coeffs.has_value();
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
          {data(bias_needed, db), data(margin_needed, dm), data(rotates, dx), data(rotates, dy)}, workspace);
  const auto as_argument = [](bool needed, const Tensor& x, const Optional& argument) {
    return needed ? converted(x, argument->scalar_type()) : x;
  };
  const CrossEntropyInputs& given = call.given;
  return {as_argument(b.need_input, df, given.input),
          as_argument(b.need_centers, dw, given.centers),
          as_argument(b.need_displacements, dd, given.displacements),
          as_argument(b.need_tau, dt, given.tau),
          dx,
          dy,
          as_argument(bias_needed, db, given.class_bias),
          as_argument(margin_needed, dm, given.margin)};
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
  const CrossEntropyInputs given{input,        centers,        displacements, tau,    input_coeffs, class_coeffs,
                                 target,       class_bias,     weight,        margin, margin_kind,  reduction,
                                 ignore_index, label_smoothing};
  const CrossEntropyCall call(given);
  const bool kept = scores.numel() > 0;
  const Sizes score_sizes =
      kept ? Sizes{centers.size(0), padded_rows(input.size(0))} : Sizes(scores.sizes().begin(), scores.sizes().end());
  const Tensor z = checked_saved(scores, input, score_sizes, call.sums, "scores"),
               j = checked_saved(slots, input, score_sizes, ScalarType::Byte, "slots");
  for (const Tensor* x : {&z, &j})  // the kernels load 16 bytes at a time
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x->const_data_ptr()) % 16 == 0,
                    "gistops: scores, slots: expected memory at a multiple of 16 bytes, as the forward saved");
  const BackwardTensors tensors{grad_loss,  grad_lse,     center_rnorms,      input_rnorms, rows,      scalars,
                                need_input, need_centers, need_displacements, need_tau,     need_bias, need_margin};
  const CrossEntropyGradients g = run_backward(call, tensors, kept ? z.mutable_data_ptr() : nullptr,
                                               kept ? static_cast<uint8_t*>(j.mutable_data_ptr()) : nullptr, nullptr);
  return {g.input, g.centers, g.displacements, g.tau, g.input_coeffs, g.class_coeffs, g.class_bias, g.margin};
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
  const CrossEntropyInputs given{input,        centers,        displacements, tau,    std::nullopt, std::nullopt,
                                 target,       class_bias,     weight,        margin, margin_kind,  reduction,
                                 ignore_index, label_smoothing};
  const CrossEntropyCall call(given);
  const BackwardTensors tensors{grad_loss,  grad_lse, center_rnorms,      input_rnorms, rows,      scalars,
                                need_input, true,     need_displacements, need_tau,     need_bias, need_margin};
  const CrossEntropyGradients g = run_backward(call, tensors, checked_stash(call, stash), nullptr, &stash);
  return {g.input, g.displacements, g.tau, g.class_bias, g.margin};
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
