// The common parts of the bindings: tensors to pointers, memory and products from PyTorch. Included by
// logits_ops.cpp and cross_entropy_ops.cpp alone.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../torch_calls.h"
#include "op_table.h"

// Defined in libtorch_cuda, whose header declares it only for builds with CUDA's headers. Weak, so that this library
// also loads on a torch without CUDA.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace gistops::cuda {
namespace {

using Sizes = std::vector<int64_t>;

void check_floating(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "gistops: ", name, ": expected float32, float16, bfloat16 or float64, got ",
                  torch::headeronly::toString(type));
}

// Return the type that all operands are converted to: float64 if one of them is float64, else their own type if they
// agree, else float32.
ScalarType operand_type(const Tensor& input, const Tensor& centers, const Tensor& displacements) {
  const std::initializer_list<const Tensor*> operands{&input, &centers, &displacements};
  if (std::ranges::any_of(operands, [](const Tensor* x) { return x->scalar_type() == ScalarType::Double; }))
    return ScalarType::Double;
  const bool agree = std::ranges::all_of(
      operands, [&](const Tensor* x) { return x->numel() == 0 || x->scalar_type() == input.scalar_type(); });
  return agree ? input.scalar_type() : ScalarType::Float;
}

const OpTable& op_table(ScalarType operands) {
  switch (operands) {
    case ScalarType::BFloat16: return bf16_ops;
    case ScalarType::Half: return f16_ops;
    case ScalarType::Double: return f64_ops;
    default: return f32_ops;
  }
}

void check_shape(const Tensor& x, const Tensor& input, const Sizes& sizes, const char* name, const char* expected) {
  STD_TORCH_CHECK(std::ranges::equal(x.sizes(), sizes), "gistops: ", name, ": expected ", expected, " ",
                  shape_text(sizes), ", got ", shape_text(x.sizes()));
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == input.get_device_index(), "gistops: ", name,
                  ": expected a tensor on the device of input");
}

// Return a tensor that the forward saved, after a check that its shape, device and type have not changed.
Tensor checked_saved(const Tensor& x, const Tensor& input, const Sizes& sizes, ScalarType dtype, const char* name) {
  check_shape(x, input, sizes, name, "the forward's shape");
  STD_TORCH_CHECK(x.scalar_type() == dtype, "gistops: ", name, ": expected the forward's dtype");
  return converted(x, dtype);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "gistops: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// The tensors of one call of an operator, checked, contiguous and of one type.
struct OpCall {
  Tensor input, centers, displacements, tau;
  ScalarType operands, sums;

  // with_vectors: centers may be sub-centers [K, M, d].
  OpCall(const Tensor& f, const Tensor& w, const Tensor& delta, const Tensor& t, bool with_vectors = false)
      : input(f), centers(w), displacements(delta), tau(t), operands(operand_type(f, w, delta)),
        sums(operands == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    const std::pair<const Tensor*, const char*> tensors[] = {
        {&f, "input"}, {&w, "centers"}, {&delta, "displacements"}, {&t, "tau"}};
    for (const auto& [x, name] : tensors) {
      STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == f.get_device_index(), "gistops: ", name,
                      ": expected all tensors on one CUDA device");
      check_floating(*x, name);
    }
    constexpr int64_t kMostDims = int64_t{1} << 27;  // the kernels index a few rows with 32 bits
    STD_TORCH_CHECK(f.dim() == 2 && f.size(1) >= 1 && f.size(1) <= kMostDims,
                    "gistops: input: expected shape [B, d] with 1 <= d <= ", kMostDims, ", got ",
                    shape_text(f.sizes()));
    const int64_t d = f.size(1);
    const bool has_vectors = with_vectors && w.dim() == 3;
    STD_TORCH_CHECK((w.dim() == 2 || has_vectors) && w.size(w.dim() - 1) == d, "gistops: centers: expected shape [K, ",
                    d, "]", with_vectors ? " or [K, M, d]" : "", ", got ", shape_text(w.sizes()));
    STD_TORCH_CHECK(!has_vectors || (w.size(1) >= 1 && w.size(1) <= 256 && delta.size(0) == 0),
                    "gistops: centers: expected 1 to 256 sub-centers per class and no displacements, got ",
                    shape_text(w.sizes()), " and ", shape_text(delta.sizes()));
    STD_TORCH_CHECK(delta.dim() == 2 && delta.size(1) == d, "gistops: displacements: expected shape [m, ", d, "], got ",
                    shape_text(delta.sizes()));
    STD_TORCH_CHECK(delta.size(0) < 256, "gistops: displacements: expected at most 255 rows, got ", delta.size(0));
    STD_TORCH_CHECK(t.numel() == 1, "gistops: tau: expected one element, got shape ", shape_text(t.sizes()));
    for (Tensor* x : {&input, &centers, &displacements}) *x = converted(*x, operands);
    tau = converted(tau, sums);
  }

  Arguments arguments() const {
    return {input.const_data_ptr(),
            centers.const_data_ptr(),
            displacements.const_data_ptr(),
            tau.const_data_ptr(),
            input.size(0),
            centers.size(0),
            input.size(1),
            displacements.size(0),
            current_stream(input.get_device_index()),
            centers.dim() == 3 ? centers.size(1) : 1};
  }
};

// Memory from PyTorch's allocator, which orders reuse by streams, and products from PyTorch's cuBLAS.
class TorchWorkspace final : public Workspace {
 public:
  explicit TorchWorkspace(const OpCall& call) : call_(call) {}

  void allocate(Buffer* buffers, int count) override {
    constexpr int64_t kAlignment = 256;
    const auto aligned = [](int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; };
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += aligned(buffers[i].bytes);
    memory_.push_back(empty_on_device_of(call_.input, {std::max<int64_t>(total, 1)}, ScalarType::Byte));
    char* at = static_cast<char*>(memory_.back().mutable_data_ptr());
    for (int i = 0; i < count; at += aligned(buffers[i].bytes), ++i) buffers[i].data = at;
  }

  // The operands are views of memory, so they require no gradient. Autocast has no rule for either overload; if it had
  // one, the result would have the type of the surrounding region. PyTorch's own setting, which allow_tf32 repeats,
  // decides if float32 is multiplied in tf32.
  void multiply(const Matrix& left, const Matrix& right, void* out, int64_t ld) override {
    const Tensor a = view(left.data, {left.rows, left.cols}, {left.row_stride, left.col_stride});
    const Tensor b = view(right.data, {right.rows, right.cols}, {right.row_stride, right.col_stride});
    const std::array<int64_t, 2> sizes{left.rows, right.cols}, strides{ld, 1};
    const Tensor sums = torch::stable::from_blob(out, sizes, strides, call_.input.device(), call_.sums);
    const Tensor product = explained("a matrix product", [&] {
      return call_.operands == call_.sums ? call("aten::mm", "out", a, b, sums)
                                          : call("aten::mm", "dtype_out", a, b, call_.sums, sums);
    });
    STD_TORCH_CHECK(product.mutable_data_ptr() == out && product.scalar_type() == call_.sums,
                    "gistops: aten::mm did not write its product to the given memory");
  }

 private:
  Tensor view(const void* data, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides) const {
    return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, call_.input.device(), call_.operands);
  }

  template <class... Arguments>
  static Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
    std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }

  const OpCall& call_;
  std::vector<Tensor> memory_;
};

}  // namespace
}  // namespace gistops::cuda
