// The backward's first pass: the gradient G of the scores z is routed to the slots that won. Its results:
//
//   H[k, i] = tau G |R[j*, k]| / |f_i|, in the operands' type, for the products H'W and H f; 0 where the pair cancels
//   S[j, i] = sum of the same over the classes k with j* = j, unrounded
//   T[k, j] = R^2 sum of G z over the rows i with j* = j; 0 where the norm is clamped
//   dtau = sum of G z / tau
//
// A chunk of classes takes two launches: route_*_kernel writes H and partials of the sums, reduce_partials_kernel adds
// the partials up.
#pragma once
#include <algorithm>

#include "problem.cuh"
#include "softmax_grad.cuh"
#include "warp_reduce.cuh"

namespace gistops::cuda {

// Round a weight to the operands' type, as H holds it. The weight of a zero vector, whose norm is clamped, is up to
// 1e12 times the others; in float16 it is limited to the largest number, because infinity times a zero in the same
// product is NaN. Other weights may become infinite, which tells a gradient scaler to lower its scale.
template <class T>
__device__ __forceinline__ T rounded_weight(Sum<T> h, bool clamped) {
  if constexpr (__is_same(T, f16)) {
    constexpr float kLargest = 65504;
    if (clamped && magnitude(h) > kLargest) h = h < 0 ? -kLargest : kLargest;
  }
  return narrow<T>(h);
}

// The tensors from which the backward gets the gradient of the scores, for a chunk of classes; p.centers are those of
// the chunk.
template <class T>
struct GradSource {
  using S = Sum<T>;
  Problem<T> p;
  const S* center_rnorms;  // [M, ldr]
  int64_t ldr;
  const S* input_rnorms;  // [B]
  const S* scores;        // of a loss: element (k, i) is at k * score_class + i * score_row, as in slots and grad
  const uint8_t* slots;
  int64_t score_class, score_row;
  const S* grad;  // gradient of the logits; null: narrow_grad, or else softmax for the gradient of a loss
  SoftmaxGrad<S> softmax;
  bool scores_gone = false;        // scores and slots are overwritten once H is known; grad is null
  const T* narrow_grad = nullptr;  // gradient of logits that are stored in the operands' type
  bool pairs_cancel = true;        // false without displacements: negative norms from a caller then mean nothing

  // Return a slot from memory, or the last slot instead of one that does not exist: slots from a caller must not lead
  // to a read out of bounds.
  __device__ __forceinline__ int valid_slot(uint8_t slot) const {
    return min(static_cast<int>(slot), static_cast<int>(p.displacements.rows));
  }

  // Return the weight H of pair (k, i) if its slot is cancelled, else 0; set slot to the slot that won.
  __device__ __forceinline__ S cancelled_weight(int64_t k, int64_t i, int& slot) const {
    const int64_t at = k * score_class + i * score_row;
    slot = valid_slot(slots[at]);
    const S r = center_rnorms[slot * ldr + k];
    return r < S(0) && slot > 0 ? weight(k, i, r, scores ? scores[at] : S(0)) : S(0);
  }

  // Return the unrounded weight of pair (k, i), whose slot has the reciprocal norm r and whose score is z.
  __device__ __forceinline__ S weight(int64_t k, int64_t i, S r, S z) const {
    S g;
    if (grad) {
      g = grad[k * score_class + i * score_row];
    } else if (narrow_grad) {
      g = wide(narrow_grad[k * score_class + i * score_row]);
    } else {
      const SoftmaxGradRow<S> row = softmax.row(i);
      g = k == row.target ? row.target_grad * row.by_logit : softmax.other_class_grad(row, k, z);
    }
    return load_tau(p.tau) * g * magnitude(r) * input_rnorms[i];
  }
};

// Results of the first pass: as partials, and as the sums that reduce_partials_kernel makes of them.
template <class T>
struct RoutedSums {
  using S = Sum<T>;
  T* h;             // [K, ld], in rows of length h_class; zeros from B on; no partials
  int64_t h_class;  // ld, or d where H lies in the gradient of the centers
  int64_t ld;       // of S
  S* s;             // partials [groups, M, ld], sums [M, ld]; those of slot 0 are not needed and may be undefined
  S* t;             // partials [row tiles, M, K], or [row tiles, K, M] if t_class_major; sums [K, M]
  bool t_class_major;
  S* tau;          // partials [blocks], sum [1]
  int* cancelled;  // [blocks], then [1]: true if any pair cancels
  S* bias;         // partials [row tiles, K], sums [K]; or null
  S* margin;       // partials [row tiles, K], sums [K] or [1]; or null
};

// The grid of the first pass: a block takes a group of class tiles and one tile of rows.
struct RoutingShape {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kSlots = 8;
  int64_t tiles, tiles_per_group, groups, row_tiles;
  int64_t most_groups;     // of as many classes or fewer: fewer tiles can make more groups
  int64_t row_passes = 1;  // tiles of rows that a block takes, one after the other; they count as one in row_tiles

  // Enough groups to fill the device, but no more, because each has a partial of S: with many row tiles few groups.
  RoutingShape(int64_t classes, int64_t rows, int64_t tile_classes, int64_t tile_rows)
      : tiles(ceil_div(classes, tile_classes)), row_tiles(ceil_div(rows, tile_rows)) {
    const int64_t most = std::clamp<int64_t>(1024 / std::max<int64_t>(row_tiles, 1), 8, 256);
    tiles_per_group = ceil_div(tiles, most);
    most_groups = std::min(tiles, most);
    groups = ceil_div(tiles, tiles_per_group);
  }
  __host__ __device__ int64_t blocks() const { return groups * row_tiles; }
  int64_t most_blocks() const { return most_groups * row_tiles; }
};

// Write a block's partial of dtau, from each thread's sum of G z, and whether any of its pairs cancels.
template <class T>
__device__ __forceinline__ void store_tau_partial(const RoutedSums<T>& out, Sum<T> gz_sum, Sum<T> tau, bool cancelled) {
  using S = Sum<T>;
  __shared__ S partial[RoutingShape::kWarps];
  gz_sum = warp_sum(gz_sum);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = gz_sum;
  const bool any = __syncthreads_or(cancelled);
  if (threadIdx.x == 0) {
    S sum = 0;
    for (int w = 0; w < RoutingShape::kWarps; ++w) sum += partial[w];
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    out.tau[block] = sum / tau;
    out.cancelled[block] = any;
  }
}

}  // namespace gistops::cuda
