// The operators for one type of operands, as the binding calls them.
#pragma once
#include "cross_entropy.cuh"
#include "logits.cuh"

namespace gistops::cuda {

template <class T>
constexpr Operations operations() {
  return {[](const Arguments& a, const Results& results, Workspace& workspace) {
            LogitsSequence<T>(a, workspace).forward(results);
          },
          [](const Arguments& a, const void* grad, const Results& saved, const Gradients& gradients,
             Workspace& workspace) { LogitsSequence<T>(a, workspace).backward(grad, saved, gradients); },
          [](const Arguments& a, const LossArguments& loss, const LossResults& results, Workspace& workspace) {
            LossSequence<T>(a, loss, workspace).forward(results);
          },
          [](const Arguments& a, const LossArguments& loss, const LossGrads& grads, const LossResults& saved,
             const Gradients& gradients, void* class_bias, void* margin, Workspace& workspace) {
            LossSequence<T>(a, loss, workspace).backward(grads, saved, gradients, class_bias, margin);
          }};
}

}  // namespace gistops::cuda
