// Dot products of a few long vectors with many, and their squared norms.
#pragma once
#include "simd.h"

namespace {

// One tile of dots(): ROWS x COLS sums in registers, so that a load of x serves COLS products and a load of y serves
// ROWS. Neither the order of a sum nor its rounding depends on the tile, so that equal displacements give equal bits,
// and ties stay ties.
template <class T, int ROWS, int COLS, bool SQUARES>
GISTOPS_INLINE void dots_tile(const T* x, int64_t d, const T* y, T* squares, T* dots, int64_t ld_dots) {
  using V = typename Simd<T>::V;
  V acc[ROWS][COLS > 0 ? COLS : 1] = {}, sq[ROWS] = {};
  for_each_vector<Simd<T>::N>(d, [&](int64_t e, int n) GISTOPS_INLINE_LAMBDA {
    V xs[ROWS];
    for (int i = 0; i < ROWS; ++i) xs[i] = load<V>(x + i * d + e, n);
    for (int j = 0; j < COLS; ++j) {
      const V ys = load<V>(y + j * d + e, n);
      for (int i = 0; i < ROWS; ++i) acc[i][j] = multiply_add(xs[i], ys, acc[i][j]);
    }
    if constexpr (SQUARES)
      for (int i = 0; i < ROWS; ++i) sq[i] = multiply_add(xs[i], xs[i], sq[i]);
  });
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < COLS; ++j) dots[i * ld_dots + j] = lane_sum<T>(acc[i][j]);
    if constexpr (SQUARES) squares[i] = lane_sum<T>(sq[i]);
  }
}

template <class T, int ROWS>
void dots_rows(const T* x, int64_t d, const T* y, int64_t columns, T* squares, T* dots, int64_t ld) {
  if (squares) {  // together with the first columns: for m <= 4 one pass over x serves both
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
  constexpr int R = GISTOPS_VECTOR_REGISTERS == 32 ? 4 : 2;  // for 4 x 4 sums
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    dots_rows<T, R>(x + i * d, d, y, columns, squares ? squares + i : nullptr, out + i * ld, ld);
  for (; i < rows; ++i) dots_rows<T, 1>(x + i * d, d, y, columns, squares ? squares + i : nullptr, out + i * ld, ld);
}

}  // namespace
