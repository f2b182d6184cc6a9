// The logits on NVIDIA GPUs: tensors in, tensors out, on the current stream. gistops/_checks.py has checked the
// arguments; the checks here are those that memory safety depends on.
#include "binding.h"

namespace gistops::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> logits_forward(const Tensor& input, const Tensor& centers,
                                                          const Tensor& displacements, const Tensor& tau,
                                                          bool /*allow_tf32*/, bool need_slots,
                                                          std::optional<ScalarType> logits_dtype) {
  const OpCall call(input, centers, displacements, tau);
  const int64_t B = input.size(0), K = centers.size(0), M = displacements.size(0) + 1;
  const ScalarType wanted = logits_dtype.value_or(call.sums);
  const bool narrow = wanted == call.operands && wanted != call.sums;
  const Tensor logits = empty_on_device_of(input, {B, K}, narrow ? wanted : call.sums),
               slots = need_slots ? empty_on_device_of(input, {B, K}, ScalarType::Byte)
                                  : empty_on_device_of(input, {0}, ScalarType::Byte);
  const Tensor center_rnorms = empty_on_device_of(input, {M, K}, call.sums),
               input_rnorms = empty_on_device_of(input, {B}, call.sums);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  TorchWorkspace workspace(call);
  op_table(call.operands)
      .logits_forward(
          call.arguments(),
          {logits.mutable_data_ptr(), need_slots ? static_cast<uint8_t*>(slots.mutable_data_ptr()) : nullptr,
           center_rnorms.mutable_data_ptr(), input_rnorms.mutable_data_ptr(), narrow},
          workspace);
  // The kernels know the types of the operands and of the sums alone; operands of several types are float32 there.
  return {converted(logits, wanted), slots, center_rnorms, input_rnorms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logits_backward(const Tensor& grad, const Tensor& input,
                                                           const Tensor& centers, const Tensor& displacements,
                                                           const Tensor& tau, const Tensor& logits, const Tensor& slots,
                                                           const Tensor& center_rnorms, const Tensor& input_rnorms,
                                                           bool need_input, bool need_centers, bool need_displacements,
                                                           bool need_tau, bool /*allow_tf32*/) {
  const OpCall call(input, centers, displacements, tau);
  const int64_t B = input.size(0), K = centers.size(0), M = displacements.size(0) + 1;
  const auto saved = [&](const Tensor& x, const Sizes& sizes, ScalarType dtype, const char* name) {
    return checked_saved(x, input, sizes, dtype, name);
  };
  const bool narrow =
      call.operands != call.sums && grad.scalar_type() == call.operands && logits.scalar_type() == call.operands;
  const auto scores = [&](const Tensor& x, const char* name) {
    check_shape(x, input, {B, K}, name, "the forward's shape");
    check_floating(x, name);
    return converted(x, narrow ? call.operands : call.sums);
  };
  const Tensor G = scores(grad, "grad"), z = scores(logits, "logits");
  const Tensor j = saved(slots, {B, K}, ScalarType::Byte, "slots");
  const Tensor R = saved(center_rnorms, {M, K}, call.sums, "center_rnorms");
  const Tensor n = saved(input_rnorms, {B}, call.sums, "input_rnorms");

  const auto gradient = [](bool needed, const Tensor& x, ScalarType dtype) {
    return needed ? empty_on_device_of(x, x.sizes(), dtype) : empty_on_device_of(x, {0}, dtype);
  };
  const Tensor df = gradient(need_input, call.input, call.operands);
  const Tensor dw = gradient(need_centers, call.centers, call.operands);
  const Tensor dd = gradient(need_displacements, call.displacements, call.sums);
  const Tensor dt = gradient(need_tau, call.tau, call.sums);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  TorchWorkspace workspace(call);
  op_table(call.operands)
      .logits_backward(
          call.arguments(), G.const_data_ptr(),
          {z.mutable_data_ptr(), static_cast<uint8_t*>(j.mutable_data_ptr()), R.mutable_data_ptr(),
           n.mutable_data_ptr(), narrow},
          {need_input ? df.mutable_data_ptr() : nullptr, need_centers ? dw.mutable_data_ptr() : nullptr,
           need_displacements ? dd.mutable_data_ptr() : nullptr, need_tau ? dt.mutable_data_ptr() : nullptr},
          workspace);
  return {converted(df, input.scalar_type()), converted(dw, centers.scalar_type()),
          converted(dd, displacements.scalar_type()), converted(dt, tau.scalar_type())};
}

}  // namespace
}  // namespace gistops::cuda

STABLE_TORCH_LIBRARY_IMPL(gistops, CUDA, m) {
  m.impl("logits_forward", TORCH_BOX(&gistops::cuda::logits_forward));
  m.impl("logits_backward", TORCH_BOX(&gistops::cuda::logits_backward));
}
