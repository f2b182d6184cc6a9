// The backward's first pass over [B, K]: each gradient goes to the vector that won.
//
//   H[i, k] = tau G |R[j*, k]| / |f_i|, in the operands' dtype, for the two products;  0 where the pair cancels
//   S[i, j] = sum of H[i, k] over k with j* = j, of H before it is rounded
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

// The weight that H and S hold: 0 where the pair cancels. Of a zero vector, whose norm is clamped, it is up to 1e12
// times the others: float16 holds it as its largest value, because infinity times a zero beside it would be NaN.
// Elsewhere infinity stays, which tells a gradient scaler to step back.
template <class T>
__device__ __forceinline__ Sum<T> held_weight(Sum<T> tau, Sum<T> grad, Sum<T> center_rnorm, Sum<T> input_rnorm) {
  using S = Sum<T>;
  if (center_rnorm < S(0)) return 0;
  S h = routed_weight(tau, grad, center_rnorm, input_rnorm);
  if constexpr (__is_same(T, f16)) {
    constexpr S kLargest = 65504;
    const bool clamped = center_rnorm >= max_rnorm<S>() || input_rnorm >= max_rnorm<S>();
    if (clamped && magnitude(h) > kLargest) h = h < S(0) ? -kLargest : kLargest;
  }
  return h;
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
          const S h = held_weight<T>(tau, grad, r, saved.input_rnorms[i]);
          if (first == 0) {
            out.h[i * out.ld + k[c]] = narrow<T>(h);
            tau_sum += moved;
            cancelled |= r < S(0);
          }
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            if (slot == first + j) s[j] += h, t[c][j] += moved;
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

// to[n] = the sum over `terms` of from[term, n], for `sums` of them. The block takes kThreads / kRuns sums; kRuns
// threads share out the terms of each.
template <int kRuns, class S>
__device__ __forceinline__ void gather(const S* from, int64_t sums, int64_t terms, S* to, int64_t block) {
  constexpr int kSums = RouteShape::kThreads / kRuns;
  const int run = static_cast<int>(threadIdx.x) / kSums, at = static_cast<int>(threadIdx.x) % kSums;
  const int64_t n = block * kSums + at;
  S sum = 0;
  if (n < sums) {
#pragma unroll 8
    for (int64_t term = run; term < terms; term += kRuns) sum += from[term * sums + n];
  }
  if constexpr (kRuns > 1) {
    __shared__ S partial[kRuns][kSums];
    partial[run][at] = sum;
    __syncthreads();
    if (run > 0) return;
#pragma unroll
    for (int r = 1; r < kRuns; ++r) sum += partial[r][at];
  }
  if (n < sums) to[n] = sum;
}

// How gather_kernel's blocks are shared out: those of S, those of T, and one for the two scalars.
struct GatherShape {
  static constexpr int kRuns = RouteShape::kWarps;
  int64_t s_sums, s_blocks, t_sums, t_blocks;
  bool few;  // so few partials of T that a thread sums them
  explicit GatherShape(const RouteShape& shape)
      : s_sums(shape.B * shape.M), s_blocks(ceil_div(s_sums, kWarp)), t_sums(shape.K * shape.M),
        few(shape.parts() <= kRuns) {
    t_blocks = ceil_div(t_sums, few ? RouteShape::kThreads : kWarp);
  }
  int64_t blocks() const { return s_blocks + t_blocks + 1; }
};

// The partials' sums.
template <class T>
__global__ void __launch_bounds__(RouteShape::kThreads)
    gather_kernel(RouteShape shape, GatherShape g, Routed<T> partial, Routed<T> out) {
  const int64_t block = blockIdx.x, after_s = block - g.s_blocks;
  if (after_s < 0) return gather<GatherShape::kRuns>(partial.s, g.s_sums, shape.groups(), out.s, block);
  if (after_s < g.t_blocks) {
    if (g.few) return gather<1>(partial.t, g.t_sums, shape.parts(), out.t, after_s);
    return gather<GatherShape::kRuns>(partial.t, g.t_sums, shape.parts(), out.t, after_s);
  }
  __shared__ Sum<T> sums[RouteShape::kWarps];
  Sum<T> sum = 0;
  int any = 0;
  for (int64_t b = threadIdx.x; b < shape.blocks(); b += RouteShape::kThreads)
    sum += partial.tau[b], any |= partial.flags[b];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  any = __syncthreads_or(any);
  if (threadIdx.x > 0) return;
  for (int w = 1; w < RouteShape::kWarps; ++w) sum += sums[w];
  *out.tau = sum, *out.cancelled = any;
}

}  // namespace gistops::cuda
