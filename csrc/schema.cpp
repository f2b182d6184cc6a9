// The operators' schemas, once for every device. Fake kernels, autograd and autocast: gistops/_ops.py.
#include <torch/csrc/stable/library.h>

// Letters as in the paper and csrc/README.md: B features of length d, K classes, M = m + 1 slots.
STABLE_TORCH_LIBRARY(gistops, m) {
  // input [B, d], centers [K, d], displacements [m, d], tau [1 element]
  //   -> logits [B, K], slots [B, K] uint8, center_rnorms R [M, K], input_rnorms 1/|f| [B]
  // allow_tf32: float32 products may be rounded to tf32, on a GPU that has it. On GPUs a negative R marks a pair whose
  // norm was computed from w + delta itself.
  m.def(
      "constellation_forward(Tensor input, Tensor centers, Tensor displacements, Tensor tau,"
      " bool allow_tf32=False)"
      " -> (Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms)");
  // Gradients in the order of the arguments, each in its argument's shape and dtype; an empty tensor where not needed.
  m.def(
      "constellation_backward(Tensor grad, Tensor input, Tensor centers, Tensor displacements, Tensor tau,"
      " Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms,"
      " bool need_input, bool need_centers, bool need_displacements, bool need_tau,"
      " bool allow_tf32=False)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  // The instruction set and the matrix products that the CPU backend uses here, as in `python -m gistops.info`.
  m.def("cpu_capability() -> str");
}
