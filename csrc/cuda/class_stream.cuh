// How the kernels of a loss walk over scores [K, ld]. A warp takes one class at a time, and a lane has kQuads times
// four adjacent rows of it. The warps of a block are independent within a tile of rows: the values of a class lie in
// the lanes, and the classes to come are copied to shared memory ahead of their use.
#pragma once
#include <type_traits>

#include "ptx.cuh"
#include "vector.cuh"

namespace gistops::cuda {

// kSlots: the slots whose sums or dot products a lane holds in registers; more slots take several passes.
template <class T, int kSlots_>
struct ClassStream {
  static constexpr int kSlots = kSlots_, kThreads = 256, kWarps = kThreads / kWarp;
  static constexpr int kQuads = kSlots == 8 ? 1 : 2, kQuadRows = 4 * kWarp, kRows = kQuads * kQuadRows;
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;  // per multiprocessor
};

// Call run(std::integral_constant<int, kSlots>) with the variant for M slots.
template <class T, class Run>
void with_slots(int64_t M, const Run& run) {
  if constexpr (sizeof(T) == 8) {
    run(std::integral_constant<int, 8>());
  } else {
    if (M == 1) return run(std::integral_constant<int, 1>());
    if (M <= 5) return run(std::integral_constant<int, 5>());
    run(std::integral_constant<int, 8>());
  }
}

// Lane j of a warp holds R[j, k] of its class k; two other lanes hold its bias and weight. Up to six slots are repeated
// in every eight lanes. More slots than lanes are read from memory. Without norms, where M is 1, R is 1.
template <class S>
struct ClassValues {
  static constexpr int kBiasLane = 30, kWeightLane = 31, kMostSlots = 30, kMostRepeated = 6;
  const S* values;  // of this lane, by class; or null
  S otherwise;

  // first_class: of the chunk in bias and weight, which may be null
  __device__ __forceinline__ ClassValues(const S* rnorms, int64_t ldr, int64_t M, const S* bias, const S* weight,
                                         int64_t first_class, int lane)
      : values(lane == kBiasLane                ? bias ? bias + first_class : nullptr
               : lane == kWeightLane            ? weight ? weight + first_class : nullptr
               : slot_of(lane, M) < M && rnorms ? rnorms + slot_of(lane, M) * ldr
                                                : nullptr),
        otherwise(lane == kWeightLane || (slot_of(lane, M) == 0 && !rnorms) ? S(1) : S(0)) {}

  static __device__ __forceinline__ int slot_of(int lane, int64_t M) { return M <= kMostRepeated ? lane % 8 : lane; }

  __device__ __forceinline__ S operator()(int k) const { return values ? values[k] : otherwise; }
};

// Rows of the classes to come, of one warp, in shared memory: sums, and slots if kSlotBytes. Two classes are under way
// while a third is in use, which is about what the memory of a large GPU needs.
template <class S, int kQuads, bool kSlotBytes>
struct ClassRing {
  static constexpr int kStages = 3, kQuadRows = 4 * kWarp, kRows = kQuads * kQuadRows;
  alignas(16) S sums[kStages][kRows];
  alignas(16) uint8_t slots[kSlotBytes ? kStages : 1][kSlotBytes ? kRows : 16];

  // Start to copy a class, if there is one, to a stage; by all lanes.
  //   from_sums, from_slots: what this lane copies first; it takes four sums of each quad, and 16 slots
  //   count: rows from the lane's first on; vectors beyond them become zeros
  __device__ __forceinline__ void copy(bool any, int stage, const S* from_sums, const uint8_t* from_slots, int count,
                                       int lane) {
    constexpr int kVectors = static_cast<int>(sizeof(S)) / 4;  // per quad and lane
    if (any) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q)
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int row = q * kQuadRows + v * kVector<S>;
          copy_async_16(&sums[stage][lane * 4 + row], from_sums + row, row < count);
        }
      if constexpr (kSlotBytes) {
        if (lane * 16 < kRows) copy_async_16(&slots[stage][lane * 16], from_slots, lane * 12 < count);
      }
    }
    copy_async_commit();
  }

  // Wait until the oldest class under way has arrived, and until all lanes have left the one before it.
  __device__ __forceinline__ void wait() const {
    copy_async_wait<kStages - 2>();
    __syncwarp();
  }
};

// Marks classes that are the target of a row of a tile. A class may be marked without being a target.
struct TargetMarks {
  static constexpr int kWords = 256;
  int words[kWords];

  __device__ __forceinline__ void clear(int thread) {
    if (thread < kWords) words[thread] = 0;
  }
  __device__ __forceinline__ void set(unsigned k) { atomicOr(&words[k / 32 % kWords], static_cast<int>(1u << k % 32)); }
  __device__ __forceinline__ bool get(unsigned k) const {
    return static_cast<unsigned>(words[k / 32 % kWords]) >> k % 32 & 1;
  }
};

// Return e^x. In half precision it is exact to a few units in the last place of float for x near 0, and to |x| units
// elsewhere; the scores themselves are not more exact.
template <class T>
__device__ __forceinline__ Sum<T> exp_of(Sum<T> x) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approx(x * 1.44269504f);
  } else {
    return exp(x);
  }
}

// The factor from exponents to the basis e to those of exp_of_sum.
template <class T>
inline constexpr Sum<T> kExpUnit = sizeof(T) == 2 ? Sum<T>(1.44269504) : Sum<T>(1);

// Return true for a finite bias or shift with which exp_of_sum is less exact than exp_of, or overflows.
template <class T>
__device__ __forceinline__ bool is_large_exponent(Sum<T> x) {
  return sizeof(T) == 2 && magnitude(x) >= Sum<T>(1024) && magnitude(x) < kInfinity<Sum<T>>;
}

// Return e^(z + bias - shift), for a bias and a shift that were multiplied by kExpUnit. A large one takes exp_of, which
// rounds z + bias as the forward did.
template <class T>
__device__ __forceinline__ Sum<T> exp_of_sum(Sum<T> z, Sum<T> bias, Sum<T> shift) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approx(fma(z, kExpUnit<T>, bias - shift));
  } else {
    return exp(z + bias - shift);
  }
}

}  // namespace gistops::cuda
