// The dot products of dots.h for bfloat16, by the instruction of AVX512-BF16: two products per lane, summed in float32.
#pragma once
#include "simd.h"

#ifdef __AVX512F__
#include <immintrin.h>

// The library is compiled for AVX-512 without BF16; only processors that have it call these functions.
#define GISTOPS_BF16 __attribute__((target("avx512bf16")))

namespace {

// 32 elements, or n of them and zeros.
GISTOPS_BF16 GISTOPS_INLINE __m512bh load_bf16(const uint16_t* x, int64_t n) {
  const __mmask32 mask = n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
  return (__m512bh)_mm512_maskz_loadu_epi16(mask, x);
}

template <int ROWS, int COLS, bool SQUARES>
GISTOPS_BF16 GISTOPS_INLINE void dots_bf16_tile(const uint16_t* x, int64_t d, const uint16_t* y, float* squares,
                                                float* dots, int64_t ld_dots) {
  __m512 acc[ROWS][COLS > 0 ? COLS : 1] = {}, sq[ROWS] = {};
  for (int64_t e = 0; e < d; e += 32) {
    __m512bh xs[ROWS];
    for (int i = 0; i < ROWS; ++i) xs[i] = load_bf16(x + i * d + e, d - e);
    for (int j = 0; j < COLS; ++j) {
      const __m512bh ys = load_bf16(y + j * d + e, d - e);
      for (int i = 0; i < ROWS; ++i) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], xs[i], ys);
    }
    if constexpr (SQUARES)
      for (int i = 0; i < ROWS; ++i) sq[i] = _mm512_dpbf16_ps(sq[i], xs[i], xs[i]);
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int j = 0; j < COLS; ++j) dots[i * ld_dots + j] = _mm512_reduce_add_ps(acc[i][j]);
    if constexpr (SQUARES) squares[i] = _mm512_reduce_add_ps(sq[i]);
  }
}

template <int ROWS>
GISTOPS_BF16 void dots_bf16_rows(const uint16_t* x, int64_t d, const uint16_t* y, int64_t columns, float* squares,
                                 float* dots, int64_t ld) {
  switch (columns < 4 ? columns : 4) {
    case 0: return dots_bf16_tile<ROWS, 0, true>(x, d, y, squares, dots, ld);
    case 1: return dots_bf16_tile<ROWS, 1, true>(x, d, y, squares, dots, ld);
    case 2: return dots_bf16_tile<ROWS, 2, true>(x, d, y, squares, dots, ld);
    case 3: return dots_bf16_tile<ROWS, 3, true>(x, d, y, squares, dots, ld);
    default: dots_bf16_tile<ROWS, 4, true>(x, d, y, squares, dots, ld);
  }
  y += 4 * d, dots += 4, columns -= 4;
  for (; columns >= 4; y += 4 * d, dots += 4, columns -= 4) dots_bf16_tile<ROWS, 4, false>(x, d, y, nullptr, dots, ld);
  for (; columns > 0; y += d, ++dots, --columns) dots_bf16_tile<ROWS, 1, false>(x, d, y, nullptr, dots, ld);
}

GISTOPS_BF16 void dots_bf16(const uint16_t* x, int64_t rows, int64_t d, const uint16_t* y, int64_t columns,
                            float* squares, float* out, int64_t ld) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) dots_bf16_rows<4>(x + i * d, d, y, columns, squares + i, out + i * ld, ld);
  for (; i < rows; ++i) dots_bf16_rows<1>(x + i * d, d, y, columns, squares + i, out + i * ld, ld);
}

template <class T>
constexpr decltype(gistops::Kernels<T>::dots_bf16) kDotsBf16 = nullptr;
template <>
constexpr decltype(gistops::Kernels<float>::dots_bf16) kDotsBf16<float> = dots_bf16;

}  // namespace

#else

namespace {

template <class T>
constexpr decltype(gistops::Kernels<T>::dots_bf16) kDotsBf16 = nullptr;

}  // namespace

#endif
