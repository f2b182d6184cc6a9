// Other layouts of a matrix, for the operands and results of products in half precision (../half_product.h).
#pragma once
#include <cstdint>
#include <utility>

#include "simd.h"

namespace {

// The low (HIGH = 0) or high halves of a and b, element by element in turn.
template <int HIGH, class T>
GISTOPS_INLINE typename Simd<T>::V interleaved(typename Simd<T>::V a, typename Simd<T>::V b) {
  constexpr int N = Simd<T>::N;
#ifdef __clang__
  const auto shuffle = [&]<int... I>(std::integer_sequence<int, I...>) GISTOPS_INLINE_LAMBDA {
    return __builtin_shufflevector(a, b, (HIGH * N / 2 + I / 2 + I % 2 * N)...);
  };
  return shuffle(std::make_integer_sequence<int, N>());
#else
  typename Simd<T>::I from;
  for (int i = 0; i < N; ++i) from[i] = HIGH * N / 2 + i / 2 + i % 2 * N;
  return __builtin_shuffle(a, b, from);
#endif
}

// out[c, r] = x[r, c] for r < rows <= N and c < cols <= N. Interleaving the rows i and i + N / 2 shuffles the elements
// of the tile perfectly; after log2(N) times it is transposed.
template <class T>
GISTOPS_INLINE void transpose_tile(const T* x, int rows, int cols, int64_t ld, T* out, int64_t ld_out) {
  using V = typename Simd<T>::V;
  constexpr int N = Simd<T>::N;
  V tile[N], next[N];
  for (int i = 0; i < N; ++i) tile[i] = i < rows ? load<V>(x + i * ld, cols) : V{};
  for (int width = 1; width < N; width *= 2) {
    for (int i = 0; i < N / 2; ++i) {
      next[2 * i] = interleaved<0, T>(tile[i], tile[i + N / 2]);
      next[2 * i + 1] = interleaved<1, T>(tile[i], tile[i + N / 2]);
    }
    for (int i = 0; i < N; ++i) tile[i] = next[i];
  }
  for (int i = 0; i < cols; ++i) store(out + i * ld_out, tile[i], rows);
}

template <class T>
void transpose(const T* x, int64_t rows, int64_t cols, int64_t ld, T* out, int64_t ld_out) {
  constexpr int N = Simd<T>::N;
  for_each_vector<N>(rows, [&](int64_t r, int height) GISTOPS_INLINE_LAMBDA {
    for_each_vector<N>(cols, [&](int64_t c, int width) GISTOPS_INLINE_LAMBDA {
      transpose_tile(x + r * ld + c, height, width, ld, out + c * ld_out + r, ld_out);
    });
  });
}

void pair_rows(const uint16_t* x, int64_t rows, int64_t cols, uint32_t* out) {
  for (int64_t r = 0; r < rows; r += 2, out += cols) {
    const uint16_t *even = x + r * cols, *odd = even + cols;
    if (r + 1 < rows) {
      for (int64_t c = 0; c < cols; ++c) out[c] = even[c] | static_cast<uint32_t>(odd[c]) << 16;
    } else {
      for (int64_t c = 0; c < cols; ++c) out[c] = even[c];
    }
  }
}

}  // namespace
