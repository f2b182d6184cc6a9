// Scores of a tile: the logits z and the winning slots, from the products P = W f' that the library made.
//
//   z[k, i] = tau / |f_i| max_j (P[k, i] + Q[j, i]) R[j, k]        slot[k, i]: the lowest j that attains the maximum
//
// Included by the kernels that consume scores (max_over_slots.cuh, lse_partials.cuh, topk_partials.cuh).
#pragma once
#include "problem.cuh"
#include "vector.cuh"
#include "warp_reduce.cuh"

namespace gistops::cuda {

// The tile of a block. A thread has four adjacent rows, and every kClassLanes-th class.
template <int kClassCount, int kRowCount>
struct ScoresTileShape {
  static constexpr int kClasses = kClassCount, kRows = kRowCount, kThreads = 256, kWarps = kThreads / kWarp;
  static constexpr int kRowsPerThread = 4, kRowLanes = kRows / kRowsPerThread, kClassLanes = kThreads / kRowLanes;
  static constexpr int kClassesPerThread = kClasses / kClassLanes;
  static constexpr int kSlots = 8;  // in shared memory at a time
};

// Arguments of a kernel that computes scores, for a chunk of classes; p.centers are those of the chunk.
template <class T>
struct ScoreInputs {
  using S = Sum<T>;
  Problem<T> p;
  S* products;             // [K, ld]  P, in rows of length score_class; overwritten with z where a pair cancels
  int64_t ld;              // B rounded up to whole vectors
  int64_t score_class;     // ld, or more where scores are parked
  const S* input_dots;     // [M, ld]  Q
  const S* center_rnorms;  // [M, ldr] R; null: 1, for lse_partials.cuh with M = 1
  int64_t ldr;
  const S* input_rnorms;  // [B]
  uint8_t* slots;         // the slot of class k and row i, at k slot_class + i slot_row; null: not needed
  int64_t slot_class, slot_row;
};

// R, Q and the classes with a cancelled pair, in shared memory.
template <class S, class Shape>
struct ScoresTile {
  S rnorms[Shape::kSlots][Shape::kClasses];
  S input_dots[Shape::kSlots][Shape::kRows];
  int cancelled[Shape::kClasses];
};

// Return f . (w + delta), by all lanes of a warp; delta null: f . w.
template <class T>
__device__ __forceinline__ Sum<T> dot_with_slot(const T* f, const T* w, const T* delta, int64_t d, int lane) {
  Sum<T> sum = 0;
  for (int64_t x = lane; x < d; x += kWarp)
    sum = fma(wide(f[x]), wide(w[x]) + (delta ? wide(delta[x]) : Sum<T>(0)), sum);
  return warp_sum(sum);
}

// Return the score z of a class with a cancelled pair and a row, from the elements of w_k + delta_j, and set its slot;
// by all lanes of a warp. Inputs: ScoreInputs, or the GradSource of the backward.
template <class Inputs>
__device__ __forceinline__ typename Inputs::S score_cancelled_pair(const Inputs& in, int64_t k, int64_t i, int lane,
                                                                   uint8_t& slot) {
  using S = typename Inputs::S;
  const auto& p = in.p;
  S best = 0;
  slot = 0;
  for (int64_t j = 0; j < p.M(); ++j) {
    const auto* delta = j ? p.displacements.data + (j - 1) * p.d() : nullptr;
    const S dot = dot_with_slot(p.input.data + i * p.d(), p.centers.data + k * p.d(), delta, p.d(), lane);
    const S score = dot * magnitude(in.center_rnorms[j * in.ldr + k]);
    if (j == 0 || score > best || score != score) best = score, slot = static_cast<uint8_t>(j);
  }
  return best * (load_tau(p.tau) * in.input_rnorms[i]);
}

// Write the logits of class k, which has a cancelled pair, and of some rows, from the elements of w_k + delta_j, by all
// lanes of a warp. The logits have rows of length ldz.
template <bool kNeedSlots, class Z, class T>
__device__ __forceinline__ void store_cancelled_class(const ScoreInputs<T>& in, Z* logits, int64_t ldz, int64_t k,
                                                      int first_row, int rows, int lane) {
  for (int64_t i = first_row; i < first_row + rows; ++i) {
    uint8_t slot;
    const Sum<T> z = score_cancelled_pair(in, k, i, lane, slot);
    if (lane > 0) continue;
    logits[i * ldz + k] = narrow<Z>(z);
    if constexpr (kNeedSlots) in.slots[i * in.slot_row + k * in.slot_class] = slot;
  }
}

// Score the classes of the tile that have a cancelled pair, from the elements of w_k + delta_j; by all threads of the
// block. Writes in.products, and in.slots unless it is null.
template <class Shape, class T>
__device__ __forceinline__ void score_cancelled(const ScoreInputs<T>& in, const int* cancelled, int64_t first_class,
                                                int64_t first_row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int c = 0; c < Shape::kClasses; ++c) {
    if (!cancelled[c]) continue;
    const int64_t k = first_class + c, last = min(first_row + Shape::kRows, in.p.B());
    for (int64_t i = first_row + warp; i < last; i += Shape::kWarps) {
      uint8_t slot;
      const Sum<T> z = score_cancelled_pair(in, k, i, lane, slot);
      if (lane == 0) {
        in.products[k * in.score_class + i] = z;
        if (in.slots) in.slots[k * in.slot_class + i * in.slot_row] = slot;
      }
    }
  }
}

// Compute the scores and slots of this thread: z[c][e] is that of class first_class + class_lane + kClassLanes c and
// row first_row + 4 row_lane + e. By all threads of the block.
template <class T, class Shape>
__device__ __forceinline__ void compute_scores(const ScoreInputs<T>& in, ScoresTile<Sum<T>, Shape>& tile,
                                               int first_class, int first_row, Sum<T> (&z)[Shape::kClassesPerThread][4],
                                               int (&slot)[Shape::kClassesPerThread][4]) {
  using S = Sum<T>;
  constexpr int kClassesPerThread = Shape::kClassesPerThread;
  static_assert(Shape::kRowsPerThread == 4);
  const int thread = static_cast<int>(threadIdx.x);
  const int row_lane = thread % Shape::kRowLanes, class_lane = thread / Shape::kRowLanes;
  const int B = static_cast<int>(in.p.B()), K = static_cast<int>(in.p.K()), M = static_cast<int>(in.p.M());
  const int thread_row = first_row + row_lane * 4;
  S products[kClassesPerThread][4];
  const auto load_products = [&] {
#pragma unroll
    for (int c = 0; c < kClassesPerThread; ++c) {
      const int k = first_class + class_lane + c * Shape::kClassLanes;
      if (k < K && thread_row < in.ld) {
        load_sums<true>(in.products + k * in.score_class + thread_row, 0, 4, products[c]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) products[c][e] = 0;
      }
    }
  };
  load_products();
  // Classes with a cancelled pair are scored first, so that no register holds anything for them meanwhile.
  bool cancelled = false;
  const int checked_class = thread % Shape::kClasses;
  if (first_class + checked_class < K)
    for (int j = thread / Shape::kClasses + 1; j < M; j += Shape::kThreads / Shape::kClasses)
      cancelled |= in.center_rnorms[j * in.ldr + first_class + checked_class] < S(0);
  const bool any_cancelled = __syncthreads_or(cancelled);
  if (any_cancelled) {
    if (thread < Shape::kClasses) tile.cancelled[thread] = 0;
    __syncthreads();
    if (cancelled) atomicOr(&tile.cancelled[checked_class], 1);
    __syncthreads();
    score_cancelled<Shape>(in, tile.cancelled, first_class, first_row);
    __syncthreads();
    load_products();
  }
  for (int group = 0; group < M; group += Shape::kSlots) {
    const int n = min(M - group, Shape::kSlots);
    if (group > 0) __syncthreads();  // no thread still reads the slots before
    for (int i = thread; i < n * Shape::kClasses; i += Shape::kThreads) {
      const int k = first_class + i % Shape::kClasses;
      tile.rnorms[i / Shape::kClasses][i % Shape::kClasses] =
          k < K ? magnitude(in.center_rnorms[(group + i / Shape::kClasses) * in.ldr + k]) : S(0);
    }
    for (int i = thread; i < n * Shape::kRows; i += Shape::kThreads) {
      const int row = first_row + i % Shape::kRows;
      tile.input_dots[i / Shape::kRows][i % Shape::kRows] =
          row < B ? in.input_dots[(group + i / Shape::kRows) * in.ld + row] : S(0);
    }
    __syncthreads();
    if (group == 0) {  // slot 0, for which Q is 0
#pragma unroll
      for (int c = 0; c < kClassesPerThread; ++c) {
        const S r = tile.rnorms[0][class_lane + c * Shape::kClassLanes];
#pragma unroll
        for (int e = 0; e < 4; ++e) z[c][e] = products[c][e] * r, slot[c][e] = 0;
      }
    }
#pragma unroll 1
    for (int j = group == 0; j < n; ++j) {
      S q[4];
      load_sums<true>(tile.input_dots[j], row_lane * 4, Shape::kRows, q);
      const int this_slot = group + j;
#pragma unroll
      for (int c = 0; c < kClassesPerThread; ++c) {
        const S r = tile.rnorms[j][class_lane + c * Shape::kClassLanes];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const S score = (products[c][e] + q[e]) * r;
          // NaN wins, as in torch.max; the lowest of equal slots wins.
          if (score > z[c][e] || score != score) z[c][e] = score, slot[c][e] = this_slot;
        }
      }
    }
  }
  const S tau = load_tau(in.p.tau);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const S scale = thread_row + e < B ? tau * in.input_rnorms[thread_row + e] : S(0);
#pragma unroll
    for (int c = 0; c < kClassesPerThread; ++c) z[c][e] *= scale;
  }
  if (!any_cancelled) return;
#pragma unroll
  for (int c = 0; c < kClassesPerThread; ++c) {
    if (!tile.cancelled[class_lane + c * Shape::kClassLanes]) continue;
    const int64_t k = first_class + class_lane + c * Shape::kClassLanes;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (thread_row + e >= B) continue;
      z[c][e] = products[c][e];
      if (in.slots) slot[c][e] = in.slots[k * in.slot_class + (thread_row + e) * in.slot_row];
    }
  }
}

}  // namespace gistops::cuda
