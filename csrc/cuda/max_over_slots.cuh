// Logits and slots [B, K] of products [K, ld]: scores of a tile, turned in shared memory, so that reads run along the
// features and writes along the classes.
#pragma once
#include "scores.cuh"

namespace gistops::cuda {

template <class T>
__global__ void __launch_bounds__(ScoresShape::kThreads) pool_kernel(Scoring<T> in, Sum<T>* logits, int64_t ldz) {
  using S = Sum<T>;
  using Shape = ScoresShape;
  __shared__ __align__(16) ScoresTile<S> tile;
  // Half of the features at a time, where all of them are more than static shared memory holds.
  constexpr int kParts = sizeof(S) == 8 ? 2 : 1, kRows = Shape::kFeatures / kParts;
  __shared__ S turned[kRows][Shape::kClasses + 1];
  __shared__ uint8_t turned_slots[kRows][Shape::kClasses + 4];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int first_class = static_cast<int>(blockIdx.x) * Shape::kClasses;
  const int first_feature = static_cast<int>(blockIdx.y) * Shape::kFeatures;
  S z[Shape::kOwn][4];
  int slot[Shape::kOwn][4];
  make_scores(in, tile, first_class, first_feature, z, slot);
  const int64_t k = first_class + lane;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if (part > 0) __syncthreads();
    if (lane * 4 / kRows == part) {
#pragma unroll
      for (int c = 0; c < Shape::kOwn; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          turned[lane * 4 % kRows + e][warp + c * Shape::kWarps] = z[c][e];
          turned_slots[lane * 4 % kRows + e][warp + c * Shape::kWarps] = static_cast<uint8_t>(slot[c][e]);
        }
    }
    __syncthreads();
    if (k >= in.p.K()) continue;
#pragma unroll 4
    for (int row = warp; row < kRows; row += Shape::kWarps) {
      const int64_t i = first_feature + part * kRows + row;
      if (i >= in.p.B()) break;
      logits[i * ldz + k] = turned[row][lane];
      in.slots[i * in.slot_row + k * in.slot_class] = turned_slots[row][lane];
    }
  }
}

}  // namespace gistops::cuda
