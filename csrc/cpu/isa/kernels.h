// The interface of the CPU kernels: a table of functions, one per instruction set, picked at run time (dispatch.cpp).
// All matrices are row-major; ld* are row strides in elements.
#pragma once
#include <cstdint>

namespace gistops {

// Norms are clamped here, as torch.nn.functional.normalize does.
constexpr double kMinNorm = 1e-12;

// Storage formats of input and centers; computation is in float, or in double if any of them is double.
enum class Format { f32, f64, f16, bf16 };

// Rank-2 terms (rotation.h) of some rows and classes: x [rows, slots], y0 and y1 [slots, n] with row stride ld.
template <class T>
struct Tables {
  const T *x, *y0, *y1;
  int64_t slots, ld;
};

template <class T>
struct Kernels {
  // x [n] in another format -> out [n], and back (rounding to nearest even).
  void (*load)(const void* x, Format format, int64_t n, T* out);
  void (*store)(const T* x, int64_t n, Format format, void* out);

  // dots[i, j] = x_i . y_j for j < columns, and squares[i] = |x_i|^2 (skipped if null).
  void (*dots)(const T* x, int64_t rows, int64_t d, const T* y, int64_t columns, T* squares, T* dots, int64_t ld_dots);

  // The epilogue of a block of the product P, which may lie where the logits go:
  //   logits[i, k] = scale[i] * max_j (P[i, k] + q[i, j]) * r[j, k],  slots[i, k] = the lowest j that attains it.
  // Strict > keeps the lowest slot; a NaN in slot 0 stays (see forward.h for how NaN reaches slot 0).
  void (*max_over_slots)(const T* p, int64_t ld_p, T* logits, uint8_t* slots, int64_t ld, int64_t rows, int64_t n,
                         const T* q, const T* r, int64_t ld_r, int64_t m_slots, const T* scale);

  // The routing of one block of G = grad, j* = slots:
  //   h[i, k] = scale[i] G[i, k] r[j*, k],   s[i, j*] += h[i, k],   t[j*, k] += G[i, k] logits[i, k]
  // and *tau += sum of G * logits. s, t and tau are skipped if null; h too.
  void (*route_grad)(const T* grad, const T* logits, int64_t ld, const uint8_t* slots, int64_t rows, int64_t n,
                     const T* r, int64_t ld_r, int64_t m_slots, const T* scale, T* h, int64_t ld_h, T* s, T* t,
                     int64_t ld_t, double* tau);

  // The correction that keeps gradients orthogonal to u_kj = w_k + delta_j, formed before it is scaled, so that
  // w_k close to -delta_j loses nothing:  dw[k] = hf[k] - sum_j t[j, k] u_kj,   dd[j] -= sum_k t[j, k] u_kj  (j >= 1).
  // delta has the m_slots - 1 rows 1..m. hf [rows, d] may be dw. dw (with hf) and dd are skipped if null.
  void (*norm_correction)(const T* w, int64_t rows, int64_t d, const T* delta, int64_t m_slots, const T* t,
                          int64_t ld_t, const T* hf, T* dw, T* dd);

  // g_i -= (g_i . f_i) f_i rnorm_i^2, the projection of the features' normalisation; clamped rows are left alone.
  void (*normalize_backward)(T* g, const T* f, int64_t rows, int64_t d, const T* rnorm);

  // max[i], sum[i]: of the scores so far, their largest and the sum of e^(score - max); goes on with the block z +
  // bias. bias may be null, here and below.
  void (*update_logsumexp)(const T* z, int64_t ld, int64_t rows, int64_t n, const T* bias, T* max, double* sum);

  // g[i, k] = a[i] e^(z + bias - lse[i]) + s[i] weight[k], with the row stride of z; without the second term if weight
  // is null. columns[k] += the first term summed over rows, skipped if null. g may be z.
  void (*softmax_grad)(const T* z, int64_t ld, int64_t rows, int64_t n, const T* bias, const T* weight, const T* lse,
                       const T* a, const T* s, T* g, T* columns);

  // Whether any z + bias is NaN or larger than bound.
  bool (*any_above)(const T* z, int64_t n, const T* bias, T bound);

  // Free centres, one slot after the other: best = max(best, p r), and slots = slot where it wins; slot 0 overwrites.
  // With the last slot comes scale, which multiplies best.
  void (*running_max)(const T* p, int64_t ld_p, int64_t rows, int64_t n, const T* r, int slot, const T* scale, T* best,
                      uint8_t* slots, int64_t ld);

  // out [rows, n], contiguous: h where slots says slot, else 0.
  void (*mask_slot)(const T* h, int64_t ld_h, const uint8_t* slots, int64_t ld, int64_t rows, int64_t n, int slot,
                    T* out);

  // logits[i, k] = scale[i] r[k] max_j (p[i, k] + x[i, 0] y0[j, k] + x[i, j] y1[j, k]), without tables in slot 0.
  void (*rotation_max_over_slots)(const T* p, int64_t ld_p, T* logits, uint8_t* slots, int64_t ld, int64_t rows,
                                  int64_t n, const Tables<T>& tables, const T* r, const T* scale);

  // The routing of such a block: h = scale G r, skipped if null; the tables' gradients dx [rows, slots] and dy
  // [slots, n], t[k] += sum over i of G logits, and moments[i] += sum over k of it. All are added to.
  void (*rotation_route_grad)(const T* grad, const T* logits, int64_t ld, const uint8_t* slots, int64_t rows, int64_t n,
                              const Tables<T>& tables, const T* r, const T* scale, T* h, int64_t ld_h, T* dx, T* dy0,
                              T* dy1, int64_t ld_dy, T* t, double* moments);

  const char* name;
};

// The table of the best instruction set that this processor has.
template <class T>
const Kernels<T>& kernels();

}  // namespace gistops
