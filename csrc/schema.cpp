// The schemas of the ops, for every device. Fake kernels, autograd and autocast: gistops/operators/, whose records hold
// the same arguments; a test compares the two.
#include <torch/csrc/stable/library.h>

// Letters as in the paper and csrc/README.md: B rows of length d, K classes, M = m + 1 slots per class. Slot 0 is the
// bare center w_k, slot j is w_k + delta_j.
STABLE_TORCH_LIBRARY(gistops, m) {
  // input [B, d], centers [K, d], displacements [m, d], tau [1 element]
  //   -> logits [B, K], slots [B, K] uint8, center_rnorms R [M, K], input_rnorms 1/|f| [B]
  // allow_tf32: a GPU may round float32 products to tf32. On GPUs a negative R marks a pair whose norm was computed
  // from w + delta itself. need_slots: without slots, which are then empty [0], there is no gradient. logits_dtype: the
  // dtype in which the logits are stored; none: float64 if an operand is float64, else float32. The backward takes
  // logits and their gradient in any floating dtype.
  m.def(
      "logits_forward(Tensor input, Tensor centers, Tensor displacements, Tensor tau, bool allow_tf32=False,"
      " bool need_slots=True, ScalarType? logits_dtype=None)"
      " -> (Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms)");
  // Every backward op returns each gradient in its argument's shape and dtype, or an empty tensor if it is not needed.
  m.def(
      "logits_backward(Tensor grad, Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor logits,"
      " Tensor slots, Tensor center_rnorms, Tensor input_rnorms, bool need_input, bool need_centers,"
      " bool need_displacements, bool need_tau, bool allow_tf32=False)"
      " -> (Tensor grad_input, Tensor grad_centers, Tensor grad_displacements, Tensor grad_tau)");

  // The same for sub-centers: centers [K, M, d].
  m.def(
      "subcenter_forward(Tensor input, Tensor centers, Tensor tau, bool allow_tf32=False, bool need_slots=True,"
      " ScalarType? logits_dtype=None)"
      " -> (Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms)");
  m.def(
      "subcenter_backward(Tensor grad, Tensor input, Tensor centers, Tensor tau, Tensor logits, Tensor slots,"
      " Tensor center_rnorms, Tensor input_rnorms, bool need_input, bool need_centers, bool need_tau,"
      " bool allow_tf32=False) -> (Tensor grad_input, Tensor grad_centers, Tensor grad_tau)");

  // The same for rotations: slot j >= 1 of class k is w_k + A u + B p_j, of the same norm as w_k, with
  // A = a_j (w_k.u) - n_j (w_k.p_j) and B = b_j (w_k.p_j) + n_j (w_k.u). directions [M, d]: u, then p_j; turns [3, M -
  // 1]: a, b and n.
  m.def(
      "rotation_forward(Tensor input, Tensor centers, Tensor tau, Tensor directions, Tensor turns,"
      " bool allow_tf32=False, bool need_slots=True, ScalarType? logits_dtype=None)"
      " -> (Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms)");
  // The gradients of directions and turns are always computed, in the dtype of the norms.
  m.def(
      "rotation_backward(Tensor grad, Tensor input, Tensor centers, Tensor tau, Tensor directions,"
      " Tensor turns, Tensor logits, Tensor slots, Tensor center_rnorms, Tensor input_rnorms, bool need_input,"
      " bool need_centers, bool need_tau, bool allow_tf32=False)"
      " -> (Tensor grad_input, Tensor grad_centers, Tensor grad_tau, Tensor grad_directions,"
      " Tensor grad_turns)");

  // CPU only: directions and turns, in `dtype`, of the rotations from axis [d] to displacements [m, d], and the
  // backward.
  m.def("rotation_planes(Tensor displacements, Tensor axis, ScalarType dtype) -> (Tensor directions, Tensor turns)");
  m.def(
      "rotation_planes_backward(Tensor grad_directions, Tensor grad_turns, Tensor displacements, Tensor axis)"
      " -> (Tensor grad_displacements, Tensor grad_axis)");

  // The parts of a cross-entropy of logits z that are never materialized. For a row with target y:
  //   lse_others = log sum over k != y of e^(z_k + class_bias_k), target_logits = z_y,
  //   weighted_sums = sum over k of weight_k z_k, [0] without weight.
  // Where y is ignore_index, lse_others includes every class and target_logits is 0. class_bias [K], target [B] int64,
  // weight [K]. Sub-centers [K, M, d] and rotations (directions and turns or neither) take no displacements: [0, d].
  m.def(
      "cross_entropy_parts_forward(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor? class_bias,"
      " Tensor? directions, Tensor? turns, Tensor target, Tensor? weight, SymInt ignore_index,"
      " bool allow_tf32=False) -> (Tensor lse_others, Tensor target_logits, Tensor weighted_sums)");
  m.def(
      "cross_entropy_parts_backward(Tensor grad_lse_others, Tensor grad_target_logits, Tensor grad_weighted_sums,"
      " Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor? class_bias, Tensor? directions,"
      " Tensor? turns, Tensor target, Tensor? weight, SymInt ignore_index, Tensor lse_others, bool need_input,"
      " bool need_centers, bool need_displacements, bool need_tau, bool need_bias, bool allow_tf32=False)"
      " -> (Tensor grad_input, Tensor grad_centers, Tensor grad_displacements, Tensor grad_tau,"
      " Tensor grad_class_bias, Tensor grad_directions, Tensor grad_turns)");
  // The same on the CPU, where the forward stores the scores in `stash`, a buffer like centers, and the backward
  // overwrites it with the gradient of centers.
  m.def(
      "stashed_cross_entropy_parts_forward(Tensor input, Tensor centers, Tensor displacements, Tensor tau,"
      " Tensor? class_bias, Tensor? directions, Tensor? turns, Tensor target, Tensor? weight,"
      " SymInt ignore_index, Tensor(a!) stash) -> (Tensor lse_others, Tensor target_logits, Tensor weighted_sums)");
  m.def(
      "stashed_cross_entropy_parts_backward(Tensor grad_lse_others, Tensor grad_target_logits,"
      " Tensor grad_weighted_sums, Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor? class_bias,"
      " Tensor? directions, Tensor? turns, Tensor target, Tensor? weight, SymInt ignore_index,"
      " Tensor lse_others, bool need_input, bool need_displacements, bool need_tau, bool need_bias, Tensor(a!) stash)"
      " -> (Tensor grad_input, Tensor grad_displacements, Tensor grad_tau, Tensor grad_class_bias,"
      " Tensor grad_directions, Tensor grad_turns)");
  // The loss from these parts, without bias, margin and label smoothing: cpu/row_loss.h describes the outputs. weight
  // is that of the targets, reduction 0 none, 1 mean, 2 sum. stashed_cross_entropy_parts_backward takes the gradients
  // loss_slopes and lse_slopes make of the parts.
  m.def(
      "stashed_cross_entropy_forward(Tensor input, Tensor centers, Tensor displacements, Tensor tau,"
      " Tensor? directions, Tensor? turns, Tensor target, Tensor? weight, int reduction, SymInt ignore_index,"
      " Tensor(a!) stash)"
      " -> (Tensor loss, Tensor lse, Tensor lse_others, Tensor loss_slopes, Tensor lse_slopes)");

  // The whole loss, on GPUs: gistops/operators/cross_entropy.py describes the arguments.
  m.def(
      "cross_entropy_forward(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor? input_coeffs,"
      " Tensor? class_coeffs, Tensor target, Tensor? class_bias, Tensor? weight, Tensor? margin, int margin_kind,"
      " int reduction, SymInt ignore_index, float label_smoothing, bool keep_scores, bool allow_tf32=False)"
      " -> (Tensor loss, Tensor lse, Tensor in_range, Tensor scores, Tensor slots, Tensor center_rnorms,"
      " Tensor input_rnorms, Tensor rows, Tensor scalars)");
  m.def(
      "cross_entropy_backward(Tensor? grad_loss, Tensor? grad_lse, Tensor input, Tensor centers, Tensor displacements,"
      " Tensor tau, Tensor? input_coeffs, Tensor? class_coeffs, Tensor target, Tensor? class_bias, Tensor? weight,"
      " Tensor? margin, Tensor lse, Tensor scores, Tensor slots, Tensor center_rnorms, Tensor input_rnorms,"
      " Tensor rows, Tensor scalars, int margin_kind, int reduction, SymInt ignore_index, float label_smoothing,"
      " bool need_input, bool need_centers, bool need_displacements, bool need_tau, bool need_bias, bool need_margin,"
      " bool allow_tf32=False)"
      " -> (Tensor grad_input, Tensor grad_centers, Tensor grad_displacements, Tensor grad_tau,"
      " Tensor grad_input_coeffs, Tensor grad_class_coeffs, Tensor grad_class_bias, Tensor grad_margin)");

  // The same of translations in half precision, where the forward parks the scores in `stash`, a buffer like centers,
  // and the backward overwrites it with the gradient of centers. It fits where cross_entropy_parks is true.
  m.def("cross_entropy_parks(Tensor input, Tensor centers, Tensor displacements) -> bool");
  m.def(
      "parked_cross_entropy_forward(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor target,"
      " Tensor? class_bias, Tensor? weight, Tensor? margin, int margin_kind, int reduction, SymInt ignore_index,"
      " float label_smoothing, Tensor(a!) stash)"
      " -> (Tensor loss, Tensor lse, Tensor in_range, Tensor center_rnorms, Tensor input_rnorms, Tensor rows,"
      " Tensor scalars)");
  m.def(
      "parked_cross_entropy_backward(Tensor? grad_loss, Tensor? grad_lse, Tensor input, Tensor centers,"
      " Tensor displacements, Tensor tau, Tensor target, Tensor? class_bias, Tensor? weight, Tensor? margin,"
      " Tensor center_rnorms, Tensor input_rnorms, Tensor rows, Tensor scalars, int margin_kind, int reduction,"
      " SymInt ignore_index, float label_smoothing, bool need_input, bool need_displacements, bool need_tau,"
      " bool need_bias, bool need_margin, Tensor(a!) stash)"
      " -> (Tensor grad_input, Tensor grad_displacements, Tensor grad_tau, Tensor grad_class_bias,"
      " Tensor grad_margin)");

  // The k largest z + class_bias of each row, in descending order, ties by the lower class: values [B, k], classes [B,
  // k] int64, slots [B, k] uint8. lse [B] over all classes, [0] unless need_lse. norms: from center_norms, CPU only.
  m.def(
      "topk(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor? class_bias, Tensor? directions,"
      " Tensor? turns, SymInt k, bool need_lse=False, bool allow_tf32=False, Tensor? norms=None)"
      " -> (Tensor values, Tensor classes, Tensor slots, Tensor lse)");
  // The same by kernels of its own, on GPUs: k is at most 128, K at most 2^24; translations alone.
  m.def(
      "fused_topk(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor? class_bias, SymInt k,"
      " bool need_lse=False, bool allow_tf32=False) -> (Tensor values, Tensor classes, Tensor slots, Tensor lse)");

  // CPU only: R of frozen centers and displacements, computed once for frozen_logits and topk. A negative entry marks a
  // class to be scored from w + delta itself.
  m.def("center_norms(Tensor centers, Tensor displacements) -> Tensor");
  m.def(
      "frozen_logits(Tensor input, Tensor centers, Tensor displacements, Tensor tau, Tensor norms,"
      " bool need_slots=True, ScalarType? logits_dtype=None)"
      " -> (Tensor logits, Tensor slots)");
  // Lines: the instruction set of the CPU backend, and how it multiplies float32, bfloat16 and float16, and why.
  m.def("cpu_capability() -> str");
  // True if the CPU backend multiplies operands of this dtype on units made for it.
  m.def("cpu_multiplies(ScalarType dtype) -> bool");
}
