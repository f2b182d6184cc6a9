// Vectors, in the portable notation of GCC and Clang.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define GISTOPS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define GISTOPS_VECTOR_BYTES 32
#else
#define GISTOPS_VECTOR_BYTES 16
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define GISTOPS_VECTOR_REGISTERS 32
#else
#define GISTOPS_VECTOR_REGISTERS 16
#endif
#define GISTOPS_INLINE inline __attribute__((always_inline))
#define GISTOPS_INLINE_LAMBDA __attribute__((always_inline))

namespace {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int N = GISTOPS_VECTOR_BYTES / 4;
  typedef float V __attribute__((vector_size(GISTOPS_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(GISTOPS_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(GISTOPS_VECTOR_BYTES)));
  typedef uint8_t Bytes __attribute__((vector_size(GISTOPS_VECTOR_BYTES / 4)));
};

template <>
struct Simd<double> {
  static constexpr int N = GISTOPS_VECTOR_BYTES / 8;
  typedef double V __attribute__((vector_size(GISTOPS_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(GISTOPS_VECTOR_BYTES)));
  typedef uint64_t U __attribute__((vector_size(GISTOPS_VECTOR_BYTES)));
  typedef uint8_t Bytes __attribute__((vector_size(GISTOPS_VECTOR_BYTES / 8)));
};

// Load and store n <= N elements; a load fills the rest of the vector with zeros. For the constant n == N they are one
// instruction.
template <class V, class E>
GISTOPS_INLINE V load(const E* p, int n) {
  V v = {};
  if (n == static_cast<int>(sizeof(V) / sizeof(E))) {
    std::memcpy(&v, p, sizeof(V));
  } else {
    for (int i = 0; i < n; ++i) v[i] = p[i];
  }
  return v;
}

template <class V, class E>
GISTOPS_INLINE void store(E* p, V v, int n) {
  if (n == static_cast<int>(sizeof(V) / sizeof(E))) {
    std::memcpy(p, &v, sizeof(V));
  } else {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
}

// a b + c, rounded once if the processor can. Of `a * b + c` in several copies of a loop's body, compilers round some
// once and others twice.
template <class V>
GISTOPS_INLINE V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == sizeof(float))
    return _mm512_fmadd_ps(a, b, c);
  else
    return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  if constexpr (sizeof(a[0]) == sizeof(float))
    return _mm256_fmadd_ps(a, b, c);
  else
    return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  if constexpr (sizeof(a[0]) == sizeof(float))
    return vfmaq_f32(c, a, b);
  else
    return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// The sum of the lanes, in a fixed order.
template <class T>
GISTOPS_INLINE T lane_sum(typename Simd<T>::V v) {
  T lanes[Simd<T>::N];
  std::memcpy(lanes, &v, sizeof(v));
  for (int half = Simd<T>::N / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Calls body(offset, N) for the whole vectors in [0, size), with N as a constant, then body(offset, n) for the rest.
template <int N, class F>
GISTOPS_INLINE void for_each_vector(int64_t size, F body) {
  int64_t e = 0;
  for (; e + N <= size; e += N) body(e, N);
  if (e < size) body(e, static_cast<int>(size - e));
}

}  // namespace
