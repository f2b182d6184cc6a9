// The interface of the CPU kernels: a table of functions, one table per instruction set, picked at run time
// (dispatch.cpp). All matrices are row-major; ld and ld_* are row strides in elements. Letters: csrc/README.md.
#pragma once
#include <cstdint>

namespace gistops {

// Norms are clamped from below at this value, as in torch.nn.functional.normalize.
constexpr double kMinNorm = 1e-12;

// Storage formats of input and centers. The computation is in float, or in double if any of them is double.
enum class Format { f32, f64, f16, bf16 };

// A block of scores: logits and winning slots, each [rows, n] with row stride ld. slots may be null.
template <class T>
struct ScoreBlock {
  T* logits;
  uint8_t* slots;
  int64_t ld, rows, n;
};

// A block of scores in the backward, with the gradient of the logits.
template <class T>
struct GradBlock {
  const T *grad, *logits;
  const uint8_t* slots;
  int64_t ld, rows, n;
};

// A matrix [slots, n] over the slots of n classes, with row stride ld.
template <class T>
struct SlotMatrix {
  const T* data;
  int64_t ld, slots;
};

// Outputs of route_grad(); null where not needed. All but h are accumulated.
template <class T>
struct RoutedGrads {
  T* h;  // [rows, n]
  int64_t ld_h;
  T* s;  // [rows, slots], contiguous
  T* t;  // [slots, n]
  int64_t ld_t;
  double* tau;
};

// The vectors of class k of a rotation are w_k + class_a[j, k] u + class_b[j, k] p_j, with directions u and p_j shared
// by all classes; input[i, 0] = f_i . u and input[i, j] = f_i . p_j.
template <class T>
struct RotationCoeffs {
  const T* input;              // [rows, slots], contiguous
  const T *class_a, *class_b;  // [slots, n]
  int64_t slots, ld;
};

// Outputs of rotation_route_grad(). h and tau may be null. All but h are accumulated.
template <class T>
struct RotationGrads {
  T* h;  // [rows, n]
  int64_t ld_h;
  T* s;                  // [rows, slots], contiguous: the gradient of RotationCoeffs::input
  T *class_a, *class_b;  // [slots, n]
  int64_t ld_class;
  T* t;  // [n], over all slots
  double* tau;
};

// Per-class terms of a cross-entropy, [n] each; null where not given.
template <class T>
struct ClassTerms {
  const T *bias, *weight;
};

// Per-row terms of the gradient of a cross-entropy, [rows] each.
template <class T>
struct RowTerms {
  const T *lse, *grad_lse, *grad_sums;
};

template <class T>
struct Kernels {
  // Convert x [n] from a storage format, and to one (rounding to nearest even).
  void (*load)(const void* x, Format format, int64_t n, T* out);
  void (*store)(const T* x, int64_t n, Format format, void* out);

  // out[c, r] = x[r, c].
  void (*transpose)(const T* x, int64_t rows, int64_t cols, int64_t ld, T* out, int64_t ld_out);

  // out[r / 2, c] = the pair x[r, c], x[r + 1, c] of 16-bit numbers, for even r, with 0 after the last row. x and out
  // are contiguous.
  void (*pair_rows)(const uint16_t* x, int64_t rows, int64_t cols, uint32_t* out);

  // dots[i, j] = x_i . y_j for j < columns, and squares[i] = |x_i|^2 (skipped if null).
  void (*dots)(const T* x, int64_t rows, int64_t d, const T* y, int64_t columns, T* squares, T* dots, int64_t ld_dots);

  // The same for bfloat16 x and y, on processors with AVX512-BF16 alone; null for older instruction sets.
  void (*dots_bf16)(const uint16_t* x, int64_t rows, int64_t d, const uint16_t* y, int64_t columns, T* squares, T* dots,
                    int64_t ld_dots);

  // out[k] = 1 / max(norm, kMinNorm) from squared norms. A NaN stays NaN, and a square that has overflowed gives NaN.
  void (*rnorms)(const T* squares, int64_t n, T* out);

  // The epilogue of a block of the product P, which may lie in out.logits:
  //   logits[i, k] = scale[i] * max_j (P[i, k] + q[i, j]) * r[j, k],  slots[i, k] = the lowest j that attains it.
  // Strict > keeps the lowest slot. A NaN in slot 0 stays (see scores.h for how a NaN reaches slot 0).
  void (*max_over_slots)(const T* p, int64_t ld_p, ScoreBlock<T> out, SlotMatrix<T> r, const T* q, const T* scale);

  // Routes a block of G = grad to the winning slots j* = slots, with z = logits:
  //   h[i, k] = scale[i] G[i, k] r[j*, k],   s[i, j*] += h[i, k] (j* >= 1),   t[j*, k] += G[i, k] z[i, k],
  //   tau += sum of G z.
  void (*route_grad)(GradBlock<T> block, SlotMatrix<T> r, const T* scale, RoutedGrads<T> out);

  // Subtracts the gradient's component along u_kj = w_k + delta_j:
  //   dw[k] = hf[k] - sum_j t[j, k] u_kj,   dd[j] -= sum_k t[j, k] u_kj  (j >= 1).
  // u is summed before it is scaled: if w_k is close to -delta_j, nothing is lost. w is [rows, d], delta holds slots
  // 1 to t.slots - 1. hf [rows, d] may be dw. dw (with hf) and dd are skipped if null.
  void (*norm_correction)(const T* w, int64_t rows, int64_t d, const T* delta, SlotMatrix<T> t, const T* hf, T* dw,
                          T* dd);

  // The backward of the input's normalization, in-place: g_i -= (g_i . f_i) f_i rnorm_i^2. Rows with a clamped norm
  // are left unchanged.
  void (*normalize_backward)(T* g, const T* f, int64_t rows, int64_t d, const T* rnorm);

  // Adds z + bias, z [rows, n] contiguous, to a running log-sum-exp: max[i] is the largest score so far and sum[i] the
  // sum of e^(score - max), or of e^score if max is infinite. bias may be null.
  void (*update_logsumexp)(const T* z, int64_t rows, int64_t n, const T* bias, T* max, double* sum);

  // grad[i, k] = grad_lse[i] e^(z + bias - lse[i]) + grad_sums[i] weight[k], without the second term if weight is null.
  // grad_bias[k] += the first term summed over the rows, skipped if null. z and grad are [rows, n], contiguous, and may
  // be the same memory.
  void (*softmax_grad)(const T* z, int64_t rows, int64_t n, ClassTerms<T> classes, RowTerms<T> row_terms, T* grad,
                       T* grad_bias);

  // True if any z + bias is NaN or larger than bound.
  bool (*any_above)(const T* z, int64_t n, const T* bias, T bound);

  // Sub-centers, from the product p [n M, rows] of their vectors with the input:
  //   logits[i, k] = scale[i] max_j p[k M + j, i] r[j, k],  slots[i, k] = the lowest j that attains it.
  void (*max_over_subcenters)(const T* p, int64_t ld_p, ScoreBlock<T> out, SlotMatrix<T> r, const T* scale);

  // The products of the backward of sub-centers w [n M, d], with the weights h [rows, n] of the winners k M + slots:
  //   g[i] += sum_k h[i, k] w[k M + slots[i, k]],   dw[k M + slots[i, k]] += sum_i h[i, k] f[i].
  void (*add_winners)(GradBlock<T> block, const T* h, int64_t ld_h, const T* w, int64_t slots, int64_t d, T* g);
  void (*add_to_winners)(GradBlock<T> block, const T* h, int64_t ld_h, const T* f, int64_t slots, int64_t d, T* dw);

  // logits[i, k] = scale[i] r[k] max_j (P[i, k] + input[i, 0] class_a[j, k] + input[i, j] class_b[j, k]), with P alone
  // in slot 0.
  void (*rotation_max_over_slots)(const T* p, int64_t ld_p, ScoreBlock<T> out, RotationCoeffs<T> coeffs, const T* r,
                                  const T* scale);

  // Routes a block of G = grad to the winning slots: h as in route_grad(), and the gradients of the coefficients.
  void (*rotation_route_grad)(GradBlock<T> block, RotationCoeffs<T> coeffs, const T* r, const T* scale,
                              RotationGrads<T> out);

  // The gradients of centers w [rows, d] and of the directions of a rotation, with the weights c [slots, rows] of the
  // directions in the gradient of the centers: dw[k] = hf[k] - t[k] w_k + sum_j c[j, k] directions_j,
  // dd[j] += sum_k c[j, k] w_k. hf may be dw. dw, with hf, is skipped if null.
  void (*rotation_correction)(const T* w, int64_t rows, int64_t d, const T* directions, const T* t, SlotMatrix<T> c,
                              const T* hf, T* dw, T* dd);

  const char* name;
};

// The table of the best instruction set that this processor has.
template <class T>
const Kernels<T>& kernels();

}  // namespace gistops
