// The cross-entropy on NVIDIA GPUs: tensors in, tensors out, on the current stream. gistops/operators/cross_entropy.py
// says what they hold; what is checked here is what memory safety rests on.
#include <optional>

#include "binding.h"

namespace gistops::cuda {
namespace {

using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

Tensor checked(const Tensor& x, const Tensor& input, const Sizes& sizes, ScalarType dtype, const char* name) {
  bool fits =
      x.is_cuda() && x.get_device_index() == input.get_device_index() && x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = x.size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(fits, "gistops: ", name, ": expected another shape, on the device of input");
  return converted(x, dtype);
}

// The arguments from target to label_smoothing, in the type of the sums.
struct CrossEntropyCall : OpCall {
  Tensor target;
  Optional bias, weight, margin;
  LossArguments loss{};

  CrossEntropyCall(const Tensor& f, const Tensor& w, const Tensor& delta, const Tensor& t, const Tensor& y,
                   const Optional& b, const Optional& share, const Optional& lowering, int64_t margin_kind,
                   int64_t reduction, int64_t ignore_index, double label_smoothing)
      : OpCall(f, w, delta, t), target(checked(y, f, {f.size(0)}, ScalarType::Long, "target")),
        bias(of_classes(b, "class_bias")), weight(of_classes(share, "weight")),
        margin(lowering && lowering->numel() == 1 ? Optional(checked(*lowering, f, shape(*lowering), sums, "margin"))
                                                  : of_classes(lowering, "margin")) {
    STD_TORCH_CHECK(w.size(0) > 0, "gistops: centers: expected at least one class");
    loss = {static_cast<const int64_t*>(target.const_data_ptr()),
            pointer(bias),
            pointer(weight),
            pointer(margin),
            margin && margin->numel() != 1,
            static_cast<int>(margin_kind),
            static_cast<int>(reduction),
            ignore_index,
            label_smoothing};
  }

  static const void* pointer(const Optional& x) { return x ? x->const_data_ptr() : nullptr; }
  static Sizes shape(const Tensor& x) { return x.dim() == 0 ? Sizes{} : Sizes{x.sizes().begin(), x.sizes().end()}; }

 private:
  Optional of_classes(const Optional& x, const char* name) const {
    if (!x) return std::nullopt;
    return checked(*x, input, {centers.size(0)}, sums, name);
  }
};

using LossOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LossOutput cross_entropy_forward(const Tensor& input, const Tensor& centers, const Tensor& displacements,
                                 const Tensor& tau, const Tensor& target, Optional class_bias, Optional weight,
                                 Optional margin, int64_t margin_kind, int64_t reduction, int64_t ignore_index,
                                 double label_smoothing, bool keep, bool /*allow_tf32*/) {
  const CrossEntropyCall call(input, centers, displacements, tau, target, class_bias, weight, margin, margin_kind,
                              reduction, ignore_index, label_smoothing);
  const int64_t B = input.size(0), K = centers.size(0), M = displacements.size(0) + 1;
  const Sizes held = keep ? Sizes{K, padded_rows(B)} : Sizes{0, 0};
  const Tensor loss = like(input, reduction == 0 ? Sizes{B} : Sizes{}, call.sums), lse = like(input, {B}, call.sums),
               inside = like(input, {1}, ScalarType::Bool), scores = like(input, held, call.sums),
               slots = like(input, held, ScalarType::Byte), center_rnorms = like(input, {M, K}, call.sums),
               input_rnorms = like(input, {B}, call.sums), rows = like(input, {margin ? 5 : 2, B}, call.sums),
               scalars = like(input, {2}, call.sums);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  TorchWorkspace workspace(call);
  op_table(call.operands)
      .cross_entropy_forward(
          call.arguments(), call.loss,
          {loss.mutable_data_ptr(), lse.mutable_data_ptr(), static_cast<bool*>(inside.mutable_data_ptr()),
           keep ? scores.mutable_data_ptr() : nullptr, keep ? static_cast<uint8_t*>(slots.mutable_data_ptr()) : nullptr,
           center_rnorms.mutable_data_ptr(), input_rnorms.mutable_data_ptr(), rows.mutable_data_ptr(),
           scalars.mutable_data_ptr()},
          workspace);
  return {loss, lse, inside, scores, slots, center_rnorms, input_rnorms, rows, scalars};
}

using LossGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

LossGradients cross_entropy_backward(Optional grad_loss, Optional grad_lse, const Tensor& input, const Tensor& centers,
                                     const Tensor& displacements, const Tensor& tau, const Tensor& target,
                                     Optional class_bias, Optional weight, Optional margin, const Tensor& /*lse*/,
                                     const Tensor& scores, const Tensor& slots, const Tensor& center_rnorms,
                                     const Tensor& input_rnorms, const Tensor& rows, const Tensor& scalars,
                                     int64_t margin_kind, int64_t reduction, int64_t ignore_index,
                                     double label_smoothing, bool need_input, bool need_centers,
                                     bool need_displacements, bool need_tau, bool need_bias, bool need_margin,
                                     bool /*allow_tf32*/) {
  const CrossEntropyCall call(input, centers, displacements, tau, target, class_bias, weight, margin, margin_kind,
                              reduction, ignore_index, label_smoothing);
  const int64_t B = input.size(0), K = centers.size(0), M = displacements.size(0) + 1;
  const bool kept = scores.numel() > 0;
  const auto saved = [&](const Tensor& x, const Sizes& sizes, ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(x.scalar_type() == dtype, "gistops: ", name, ": expected the forward's dtype");
    return checked(x, input, sizes, dtype, name);
  };
  const Sizes held = kept ? Sizes{K, padded_rows(B)} : Sizes{scores.size(0), scores.size(1)};
  const Tensor z = saved(scores, held, call.sums, "scores"), j = saved(slots, held, ScalarType::Byte, "slots"),
               R = saved(center_rnorms, {M, K}, call.sums, "center_rnorms"),
               n = saved(input_rnorms, {B}, call.sums, "input_rnorms"),
               notes = saved(rows, {margin ? 5 : 2, B}, call.sums, "rows"),
               two = saved(scalars, {2}, call.sums, "scalars");
  for (const Tensor* x : {&z, &j})  // read 16 bytes at a time
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x->const_data_ptr()) % 16 == 0,
                    "gistops: scores, slots: expected the forward's memory");
  const auto grad = [&](const Optional& x, const Sizes& sizes, const char* name) {
    return x ? Optional(checked(*x, input, sizes, call.sums, name)) : std::nullopt;
  };
  const Optional of_loss = grad(grad_loss, reduction == 0 ? Sizes{B} : Sizes{}, "grad_loss"),
                 of_lse = grad(grad_lse, {B}, "grad_lse");
  const auto gradient = [&](bool needed, const Tensor& x, ScalarType dtype) {
    return needed ? like(x, x.sizes(), dtype) : like(x, {0}, call.sums);
  };
  const bool bias_needed = need_bias && call.bias, margin_needed = need_margin && call.margin;
  const Tensor df = gradient(need_input, call.input, call.operands),
               dw = gradient(need_centers, call.centers, call.operands),
               dd = gradient(need_displacements, call.displacements, call.sums),
               dt = gradient(need_tau, call.tau, call.sums),
               db = gradient(bias_needed, bias_needed ? *call.bias : call.tau, call.sums),
               dm = gradient(margin_needed, margin_needed ? *call.margin : call.tau, call.sums);
  const auto data = [](bool needed, const Tensor& x) { return needed ? x.mutable_data_ptr() : nullptr; };
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  TorchWorkspace workspace(call);
  op_table(call.operands)
      .cross_entropy_backward(
          call.arguments(), call.loss, {CrossEntropyCall::pointer(of_loss), CrossEntropyCall::pointer(of_lse)},
          {nullptr, nullptr, nullptr, data(kept, z), static_cast<uint8_t*>(data(kept, j)), R.mutable_data_ptr(),
           n.mutable_data_ptr(), notes.mutable_data_ptr(), two.mutable_data_ptr()},
          {data(need_input, df), data(need_centers, dw), data(need_displacements, dd), data(need_tau, dt)},
          {data(bias_needed, db), data(margin_needed, dm)}, workspace);
  const auto typed = [](bool needed, const Tensor& g, const Tensor& x) {
    return needed ? converted(g, x.scalar_type()) : g;
  };
  return {typed(need_input, df, input),
          typed(need_centers, dw, centers),
          typed(need_displacements, dd, displacements),
          typed(need_tau, dt, tau),
          bias_needed ? converted(db, class_bias->scalar_type()) : db,
          margin_needed ? converted(dm, margin->scalar_type()) : dm};
}

}  // namespace
}  // namespace gistops::cuda

STABLE_TORCH_LIBRARY_IMPL(gistops, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&gistops::cuda::cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&gistops::cuda::cross_entropy_backward));
}
