// The last kernel of the forward of the logits.
#pragma once
#include "class_stream.cuh"
#include "scores.cuh"

namespace gistops::cuda {

// The tile of a block. Each warp has 32 adjacent classes, one per lane, and 128 bytes of rows. Products arrive along
// the rows and logits leave along the classes; the tile is transposed in shared memory.
template <class S, int kSlots>
struct LogitsShape {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kClasses = kThreads;
  static constexpr int kVectors = 8, kRows = kVectors * kVector<S>;
  static constexpr int kBlocks = sizeof(S) == 8 ? 4 : 8;  // per multiprocessor
};

template <class S, int kSlots>
struct LogitsShared {
  using Shape = LogitsShape<S, kSlots>;
  // A class in each row, its vectors in another order: lanes that read one vector of each class, or all vectors of one
  // class, access all banks.
  alignas(16) S products[Shape::kWarps][kWarp][Shape::kRows];
  alignas(16) S input_dots[kSlots][Shape::kRows];
  alignas(16) S scales[Shape::kRows];  // tau / |f_i|

  __device__ __forceinline__ static int place(int class_lane, int vector) {
    return (vector ^ class_lane % Shape::kVectors) * kVector<S>;
  }
};

// Set z to the scores of four rows of class k before they are scaled, and `slot` if kNeedSlots. rnorms: R of the class
// for the first kSlots slots. is_simple: there are kSlots slots, and R and Q are finite, so that a NaN among the
// products makes all scores of the row NaN.
template <bool kNeedSlots, class T, int kSlots>
__device__ __forceinline__ void score_rows(const ScoreInputs<T>& in, const LogitsShared<Sum<T>, kSlots>& shared, int k,
                                           const Sum<T> (&rnorms)[kSlots], const Sum<T> (&products)[4], int first_row,
                                           int row, bool is_simple, Sum<T> (&z)[4], int (&slot)[4]) {
  using S = Sum<T>;
  const int M = static_cast<int>(in.p.M());
#pragma unroll
  for (int e = 0; e < 4; ++e) z[e] = products[e] * rnorms[0], slot[e] = 0;
  if (kSlots == 1) return;
  const auto add_slots = [&](auto simple) {
    constexpr bool kSimple = decltype(simple)::value;
    const auto add = [&](int j, const S(&q)[4], S r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const S score = (products[e] + q[e]) * r;
        if constexpr (kSimple && !kNeedSlots) {
          z[e] = max(z[e], score);
        } else {
          // NaN wins, as in torch.max; the lowest of equal slots wins.
          if (score > z[e] || (!kSimple && score != score)) z[e] = score, slot[e] = j;
        }
      }
    };
#pragma unroll
    for (int j = 1; j < kSlots; ++j) {
      if (!kSimple && j >= M) break;
      S q[4];
      load_sums<true>(shared.input_dots[j], row, 0, q);
      add(j, q, rnorms[j]);
    }
    if constexpr (kSlots == 8 && !kSimple) {
#pragma unroll 1
      for (int j = kSlots; j < M; ++j) {
        S q[4];
        load_sums<true>(in.input_dots + j * in.ld, first_row + row, 0, q);
        add(j, q, k < in.p.K() ? in.center_rnorms[j * in.ldr + k] : S(0));
      }
    }
  };
  is_simple ? add_slots(std::true_type()) : add_slots(std::false_type());
}

// Compute logits and slots, both [B, K], from the products P [K, ld] of a chunk of classes. The logits have rows of
// length ldz and are rounded to the type Z; in.slots is null if !kNeedSlots.
//
// Grid: (tiles of rows, tiles of classes). Block: 128 threads.
template <class T, class Z, int kSlots, bool kNeedSlots>
__global__ void __launch_bounds__(LogitsShape<Sum<T>, kSlots>::kThreads, LogitsShape<Sum<T>, kSlots>::kBlocks)
    max_over_slots_kernel(ScoreInputs<T> in, Z* logits, int64_t ldz) {
  using S = Sum<T>;
  using Shape = LogitsShape<S, kSlots>;
  using Shared = LogitsShared<S, kSlots>;
  constexpr int kRows = Shape::kRows, kVectors = Shape::kVectors;
  __shared__ Shared shared;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int B = static_cast<int>(in.p.B()), K = static_cast<int>(in.p.K()), M = static_cast<int>(in.p.M());
  const int first_row = static_cast<int>(blockIdx.x) * kRows, rows = min(kRows, B - first_row);
  const int first_class = static_cast<int>(blockIdx.y) * Shape::kClasses + warp * kWarp, k = first_class + lane;
  {
    const int vector = lane % kVectors, row = first_row + vector * kVector<S>;
#pragma unroll
    for (int i = 0; i < kWarp; i += kWarp / kVectors) {
      const int c = i + lane / kVectors;
      copy_async_16(&shared.products[warp][c][Shared::place(c, vector)],
                    in.products + (first_class + c) * in.score_class + row, first_class + c < K && row < in.ld);
    }
    copy_async_commit();
  }
  S rnorms[kSlots];
#pragma unroll
  for (int j = 0; j < kSlots; ++j) rnorms[j] = k < K && j < M ? in.center_rnorms[j * in.ldr + k] : S(0);
  bool finite = true;
#pragma unroll
  for (int i = kRows; i < kSlots * kRows; i += Shape::kThreads) {
    const int j = (i + thread) / kRows, row = thread % kRows;
    if (j >= kSlots) break;
    const S q = j < M && row < rows ? in.input_dots[j * in.ld + first_row + row] : S(0);
    shared.input_dots[j][row] = q;
    finite &= magnitude(q) < kInfinity<S>;
  }
  if (thread < kRows)
    shared.scales[thread] = thread < rows ? load_tau(in.p.tau) * in.input_rnorms[first_row + thread] : S(0);
  bool cancelled = false;
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    cancelled |= rnorms[j] < S(0);
    finite &= rnorms[j] < kInfinity<S>;
  }
  if (kSlots == 8 && k < K)
    for (int j = kSlots; j < M; ++j) cancelled |= in.center_rnorms[j * in.ldr + k] < S(0);
  const bool is_simple = !__syncthreads_or(!finite) && M == kSlots;
  // Classes with a cancelled pair are scored from the elements of w_k + delta_j, by all lanes.
  const unsigned cancelled_lanes = __ballot_sync(~0u, cancelled);
#pragma unroll 1
  for (int c = 0; cancelled_lanes != 0 && c < kWarp; ++c) {
    if (!(cancelled_lanes >> c & 1)) continue;
    store_cancelled_class<kNeedSlots>(in, logits, ldz, first_class + c, first_row, rows, lane);
  }
  const int written = k < K && !(cancelled_lanes >> lane & 1) ? rows : 0;
  Z* z_out = logits + first_row * ldz + k;
  uint8_t* slot_out = kNeedSlots ? in.slots + first_row * in.slot_row + k * in.slot_class : nullptr;
  const S(&products)[kRows] = shared.products[warp][lane];
  copy_async_wait<0>();
  __syncwarp();
#pragma unroll 1
  for (int row = 0; row < rows; row += 4) {
    S p[4], z[4], scale[4];
    int slot[4];
#pragma unroll
    for (int v = 0; v < 4 / kVector<S>; ++v) {
      S part[kVector<S>];
      load_sums<true>(products, Shared::place(lane, row / kVector<S> + v), 0, part);
#pragma unroll
      for (int e = 0; e < kVector<S>; ++e) p[v * kVector<S> + e] = part[e];
    }
    score_rows<kNeedSlots>(in, shared, k, rnorms, p, first_row, row, is_simple, z, slot);
    load_sums<true>(shared.scales, row, 0, scale);
    const auto store = [&](int e, bool needed) {
      if (needed) {
        *z_out = narrow<Z>(z[e] * scale[e]);
        if constexpr (kNeedSlots) *slot_out = static_cast<uint8_t>(slot[e]);
      }
      z_out += ldz;
      if constexpr (kNeedSlots) slot_out += in.slot_row;
    };
    if (row + 4 <= written) {
#pragma unroll
      for (int e = 0; e < 4; ++e) store(e, true);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) store(e, row + e < written);
    }
  }
}

}  // namespace gistops::cuda
