// Reciprocal norms of the rows of the input and of all slots, and the dot products of the input with the displacements.
#pragma once
#include "problem.cuh"
#include "vector.cuh"
#include "warp_reduce.cuh"

namespace gistops::cuda {

// A "row" in this file is a row of the input or of the centers.
// kGroup: displacements whose sums are in registers at a time. More of them leave room for fewer rows.
template <int kGroup>
struct NormsShape {
  static constexpr int kThreads = 128, kRowsPerWarp = 16 / kGroup;
  static constexpr int kRowsPerBlock = kThreads / kWarp * kRowsPerWarp;
};

// Pointers are null where the result is not needed.
template <class S>
struct NormOutputs {
  S* input_rnorms;  // [B]      1 / |f_i|
  S* input_dots;    // [M, ld]  Q: f_i . delta_j, 0 for j = 0
  int64_t ld;
  S* center_rnorms;  // [M, ldr]  R: 1 / |w_k + delta_j|, negative where the pair cancels
  int64_t ldr;
  int* blocks_done;  // [1]: set to 0, for row_loss_kernel
};

// Return the blocks per multiprocessor to ask for: the loads in flight must cover the latency of memory.
template <class T, int kGroup, bool kAligned>
constexpr int norms_blocks() {
  if (!kAligned || kGroup > 4 || sizeof(T) == 8) return 1;
  return sizeof(T) == 2 && kFitsIn128Registers ? 4 : 3;
}

// Return |w + delta|^2, by all lanes of a warp.
template <bool kAligned, class T>
__device__ __forceinline__ Sum<T> squared_norm_of_slot(const T* w, const T* delta, int d, int lane) {
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

// Compute all of NormOutputs, with one pass over the input and one over the centers for each group of displacements.
//
// Grid: input_blocks blocks of kRowsPerBlock input rows, then enough blocks for the centers. Block: kThreads. A warp
// takes kRowsPerWarp adjacent rows x; its lanes split the dims, and accumulate |x|^2, x . delta_j and |delta_j|^2.
template <class T, int kGroup, bool kAligned>
__global__ void __launch_bounds__(NormsShape<kGroup>::kThreads, norms_blocks<T, kGroup, kAligned>())
    norms_kernel(Problem<T> p, int64_t input_blocks, NormOutputs<Sum<T>> out) {
  using S = Sum<T>;
  constexpr int kRows = NormsShape<kGroup>::kRowsPerWarp, kPart = kVector<T>;
  static_assert(kRows * kGroup % 8 == 0 && kGroup <= 8);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  if (out.blocks_done && blockIdx.x == 0 && threadIdx.x == 0) *out.blocks_done = 0;
  const bool is_input = blockIdx.x < input_blocks;
  const int64_t rows = is_input ? p.B() : p.K(), m = p.m();
  const int d = static_cast<int>(p.d());
  const int64_t block = is_input ? blockIdx.x : blockIdx.x - input_blocks;
  const int64_t first = block * NormsShape<kGroup>::kRowsPerBlock + warp * kRows;
  if (first >= rows) return;
  const T* data = is_input ? p.input.data : p.centers.data;
  const T* begin = data + first * int64_t{d};
  int offset[kRows];  // where each row begins; rows past the end repeat the last
#pragma unroll
  for (int r = 0; r < kRows; ++r) offset[r] = static_cast<int>(min(static_cast<int64_t>(r), rows - 1 - first)) * d;

  S square = 0;  // |x|^2 of row lane / 4, in lanes below 4 kRows
  for (int64_t group = 0; group == 0 || group < m; group += kGroup) {
    S squares[8] = {}, delta_squares[8] = {}, dots[kRows][kGroup] = {};
    alignas(16) T prefetched[kRows][kPart];  // loaded while the previous values are in use
    const auto prefetch = [&](int x) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        *reinterpret_cast<uint4*>(prefetched[r]) = *reinterpret_cast<const uint4*>(begin + offset[r] + x);
    };
    if (kAligned && lane * kPart < d) prefetch(lane * kPart);
    for (int x = lane * kPart; x < d; x += kWarp * kPart) {
      S values[kRows][kPart];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kAligned) {
#pragma unroll
          for (int e = 0; e < kPart; ++e) values[r][e] = wide(prefetched[r][e]);
        } else {
          load_vector<false>(begin + offset[r], x, d, values[r]);
        }
      }
      if (kAligned && x + kWarp * kPart < d) prefetch(x + kWarp * kPart);
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
      square = warp_sum_of_8(squares, lane);
      const int64_t at = first + lane / 4;
      if (lane % 4 == 0 && lane / 4 < kRows && at < rows) {
        (is_input ? out.input_rnorms : out.center_rnorms)[at] = clamped_rnorm(square);
        if (is_input) out.input_dots[at] = 0;
      }
    }
    if (m == 0) break;
    const S lane_delta_square = warp_sum_of_8(delta_squares, lane);  // of displacement group + lane / 4
#pragma unroll
    for (int part = 0; part < kRows * kGroup; part += 8) {
      S eight[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) eight[i] = dots[(part + i) / kGroup][(part + i) % kGroup];
      const S dot = warp_sum_of_8(eight, lane);
      const int r = (part + lane / 4) / kGroup, j = (part + lane / 4) % kGroup;  // the pair of this lane
      const S row_square = __shfl_sync(~0u, square, r * 4);
      const S delta_square = __shfl_sync(~0u, lane_delta_square, j * 4);
      const bool valid = lane % 4 == 0 && first + r < rows && group + j < m;
      if (is_input) {
        if (valid) out.input_dots[(group + j + 1) * out.ld + first + r] = dot;
        continue;
      }
      const S sum = row_square + delta_square + 2 * dot;
      const bool cancelled = valid && cancels(sum, row_square, delta_square);
      S rnorm = clamped_rnorm(sum);
      if (__any_sync(~0u, cancelled)) {
        for (int i = 0; i < 8; ++i) {
          if (!__shfl_sync(~0u, static_cast<int>(cancelled), i * 4)) continue;
          const int64_t k = first + (part + i) / kGroup, index = group + (part + i) % kGroup;
          const S direct =
              squared_norm_of_slot<kAligned>(p.centers.data + k * d, p.displacements.data + index * d, d, lane);
          if (i == lane / 4) rnorm = -clamped_rnorm(direct);
        }
      }
      if (valid) out.center_rnorms[(group + j + 1) * out.ldr + first + r] = rnorm;
    }
  }
}

}  // namespace gistops::cuda
