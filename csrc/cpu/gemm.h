// Matrix products from PyTorch: its BLAS (MKL, OpenBLAS, Accelerate) or its oneDNN, whichever is faster on this
// processor. Called inside PyTorch's thread pool, where both run on the calling thread alone.
//
// The rule: oneDNN on AMD processors with AVX-512; BLAS elsewhere, for float64 and for small products. Measured with
// one thread, float32, 256 x 512 x 2048, on an AMD Zen 5 core: oneDNN uses AVX-512 and reaches 230 GFLOP/s; MKL uses
// only AVX2 on AMD processors and reaches 103 GFLOP/s. GISTOPS_CPU_PRODUCTS=blas or onednn overrides the rule.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "../torch_calls.h"
#include "half_product.h"

extern "C" {
// Weak: with a libtorch that lacks these functions, this library still loads, and the ops raise an error.
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                  const float*, const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*, double*,
                                  const int*);
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(AtenTensorHandle, AtenTensorHandle,
                                                                      AtenTensorHandle*, const char*, const double**,
                                                                      int64_t, const char**, AtenTensorHandle*);
}

namespace gistops {

inline bool blas_available() { return sgemm_ != nullptr && dgemm_ != nullptr; }

// A row-major matrix in memory, or the transpose of one.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, cols, ld;  // as stored
  bool transposed = false;
  Matrix t() const { return {data, rows, cols, ld, !transposed}; }
  int64_t height() const { return transposed ? cols : rows; }
  int64_t width() const { return transposed ? rows : cols; }
};

// c [a.height, b.width] = a b + beta c. The sizes of blocks fit into int. BLAS is column-major and sees the transpose
// of each row-major matrix, so that it computes c' = b' a'.
template <class T>
void blas_product(const Matrix<T>& a, const Matrix<T>& b, T beta, T* c, int64_t ldc) {
  const char ta = a.transposed ? 'T' : 'N', tb = b.transposed ? 'T' : 'N';
  const int m = static_cast<int>(b.width()), n = static_cast<int>(a.height()), k = static_cast<int>(a.width());
  const int la = static_cast<int>(a.ld), lb = static_cast<int>(b.ld), lc = static_cast<int>(ldc);
  if (m == 0 || n == 0) return;
  const T one = 1;
  if constexpr (sizeof(T) == sizeof(float)) {
    sgemm_(&tb, &ta, &m, &n, &k, &one, b.data, &lb, a.data, &la, &beta, c, &lc);
  } else {
    dgemm_(&tb, &ta, &m, &n, &k, &one, b.data, &lb, a.data, &la, &beta, c, &lc);
  }
}

// a b by oneDNN, by the function of PyTorch's C interface that compiled models call for linear layers. (Each call of
// mkldnn::_linear_pointwise through the stable ABI's dispatcher would leak its string argument, 48 bytes: torch 2.11
// to 2.13.)
inline torch::stable::Tensor onednn_product(const Matrix<float>& a, const Matrix<float>& b) {
  using torch::stable::Tensor;
  const auto tensor = [](const Matrix<float>& x) {
    const std::array<int64_t, 2> sizes{x.height(), x.width()};
    const std::array<int64_t, 2> strides{x.transposed ? 1 : x.ld, x.transposed ? x.ld : 1};
    return torch::stable::from_blob(const_cast<float*>(x.data), sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    torch::headeronly::ScalarType::Float);
  };
  const Tensor x = tensor(a), w = tensor(b.t());
  return explained("a matrix product", [&] {
    AtenTensorHandle product = nullptr;
    // (X, W, bias, attr, scalars, algorithm) -> X W'
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu__linear_pointwise(x.get(), w.get(), nullptr, "none", nullptr, 0, nullptr, &product));
    return Tensor(product);
  });
}

// The library of the float32 products.
inline Choice choose_onednn() {
  const char* asked = std::getenv("GISTOPS_CPU_PRODUCTS");
  if (asked && std::strcmp(asked, "blas") == 0) return {false, "BLAS, as GISTOPS_CPU_PRODUCTS asks"};
  const bool wanted = asked && std::strcmp(asked, "onednn") == 0;
  bool faster = false;
#ifdef GISTOPS_X86
  __builtin_cpu_init();
  faster = __builtin_cpu_is("amd") && __builtin_cpu_supports("x86-64-v4");
#endif
  if (!wanted && !faster) return {false, "BLAS, the rule for all processors but AMD's with AVX-512"};
  if (!aoti_torch_cpu__linear_pointwise) return {false, "BLAS: this PyTorch exports no linear_pointwise"};
  try {
    const float one = 1;
    onednn_product({&one, 1, 1, 1}, {&one, 1, 1, 1});
  } catch (...) {
    return {false, "BLAS: this PyTorch has no oneDNN"};
  }
  return {true, wanted ? "oneDNN, as GISTOPS_CPU_PRODUCTS asks"
                       : "oneDNN: on AMD processors with AVX-512, MKL uses AVX2 alone"};
}

inline const Choice& float32_choice() {
  static const Choice choice = choose_onednn();
  return choice;
}

inline bool use_onednn() { return float32_choice().chosen; }

template <class T>
bool prefer_onednn(const Matrix<T>& a, const Matrix<T>& b) {
  // The call costs about 10 us, a thousandth of the product of a block. With gaps between the rows of b, oneDNN falls
  // back to its reference kernel, which is a hundred times slower.
  return sizeof(T) == sizeof(float) && b.ld == b.cols && a.height() * b.width() * a.width() >= (1 << 20) &&
         use_onednn();
}

// The product a b: in c, or in memory that this object owns.
template <class T>
class Product {
 public:
  Product(const Matrix<T>& a, const Matrix<T>& b, T* c, int64_t ldc) : data(c), ld(ldc) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (prefer_onednn(a, b)) {
        owned_ = onednn_product(a, b);
        data = static_cast<const T*>(owned_->const_data_ptr()), ld = b.width();
        return;
      }
    }
    blas_product<T>(a, b, 0, c, ldc);
  }
  const T* data;
  int64_t ld;

 private:
  std::optional<torch::stable::Tensor> owned_;
};

// c [a.height, b.width] += a b, with contiguous c.
template <class T>
void add_product(const Matrix<T>& a, const Matrix<T>& b, T* c) {
  if (!prefer_onednn(a, b)) return blas_product<T>(a, b, 1, c, b.width());
  const Product<T> product(a, b, nullptr, 0);
  for (int64_t i = 0; i < a.height() * b.width(); ++i) c[i] += product.data[i];
}

}  // namespace gistops
