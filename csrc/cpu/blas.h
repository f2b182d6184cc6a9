// Matrix products from the BLAS that this PyTorch was built with (MKL, OpenBLAS, Accelerate).
// Called inside PyTorch's thread pool, where those libraries run on the calling thread alone.
#pragma once
#include <cstdint>

extern "C" {
// Weak: a libtorch without them still loads this library, which then says that the backend cannot serve.
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                  const float*, const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*, double*,
                                  const int*);
}

namespace gistops::blas {

inline bool available() { return sgemm_ != nullptr && dgemm_ != nullptr; }

enum class Op : char { none = 'N', transposed = 'T' };

// Row-major c[rows, cols] = op(a) op(b) + beta c, over `inner`. Sizes are of blocks, so int holds them.
// BLAS is column-major, where a row-major matrix is its own transpose: c' = op(b)' op(a)'.
template <class T>
inline void gemm(Op op_a, Op op_b, int64_t rows, int64_t cols, int64_t inner, const T* a, int64_t lda, const T* b,
                 int64_t ldb, T beta, T* c, int64_t ldc) {
  if (rows == 0 || cols == 0) return;
  const char ta = static_cast<char>(op_a), tb = static_cast<char>(op_b);
  const int m = static_cast<int>(cols), n = static_cast<int>(rows), k = static_cast<int>(inner);
  const int la = static_cast<int>(lda), lb = static_cast<int>(ldb), lc = static_cast<int>(ldc);
  const T one = 1;
  if constexpr (sizeof(T) == sizeof(float)) {
    sgemm_(&tb, &ta, &m, &n, &k, &one, b, &lb, a, &la, &beta, c, &lc);
  } else {
    dgemm_(&tb, &ta, &m, &n, &k, &one, b, &lb, a, &la, &beta, c, &lc);
  }
}

}  // namespace gistops::blas
