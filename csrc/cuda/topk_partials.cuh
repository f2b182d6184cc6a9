// The k best of ranges of classes: a list per row and range, which grows with B and k but not with K.
#pragma once
#include "scores.cuh"
#include "topk_candidates.cuh"

namespace gistops::cuda {

// The tile of a block: 128 classes by 32 rows of float, or 16 of double: 128 bytes of each class.
template <class S>
using TopkShape = ScoresTileShape<128, 128 / static_cast<int>(sizeof(S))>;

// The partial results of all ranges. They hold what the chunks of classes so far gave.
template <class S>
struct TopkPartials {
  Candidate<S>* lists;  // [B, ranges, k]: descending, zero bits where there are fewer candidates
  S *max, *sum;         // [B, ranges]: the maximum, and the sum of exponentials of z - max; null: not needed
  int ranges, k, capacity;
};

// The classes of a chunk as the ranges take them.
struct TopkChunk {
  int64_t first_class;
  int range_tiles;  // tiles of classes per range
  bool is_first;
};

// Return the larger of two numbers, or the other one of NaN.
template <class S>
__device__ __forceinline__ S larger(S x, S y) {
  return x > y || y != y ? x : y;
}

template <class S>
__device__ __forceinline__ S warp_max(S x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = larger(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// Return a shift that keeps exp(z - shift) defined where the maximum is infinite.
template <class S>
__device__ __forceinline__ S finite_shift(S max) {
  return magnitude(max) < kInfinity<S> ? max : S(0);
}

// Update the partial results with a chunk of classes. bias is that of all classes, or null.
//
// Grid: (tiles of rows, ranges). Block: 256 threads; dynamic shared memory: a list per row of the tile. A warp owns
// every eighth row: scores pass through shared memory, transposed, so that a lane has a class.
template <class T>
__global__ void __launch_bounds__(TopkShape<Sum<T>>::kThreads, sizeof(T) == 8 ? 1 : 2)
    topk_partials_kernel(TopkChunk chunk, ScoreInputs<T> in, const Sum<T>* bias, TopkPartials<Sum<T>> out) {
  using S = Sum<T>;
  using Shape = TopkShape<S>;
  constexpr int kClasses = Shape::kClasses, kRows = Shape::kRows, kPerLane = kClasses / kWarp;
  GISTOPS_DYNAMIC_SHARED(Candidate<S>, lists);
  __shared__ __align__(16) ScoresTile<S, Shape> tile;
  __shared__ S scores[kRows][kClasses + 1];
  __shared__ uint8_t slots[kRows][kClasses + 4];
  __shared__ Candidate<S> least[kRows];
  __shared__ int counts[kRows];
  __shared__ S maxima[kRows], sums[kRows];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int first_row = static_cast<int>(blockIdx.x) * kRows, range = static_cast<int>(blockIdx.y);
  const int rows = min(kRows, static_cast<int>(in.p.B()) - first_row), K = static_cast<int>(in.p.K());
  const int range_classes = chunk.range_tiles * kClasses;
  const int begin = min(range * range_classes, K), end = min(begin + range_classes, K);
  if (begin == end && !chunk.is_first) return;
  const auto partial = [&](int row) { return static_cast<int64_t>(first_row + row) * out.ranges + range; };
  for (int row = warp; row < rows; row += Shape::kWarps) {
    Candidate<S> kept{0, 0};
    if (!chunk.is_first) {
      const Candidate<S>* from = out.lists + partial(row) * out.k;
      for (int i = lane; i < out.k; i += kWarp) lists[row * out.capacity + i] = from[i];
      kept = from[out.k - 1];
    }
    if (lane > 0) continue;
    least[row] = kept, counts[row] = chunk.is_first ? 0 : out.k;
    if (!out.max) continue;
    maxima[row] = chunk.is_first ? -kInfinity<S> : out.max[partial(row)];
    sums[row] = chunk.is_first ? S(0) : out.sum[partial(row)];
  }
#pragma unroll 1
  for (int first_class = begin; first_class < end; first_class += kClasses) {
    {
      S z[Shape::kClassesPerThread][4];
      int slot[Shape::kClassesPerThread][4];
      compute_scores(in, tile, first_class, first_row, z, slot);  // waits until no thread reads the tile before
      const int row_lane = thread % Shape::kRowLanes, class_lane = thread / Shape::kRowLanes;
#pragma unroll
      for (int c = 0; c < Shape::kClassesPerThread; ++c) {
        const int at = class_lane + c * Shape::kClassLanes;
        const S added = bias && first_class + at < in.p.K() ? bias[chunk.first_class + first_class + at] : S(0);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          scores[row_lane * 4 + e][at] = z[c][e] + added;
          slots[row_lane * 4 + e][at] = static_cast<uint8_t>(slot[c][e]);
        }
      }
    }
    __syncthreads();
    const int inside = K - first_class;  // classes of the tile that exist
#pragma unroll 1
    for (int row = warp; row < rows; row += Shape::kWarps) {
      CandidateList<S> list{lists + row * out.capacity, out.capacity, out.k, lane, counts[row], least[row]};
      const S least_score = list.least.value();
      S z[kPerLane], max = -kInfinity<S>;
      bool any = false;
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) {
        const bool exists = c * kWarp + lane < inside;
        z[c] = exists ? scores[row][c * kWarp + lane] : -kInfinity<S>;
        any |= exists && !(z[c] < least_score);  // true where one of the two is NaN
        max = larger(max, z[c]);
      }
      if (out.max) {
        const S old_max = maxima[row], new_max = larger(old_max, warp_max(max)), shift = finite_shift(new_max);
        S sum = 0;
#pragma unroll
        for (int c = 0; c < kPerLane; ++c) sum += exp(z[c] - shift);
        sum = warp_sum(sum);
        __syncwarp();  // every lane has read the row's maximum
        if (lane == 0) sums[row] = fma(sums[row], exp(old_max - shift), sum), maxima[row] = new_max;
      }
      if (!__any_sync(~0u, any)) continue;
#pragma unroll 1
      for (int c = lane; c < kClasses; c += kWarp) {
        Candidate<S> candidate{0, 0};
        if (c < inside)
          candidate = Candidate<S>::of(scores[row][c], chunk.first_class + first_class + c, slots[row][c]);
        list.add(candidate);
      }
      __syncwarp();
      if (lane == 0) least[row] = list.least, counts[row] = list.count;
    }
  }
  __syncthreads();
  for (int row = warp; row < rows; row += Shape::kWarps) {
    CandidateList<S> list{lists + row * out.capacity, out.capacity, out.k, lane, counts[row], least[row]};
    list.prune();
    for (int i = lane; i < out.k; i += kWarp) out.lists[partial(row) * out.k + i] = list.items[i];
    if (out.max && lane == 0) out.max[partial(row)] = maxima[row], out.sum[partial(row)] = sums[row];
  }
}

}  // namespace gistops::cuda
