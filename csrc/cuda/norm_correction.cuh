// The gradient of the centres from the product H f, and the centres' share of the displacements' gradient:
//
//   dw[k] = (H f)[k] - sum_j T[k, j] (w_k + delta_j)
//   dd[j] = ... - sum_k T[k, j] (w_k + delta_j)           partials [tiles of classes, m, d]
//
// w + delta is summed before it is weighted, so that nothing cancels. A block takes a run of classes and 32 vectors of
// 16 bytes along d; a thread takes one of these, and every fourth class. Pairs that cancel are not in H: their features
// are added here.
#pragma once
#include "routing.cuh"
#include "vector.cuh"

namespace gistops::cuda {

struct CorrectShape {
  static constexpr int kThreads = 128, kAcross = 32, kRuns = kThreads / kAcross;
  static constexpr int kSlots = 4;  // displacements at a time
  static constexpr int kMostClasses = 64, kBatch = 2;
  int classes;  // of a block

  // Long runs leave few partials, short ones keep a small problem from idling.
  CorrectShape(int64_t K, int64_t across) : classes(kMostClasses) {
    constexpr int64_t kEnough = 256;  // blocks
    while (classes > 8 && ceil_div(K, classes) * across < kEnough) classes /= 2;
  }
};

// sums: the product [K, d], or null where only the displacements' share is wanted; may lie where `centers` does.
template <class T, bool kAligned>
__global__ void __launch_bounds__(CorrectShape::kThreads, 1)
    correct_kernel(CorrectShape shape, Pairs<T> in, const Sum<T>* t, const int* cancelled, Sum<T>* sums, T* centers,
                   Sum<T>* partials) {
  using S = Sum<T>;
  using Shape = CorrectShape;
  constexpr int kPart = kVector<T>, kSlots = Shape::kSlots, kBatch = Shape::kBatch;
  __shared__ S moments[Shape::kMostClasses][kSlots + 1];  // of the bare centre, then of the displacements
  __shared__ int apart[Shape::kMostClasses];
  __shared__ S combined[Shape::kRuns][kPart][Shape::kAcross];
  const int thread = static_cast<int>(threadIdx.x), column = thread % Shape::kAcross, run = thread / Shape::kAcross;
  const Problem<T>& p = in.p;
  const int64_t K = p.K(), M = p.M(), m = p.m(), first_class = static_cast<int64_t>(blockIdx.x) * shape.classes;
  const int d = static_cast<int>(p.d());
  const int x = static_cast<int>(blockIdx.y * Shape::kAcross + column) * kPart;
  const int classes = static_cast<int>(min(K - first_class, static_cast<int64_t>(shape.classes)));
  const bool any = *cancelled;
  if (any && thread < classes) {
    int lost = 0;
    for (int64_t j = 1; j < M; ++j) lost |= in.center_rnorms[j * in.ldr + first_class + thread] < S(0);
    apart[thread] = lost;
  }
  for (int64_t first = 0; first == 0 || first < m; first += kSlots) {
    __syncthreads();
    for (int e = thread; e < classes * (kSlots + 1); e += Shape::kThreads) {
      const int64_t c = e / (kSlots + 1), slot = e % (kSlots + 1) == 0 ? 0 : first + e % (kSlots + 1);
      const bool valid = slot < M && (slot > 0 || first == 0);
      moments[c][e % (kSlots + 1)] = valid ? t[(first_class + c) * M + slot] : S(0);
    }
    __syncthreads();
    const bool last = first + kSlots >= m;
    S delta[kSlots][kPart] = {}, partial[kSlots][kPart] = {};
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      if (first + j < m && x < d) load_vector<kAligned>(p.displacements.data + (first + j) * d, x, d, delta[j]);
    if (x < d) {
#pragma unroll 1
      for (int c = run; c < classes; c += Shape::kRuns * kBatch) {
        S w[kBatch][kPart], sum[kBatch][kPart] = {};
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int64_t k = first_class + min(c + b * Shape::kRuns, classes - 1);
          load_vector<kAligned>(p.centers.data + k * d, x, d, w[b]);
          if (centers) load_sums<kAligned>(sums + k * d, x, d, sum[b]);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int row = c + b * Shape::kRuns;
          if (row >= classes) break;
          const int64_t k = first_class + row;
#pragma unroll
          for (int e = 0; e < kPart; ++e) sum[b][e] = fma(-moments[row][0], w[b][e], sum[b][e]);
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            const S weight = moments[row][j + 1];
#pragma unroll
            for (int e = 0; e < kPart; ++e) {
              const S moved = weight * (w[b][e] + delta[j][e]);
              sum[b][e] -= moved, partial[j][e] += moved;
            }
          }
          if (any && apart[row]) {
            for (int64_t i = 0; i < p.B(); ++i) {
              int slot;
              const S h = in.apart(k, i, slot);
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
      for (int e = 0; e < kPart; ++e) combined[run][e][column] = partial[j][e];
      __syncthreads();
      if (run > 0 || x >= d) continue;
      S sum[kPart] = {};
#pragma unroll
      for (int r = 0; r < Shape::kRuns; ++r)
#pragma unroll
        for (int e = 0; e < kPart; ++e) sum[e] += combined[r][e][column];
      store_sums<kAligned>(partials + (blockIdx.x * m + first + j) * d, x, d, sum);
    }
  }
}

}  // namespace gistops::cuda
