// The gradient of the centers from the product H f in float32 and float64, and the centers' part of the gradient of the
// displacements. In half precision grad_centers.cuh computes the product too.
#pragma once
#include "routing.cuh"
#include "vector.cuh"

namespace gistops::cuda {

// A block takes a tile of classes and 32 vectors of 16 bytes along the dims: a lane per vector; its four warps split
// the classes.
struct NormCorrectionShape {
  static constexpr int kThreads = 128, kVectors = kWarp, kWarps = kThreads / kWarp;
  static constexpr int kSlots = 4;              // displacements at a time
  static constexpr int kMostClasses = 64;       // of a tile
  static constexpr int kPrefetchedClasses = 2;  // loaded before any is used
  int classes;                                  // of a tile

  // Large tiles leave few partials; small ones keep the device busy when the problem is small.
  NormCorrectionShape(int64_t K, int64_t dim_tiles) : classes(kMostClasses) {
    constexpr int64_t kEnoughBlocks = 256;
    while (classes > 8 && ceil_div(K, classes) * dim_tiles < kEnoughBlocks) classes /= 2;
  }
};

// Subtract from the product the terms that the norms contribute:
//
//   dw_k = (H f)_k - sum_j T[k, j] (w_k + delta_j)
//   partials [tiles of classes, m, d] of  sum_k T[k, j] (w_k + delta_j)
//
// w + delta is summed before it is weighted, so that nothing cancels. H does not contain cancelled pairs, whose rows
// are added here.
//   t [K, M]
//   sums [K, d]: the product H f; may be the memory of `centers`. Null, as centers, if only partials are needed
//   centers [K, d]: the gradient
//   partials: null if not needed
//
// Grid: (tiles of shape.classes classes, tiles of 32 vectors). Block: 128 threads.
template <class T, bool kAligned>
__global__ void __launch_bounds__(NormCorrectionShape::kThreads, 1)
    norm_correction_kernel(NormCorrectionShape shape, GradSource<T> in, const Sum<T>* t, const int* cancelled,
                           Sum<T>* sums, T* centers, Sum<T>* partials) {
  using S = Sum<T>;
  using Shape = NormCorrectionShape;
  constexpr int kPart = kVector<T>, kSlots = Shape::kSlots, kPrefetched = Shape::kPrefetchedClasses;
  __shared__ S t_tile[Shape::kMostClasses][kSlots + 1];  // of slot 0, then of the displacements
  __shared__ int class_cancelled[Shape::kMostClasses];
  __shared__ S combined[Shape::kWarps][kPart][Shape::kVectors];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const Problem<T>& p = in.p;
  const int64_t K = p.K(), M = p.M(), m = p.m(), first_class = static_cast<int64_t>(blockIdx.x) * shape.classes;
  const int d = static_cast<int>(p.d());
  const int x = static_cast<int>(blockIdx.y * Shape::kVectors + lane) * kPart;
  const int classes = static_cast<int>(min(K - first_class, static_cast<int64_t>(shape.classes)));
  const bool any_cancelled = *cancelled;
  if (any_cancelled && thread < classes) {
    int any = 0;
    for (int64_t j = 1; j < M; ++j) any |= in.center_rnorms[j * in.ldr + first_class + thread] < S(0);
    class_cancelled[thread] = any;
  }
  for (int64_t first = 0; first == 0 || first < m; first += kSlots) {
    __syncthreads();
    for (int e = thread; e < classes * (kSlots + 1); e += Shape::kThreads) {
      const int64_t c = e / (kSlots + 1), slot = e % (kSlots + 1) == 0 ? 0 : first + e % (kSlots + 1);
      const bool valid = slot < M && (slot > 0 || first == 0);
      t_tile[c][e % (kSlots + 1)] = valid ? t[(first_class + c) * M + slot] : S(0);
    }
    __syncthreads();
    const bool last = first + kSlots >= m;
    S delta[kSlots][kPart] = {}, partial[kSlots][kPart] = {};
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      if (first + j < m && x < d) load_vector<kAligned>(p.displacements.data + (first + j) * d, x, d, delta[j]);
    if (x < d) {
#pragma unroll 1
      for (int c = warp; c < classes; c += Shape::kWarps * kPrefetched) {
        S w[kPrefetched][kPart], sum[kPrefetched][kPart] = {};
#pragma unroll
        for (int b = 0; b < kPrefetched; ++b) {
          const int64_t k = first_class + min(c + b * Shape::kWarps, classes - 1);
          load_vector<kAligned>(p.centers.data + k * d, x, d, w[b]);
          if (centers) load_sums<kAligned>(sums + k * d, x, d, sum[b]);
        }
#pragma unroll
        for (int b = 0; b < kPrefetched; ++b) {
          const int row = c + b * Shape::kWarps;
          if (row >= classes) break;
          const int64_t k = first_class + row;
#pragma unroll
          for (int e = 0; e < kPart; ++e) sum[b][e] = fma(-t_tile[row][0], w[b][e], sum[b][e]);
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            const S weight = t_tile[row][j + 1];
#pragma unroll
            for (int e = 0; e < kPart; ++e) {
              const S term = weight * (w[b][e] + delta[j][e]);
              sum[b][e] -= term, partial[j][e] += term;
            }
          }
          if (any_cancelled && class_cancelled[row]) {
            for (int64_t i = 0; i < p.B(); ++i) {
              int slot;
              const S h = in.cancelled_weight(k, i, slot);
              if (h == S(0)) continue;
              S f[kPart];
              load_vector<kAligned>(p.input.data + i * d, x, d, f);
#pragma unroll
              for (int e = 0; e < kPart; ++e) {
                if (first == 0) sum[b][e] = fma(h, f[e], sum[b][e]);
#pragma unroll
                for (int j = 0; j < kSlots; ++j)
                  if (slot == first + j + 1) partial[j][e] = fma(-h, f[e], partial[j][e]);
              }
            }
          }
          if (!centers) continue;
          if (last) {
            store_vector<kAligned>(centers + k * d, x, d, sum[b]);
          } else {
            store_sums<kAligned>(sums + k * d, x, d, sum[b]);
          }
        }
      }
    }
    if (!partials) continue;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      if (first + j >= m) break;
      __syncthreads();
#pragma unroll
      for (int e = 0; e < kPart; ++e) combined[warp][e][lane] = partial[j][e];
      __syncthreads();
      if (warp > 0 || x >= d) continue;
      S sum[kPart] = {};
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w)
#pragma unroll
        for (int e = 0; e < kPart; ++e) sum[e] += combined[w][e][lane];
      store_sums<kAligned>(partials + (blockIdx.x * m + first + j) * d, x, d, sum);
    }
  }
}

}  // namespace gistops::cuda
