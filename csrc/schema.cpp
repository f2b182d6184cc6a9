// The operators' schemas, once for every device. Fake kernels, autograd and autocast: gistops/operators/.
#include <torch/csrc/stable/library.h>

// Letters as in the paper and csrc/README.md: B features of length d, K classes, M = m + 1 slots.
STABLE_TORCH_LIBRARY(gistops, m) {
  // input [B, d], centers [K, d], displacements [m, d], tau [1 element]; or free centres: centers [K, M, d] and
  // displacements [0, d]
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

  // The same where the vectors of class k in slot j >= 1 are w_k + y[0, j, k] a + y[1, j, k] b_j, all as long as w_k,
  // with a and b_j shared by the classes: a rotation. feature_table x [B, M]: f.a, and f.b_j for j >= 1; class_tables y
  // [2, M, K], 0 in slot 0.
  m.def(
      "tabled_forward(Tensor input, Tensor centers, Tensor tau, Tensor feature_table, Tensor class_tables,"
      " bool allow_tf32=False)"
      " -> (Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms)");
  // Gradients of input, centers, tau, feature_table and class_tables; the last two are always made.
  m.def(
      "tabled_backward(Tensor grad, Tensor input, Tensor centers, Tensor tau, Tensor feature_table,"
      " Tensor class_tables, Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms,"
      " bool need_input, bool need_centers, bool need_tau, bool allow_tf32=False)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // The parts of a cross-entropy, without logits [B, K]: of z the logits, lse_i = log sum over k != y_i of
  // e^(z + class_bias), target_logits z[i, y_i] (0 where the target y is ignore_index, which hides no class), and
  // sums_i = sum over k of weight_k z_ik ([0] without weight). class_bias [K], target [B] int64, weight [K]. Both
  // tables or none, and no displacements with them.
  m.def(
      "constellation_lse_forward(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor? class_bias,"
      " Tensor? feature_table, Tensor? class_tables, Tensor target, Tensor? weight, int ignore_index,"
      " bool allow_tf32=False) -> (Tensor lse, Tensor target_logits, Tensor sums)");
  // Gradients of input, centers, displacements, tau, class_bias, and of the tables, if there are any.
  m.def(
      "constellation_lse_backward(Tensor grad_lse, Tensor grad_target, Tensor grad_sums, Tensor input, Tensor centers,"
      " Tensor displacements, Tensor tau, Tensor? class_bias, Tensor? feature_table, Tensor? class_tables,"
      " Tensor target, Tensor? weight, int ignore_index, Tensor lse, bool need_input, bool need_centers,"
      " bool need_displacements, bool need_tau, bool need_bias, bool allow_tf32=False)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // On the CPU, the same with the scores parked between the two in `parked`, like centers, which then becomes the
  // gradient of centers.
  m.def(
      "constellation_parked_lse_forward(Tensor input, Tensor centers, Tensor displacements, Tensor tau,"
      " Tensor? class_bias, Tensor? feature_table, Tensor? class_tables, Tensor target, Tensor? weight,"
      " int ignore_index, Tensor(a!) parked) -> (Tensor lse, Tensor target_logits, Tensor sums)");
  m.def(
      "constellation_parked_lse_backward(Tensor grad_lse, Tensor grad_target, Tensor grad_sums, Tensor input,"
      " Tensor centers, Tensor displacements, Tensor tau, Tensor? class_bias, Tensor? feature_table,"
      " Tensor? class_tables, Tensor target, Tensor? weight, int ignore_index, Tensor lse, bool need_input,"
      " bool need_displacements, bool need_tau, bool need_bias, Tensor(a!) parked)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // On GPUs, the whole loss: gistops/operators/cross_entropy.py says what the arguments hold.
  m.def(
      "constellation_cross_entropy_forward(Tensor input, Tensor centers, Tensor displacements, Tensor tau,"
      " Tensor target, Tensor? class_bias, Tensor? weight, Tensor? margin, int margin_kind, int reduction,"
      " int ignore_index, float label_smoothing, bool keep, bool allow_tf32=False)"
      " -> (Tensor loss, Tensor lse, Tensor inside, Tensor scores, Tensor slots, Tensor center_rnorms,"
      " Tensor input_rnorms, Tensor rows, Tensor scalars)");
  m.def(
      "constellation_cross_entropy_backward(Tensor? grad_loss, Tensor? grad_lse, Tensor input, Tensor centers,"
      " Tensor displacements, Tensor tau, Tensor target, Tensor? class_bias, Tensor? weight, Tensor? margin,"
      " Tensor lse, Tensor scores, Tensor slots, Tensor center_rnorms, Tensor input_rnorms, Tensor rows,"
      " Tensor scalars, int margin_kind, int reduction, int ignore_index, float label_smoothing, bool need_input,"
      " bool need_centers, bool need_displacements, bool need_tau, bool need_bias, bool need_margin,"
      " bool allow_tf32=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The k largest of z + class_bias of each row, largest first, the lowest class of equals; lse over all classes ([0]
  // unless need_lse). values [B, k], classes [B, k] int64, slots [B, k] uint8.
  m.def(
      "constellation_topk(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor? class_bias,"
      " Tensor? feature_table, Tensor? class_tables, int k, bool need_lse=False, bool allow_tf32=False,"
      " Tensor? norms=None) -> (Tensor values, Tensor classes, Tensor slots, Tensor lse)");
  // On the CPU, R of centres and displacements that do not change, for the two that take it; what is negative marks a
  // class to be scored from w + delta itself.
  m.def("constellation_norms(Tensor centers, Tensor displacements) -> Tensor norms");
  m.def(
      "constellation_frozen_forward(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor norms)"
      " -> (Tensor logits, Tensor slots)");
  // The instruction set and the matrix products that the CPU backend uses here, as in `python -m gistops.info`.
  m.def("cpu_capability() -> str");
}
