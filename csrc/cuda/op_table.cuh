// The ops for one type of operands.
#pragma once
#include "cross_entropy.cuh"
#include "logits.cuh"
#include "topk.cuh"

namespace gistops::cuda {

template <class T>
constexpr OpTable make_op_table() {
  return {.logits_forward = [](const Arguments& a, const LogitsResults& results,
                               Workspace& workspace) { LogitsLauncher<T>(a, workspace).forward(results); },
          .logits_backward =
              [](const Arguments& a, const void* grad, const LogitsResults& saved, const Gradients& gradients,
                 Workspace& workspace) { LogitsLauncher<T>(a, workspace).backward(grad, saved, gradients); },
          .cross_entropy_parks = [](const Arguments& a) { return scores_can_be_parked<T>(a); },
          .cross_entropy_forward =
              [](const Arguments& a, const LossArguments& loss, const LossResults& results, Workspace& workspace) {
                CrossEntropyLauncher<T>(a, loss, workspace).forward(results);
              },
          .cross_entropy_backward =
              [](const Arguments& a, const LossArguments& loss, const LossOutputGrads& grads, const LossResults& saved,
                 const Gradients& gradients, const LossGradients& loss_gradients, Workspace& workspace) {
                CrossEntropyLauncher<T>(a, loss, workspace).backward(grads, saved, gradients, loss_gradients);
              },
          .topk = [](const Arguments& a, const TopkArguments& topk, const TopkResults& results,
                     Workspace& workspace) { TopkLauncher<T>(a, workspace).run(topk, results); }};
}

}  // namespace gistops::cuda
