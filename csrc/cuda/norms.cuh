// Norms of the centres and features, and what they make with the displacements, in one reading of each: a warp takes
// some rows, and sums |x|^2, x . delta_j and |delta_j|^2 on the way.
#pragma once
#include "problem.cuh"
#include "vector.cuh"
#include "warp_reduce.cuh"

namespace gistops::cuda {

// kGroup: displacements at a time. Rows of a warp: as many as registers hold the sums of.
template <int kGroup>
struct NormsShape {
  static constexpr int kThreads = 128, kRows = 16 / kGroup, kRowsABlock = kThreads / kWarp * kRows;
};

// Null where not wanted.
template <class S>
struct Norms {
  S* input_rnorms;  // [B]      1 / |f_i|
  S* products;      // [M, ld]  f_i . delta_j, 0 for j = 0
  int64_t ld;
  S* center_rnorms;  // [M, ldr]  1 / |w_k + delta_j|, negative where the pair cancels
  int64_t ldr;
  int* ticket;  // set to 0
};

// On a multiprocessor, at least: what is in flight must cover the memory's latency.
template <class T, int kGroup, bool kAligned>
constexpr int norms_blocks() {
  if (!kAligned || kGroup > 4 || sizeof(T) == 8) return 1;
  return sizeof(T) == 2 && kSqueezes ? 4 : 3;
}

template <bool kAligned, class T>
__device__ __forceinline__ Sum<T> square_of_sum(const T* w, const T* delta, int d, int lane) {
  Sum<T> sum = 0;
  for (int x = lane * kVector<T>; x < d; x += kWarp * kVector<T>) {
    Sum<T> a[kVector<T>], b[kVector<T>];
    load_vector<kAligned>(w, x, d, a);
    load_vector<kAligned>(delta, x, d, b);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) sum = fma(a[e] + b[e], a[e] + b[e], sum);
  }
  return warp_sum(sum);
}

// Blocks 0 .. input_blocks: of the features; then of the centres.
template <class T, int kGroup, bool kAligned>
__global__ void __launch_bounds__(NormsShape<kGroup>::kThreads, norms_blocks<T, kGroup, kAligned>())
    norms_kernel(Problem<T> p, int64_t input_blocks, Norms<Sum<T>> out) {
  using S = Sum<T>;
  constexpr int kRows = NormsShape<kGroup>::kRows, kPart = kVector<T>;
  static_assert(kRows * kGroup % 8 == 0 && kGroup <= 8);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  if (out.ticket && blockIdx.x == 0 && threadIdx.x == 0) *out.ticket = 0;
  const bool of_input = blockIdx.x < input_blocks;
  const int64_t rows = of_input ? p.B() : p.K(), m = p.m();
  const int d = static_cast<int>(p.d());
  const int64_t block = of_input ? blockIdx.x : blockIdx.x - input_blocks;
  const int64_t first = block * NormsShape<kGroup>::kRowsABlock + warp * kRows;
  if (first >= rows) return;
  const T* data = of_input ? p.input.data : p.centers.data;
  const T* begin = data + first * int64_t{d};
  int row[kRows];  // where they begin; past the end the last again
#pragma unroll
  for (int r = 0; r < kRows; ++r) row[r] = static_cast<int>(min(static_cast<int64_t>(r), rows - 1 - first)) * d;

  S square = 0;  // of row lane / 4, for lanes below 4 kRows
  for (int64_t group = 0; group == 0 || group < m; group += kGroup) {
    S squares[8] = {}, delta_squares[8] = {}, dots[kRows][kGroup] = {};
    alignas(16) T ahead[kRows][kPart];  // read while the values before them are at work
    const auto read = [&](int x) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        *reinterpret_cast<uint4*>(ahead[r]) = *reinterpret_cast<const uint4*>(begin + row[r] + x);
    };
    if (kAligned && lane * kPart < d) read(lane * kPart);
    for (int x = lane * kPart; x < d; x += kWarp * kPart) {
      S values[kRows][kPart];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kAligned) {
#pragma unroll
          for (int e = 0; e < kPart; ++e) values[r][e] = wide(ahead[r][e]);
        } else {
          load_vector<false>(begin + row[r], x, d, values[r]);
        }
      }
      if (kAligned && x + kWarp * kPart < d) read(x + kWarp * kPart);
      if (group == 0) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int e = 0; e < kPart; ++e) squares[r] = fma(values[r][e], values[r][e], squares[r]);
      }
      if (m == 0) continue;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        S delta[kPart];
        load_vector<kAligned>(p.displacements.data + min(group + j, m - 1) * d, x, d, delta);
#pragma unroll
        for (int e = 0; e < kPart; ++e) {
          delta_squares[j] = fma(delta[e], delta[e], delta_squares[j]);
#pragma unroll
          for (int r = 0; r < kRows; ++r) dots[r][j] = fma(values[r][e], delta[e], dots[r][j]);
        }
      }
    }
    if (group == 0) {
      square = halving_sum(squares, lane);
      const int64_t at = first + lane / 4;
      if (lane % 4 == 0 && lane / 4 < kRows && at < rows) {
        (of_input ? out.input_rnorms : out.center_rnorms)[at] = clamped_rnorm(square);
        if (of_input) out.products[at] = 0;
      }
    }
    if (m == 0) break;
    const S delta_square_of_lane = halving_sum(delta_squares, lane);  // of displacement lane / 4
#pragma unroll
    for (int part = 0; part < kRows * kGroup; part += 8) {
      S eight[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) eight[i] = dots[(part + i) / kGroup][(part + i) % kGroup];
      const S dot = halving_sum(eight, lane);
      const int r = (part + lane / 4) / kGroup, j = (part + lane / 4) % kGroup;  // this lane's
      const S row_square = __shfl_sync(~0u, square, r * 4);
      const S delta_square = __shfl_sync(~0u, delta_square_of_lane, j * 4);
      const bool valid = lane % 4 == 0 && first + r < rows && group + j < m;
      if (of_input) {
        if (valid) out.products[(group + j + 1) * out.ld + first + r] = dot;
        continue;
      }
      const S sum = row_square + delta_square + 2 * dot;
      const bool lost = valid && cancels(sum, row_square, delta_square);
      S rnorm = clamped_rnorm(sum);
      if (__any_sync(~0u, lost)) {
        for (int i = 0; i < 8; ++i) {
          if (!__shfl_sync(~0u, static_cast<int>(lost), i * 4)) continue;
          const int64_t k = first + (part + i) / kGroup, slot = group + (part + i) % kGroup;
          const S direct = square_of_sum<kAligned>(p.centers.data + k * d, p.displacements.data + slot * d, d, lane);
          if (i == lane / 4) rnorm = -clamped_rnorm(direct);
        }
      }
      if (valid) out.center_rnorms[(group + j + 1) * out.ldr + first + r] = rnorm;
    }
  }
}

}  // namespace gistops::cuda
