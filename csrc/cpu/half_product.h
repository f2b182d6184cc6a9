// Matrix products in half precision with sums in float32, on the units that a processor has for them: PyTorch's
// brgemm, which calls a microkernel of oneDNN. It is not part of PyTorch's stable interface: each format is used only
// if a product of known result is right.
//
// The rule: bfloat16 on processors with AVX512-BF16 or AMX; float16 on those with AMX-FP16, the only units that sum
// products of float16 in float32. GISTOPS_CPU_PRODUCTS=blas and an older instruction set (dispatch.cpp) disable both.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "isa/kernels.h"

namespace c10 {
struct BFloat16;
struct Half;
enum class ScalarType : int8_t;
}  // namespace c10

namespace at::native::cpublas {
// c [m, n] = a b, or += a b. a is [m, k] with row stride lda; b holds [k / 2, n] pairs of consecutive rows.
// Weak: with a libtorch that lacks these functions, the products are computed in float32.
__attribute__((weak)) void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                                  const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool pairs);
__attribute__((weak)) void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                                  const c10::Half* a, const c10::Half* b, float* c, bool pairs);
__attribute__((weak)) void brgemm_release(bool pairs);
__attribute__((weak)) bool could_pack(c10::ScalarType dtype);  // true for float16 if there is AMX-FP16
}  // namespace at::native::cpublas

namespace gistops {

// A way to compute, chosen or not, and why.
struct Choice {
  bool chosen;
  const char* why;
};

// A matrix [2 rows, cols] in half precision whose rows 2i and 2i + 1 are interleaved: element c of row i is the pair of
// their elements c. ld is in pairs.
struct Pairs {
  const uint32_t* data;
  int64_t rows, cols, ld;
};

// True until the end of this thread's work if it has used the units, whose state must then be released.
inline thread_local bool half_units_in_use = false;

inline void release_half_units() {
  if (half_units_in_use) at::native::cpublas::brgemm_release(true);
  half_units_in_use = false;
}

// c [m, b.cols] = a b, or += a b if `add`. a [m, 2 b.rows] is in `format`, with row stride lda.
inline void half_product(Format format, const void* a, int64_t m, int64_t lda, const Pairs& b, float* c, int64_t ldc,
                         bool add) {
  constexpr int64_t kColumns = 256;  // so many columns of b and c stay in L2
  half_units_in_use = true;
  for (int64_t j = 0; j < b.cols; j += kColumns) {
    const int64_t n = std::min(kColumns, b.cols - j);
    if (format == Format::bf16) {
      at::native::cpublas::brgemm(m, n, 2 * b.rows, lda, b.ld, ldc, add, static_cast<const c10::BFloat16*>(a),
                                  reinterpret_cast<const c10::BFloat16*>(b.data + j), c + j, true);
    } else {
      at::native::cpublas::brgemm(m, n, 2 * b.rows, lda, b.ld, ldc, add, static_cast<const c10::Half*>(a),
                                  reinterpret_cast<const c10::Half*>(b.data + j), c + j, true);
    }
  }
}

// True if brgemm is there, takes operands in this layout and has not been disabled (torch.backends.mkldnn).
inline bool half_product_is_right(Format format) {
  constexpr int kSize = 16;
  const bool bf16 = format == Format::bf16;
  const uint16_t one = bf16 ? 0x3f80 : 0x3c00, two = bf16 ? 0x4000 : 0x4000, half = bf16 ? 0x3f00 : 0x3800;
  uint16_t a[kSize][4];  // rows 1 2 .5 1, but row 3: 2 2 .5 1
  uint32_t b[2][kSize];  // columns 1 2 .5 .5, but column 5: 1 2 2 .5
  float c[kSize][kSize];
  const auto pair = [](uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; };
  for (int i = 0; i < kSize; ++i) {
    a[i][0] = i == 3 ? two : one, a[i][1] = two, a[i][2] = half, a[i][3] = one;
    b[0][i] = pair(one, two), b[1][i] = pair(i == 5 ? two : half, half);
  }
  try {
    half_product(format, a, kSize, 4, {b[0], 2, kSize, kSize}, c[0], kSize, false);
    release_half_units();
  } catch (...) {
    half_units_in_use = false;
    return false;
  }
  for (int i = 0; i < kSize; ++i)
    for (int j = 0; j < kSize; ++j)
      if (c[i][j] != (i == 3 ? 6.0f : 5.0f) + (j == 5 ? 1.0f : 0.25f) + 0.5f) return false;
  return true;
}

// Products of matrices in this format: on the units, or in float32.
inline Choice choose_half_units(Format format) {
  using namespace at::native::cpublas;
  using Bf16 = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::BFloat16*,
                        const c10::BFloat16*, float*, bool);
  using Half = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::Half*, const c10::Half*,
                        float*, bool);
  const bool bf16 = format == Format::bf16;
  const char* asked = std::getenv("GISTOPS_CPU_PRODUCTS");
  if (asked && std::strcmp(asked, "blas") == 0) return {false, "in float32, as GISTOPS_CPU_PRODUCTS asks"};
  if (std::strcmp(kernels<float>().name, "v4") != 0)
    return {false, "in float32: no AVX-512, or an older set is asked for"};
  if (!static_cast<Bf16>(brgemm) || !static_cast<Half>(brgemm) || !brgemm_release || !could_pack)
    return {false, "in float32: this PyTorch exports no brgemm"};
  bool supported = false;
#ifdef GISTOPS_X86
  constexpr auto kHalf = static_cast<c10::ScalarType>(5);
  __builtin_cpu_init();
  supported = bf16 ? __builtin_cpu_supports("avx512bf16") : could_pack(kHalf);
#endif
  if (!supported)
    return {false,
            bf16 ? "in float32: this processor has no AVX512-BF16" : "in float32: this processor has no AMX-FP16"};
  if (!half_product_is_right(format))
    return {false, "in float32: PyTorch's oneDNN is disabled, or takes another layout"};
  return {true, bf16 ? "by oneDNN on AVX512-BF16 or AMX" : "by oneDNN on AMX-FP16"};
}

inline const Choice& half_choice(Format format) {
  static const Choice bf16 = choose_half_units(Format::bf16), f16 = choose_half_units(Format::f16);
  return format == Format::bf16 ? bf16 : f16;
}

// True if matrices in this format are multiplied as they are. PyTorch's oneDNN may have been disabled since the choice.
inline bool use_half_units(Format format) {
  return (format == Format::bf16 || format == Format::f16) && half_choice(format).chosen &&
         half_product_is_right(format);
}

}  // namespace gistops
