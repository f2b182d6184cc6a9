// Conversions between the storage formats and the type of computation.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd.h"
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

GISTOPS_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

GISTOPS_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

GISTOPS_INLINE float from_bf16(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }

GISTOPS_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);  // NaN stays NaN
}

GISTOPS_INLINE float from_f16(uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &x, 2);
  return half;
#else
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, exponent = (x >> 10) & 0x1f, fraction = x & 0x3ff;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // subnormal: fraction * 2^-24
  return sign ? -value : value;
#endif
}

GISTOPS_INLINE uint16_t to_f16(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  const __fp16 half = static_cast<__fp16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
#else
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {                                              // below 2^-14: in units of 2^-24
    const float shifted = from_bits(magnitude) + 0.5f;                       // 0.5 has its last bit at 2^-24
    return static_cast<uint16_t>(sign | (to_bits(shifted) - to_bits(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
#endif
}

template <class T>
void load_format(const void* from, gistops::Format format, int64_t n, T* out) {
  using gistops::Format;
  const auto each = [&](const auto* x, auto convert) GISTOPS_INLINE_LAMBDA {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(convert(x[i]));
  };
  switch (format) {
    case Format::f32: return each(static_cast<const float*>(from), [](float x) { return x; });
    case Format::f64: return each(static_cast<const double*>(from), [](double x) { return x; });
    case Format::bf16: return each(static_cast<const uint16_t*>(from), [](uint16_t x) { return from_bf16(x); });
    case Format::f16: {
      const auto* x = static_cast<const uint16_t*>(from);
      int64_t i = 0;
#ifdef __F16C__
      if constexpr (sizeof(T) == 4)
        for (; i + 8 <= n; i += 8)
          _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
      for (; i < n; ++i) out[i] = static_cast<T>(from_f16(x[i]));
    }
  }
}

template <class T>
void store_format(const T* x, int64_t n, gistops::Format format, void* to) {
  using gistops::Format;
  const auto each = [&](auto* out, auto convert) GISTOPS_INLINE_LAMBDA {
    for (int64_t i = 0; i < n; ++i) out[i] = convert(x[i]);
  };
  switch (format) {
    case Format::f32: return each(static_cast<float*>(to), [](T v) { return static_cast<float>(v); });
    case Format::f64: return each(static_cast<double*>(to), [](T v) { return static_cast<double>(v); });
    case Format::bf16: return each(static_cast<uint16_t*>(to), [](T v) { return to_bf16(static_cast<float>(v)); });
    case Format::f16: return each(static_cast<uint16_t*>(to), [](T v) { return to_f16(static_cast<float>(v)); });
  }
}

}  // namespace
