// The vectorized inner loops. This folder is compiled once per instruction set, with GISTOPS_ISA as its name
// (gistops/_build.py). It includes no header of torch, and all it defines is in an unnamed namespace or named after the
// instruction set, so that the linker cannot use code for a newer processor in place of code for an older one.
#include "kernels.h"

#include "convert.h"
#include "rotation.h"
#include "simd.h"
#include "softmax.h"
#include "subcenter.h"

#define GISTOPS_JOIN_(a, b) a##b
#define GISTOPS_JOIN(a, b) GISTOPS_JOIN_(a, b)
#define GISTOPS_STRING_(a) #a
#define GISTOPS_STRING(a) GISTOPS_STRING_(a)

namespace {

// One tile of dots(): ROWS x COLS sums in registers, so that a load of x serves COLS products and one of y serves ROWS.
// Each sum adds in the same order whatever its tile, so that equal displacements give equal bits, and ties stay ties.
template <class T, int ROWS, int COLS, bool SQUARES>
GISTOPS_INLINE void dots_tile(const T* x, int64_t d, const T* y, T* squares, T* dots, int64_t ld_dots) {
  using V = typename Simd<T>::V;
  V acc[ROWS][COLS > 0 ? COLS : 1] = {}, sq[ROWS] = {};
  over<Simd<T>::N>(d, [&](int64_t e, int n) GISTOPS_INLINE_LAMBDA {
    V xs[ROWS];
    for (int i = 0; i < ROWS; ++i) xs[i] = load<V>(x + i * d + e, n);
    for (int j = 0; j < COLS; ++j) {
      const V ys = load<V>(y + j * d + e, n);
      for (int i = 0; i < ROWS; ++i) acc[i][j] += xs[i] * ys;
    }
    if constexpr (SQUARES)
      for (int i = 0; i < ROWS; ++i) sq[i] += xs[i] * xs[i];
  });
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < COLS; ++j) dots[i * ld_dots + j] = sum<T>(acc[i][j]);
    if constexpr (SQUARES) squares[i] = sum<T>(sq[i]);
  }
}

template <class T, int ROWS>
void dots_rows(const T* x, int64_t d, const T* y, int64_t columns, T* squares, T* dots, int64_t ld) {
  if (squares) {  // with the first columns, so that one pass over x serves both in the common m <= 4
    switch (columns < 4 ? columns : 4) {
      case 0: return dots_tile<T, ROWS, 0, true>(x, d, y, squares, dots, ld);
      case 1: return dots_tile<T, ROWS, 1, true>(x, d, y, squares, dots, ld);
      case 2: return dots_tile<T, ROWS, 2, true>(x, d, y, squares, dots, ld);
      case 3: return dots_tile<T, ROWS, 3, true>(x, d, y, squares, dots, ld);
      default: dots_tile<T, ROWS, 4, true>(x, d, y, squares, dots, ld);
    }
    y += 4 * d, dots += 4, columns -= 4;
  }
  for (; columns >= 4; y += 4 * d, dots += 4, columns -= 4) dots_tile<T, ROWS, 4, false>(x, d, y, nullptr, dots, ld);
  for (; columns > 0; y += d, ++dots, --columns) dots_tile<T, ROWS, 1, false>(x, d, y, nullptr, dots, ld);
}

template <class T>
void dots(const T* x, int64_t rows, int64_t d, const T* y, int64_t columns, T* squares, T* out, int64_t ld) {
  constexpr int R = GISTOPS_VECTOR_BYTES == 64 ? 4 : 2;  // 4 x 4 sums want 32 registers
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    dots_rows<T, R>(x + i * d, d, y, columns, squares ? squares + i : nullptr, out + i * ld, ld);
  for (; i < rows; ++i) dots_rows<T, 1>(x + i * d, d, y, columns, squares ? squares + i : nullptr, out + i * ld, ld);
}

// R rows at once share the loads of r.
template <class T, int R>
GISTOPS_INLINE void pool_rows(const T* p, int64_t ld_p, T* logits, uint8_t* slots, int64_t ld, int64_t n, const T* q,
                              const T* r, int64_t ld_r, int64_t m_slots, const T* scale) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  over<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
    V product[R], best[R];
    I slot[R] = {};
    const V r0 = load<V>(r + k, lanes);
    for (int i = 0; i < R; ++i) {
      product[i] = load<V>(p + i * ld_p + k, lanes);
      best[i] = product[i] * r0;
    }
    for (int64_t j = 1; j < m_slots; ++j) {
      const V rj = load<V>(r + j * ld_r + k, lanes);
      const I index = I{} + static_cast<int>(j);
      for (int i = 0; i < R; ++i) {
        const V score = (product[i] + q[i * m_slots + j]) * rj;
        const I wins = score > best[i];
        best[i] = wins ? score : best[i];
        slot[i] = wins ? index : slot[i];
      }
    }
    for (int i = 0; i < R; ++i) {
      store(logits + i * ld + k, best[i] * scale[i], lanes);
      store(slots + i * ld + k, __builtin_convertvector(slot[i], Bytes), lanes);
    }
  });
}

template <class T>
void pool(const T* p, int64_t ld_p, T* logits, uint8_t* slots, int64_t ld, int64_t rows, int64_t n, const T* q,
          const T* r, int64_t ld_r, int64_t m_slots, const T* scale) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    pool_rows<T, 4>(p + i * ld_p, ld_p, logits + i * ld, slots + i * ld, ld, n, q + i * m_slots, r, ld_r, m_slots,
                    scale + i);
  for (; i < rows; ++i)
    pool_rows<T, 1>(p + i * ld_p, ld_p, logits + i * ld, slots + i * ld, ld, n, q + i * m_slots, r, ld_r, m_slots,
                    scale + i);
}

// R rows at once share the loads of r, and the sums t: one load and store for R rows.
template <class T, int R, bool SHARES, bool MOMENTS>
GISTOPS_INLINE void route_rows(const T* grad, const T* logits, int64_t ld, const uint8_t* slots, int64_t n, const T* r,
                               int64_t ld_r, int64_t m_slots, const T* scale, T* h, int64_t ld_h, T* s, T* t,
                               int64_t ld_t, typename Simd<T>::V& total) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  V shares[SHARES ? 256 : 1][R];
  if constexpr (SHARES)
    for (int64_t j = 1; j < m_slots; ++j)
      for (int i = 0; i < R; ++i) shares[j][i] = V{};
  over<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
    V g[R], moment[R], chosen[R];
    I slot[R];
    const V r0 = load<V>(r + k, lanes);
    for (int i = 0; i < R; ++i) {
      g[i] = load<V>(grad + i * ld + k, lanes);
      moment[i] = g[i] * load<V>(logits + i * ld + k, lanes);
      total += moment[i];
      slot[i] = __builtin_convertvector(load<Bytes>(slots + i * ld + k, lanes), I);
      chosen[i] = r0;
    }
    for (int64_t j = 1; j < m_slots; ++j) {
      const V rj = load<V>(r + j * ld_r + k, lanes);
      for (int i = 0; i < R; ++i) chosen[i] = slot[i] == static_cast<int>(j) ? rj : chosen[i];
    }
    for (int i = 0; i < R; ++i) {
      chosen[i] = g[i] * chosen[i] * scale[i];
      if (h) store(h + i * ld_h + k, chosen[i], lanes);
    }
    for (int64_t j = 0; j < m_slots; ++j) {
      V sum = {};
      if constexpr (MOMENTS) sum = load<V>(t + j * ld_t + k, lanes);
      for (int i = 0; i < R; ++i) {
        const I here = slot[i] == static_cast<int>(j);
        if constexpr (MOMENTS) sum += here ? moment[i] : V{};
        if constexpr (SHARES) shares[j][i] += here ? chosen[i] : V{};
      }
      if constexpr (MOMENTS) store(t + j * ld_t + k, sum, lanes);
    }
  });
  if constexpr (SHARES)
    for (int i = 0; i < R; ++i)
      for (int64_t j = 1; j < m_slots; ++j) s[i * m_slots + j] += sum<T>(shares[j][i]);
}

template <class T, bool SHARES, bool MOMENTS>
void route_all(const T* grad, const T* logits, int64_t ld, const uint8_t* slots, int64_t rows, int64_t n, const T* r,
               int64_t ld_r, int64_t m_slots, const T* scale, T* h, int64_t ld_h, T* s, T* t, int64_t ld_t,
               double* tau) {
  constexpr int R = 2;
  int64_t i = 0;
  const auto rows_from = [&]<int COUNT>() GISTOPS_INLINE_LAMBDA {
    typename Simd<T>::V total = {};
    route_rows<T, COUNT, SHARES, MOMENTS>(grad + i * ld, logits + i * ld, ld, slots + i * ld, n, r, ld_r, m_slots,
                                          scale + i, h ? h + i * ld_h : nullptr, ld_h, s ? s + i * m_slots : nullptr, t,
                                          ld_t, total);
    if (tau) *tau += sum<T>(total);
  };
  for (; i + R <= rows; i += R) rows_from.template operator()<R>();
  for (; i < rows; ++i) rows_from.template operator()<1>();
}

template <class T>
void route(const T* grad, const T* logits, int64_t ld, const uint8_t* slots, int64_t rows, int64_t n, const T* r,
           int64_t ld_r, int64_t m_slots, const T* scale, T* h, int64_t ld_h, T* s, T* t, int64_t ld_t, double* tau) {
  const auto run = s && t ? route_all<T, true, true>
                   : s    ? route_all<T, true, false>
                   : t    ? route_all<T, false, true>
                          : route_all<T, false, false>;
  run(grad, logits, ld, slots, rows, n, r, ld_r, m_slots, scale, h, ld_h, s, t, ld_t, tau);
}

// R rows at once share the loads of delta, and the sums dd.
template <class T, int R>
GISTOPS_INLINE void correct_rows(const T* w, int64_t width, int64_t d, const T* delta, int64_t m_slots, const T* t,
                                 int64_t ld_t, const T* hf, T* dw, T* dd) {
  using V = typename Simd<T>::V;
  over<Simd<T>::N>(width, [&](int64_t e, int lanes) GISTOPS_INLINE_LAMBDA {
    V center[R], total[R];
    for (int i = 0; i < R; ++i) {
      center[i] = load<V>(w + i * d + e, lanes);
      total[i] = center[i] * t[i];
    }
    for (int64_t j = 1; j < m_slots; ++j) {
      const V shift = load<V>(delta + (j - 1) * d + e, lanes);
      V sum = {};
      for (int i = 0; i < R; ++i) {
        const V pull = (center[i] + shift) * t[j * ld_t + i];
        total[i] += pull;
        sum += pull;
      }
      if (dd) store(dd + (j - 1) * d + e, load<V>(dd + (j - 1) * d + e, lanes) - sum, lanes);
    }
    if (dw)
      for (int i = 0; i < R; ++i) store(dw + i * d + e, load<V>(hf + i * d + e, lanes) - total[i], lanes);
  });
}

template <class T>
void correct(const T* w, int64_t rows, int64_t d, const T* delta, int64_t m_slots, const T* t, int64_t ld_t,
             const T* hf, T* dw, T* dd) {
  constexpr int R = 4;
  constexpr int64_t kStrip = 512;  // of delta and dd, so that m strips of both stay in L1 while the rows pass
  for (int64_t e = 0; e < d; e += kStrip) {
    const int64_t width = d - e < kStrip ? d - e : kStrip;
    const auto rows_from = [&]<int COUNT>(int64_t k) GISTOPS_INLINE_LAMBDA {
      correct_rows<T, COUNT>(w + k * d + e, width, d, delta + e, m_slots, t + k, ld_t, dw ? hf + k * d + e : nullptr,
                             dw ? dw + k * d + e : nullptr, dd ? dd + e : nullptr);
    };
    int64_t k = 0;
    for (; k + R <= rows; k += R) rows_from.template operator()<R>(k);
    for (; k < rows; ++k) rows_from.template operator()<1>(k);
  }
}

template <class T>
void project(T* g, const T* f, int64_t rows, int64_t d, const T* rnorm) {
  using V = typename Simd<T>::V;
  for (int64_t i = 0; i < rows; ++i) {
    if (rnorm[i] >= static_cast<T>(1 / gistops::kMinNorm)) continue;  // the clamp is flat
    V acc = {};
    over<Simd<T>::N>(d, [&](int64_t e, int n) GISTOPS_INLINE_LAMBDA {
      acc += load<V>(g + i * d + e, n) * (load<V>(f + i * d + e, n) * rnorm[i]);
    });
    const T along = sum<T>(acc) * rnorm[i];
    over<Simd<T>::N>(d, [&](int64_t e, int n) GISTOPS_INLINE_LAMBDA {
      store(g + i * d + e, load<V>(g + i * d + e, n) - load<V>(f + i * d + e, n) * along, n);
    });
  }
}

template <class T>
constexpr gistops::Kernels<T> kTable = {
    load_format<T>, store_format<T>, dots<T>,        pool<T>,         route<T>,
    correct<T>,     project<T>,      log_sums<T>,    softmax<T>,      above<T>,
    compete<T>,     select<T>,       pool_tables<T>, route_tables<T>, GISTOPS_STRING(GISTOPS_ISA)};

}  // namespace

namespace gistops {

#define GISTOPS_TABLE(isa, T) GISTOPS_JOIN(GISTOPS_JOIN(table_, isa), _##T)
extern const Kernels<float>* const GISTOPS_TABLE(GISTOPS_ISA, float) = &kTable<float>;
extern const Kernels<double>* const GISTOPS_TABLE(GISTOPS_ISA, double) = &kTable<double>;

}  // namespace gistops
