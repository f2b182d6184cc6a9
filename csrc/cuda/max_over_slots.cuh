// The last kernel of the forward of the logits.
#pragma once
#include "scores.cuh"

namespace gistops::cuda {

// Compute logits and slots, both [B, K], from the products P [K, ld] of a chunk of classes. The logits have rows of
// length ldz and are rounded to the type Z; in.slots is null if they are not needed.
//
// Grid: (tiles of 32 classes, tiles of 128 rows). Block: 256 threads. Reads run along the rows and writes along the
// classes, so the tile is transposed in shared memory.
template <class T, class Z>
__global__ void __launch_bounds__(ScoresShape::kThreads)
    max_over_slots_kernel(ScoreInputs<T> in, Z* logits, int64_t ldz) {
  using S = Sum<T>;
  using Shape = ScoresShape;
  __shared__ __align__(16) ScoresTile<S> tile;
  // float64: half of the rows at a time, because all of them exceed static shared memory.
  constexpr int kPasses = sizeof(S) == 8 ? 2 : 1, kRows = Shape::kRows / kPasses;
  __shared__ S transposed[kRows][Shape::kClasses + 1];
  __shared__ uint8_t transposed_slots[kRows][Shape::kClasses + 4];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int first_class = static_cast<int>(blockIdx.x) * Shape::kClasses;
  const int first_row = static_cast<int>(blockIdx.y) * Shape::kRows;
  S z[Shape::kClassesPerThread][4];
  int slot[Shape::kClassesPerThread][4];
  compute_scores(in, tile, first_class, first_row, z, slot);
  const int64_t k = first_class + lane;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    if (pass > 0) __syncthreads();
    if (lane * 4 / kRows == pass) {
#pragma unroll
      for (int c = 0; c < Shape::kClassesPerThread; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          transposed[lane * 4 % kRows + e][warp + c * Shape::kWarps] = z[c][e];
          transposed_slots[lane * 4 % kRows + e][warp + c * Shape::kWarps] = static_cast<uint8_t>(slot[c][e]);
        }
    }
    __syncthreads();
    if (k >= in.p.K()) continue;
#pragma unroll 4
    for (int row = warp; row < kRows; row += Shape::kWarps) {
      const int64_t i = first_row + pass * kRows + row;
      if (i >= in.p.B()) break;
      logits[i * ldz + k] = narrow<Z>(transposed[row][lane]);
      if (in.slots) in.slots[i * in.slot_row + k * in.slot_class] = transposed_slots[row][lane];
    }
  }
}

}  // namespace gistops::cuda
