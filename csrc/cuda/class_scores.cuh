// The scores of a lane's rows of one class, from the products P = W f' that the library made. Formulas: scores.cuh.
#pragma once
#include "class_stream.cuh"
#include "scores.cuh"

namespace gistops::cuda {

// The scores of one class after another, of the rows of a lane.
template <class T, int kSlots>
class ClassScores {
  using Stream = ClassStream<T, kSlots>;
  static constexpr int kQuads = Stream::kQuads, kQuadRows = Stream::kQuadRows, kDots = kSlots > 1 ? kSlots : 2;

 public:
  using S = Sum<T>;
  __device__ __forceinline__ ClassScores(const ScoreInputs<T>& in, const ClassValues<S>& values, int first_row,
                                         int lane)
      : in_(in), values_(values), lane_(lane), first_row_(first_row), M_(static_cast<int>(in.p.M())) {
    const S tau = load_tau(in.p.tau);
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) scale_[q][e] = row(q, e) < in.p.B() ? tau * in.input_rnorms[row(q, e)] : S(0);
    if (M_ <= kSlots) finite_dots_ = load_dots(0);
  }

  __device__ __forceinline__ int row(int q, int e) const { return first_row_ + q * kQuadRows + lane_ * 4 + e; }
  __device__ __forceinline__ bool in_memory(int q) const { return row(q, 0) < in_.ld; }

  // Set the products of rows beyond the batch to 0, where they share a vector with rows of the batch.
  __device__ __forceinline__ void clear_tail(S* products) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
#pragma unroll
      for (int e = 1; e < 4; ++e)
        if (row(q, e) >= in_.p.B()) products[row(q, e) - first_row_] = S(0);
  }

  // Set the scores and slots of class k; those of rows beyond the batch are 0 if their products are.
  //   products: of the tile's rows, in shared memory
  //   value: the lane's value of the class
  //   slots_of_rows: scratch of the warp, in shared memory
  __device__ __forceinline__ void operator()(const S* products, S value, int k, uint8_t* slots_of_rows,
                                             S (&z)[kQuads][4], int (&slot)[kQuads][4]) {
    const bool in_lane = lane_ < M_ && lane_ < ClassValues<S>::kMostSlots;
    bool cancelled = in_lane && value < S(0), finite = finite_dots_ && (!in_lane || value < kInfinity<S>);
    if (kSlots == 8 && M_ > ClassValues<S>::kMostSlots) {
      finite = false;
      for (int j = lane_; j < M_; j += kWarp) cancelled |= in_.center_rnorms[j * in_.ldr + k] < S(0);
    }
    if (__any_sync(~0u, cancelled || !finite)) {
      if (__any_sync(~0u, cancelled)) return score_cancelled(k, slots_of_rows, z, slot);
      score<true>(products, value, k, z, slot);
    } else {
      score<false>(products, value, k, z, slot);
    }
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) z[q][e] *= scale_[q][e];
  }

 private:
  // Load Q of slots first .. first + kSlots; return true if all are finite.
  __device__ __forceinline__ bool load_dots(int first) {
    bool finite = true;
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        if (first + j == 0) continue;  // Q is 0
        if (first + j < M_ && in_memory(q)) {
          load_sums<true>(in_.input_dots + (first + j) * in_.ld, row(q, 0), 0, dots_[j][q]);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) dots_[j][q][e] = S(0);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (row(q, e) >= in_.p.B()) dots_[j][q][e] = S(0);
          finite &= magnitude(dots_[j][q][e]) < kInfinity<S>;
        }
      }
    return finite;
  }

  // kNaN: R or Q may not be finite, so that a NaN may meet a number.
  template <bool kNaN>
  __device__ __forceinline__ void score(const S* products, S value, int k, S (&z)[kQuads][4], int (&slot)[kQuads][4]) {
    const auto rnorm = [&](int j) {
      return kSlots < 8 || M_ <= ClassValues<S>::kMostSlots ? __shfl_sync(~0u, value, j)
                                                            : in_.center_rnorms[j * in_.ldr + k];
    };
    // Those of few slots are exchanged before any is used, so that no exchange waits for another.
    S rnorms[kSlots < 8 ? kSlots : 1];
#pragma unroll
    for (int j = 0; j < (kSlots < 8 ? kSlots : 1); ++j) rnorms[j] = rnorm(j);
    S product[kQuads][4];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      load_sums<true>(products, q * kQuadRows + lane_ * 4, 0, product[q]);
#pragma unroll
      for (int e = 0; e < 4; ++e) z[q][e] = product[q][e] * rnorms[0], slot[q][e] = 0;
    }
    if constexpr (kSlots > 1) {
#pragma unroll 1
      for (int first = 0; first < (kSlots == 8 ? M_ : 1); first += kSlots) {
        if (kSlots == 8 && M_ > kSlots) load_dots(first);
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
          if (first + j >= M_) break;
          if (first + j == 0) continue;
          const S r = kSlots < 8 ? rnorms[kSlots < 8 ? j : 0] : rnorm(first + j);
#pragma unroll
          for (int q = 0; q < kQuads; ++q)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const S score = (product[q][e] + dots_[j][q][e]) * r;
              // NaN wins, as in torch.max; the lowest of equal slots wins.
              if (score > z[q][e] || (kNaN && score != score)) z[q][e] = score, slot[q][e] = first + j;
            }
        }
      }
    }
  }

  // Score a class with a cancelled pair from the elements of w_k + delta_j, by all lanes of the warp. The scores go
  // through the memory of the products.
  __device__ __forceinline__ void score_cancelled(int k, uint8_t* slots_of_rows, S (&z)[kQuads][4],
                                                  int (&slot)[kQuads][4]) const {
    const int rows = min(Stream::kRows, static_cast<int>(in_.p.B()) - first_row_);
    for (int i = 0; i < rows; ++i) {
      uint8_t best_slot;
      const S best = score_cancelled_pair(in_, k, first_row_ + i, lane_, best_slot);
      if (lane_ == 0) in_.products[k * in_.score_class + first_row_ + i] = best, slots_of_rows[i] = best_slot;
    }
    __syncwarp();
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool inside = row(q, e) < in_.p.B();
        z[q][e] = inside ? in_.products[k * in_.score_class + row(q, e)] : S(0);
        slot[q][e] = inside ? slots_of_rows[row(q, e) - first_row_] : 0;
      }
    __syncwarp();
  }

  const ScoreInputs<T>& in_;
  const ClassValues<S>& values_;
  int lane_, first_row_, M_;
  bool finite_dots_ = false;
  S scale_[kQuads][4], dots_[kDots][kQuads][4];
};

}  // namespace gistops::cuda
