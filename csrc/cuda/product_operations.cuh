// The operators around PyTorch's products, as the binding calls them.
#pragma once
#include "logits_products.cuh"
#include "loss_products.cuh"

namespace gistops::cuda {

template <class T>
constexpr ProductOperations product_operations() {
  return {[](const Arguments& a, const Results& results, Workspace& workspace) {
            LogitsProducts<T>(a, workspace).forward(results);
          },
          [](const Arguments& a, const void* grad, const Results& saved, const Gradients& gradients,
             Workspace& workspace) { LogitsProducts<T>(a, workspace).backward(grad, saved, gradients); },
          [](const Arguments& a, const LossArguments& loss, const LossResults& results, Workspace& workspace) {
            LossProducts<T>(a, loss, workspace).forward(results);
          },
          [](const Arguments& a, const LossArguments& loss, const LossGrads& grads, const LossResults& saved,
             const Gradients& gradients, void* class_bias, void* margin, Workspace& workspace) {
            LossProducts<T>(a, loss, workspace).backward(grads, saved, gradients, class_bias, margin);
          }};
}

}  // namespace gistops::cuda
