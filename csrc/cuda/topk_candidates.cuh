// The k best candidates that a warp has seen of a row, in shared memory.
//
// Candidates have a total order: NaN is the largest score, -0 equals 0, and the lower class wins a tie. The k best are
// therefore the same in any order of arrival.
#pragma once
#include <cstring>

#include "device.cuh"
#include "op_table.h"

namespace gistops::cuda {

template <class S>
struct BitsOf {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};

// A score, class and slot. `score` is ordered like the numbers; the tag holds the inverted class in 24 bits, then the
// slot. All bits are 0 where there is no candidate, which is less than every candidate.
template <class S>
struct alignas(sizeof(S) * 2) Candidate {
  using Bits = typename BitsOf<S>::type;
  static constexpr Bits kSign = Bits{1} << (sizeof(S) * 8 - 1);
  static constexpr uint32_t kLastClass = kMostTopkClasses - 1;
  Bits score;
  uint32_t tag;

  __device__ __forceinline__ static Candidate of(S z, int64_t class_index, uint32_t slot) {
    z += S(0);  // -0 becomes 0
    Bits bits;
    memcpy(&bits, &z, sizeof bits);
    bits = z != z ? ~Bits{0} : bits ^ (bits & kSign ? ~Bits{0} : kSign);
    return {bits, (kLastClass - static_cast<uint32_t>(class_index)) << 8 | slot};
  }
  // Return the score as a number: NaN if there is no candidate.
  __device__ __forceinline__ S value() const {
    const Bits bits = score ^ (score & kSign ? kSign : ~Bits{0});
    S z;
    memcpy(&z, &bits, sizeof z);
    return z;
  }
  __device__ __forceinline__ int64_t class_index() const { return kLastClass - (tag >> 8); }
  __device__ __forceinline__ uint8_t slot() const { return static_cast<uint8_t>(tag & 255); }
  __device__ __forceinline__ bool operator>(const Candidate& other) const {
    return score > other.score || (score == other.score && tag > other.tag);
  }
};

// Return the length of the memory of a list of k: a power of two, of which a warp can fill 32 places beyond k.
inline int candidate_capacity(int64_t k) {
  int capacity = 64;
  while (capacity < 2 * k) capacity *= 2;
  return capacity;
}

// Sort n candidates in shared memory, n a power of two of at least 64, in descending order; by all lanes of a warp.
template <class S>
__device__ __forceinline__ void sort_descending(Candidate<S>* x, int n, int lane) {
#pragma unroll 1
  for (int size = 2; size <= n; size *= 2)
#pragma unroll 1
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncwarp();
#pragma unroll 1
      for (int pair = lane; pair < n / 2; pair += kWarp) {
        const int i = 2 * pair - (pair & (stride - 1)), j = i + stride;
        const bool descending = (i & size) == 0;
        const Candidate<S> first = x[i], second = x[j];
        if ((second > first) == descending) x[i] = second, x[j] = first;
      }
    }
  __syncwarp();
}

// The list of a row. All lanes of a warp hold the same fields and make the same calls.
template <class S>
struct CandidateList {
  Candidate<S>* items;  // [capacity], in shared memory
  int capacity, k, lane;
  int count;
  Candidate<S> least;  // the kth best, or zero bits: no candidate that is not larger is among the k best

  // Add one candidate per lane, or none.
  __device__ __forceinline__ void add(Candidate<S> candidate) {
    bool better = candidate > least;
    unsigned lanes = __ballot_sync(~0u, better);
    if (lanes == 0) return;
    if (count + __popc(lanes) > capacity) {
      prune();
      better = candidate > least;
      lanes = __ballot_sync(~0u, better);
    }
    if (better) items[count + __popc(lanes & ((1u << lane) - 1))] = candidate;
    count += __popc(lanes);
  }

  // Leave the k best at most, in descending order, and zero bits up to k.
  __device__ __forceinline__ void prune() {
    for (int i = count + lane; i < capacity; i += kWarp) items[i] = {0, 0};
    sort_descending(items, capacity, lane);
    least = items[k - 1];
    count = min(count, k);
  }
};

}  // namespace gistops::cuda
