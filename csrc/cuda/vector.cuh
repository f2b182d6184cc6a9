// Loads and stores of 16 bytes between memory and registers.
#pragma once
#include "device.cuh"

namespace gistops::cuda {

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Load elements x .. x + kVector of a row of `cols` elements and widen them; elements past the end are zero.
// kAligned: every row begins at a multiple of 16 bytes and is a whole number of vectors long.
template <bool kAligned, class T>
__device__ __forceinline__ void load_vector(const T* row, int x, int cols, Sum<T> (&out)[kVector<T>]) {
  if constexpr (kAligned) {
    alignas(16) T values[kVector<T>];
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(row + x);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) out[e] = wide(values[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) out[e] = x + e < cols ? wide(row[x + e]) : Sum<T>(0);
  }
}

template <bool kAligned, class T>
__device__ __forceinline__ void store_vector(T* row, int x, int cols, const Sum<T> (&in)[kVector<T>]) {
  if constexpr (kAligned) {
    alignas(16) T values[kVector<T>];
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) values[e] = narrow<T>(in[e]);
    *reinterpret_cast<uint4*>(row + x) = *reinterpret_cast<const uint4*>(values);
  } else {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e)
      if (x + e < cols) row[x + e] = narrow<T>(in[e]);
  }
}

// The same for kCount sums, which may take more or less than 16 bytes.
template <bool kAligned, class S, int kCount>
__device__ __forceinline__ void load_sums(const S* row, int x, int cols, S (&out)[kCount]) {
  constexpr int kPart = kVector<S> < kCount ? kVector<S> : kCount;
#pragma unroll
  for (int part = 0; part < kCount; part += kPart) {
    if constexpr (kAligned) {
      alignas(16) S values[kPart];
      *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(row + x + part);
#pragma unroll
      for (int e = 0; e < kPart; ++e) out[part + e] = values[e];
    } else {
#pragma unroll
      for (int e = 0; e < kPart; ++e) out[part + e] = x + part + e < cols ? row[x + part + e] : S(0);
    }
  }
}

template <bool kAligned, class S, int kCount>
__device__ __forceinline__ void store_sums(S* row, int x, int cols, const S (&in)[kCount]) {
  constexpr int kPart = kVector<S> < kCount ? kVector<S> : kCount;
#pragma unroll
  for (int part = 0; part < kCount; part += kPart) {
    if constexpr (kAligned) {
      alignas(16) S values[kPart];
#pragma unroll
      for (int e = 0; e < kPart; ++e) values[e] = in[part + e];
      *reinterpret_cast<uint4*>(row + x + part) = *reinterpret_cast<const uint4*>(values);
    } else {
#pragma unroll
      for (int e = 0; e < kPart; ++e)
        if (x + part + e < cols) row[x + part + e] = in[part + e];
    }
  }
}

// Load or store four adjacent elements, at a multiple of their size.
template <class T>
__device__ __forceinline__ void load_four(const T* from, T (&values)[4]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint2*>(values) = *reinterpret_cast<const uint2*>(from);
  } else {
#pragma unroll
    for (int part = 0; part < 4; part += kVector<T>)
      *reinterpret_cast<uint4*>(values + part) = *reinterpret_cast<const uint4*>(from + part);
  }
}
template <class T>
__device__ __forceinline__ void store_four(T* to, const T (&values)[4]) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(values);
  } else {
#pragma unroll
    for (int part = 0; part < 4; part += kVector<T>)
      *reinterpret_cast<uint4*>(to + part) = *reinterpret_cast<const uint4*>(values + part);
  }
}

}  // namespace gistops::cuda
