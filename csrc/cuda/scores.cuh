// From products to scores: a tile of 32 classes and 128 features, of products that lie class-major [K, ld].
//
//   z[k, i] = tau / |f_i| max_j (P[k, i] + Q[j, i]) R[j, k]        slot: the lowest j that attains it
//
// A thread has four features, and every eighth class of the tile. A class with a vector that cancels is scored from
// the vectors themselves.
#pragma once
#include "problem.cuh"
#include "vector.cuh"
#include "warp_reduce.cuh"

namespace gistops::cuda {

struct ScoresShape {
  static constexpr int kClasses = 32, kFeatures = 128, kThreads = 256, kWarps = kThreads / kWarp;
  static constexpr int kOwn = kClasses / kWarps;  // classes of a thread
  static constexpr int kSlots = 8;                // in shared memory at a time
};

// Of a run of classes; p.centers are those alone.
template <class T>
struct Scoring {
  using S = Sum<T>;
  Problem<T> p;
  S* products;             // [K, ld] P; where a pair cancels, z takes its place
  int64_t ld;              // B rounded up to whole vectors
  const S* shared;         // [M, ld]  Q
  const S* center_rnorms;  // [M, ldr]
  int64_t ldr;
  const S* input_rnorms;  // [B]
  uint8_t* slots;         // of class k and feature i: at k slot_class + i slot_row
  int64_t slot_class, slot_row;
};

template <class S>
struct ScoresTile {
  S rnorms[ScoresShape::kSlots][ScoresShape::kClasses];
  S products[ScoresShape::kSlots][ScoresShape::kFeatures];
  int apart[ScoresShape::kClasses];
};

// f . (w + delta) by a warp.
template <class T>
__device__ __forceinline__ Sum<T> product_of_sum(const T* f, const T* w, const T* delta, int64_t d, int lane) {
  Sum<T> sum = 0;
  for (int64_t x = lane; x < d; x += kWarp)
    sum = fma(wide(f[x]), wide(w[x]) + (delta ? wide(delta[x]) : Sum<T>(0)), sum);
  return warp_sum(sum);
}

// By a block: scores and slots of the tile's classes that tile.apart marks.
template <class T>
__device__ __forceinline__ void score_apart(const Scoring<T>& in, const int* apart, int64_t first_class,
                                            int64_t first_feature) {
  using S = Sum<T>;
  using Shape = ScoresShape;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const Problem<T>& p = in.p;
  for (int c = 0; c < Shape::kClasses; ++c) {
    if (!apart[c]) continue;
    const int64_t k = first_class + c, last = min(first_feature + Shape::kFeatures, p.B());
    for (int64_t i = first_feature + warp; i < last; i += Shape::kWarps) {
      S best = 0;
      int slot = 0;
      for (int64_t j = 0; j < p.M(); ++j) {
        const T* delta = j ? p.displacements.data + (j - 1) * p.d() : nullptr;
        const S dot = product_of_sum(p.input.data + i * p.d(), p.centers.data + k * p.d(), delta, p.d(), lane);
        const S score = dot * magnitude(in.center_rnorms[j * in.ldr + k]);
        if (j == 0 || score > best || score != score) best = score, slot = static_cast<int>(j);
      }
      if (lane == 0) {
        in.products[k * in.ld + i] = best * (*p.tau * in.input_rnorms[i]);
        in.slots[k * in.slot_class + i * in.slot_row] = static_cast<uint8_t>(slot);
      }
    }
  }
}

// Scores and slots of a thread: of classes first_class + warp + 8 c, features first_feature + 4 lane + e. By a block.
template <class T>
__device__ __forceinline__ void make_scores(const Scoring<T>& in, ScoresTile<Sum<T>>& tile, int first_class,
                                            int first_feature, Sum<T> (&z)[ScoresShape::kOwn][4],
                                            int (&slot)[ScoresShape::kOwn][4]) {
  using S = Sum<T>;
  using Shape = ScoresShape;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int B = static_cast<int>(in.p.B()), K = static_cast<int>(in.p.K()), M = static_cast<int>(in.p.M());
  const int own = first_feature + lane * 4;
  S sums[Shape::kOwn][4];
  const auto load = [&] {
#pragma unroll
    for (int c = 0; c < Shape::kOwn; ++c) {
      const int k = first_class + warp + c * Shape::kWarps;
      if (k < K && own < in.ld) {
        load_sums<true>(in.products + int64_t{k} * in.ld + own, 0, 4, sums[c]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[c][e] = 0;
      }
    }
  };
  load();
  // Classes with a vector that cancels come first, so that the rest need not remember anything meanwhile.
  bool lost = false;
  if (first_class + lane < K)
    for (int j = warp + 1; j < M; j += Shape::kWarps) lost |= in.center_rnorms[j * in.ldr + first_class + lane] < S(0);
  const bool any = __syncthreads_or(lost);
  if (any) {
    if (thread < Shape::kClasses) tile.apart[thread] = 0;
    __syncthreads();
    if (lost) atomicOr(&tile.apart[lane], 1);
    __syncthreads();
    score_apart(in, tile.apart, first_class, first_feature);
    __syncthreads();
    load();
  }
  for (int group = 0; group < M; group += Shape::kSlots) {
    const int n = min(M - group, Shape::kSlots);
    if (group > 0) __syncthreads();  // all are done with what the tile held
    for (int i = thread; i < n * Shape::kClasses; i += Shape::kThreads) {
      const int k = first_class + i % Shape::kClasses;
      tile.rnorms[i / Shape::kClasses][i % Shape::kClasses] =
          k < K ? magnitude(in.center_rnorms[(group + i / Shape::kClasses) * in.ldr + k]) : S(0);
    }
    for (int i = thread; i < n * Shape::kFeatures; i += Shape::kThreads) {
      const int row = first_feature + i % Shape::kFeatures;
      tile.products[i / Shape::kFeatures][i % Shape::kFeatures] =
          row < B ? in.shared[(group + i / Shape::kFeatures) * in.ld + row] : S(0);
    }
    __syncthreads();
    if (group == 0) {
#pragma unroll
      for (int c = 0; c < Shape::kOwn; ++c) {
        const S r = tile.rnorms[0][warp + c * Shape::kWarps];
#pragma unroll
        for (int e = 0; e < 4; ++e) z[c][e] = sums[c][e] * r, slot[c][e] = 0;  // Q is 0 there
      }
    }
#pragma unroll 1
    for (int j = group == 0; j < n; ++j) {
      S q[4];
      load_sums<true>(tile.products[j], lane * 4, Shape::kFeatures, q);
      const int number = group + j;
#pragma unroll
      for (int c = 0; c < Shape::kOwn; ++c) {
        const S r = tile.rnorms[j][warp + c * Shape::kWarps];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const S score = (sums[c][e] + q[e]) * r;
          // NaN wins, as in torch.max; of equals the lowest
          if (score > z[c][e] || score != score) z[c][e] = score, slot[c][e] = number;
        }
      }
    }
  }
  const S tau = *in.p.tau;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const S scale = own + e < B ? tau * in.input_rnorms[own + e] : S(0);
#pragma unroll
    for (int c = 0; c < Shape::kOwn; ++c) z[c][e] *= scale;
  }
  if (!any) return;
#pragma unroll
  for (int c = 0; c < Shape::kOwn; ++c) {
    if (!tile.apart[warp + c * Shape::kWarps]) continue;
    const uint8_t* slots = in.slots + (first_class + warp + c * Shape::kWarps) * in.slot_class + own * in.slot_row;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (own + e >= B) continue;
      z[c][e] = sums[c][e];
      slot[c][e] = slots[e * in.slot_row];
    }
  }
}

}  // namespace gistops::cuda
