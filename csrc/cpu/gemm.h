// Matrix products, all from PyTorch: its BLAS (MKL, OpenBLAS, Accelerate) or its oneDNN, whichever is faster here.
// Called inside PyTorch's thread pool, where both run on the calling thread alone.
//
// Measured, one thread, float32, 256 x 512 x 2048: on an AMD Zen 5 core oneDNN reaches 230 GFLOP/s, because it uses
// AVX-512, where MKL keeps to AVX2 on AMD's processors, 103 GFLOP/s. So the rule: oneDNN on AMD with AVX-512, BLAS
// elsewhere and for float64 and small products. GISTOPS_CPU_PRODUCTS=blas or onednn overrides it, to compare them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

extern "C" {
// Weak: a libtorch without them still loads this library, which then says that the backend cannot serve.
__attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*,
                                  const float*, const int*, const float*, const int*, const float*, float*, const int*);
__attribute__((weak)) void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                                  const double*, const int*, const double*, const int*, const double*, double*,
                                  const int*);
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

// c[a.height, b.width] = a b + beta c. Sizes are of blocks, so int holds them.
// BLAS is column-major, where a row-major matrix is its own transpose: c' = b' a'.
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

// a b through the dispatcher, as torch.compile's own linear layers call oneDNN.
inline torch::stable::Tensor onednn_product(const Matrix<float>& a, const Matrix<float>& b) {
  using torch::stable::Tensor;
  const auto tensor = [](const Matrix<float>& x) {
    const std::array<int64_t, 2> sizes{x.height(), x.width()};
    const std::array<int64_t, 2> strides{x.transposed ? 1 : x.ld, x.transposed ? x.ld : 1};
    return torch::stable::from_blob(const_cast<float*>(x.data), sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    torch::headeronly::ScalarType::Float);
  };
  // (X, W, bias, attr, scalars, algorithm) -> X W'
  std::array<StableIValue, 6> stack{
      torch::stable::detail::from(tensor(a)),
      torch::stable::detail::from(tensor(b.t())),
      torch::stable::detail::from(std::optional<Tensor>()),
      torch::stable::detail::from(std::string("none")),
      torch::stable::detail::from(std::vector<int64_t>()),
      torch::stable::detail::from(std::optional<std::string>()),
  };
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline bool choose_onednn() {
  const char* asked = std::getenv("GISTOPS_CPU_PRODUCTS");
  if (asked && std::strcmp(asked, "blas") == 0) return false;
  bool wanted = asked && std::strcmp(asked, "onednn") == 0;
#ifdef GISTOPS_X86
  __builtin_cpu_init();
  wanted |= __builtin_cpu_is("amd") && __builtin_cpu_supports("x86-64-v4");
#endif
  if (!wanted) return false;
  try {  // a PyTorch without oneDNN has no such operator
    const float one = 1;
    onednn_product({&one, 1, 1, 1}, {&one, 1, 1, 1});
    return true;
  } catch (...) {
    return false;
  }
}

inline bool use_onednn() {
  static const bool chosen = choose_onednn();
  return chosen;
}

template <class T>
bool worth_onednn(const Matrix<T>& a, const Matrix<T>& b) {
  // Its call costs some 10 us, a thousandth of a block's product. With gaps between the rows of b it is a hundred times
  // slower: it has no kernel for that but its reference.
  return sizeof(T) == sizeof(float) && b.ld == b.cols && a.height() * b.width() * a.width() >= (1 << 20) &&
         use_onednn();
}

// The product a b, wherever it was made: in c, or in memory of its own, held until this object goes.
template <class T>
class Product {
 public:
  Product(const Matrix<T>& a, const Matrix<T>& b, T* c, int64_t ldc) : data(c), ld(ldc) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (worth_onednn(a, b)) {
        own_ = onednn_product(a, b);
        data = static_cast<const T*>(own_->const_data_ptr()), ld = b.width();
        return;
      }
    }
    blas_product<T>(a, b, 0, c, ldc);
  }
  const T* data;
  int64_t ld;

 private:
  std::optional<torch::stable::Tensor> own_;
};

// c[a.height, b.width] += a b, c contiguous.
template <class T>
void add_product(const Matrix<T>& a, const Matrix<T>& b, T* c) {
  if (!worth_onednn(a, b)) return blas_product<T>(a, b, 1, c, b.width());
  const Product<T> product(a, b, nullptr, 0);
  for (int64_t i = 0; i < a.height() * b.width(); ++i) c[i] += product.data[i];
}

}  // namespace gistops
