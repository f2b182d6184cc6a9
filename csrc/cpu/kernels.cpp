// The vectorised inner loops, free of torch. Compiled once for each instruction set, with GISTOPS_ISA naming it
// (gistops/_build.py); the baseline copy also holds the choice between them.
#include "kernels.h"

#include <cmath>

#include "formats.h"
#include "simd.h"

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
  for (; i + R <= rows; i += R) dots_rows<T, R>(x + i * d, d, y, columns, squares ? squares + i : nullptr, out + i * ld, ld);
  for (; i < rows; ++i) dots_rows<T, 1>(x + i * d, d, y, columns, squares ? squares + i : nullptr, out + i * ld, ld);
}

// R rows at once share the loads of r.
template <class T, int R>
GISTOPS_INLINE void pool_rows(T* logits, int64_t ld, uint8_t* slots, int64_t ld_slots, int64_t n, const T* q, const T* r,
                              int64_t ld_r, int64_t m_slots, const T* scale) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  over<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
    V p[R], best[R];
    I slot[R] = {};
    const V r0 = load<V>(r + k, lanes);
    for (int i = 0; i < R; ++i) {
      p[i] = load<V>(logits + i * ld + k, lanes);
      best[i] = p[i] * r0;
    }
    for (int64_t j = 1; j < m_slots; ++j) {
      const V rj = load<V>(r + j * ld_r + k, lanes);
      const I index = I{} + static_cast<int>(j);
      for (int i = 0; i < R; ++i) {
        const V score = (p[i] + q[i * m_slots + j]) * rj;
        const I wins = score > best[i];
        best[i] = wins ? score : best[i];
        slot[i] = wins ? index : slot[i];
      }
    }
    for (int i = 0; i < R; ++i) {
      store(logits + i * ld + k, best[i] * scale[i], lanes);
      store(slots + i * ld_slots + k, __builtin_convertvector(slot[i], Bytes), lanes);
    }
  });
}

template <class T>
void pool(T* logits, int64_t ld, uint8_t* slots, int64_t ld_slots, int64_t rows, int64_t n, const T* q, const T* r,
          int64_t ld_r, int64_t m_slots, const T* scale) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    pool_rows<T, 4>(logits + i * ld, ld, slots + i * ld_slots, ld_slots, n, q + i * m_slots, r, ld_r, m_slots, scale + i);
  for (; i < rows; ++i)
    pool_rows<T, 1>(logits + i * ld, ld, slots + i * ld_slots, ld_slots, n, q + i * m_slots, r, ld_r, m_slots, scale + i);
}

template <class T>
void route(const T* grad, const T* logits, int64_t ld, const uint8_t* slots, int64_t rows, int64_t n, const T* r,
           int64_t ld_r, int64_t m_slots, const T* scale, T* h, int64_t ld_h, T* s, T* t, int64_t ld_t, T* tau) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  V total = {};
  for (int64_t i = 0; i < rows; ++i) {
    V shares[256];
    if (s)
      for (int64_t j = 0; j < m_slots; ++j) shares[j] = V{};
    over<Simd<T>::N>(n, [&](int64_t k, int lanes) GISTOPS_INLINE_LAMBDA {
      const V g = load<V>(grad + i * ld + k, lanes);
      const V moment = g * load<V>(logits + i * ld + k, lanes);
      const I slot = __builtin_convertvector(load<Bytes>(slots + i * ld + k, lanes), I);
      V chosen = load<V>(r + k, lanes);
      for (int64_t j = 1; j < m_slots; ++j) chosen = slot == static_cast<int>(j) ? load<V>(r + j * ld_r + k, lanes) : chosen;
      const V weight = g * chosen * scale[i];
      if (h) store(h + i * ld_h + k, weight, lanes);
      if (tau) total += moment;
      if (s)
        for (int64_t j = 1; j < m_slots; ++j) shares[j] += slot == static_cast<int>(j) ? weight : V{};
      if (t)
        for (int64_t j = 0; j < m_slots; ++j) {
          T* at = t + j * ld_t + k;
          store(at, load<V>(at, lanes) + (slot == static_cast<int>(j) ? moment : V{}), lanes);
        }
    });
    if (s)
      for (int64_t j = 1; j < m_slots; ++j) s[i * m_slots + j] += sum<T>(shares[j]);
  }
  if (tau) *tau += sum<T>(total);
}

template <class T>
void correct(const T* w, int64_t rows, int64_t d, const T* delta, int64_t m_slots, const T* t, int64_t ld_t, T* dw,
             T* dd) {
  using V = typename Simd<T>::V;
  constexpr int64_t kStrip = 512;  // of delta and dd, so that m strips of both stay in L1 while the rows pass
  for (int64_t begin = 0; begin < d; begin += kStrip) {
    const int64_t width = d - begin < kStrip ? d - begin : kStrip;
    for (int64_t k = 0; k < rows; ++k) {
      over<Simd<T>::N>(width, [&](int64_t offset, int lanes) GISTOPS_INLINE_LAMBDA {
        const int64_t e = begin + offset;
        const V center = load<V>(w + k * d + e, lanes);
        V total = center * t[k];
        for (int64_t j = 1; j < m_slots; ++j) {
          const V pull = (center + load<V>(delta + (j - 1) * d + e, lanes)) * t[j * ld_t + k];
          total += pull;
          if (dd) store(dd + (j - 1) * d + e, load<V>(dd + (j - 1) * d + e, lanes) - pull, lanes);
        }
        if (dw) store(dw + k * d + e, load<V>(dw + k * d + e, lanes) - total, lanes);
      });
    }
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
constexpr gistops::Kernels<T> kTable = {load_format<T>, store_format<T>, dots<T>,    pool<T>,
                                        route<T>,       correct<T>,      project<T>, GISTOPS_STRING(GISTOPS_ISA)};

}  // namespace

namespace gistops {

#define GISTOPS_TABLE(isa, T) GISTOPS_JOIN(GISTOPS_JOIN(table_, isa), _##T)
extern const Kernels<float>* const GISTOPS_TABLE(GISTOPS_ISA, float) = &kTable<float>;
extern const Kernels<double>* const GISTOPS_TABLE(GISTOPS_ISA, double) = &kTable<double>;

}  // namespace gistops
