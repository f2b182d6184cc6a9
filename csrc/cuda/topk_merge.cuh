// The results of top-k from the lists of all ranges, in one launch.
#pragma once
#include "topk_partials.cuh"

namespace gistops::cuda {

struct TopkMergeShape {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
};

template <class S>
struct TopkResult {
  S* values;         // [B, k]
  int64_t* classes;  // [B, k]
  uint8_t* slots;    // [B, k]
  S* lse;            // [B], or null
};

// Write the log-sum-exp of a row; by all lanes of a warp.
template <class S>
__device__ __forceinline__ void merge_lse(const TopkPartials<S>& in, int64_t row, int lane, S* lse) {
  const S *max = in.max + row * in.ranges, *sum = in.sum + row * in.ranges;
  S row_max = -kInfinity<S>, total = 0;
  for (int range = lane; range < in.ranges; range += kWarp) row_max = larger(row_max, max[range]);
  row_max = warp_max(row_max);
  const S shift = finite_shift(row_max);
  for (int range = lane; range < in.ranges; range += kWarp) total = fma(sum[range], exp(max[range] - shift), total);
  total = warp_sum(total);
  if (lane == 0) lse[row] = shift + log(total);
}

// Merge the lists of a row, and its partials of the log-sum-exp.
//
// Grid: rows. Block: 256 threads; dynamic shared memory: a list per warp.
template <class S>
__global__ void __launch_bounds__(TopkMergeShape::kThreads) topk_merge_kernel(TopkPartials<S> in, TopkResult<S> out) {
  using Shape = TopkMergeShape;
  GISTOPS_DYNAMIC_SHARED(Candidate<S>, lists);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t row = blockIdx.x;
  const int n = in.ranges * in.k;
  const Candidate<S>* from = in.lists + row * n;
  const Candidate<S> none{0, 0};
  CandidateList<S> list{lists + warp * in.capacity, in.capacity, in.k, lane, 0, none};
  const auto load = [&](int i) { return i < n ? from[i] : Candidate<S>{0, 0}; };
  Candidate<S> next = load(thread);
#pragma unroll 1
  for (int first = warp * kWarp; first < n; first += Shape::kThreads) {
    const Candidate<S> candidate = next;
    next = load(first + Shape::kThreads + lane);
    list.add(candidate);
  }
  list.prune();
  __syncthreads();
  if (warp > 0) {
    if (warp == 1 && out.lse) merge_lse(in, row, lane, out.lse);
    return;
  }
#pragma unroll 1
  for (int other = 1; other < Shape::kWarps; ++other)
    for (int first = 0; first < in.k; first += kWarp) {
      Candidate<S> candidate{0, 0};
      if (first + lane < in.k) candidate = lists[other * in.capacity + first + lane];
      list.add(candidate);
    }
  list.prune();
  for (int i = lane; i < in.k; i += kWarp) {
    const Candidate<S> best = list.items[i];
    out.values[row * in.k + i] = best.value();
    out.classes[row * in.k + i] = best.class_index();
    out.slots[row * in.k + i] = best.slot();
  }
}

}  // namespace gistops::cuda
