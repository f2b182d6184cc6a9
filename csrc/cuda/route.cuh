// The backward's first pass over [B, K]: each gradient goes to the vector that won.
//
//   H[i, k] = tau G |R[j*, k]| / |f_i|, in the operands' dtype, for the two products;  0 where the pair cancels
//   S[i, j] = sum of H[i, k] over k with j* = j, of H as it was rounded, so that S delta and H w round alike
//   T[k, j] = R^2 sum of G z over i with j* = j  (tau G c = G z, z the logits);  0 where the norm is clamped
//   tau's gradient: sum of G z / tau
//
// Everything is summed in an order that the sizes alone decide. A block takes a group of tiles of 64 classes and a part
// of the features; each of its warps takes every eighth feature of that part.
#pragma once
#include "arguments.h"

namespace gistops::cuda {

struct RouteShape {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kClasses = 64, kSlots = 8;
  static constexpr int64_t kMaxGroups = 256;  // bounds the partials of S: [groups, B, M]

  int64_t B, K, M;
  __host__ __device__ RouteShape(int64_t B, int64_t K, int64_t M) : B(B), K(K), M(M) {}
  __host__ __device__ int64_t tiles() const { return ceil_div(K, kClasses); }
  __host__ __device__ int64_t tiles_a_group() const { return ceil_div(tiles(), kMaxGroups); }
  __host__ __device__ int64_t groups() const { return ceil_div(tiles(), tiles_a_group()); }
  // Parts of the features, where the classes alone make too few blocks: no less than 32 features each.
  __host__ __device__ int64_t parts() const {
    const int64_t wanted = ceil_div(kMaxGroups, groups()), most = ceil_div(B, 32);
    return wanted < most ? wanted : most;
  }
  __host__ __device__ int64_t rows_a_part() const { return ceil_div(B, parts()); }
  __host__ __device__ int64_t blocks() const { return groups() * parts(); }
  __host__ __device__ int64_t classes_a_group() const { return tiles_a_group() * kClasses; }
};

template <class T>
struct Routed {
  T* h;            // [B, ld]
  int64_t ld;      // of h: K rounded up to whole vectors
  Sum<T>* s;       // [groups, B, M], then [B, M]
  Sum<T>* t;       // [parts, K, M], then [K, M]
  Sum<T>* tau;     // [blocks], then [1]
  int* flags;      // [parts, groups]: whether any of a block's pairs cancels
  int* cancelled;  // [1], after the partials: whether any does
};

template <class T>
struct Saved {
  const Sum<T>* grad;           // [B, K]
  const Sum<T>* logits;         // [B, K]
  const uint8_t* slots;         // [B, K]
  const Sum<T>* center_rnorms;  // [M, K]
  const Sum<T>* input_rnorms;   // [B]
};

// The weight with which feature i pulls on the vector that won class k; the same in every kernel that needs it.
template <class S>
__device__ __forceinline__ S routed_weight(S tau, S grad, S center_rnorm, S input_rnorm) {
  return tau * grad * magnitude(center_rnorm) * input_rnorm;
}

// The weight as H holds it. Of a zero vector, whose norm is clamped, it is up to 1e12 times the others: float16 holds
// it as its largest value, because infinity times a zero beside it would be NaN. Elsewhere infinity stays, which tells
// a gradient scaler to step back.
template <class T>
__device__ __forceinline__ T stored_weight(Sum<T> tau, Sum<T> grad, Sum<T> center_rnorm, Sum<T> input_rnorm) {
  using S = Sum<T>;
  if (center_rnorm < S(0)) return narrow<T>(S(0));
  S h = routed_weight(tau, grad, center_rnorm, input_rnorm);
  if constexpr (__is_same(T, f16)) {
    constexpr S kLargest = 65504;
    const bool clamped = center_rnorm >= max_rnorm<S>() || input_rnorm >= max_rnorm<S>();
    if (clamped && magnitude(h) > kLargest) h = h < S(0) ? -kLargest : kLargest;
  }
  return narrow<T>(h);
}

// Eight values a lane -> the sum over the warp of value `lane / 4`, by halving exchanges: 9 shuffles for 40.
template <class S>
__device__ __forceinline__ S warp_sum_of_eight(const S (&x)[8], int lane) {
  S four[4], two[2];
  const bool upper = lane & 16, middle = lane & 8, lower = lane & 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const S kept = upper ? x[i + 4] : x[i], given = upper ? x[i] : x[i + 4];
    four[i] = kept + __shfl_xor_sync(~0u, given, 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const S kept = middle ? four[i + 2] : four[i], given = middle ? four[i] : four[i + 2];
    two[i] = kept + __shfl_xor_sync(~0u, given, 8);
  }
  S one = (lower ? two[1] : two[0]) + __shfl_xor_sync(~0u, lower ? two[0] : two[1], 4);
  one += __shfl_xor_sync(~0u, one, 2);
  return one + __shfl_xor_sync(~0u, one, 1);
}

template <class T>
__global__ void __launch_bounds__(RouteShape::kThreads)
    route_kernel(RouteShape shape, const Sum<T>* tau_value, Saved<T> saved, Routed<T> out) {
  using S = Sum<T>;
  constexpr int kSlots = RouteShape::kSlots, kClasses = RouteShape::kClasses, kWarps = RouteShape::kWarps;
  __shared__ S partial_t[kWarps][kSlots][kClasses];
  __shared__ S partial_tau[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t B = shape.B, K = shape.K, M = shape.M, group = blockIdx.x, part = blockIdx.y;
  const int64_t first_row = part * shape.rows_a_part();
  const int64_t last_row = min(first_row + shape.rows_a_part(), B);
  const int64_t first_tile = group * shape.tiles_a_group();
  const int64_t last_tile = min(first_tile + shape.tiles_a_group(), shape.tiles());
  const S tau = *tau_value;
  S tau_sum = 0;
  bool cancelled = false;

  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t k[2] = {tile * kClasses + lane, tile * kClasses + kWarp + lane};
    for (int64_t first = 0; first < M; first += kSlots) {
      S t[2][kSlots] = {};
#pragma unroll 2
      for (int64_t i = first_row + warp; i < last_row; i += kWarps) {
        S s[kSlots] = {};
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (k[c] >= out.ld) continue;
          const bool inside = k[c] < K;
          const int64_t at = i * K + k[c];
          const S grad = inside ? saved.grad[at] : S(0), z = inside ? saved.logits[at] : S(0);
          const int slot = inside ? saved.slots[at] : 0;
          const S r = inside ? saved.center_rnorms[slot * K + k[c]] : S(0), moved = grad * z;
          const T h = stored_weight<T>(tau, grad, r, saved.input_rnorms[i]);
          if (first == 0) {
            out.h[i * out.ld + k[c]] = h;
            tau_sum += moved;
            cancelled |= r < S(0);
          }
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            if (slot == first + j) s[j] += wide(h), t[c][j] += moved;
          }
        }
        const S sum = warp_sum_of_eight(s, lane);
        const int64_t j = first + lane / 4;
        if (lane % 4 == 0 && j < M) {  // the same lane for all tiles: no other reads or writes this sum
          S* to = out.s + (group * B + i) * M + j;
          *to = tile == first_tile ? sum : *to + sum;
        }
      }
#pragma unroll
      for (int j = 0; j < kSlots; ++j) partial_t[warp][j][lane] = t[0][j], partial_t[warp][j][lane + kWarp] = t[1][j];
      __syncthreads();
      for (int e = static_cast<int>(threadIdx.x); e < kSlots * kClasses; e += RouteShape::kThreads) {
        const int64_t j = first + e / kClasses, col = tile * kClasses + e % kClasses;
        if (j >= M || col >= K) continue;
        S sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += partial_t[w][e / kClasses][e % kClasses];
        const S r = saved.center_rnorms[j * K + col];
        out.t[(part * K + col) * M + j] = magnitude(r) >= max_rnorm<S>() ? S(0) : sum * r * r;
      }
      __syncthreads();
    }
  }
  tau_sum = warp_sum(tau_sum);
  if (lane == 0) partial_tau[warp] = tau_sum;
  const bool any = __syncthreads_or(cancelled);
  if (threadIdx.x == 0) {
    S sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += partial_tau[w];
    const int64_t block = part * gridDim.x + group;
    out.tau[block] = sum / tau;
    out.flags[block] = any;
  }
}

// The partials' sums: s [B, M] and t [K, M] by a thread each, the two scalars by the first thread of all.
template <class T>
__global__ void __launch_bounds__(RouteShape::kThreads)
    gather_kernel(RouteShape shape, Routed<T> partial, Routed<T> out) {
  const int64_t rows = shape.B * shape.M, classes = shape.K * shape.M;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * RouteShape::kThreads + threadIdx.x;
  if (i < rows) {
    Sum<T> sum = 0;
    for (int64_t g = 0; g < shape.groups(); ++g) sum += partial.s[g * rows + i];
    out.s[i] = sum;
  } else if (i - rows < classes) {
    Sum<T> sum = 0;
    for (int64_t part = 0; part < shape.parts(); ++part) sum += partial.t[part * classes + i - rows];
    out.t[i - rows] = sum;
  } else if (i - rows == classes) {
    Sum<T> sum = 0;
    int any = 0;
    for (int64_t b = 0; b < shape.blocks(); ++b) sum += partial.tau[b], any |= partial.flags[b];
    *out.tau = sum, *out.cancelled = any;
  }
}

}  // namespace gistops::cuda
