// Sub-centers in a loss: M vectors per class, [K, M, d], each with a product of its own. The two kernels here lie
// between the products of all K M vectors and the kernels for one vector per class.
#pragma once
#include <algorithm>

#include "vector.cuh"

namespace gistops::cuda {

// A warp takes one class and 128 rows: a lane has four adjacent rows.
struct SubcentersShape {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kRows = 4 * kWarp;
};

// The reciprocal norm of sub-center j of class k is at k * class_stride + j * slot_stride.
template <class S>
struct SubcenterNorms {
  const S* rnorms;
  int64_t class_stride, slot_stride;
};

// Find the best sub-center of each class and row of a chunk:
//
//   scores[k, i] = max_j products[k M + j, i] R[k, j]        slots[k, i]: the lowest j that attains the maximum
//
// NaN is the largest. All tensors of rows have length ld; rows beyond the batch give scores without meaning.
//   copied_norms: element (k, j) of R goes to copied_norms[j * ldr + k]; or null
//
// lse_partials_kernel could take the maximum when it loads the products, which would save two passes over the scores,
// 2 / (M + 2) of the traffic between the product and the log-sum-exp, at the price of another variant of that kernel.
//
// Grid: (tiles of eight classes, tiles of 128 rows). Block: 256 threads.
template <class S>
__global__ void __launch_bounds__(SubcentersShape::kThreads, sizeof(S) == 8 ? 2 : 4)
    best_subcenter_kernel(int64_t K, int64_t M, int64_t ld, const S* products, SubcenterNorms<S> norms, S* copied_norms,
                          int64_t ldr, S* scores, uint8_t* slots) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * SubcentersShape::kWarps + warp;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * SubcentersShape::kRows + lane * 4;
  if (k >= K) return;
  const S* rnorms = norms.rnorms + k * norms.class_stride;
  if (copied_norms && blockIdx.y == 0)
    for (int64_t j = lane; j < M; j += kWarp) copied_norms[j * ldr + k] = rnorms[j * norms.slot_stride];
  if (i >= ld) return;
  const S* from = products + k * M * ld + i;
  S best[4];
  uint32_t slot[4] = {};
  load_sums<true>(from, 0, 0, best);
#pragma unroll
  for (int e = 0; e < 4; ++e) best[e] *= rnorms[0];
#pragma unroll 4
  for (int j = 1; j < static_cast<int>(M); ++j) {
    S score[4];
    load_sums<true>(from + j * ld, 0, 0, score);
    const S r = rnorms[j * norms.slot_stride];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      score[e] *= r;
      if (score[e] > best[e] || (score[e] != score[e] && best[e] == best[e])) best[e] = score[e], slot[e] = j;
    }
  }
  store_sums<true>(scores + k * ld + i, 0, 0, best);
  *reinterpret_cast<uint32_t*>(slots + k * ld + i) = slot[0] | slot[1] << 8 | slot[2] << 16 | slot[3] << 24;
}

// Expand the weights h [K, ld] of the classes of a chunk to those of their sub-centers, out [K M, ld]: the slot that
// won has the weight, the others have 0. Grid and block: as above.
template <class T>
__global__ void __launch_bounds__(SubcentersShape::kThreads)
    expand_weights_kernel(int64_t K, int64_t M, int64_t ld, const T* h, const uint8_t* slots, T* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * SubcentersShape::kWarps + warp;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * SubcentersShape::kRows + lane * 4;
  if (k >= K || i >= ld) return;
  const uint32_t bytes = *reinterpret_cast<const uint32_t*>(slots + k * ld + i);
  alignas(16) T weights[4];
  load_four(h + k * ld + i, weights);
#pragma unroll 4
  for (int j = 0; j < static_cast<int>(M); ++j) {
    alignas(16) T values[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      // A slot that does not exist counts as the last, as in GradSource.
      const int slot = min(static_cast<int>(bytes >> (8 * e) & 255), static_cast<int>(M) - 1);
      values[e] = slot == j ? weights[e] : narrow<T>(0);
    }
    store_four(out + (k * M + j) * ld + i, values);
  }
}

}  // namespace gistops::cuda
