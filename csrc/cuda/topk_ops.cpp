// Top-k on NVIDIA GPUs: tensors in, tensors out, on the current stream. The checks here are those that memory safety
// depends on.
#include <optional>

#include "binding.h"

namespace gistops::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_topk(const Tensor& input, const Tensor& centers,
                                                      const Tensor& displacements, const Tensor& tau,
                                                      std::optional<Tensor> class_bias, int64_t k, bool need_lse,
                                                      bool /*allow_tf32*/) {
  const OpCall call(input, centers, displacements, tau);
  const int64_t B = input.size(0), K = centers.size(0);
  STD_TORCH_CHECK(K <= kMostTopkClasses, "gistops: centers: expected at most ", kMostTopkClasses, " classes, got ", K);
  STD_TORCH_CHECK(k >= 1 && k <= std::min(K, kMostBest), "gistops: k: expected an integer from 1 to ",
                  std::min(K, kMostBest), ", got ", k);
  Tensor bias = call.tau;
  if (class_bias) {
    check_floating(*class_bias, "class_bias");
    check_shape(*class_bias, input, {K}, "class_bias", "shape");
    bias = converted(*class_bias, call.sums);
  }
  const Tensor values = empty_on_device_of(input, {B, k}, call.sums),
               classes = empty_on_device_of(input, {B, k}, ScalarType::Long),
               slots = empty_on_device_of(input, {B, k}, ScalarType::Byte),
               lse = empty_on_device_of(input, {need_lse ? B : 0}, call.sums);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  TorchWorkspace workspace(call);
  op_table(call.operands)
      .topk(call.arguments(), {.class_bias = class_bias ? bias.const_data_ptr() : nullptr, .k = k},
            {.values = values.mutable_data_ptr(),
             .classes = static_cast<int64_t*>(classes.mutable_data_ptr()),
             .slots = static_cast<uint8_t*>(slots.mutable_data_ptr()),
             .lse = need_lse ? lse.mutable_data_ptr() : nullptr},
            workspace);
  return {values, classes, slots, lse};
}

}  // namespace
}  // namespace gistops::cuda

STABLE_TORCH_LIBRARY_IMPL(gistops, CUDA, m) { m.impl("fused_topk", TORCH_BOX(&gistops::cuda::fused_topk)); }
