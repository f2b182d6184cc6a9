// The logits in half precision by one kernel, which does not write the products: see fused_product.cuh.
#pragma once
#include "fused_product.cuh"
#include "scores.cuh"

namespace gistops::cuda {

// What follows f in the shared memory of a block.
// Z: the type of the logits
template <class Shape, class Z>
struct FusedLogitsShared {
  static constexpr int kSlots = Shape::kSlots, kStagedRows = 32;
  // Logits of a warp, in rows of its classes, with padding against bank conflicts; and their slots.
  struct Staged {
    static constexpr int kLd = Shape::kWarpClasses + 16 / static_cast<int>(sizeof(Z));
    alignas(16) Z logits[kStagedRows][kLd];
    alignas(16) uint8_t slots[kStagedRows][Shape::kWarpClasses];
  };
  // tau / |f_i| of two adjacent rows, then their Q of slots 1, 2 and so on, which is 0 where the slot does not exist;
  // with padding against bank conflicts.
  static constexpr int kVectors = (2 * kSlots + 3) / 4, kPairLd = (kVectors | 1) * 4;
  alignas(16) float rows[Shape::kRows / 2][kPairLd];
  float delta_squares[8];
  Staged staged[Shape::kWarps];
};

// Copy rows of a warp's elements from shared memory, where their length is kLd, to a matrix of rows of K elements.
// kPart: elements per copy
template <int kPart, int kRows, int kClasses, int kLd, class E>
__device__ __forceinline__ void copy_class_rows(const E* from, E* to, int64_t K, int rows, int classes, int lane) {
  constexpr int kParts = kClasses / kPart, kStep = kWarp / kParts;
  const int c = lane % kParts * kPart;
  if (c >= classes) return;
  to += lane / kParts * K + c, from += lane / kParts * kLd + c;
#pragma unroll 4
  for (int row = 0; row < kRows; row += kStep, to += kStep * K, from += kStep * kLd)
    if (lane / kParts + row < rows)
      *reinterpret_cast<Pack<E, kPart>*>(to) = *reinterpret_cast<const Pack<E, kPart>*>(from);
}

// The logits of one group of four warps, for one tile of classes after another.
template <class Shape, class Z, bool kNeedSlots>
class FusedLogits {
  using T = typename Shape::T;
  using Shared = FusedLogitsShared<Shape, Z>;
  static constexpr int kSlots = Shape::kSlots, kWarpClasses = Shape::kWarpClasses, kRows = Shape::kRows;
  static constexpr int kGroups = Shape::kGroups;

 public:
  __device__ FusedLogits(const ScoreInputs<T>& in, Z* logits, float* center_rnorms, int first_row,
                         unsigned char* memory)
      : in_(in), logits_(logits), center_rnorms_(center_rnorms), first_row_(first_row),
        rows_(min(kRows, static_cast<int>(in.p.B()) - first_row)), product_(in.p, memory),
        shared_(*reinterpret_cast<Shared*>(memory + Shape::f_bytes(in.p.d()))) {
    lane_ = static_cast<int>(threadIdx.x) % kWarp, warp_ = static_cast<int>(threadIdx.x) / kWarp;
  }

  // first_tile, tile_stride: the tiles of this group
  __device__ __forceinline__ void run(int first_tile, int tile_stride) {
    product_.start(first_tile);
    load_shared();
    const int tiles = static_cast<int>(ceil_div(in_.p.K(), Shape::kClasses)), group = warp_ / 4;
    // A group starts to multiply when the one before is halfway: two multiply while the third computes scores. They
    // would do the same at the same time otherwise. All have the same number of turns.
#pragma unroll 1
    for (int tile = first_tile; tile - group < tiles; tile += tile_stride) {
      if (group > 0 || tile > first_tile) barrier_sync(1 + (group + kGroups - 1) % kGroups, 2 * Shape::kGroupThreads);
      const auto let_next_group_start = [&] {
        if (group + 1 < kGroups || tile - group + tile_stride < tiles)
          barrier_arrive(1 + group, 2 * Shape::kGroupThreads);
      };
      if (tile >= tiles) {
        let_next_group_start();
        continue;
      }
      product_.multiply(tile + tile_stride, let_next_group_start);
      first_class_ = tile * Shape::kClasses + warp_ % 4 * kWarpClasses;
      hold(warp_), hold(lane_);  // so that no address that depends on it takes registers from the product
      compute_rnorms();
      store_logits();
      if (cancelled_lanes_[0] | cancelled_lanes_[1]) store_cancelled();
    }
  }

 private:
  // Load what all tiles need, by all threads of the block.
  __device__ __forceinline__ void load_shared() {
    const int M = static_cast<int>(in_.p.M()), thread = static_cast<int>(threadIdx.x);
    product_.load_rows(first_row_);
#pragma unroll 1
    for (int i = thread; i < kSlots * kRows; i += Shape::kThreads) {
      const int j = i / kRows, row = i % kRows;
      float value = 0;
      if (row < rows_ && j == 0) value = load_tau(in_.p.tau) * in_.input_rnorms[first_row_ + row];
      if (row < rows_ && j > 0 && j < M) value = in_.input_dots[j * in_.ld + first_row_ + row];
      shared_.rows[row / 2][j * 2 + row % 2] = value;
    }
    if (warp_ + 1 < M) {
      float sum = 0;
      const T* delta = in_.p.displacements.data + warp_ * in_.p.d();
#pragma unroll 1
      for (int x = lane_ * kVector<T>; x < in_.p.d(); x += kWarp * kVector<T>) {
        float values[kVector<T>];
        load_vector<true>(delta, x, 0, values);
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) sum = fma(values[e], values[e], sum);
      }
      sum = warp_sum(sum);
      if (lane_ == 0) shared_.delta_squares[warp_] = sum;
    }
    __syncthreads();
  }

  // Compute R of the warp's classes and write it.
  __device__ __forceinline__ void compute_rnorms() {
    const int m = static_cast<int>(in_.p.m()), first_index = lane_ % 4 * 2;
    float own[2][2];  // of slots first_index + 1 and the next, for both classes; of slot 0 where they do not exist
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float square = product_.square(half);
      if (kSlots == 1) rnorms_[half][0] = clamped_rnorm(square);
      cancelled_lanes_[half] = 0;
#pragma unroll
      for (int e = 0; e < 2 && kSlots > 1; ++e) {
        const bool valid = first_index + e < m;
        const float delta_square = valid ? shared_.delta_squares[first_index + e] : 0.0f,
                    dot = valid ? product_.dot(half, e) : 0.0f;
        const float sum = square + delta_square + 2 * dot;
        own[half][e] = clamped_rnorm(sum);
        if (valid && class_of(half) < in_.p.K() && cancels(sum, square, delta_square)) own[half][e] = -1;
      }
    }
    if constexpr (kSlots > 1) {
      const bool any = own[0][0] < 0 || own[0][1] < 0 || own[1][0] < 0 || own[1][1] < 0;
      if (__any_sync(~0u, any)) compute_cancelled(own);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = class_of(half) < in_.p.K();
      float* to = center_rnorms_ + class_of(half);
      // Slot 8 does not exist, so that the last lane has slot 0.
      if (kSlots > 1) rnorms_[half][0] = __shfl_sync(~0u, own[half][1], lane_ | 3);
      if (inside && lane_ % 4 == 0) *to = rnorms_[half][0];
#pragma unroll
      for (int e = 0; e < 2 && kSlots > 1; ++e)
        if (inside && first_index + e < m) to[(first_index + e + 1) * in_.ldr] = own[half][e];
#pragma unroll
      for (int j = 1; j < kSlots; ++j)
        rnorms_[half][j] = __shfl_sync(~0u, own[half][(j - 1) % 2], (lane_ & ~3) + (j - 1) / 2);
    }
  }
  // Return this lane's class in one half of those of the warp.
  __device__ __forceinline__ int class_of(int half) const { return first_class_ + half * 8 + lane_ / 4; }

  // Replace each negative value by -R, computed by all lanes from the elements of w_k + delta_j.
  __device__ __forceinline__ void compute_cancelled(float (&own)[2][2]) {
    const int d = static_cast<int>(in_.p.d());
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair) {
      const int half = pair / 2, e = pair % 2;
      const unsigned lanes = __ballot_sync(~0u, (half ? e ? own[1][1] : own[1][0] : e ? own[0][1] : own[0][0]) < 0);
      half ? cancelled_lanes_[1] |= lanes : cancelled_lanes_[0] |= lanes;
#pragma unroll 1
      for (int other = 0; other < kWarp; ++other) {
        if (!(lanes >> other & 1)) continue;
        const T* w = in_.p.centers.data + int64_t{first_class_ + half * 8 + other / 4} * d;
        const T* delta = in_.p.displacements.data + (other % 4 * 2 + e) * d;
        const float rnorm = -clamped_rnorm(squared_norm_of_slot<true>(w, delta, d, lane_));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (other == lane_ && pair == i) own[i / 2][i % 2] = rnorm;
      }
    }
  }

  // Compute the logits of the warp's classes and write them, some rows at a time.
  __device__ __forceinline__ void store_logits() {
    auto& staged = shared_.staged[warp_];
    const int m = static_cast<int>(in_.p.m());  // the slot of a NaN may be one that does not exist
    const int64_t K = in_.p.K(), begin = int64_t{first_row_} * K + first_class_;
    const int classes = min(static_cast<int>(K) - first_class_, kWarpClasses);
#pragma unroll
    for (int first = 0; first < kRows; first += Shared::kStagedRows) {
      if (first >= rows_) break;
      __syncwarp();  // the rows before have been read
#pragma unroll
      for (int j = 0; j < Shared::kStagedRows / 8; j += 2) {
        float z[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int slots[4];
          score(product_.products(first / 8 + j + i), first + (j + i) * 8 + lane_ % 4 * 2, z[i], slots);
#pragma unroll
          for (int e = 0; e < 4 && kNeedSlots; ++e)
            staged.slots[(j + i) * 8 + lane_ % 4 * 2 + e % 2][lane_ / 4 + e / 2 * 8] =
                static_cast<uint8_t>(min(slots[e], m));
        }
        stage(staged, j * 8, z);
      }
      __syncwarp();
      const auto store = [&](auto ld, const auto* from, auto* to) {
        constexpr int kVector = 16 / static_cast<int>(sizeof(*from));
        to += begin + first * K;
        const bool aligned = (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(K) * sizeof(*to)) % 16 == 0;
        const auto copy = [&](auto part) {
          copy_class_rows<part, Shared::kStagedRows, kWarpClasses, ld>(from, to, K, rows_ - first, classes, lane_);
        };
        aligned ? copy(std::integral_constant<int, kVector>()) : copy(std::integral_constant<int, 1>());
      };
      hold(lane_);  // as above
      store(std::integral_constant<int, Shared::Staged::kLd>(), staged.logits[0], logits_);
      if constexpr (kNeedSlots) store(std::integral_constant<int, kWarpClasses>(), staged.slots[0], in_.slots);
    }
  }
  // Stage the logits of 16 rows.
  __device__ __forceinline__ void stage(typename Shared::Staged& staged, int row, const float (&z)[2][4]) const {
    if constexpr (sizeof(Z) == 2) {
      uint32_t pairs[4];  // of adjacent rows: a matrix of eight classes by eight rows each, which is transposed
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = pack<Z>(z[i / 2][i % 2 * 2], z[i / 2][i % 2 * 2 + 1]);
      store_matrix_x4_trans(&staged.logits[row + lane_ / 16 * 8 + lane_ % 8][lane_ / 8 % 2 * 8], pairs);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) staged.logits[row + i * 8 + lane_ % 4 * 2 + e % 2][lane_ / 4 + e / 2 * 8] = z[i][e];
    }
  }

  // Set z to the logits of two classes in turn and two adjacent rows each, and `slots` if they are needed. NaN wins, as
  // in torch.max; the lowest of equal slots wins.
  __device__ __forceinline__ void score(const float (&products)[4], int row, float (&z)[4], int (&slots)[4]) const {
    float values[Shared::kVectors * 4];  // of the rows
    load_sums<true>(shared_.rows[row / 2], 0, 0, values);
#pragma unroll
    for (int e = 0; e < 4; ++e) z[e] = products[e] * rnorms_[e / 2][0], slots[e] = 0;
#pragma unroll
    for (int j = 1; j < kSlots; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float score = (products[e] + values[j * 2 + e % 2]) * rnorms_[e / 2][j];
        if constexpr (kNeedSlots) {
          if (score > z[e] || score != score) z[e] = score, slots[e] = j;
        } else {
          z[e] = max_or_nan(z[e], score);
        }
      }
#pragma unroll
    for (int e = 0; e < 4; ++e) z[e] *= values[e % 2];
  }

  // Write the logits of classes with a cancelled pair, from the elements of w_k + delta_j.
  __device__ __forceinline__ void store_cancelled() const {
    __syncwarp();  // the other lanes have written R, and logits in place of these
#pragma unroll 1
    for (int c = 0; c < kWarpClasses; ++c) {
      if (!((c < 8 ? cancelled_lanes_[0] : cancelled_lanes_[1]) >> c % 8 * 4 & 15)) continue;
      store_cancelled_class<kNeedSlots>(in_, logits_, in_.p.K(), first_class_ + c, first_row_, rows_, lane_);
    }
  }

  const ScoreInputs<T>& in_;
  Z* logits_;
  float* center_rnorms_;
  int first_row_, rows_, first_class_ = 0, lane_, warp_;
  FusedProduct<Shape> product_;
  Shared& shared_;
  float rnorms_[2][kSlots];      // slots that do not exist repeat slot 0
  unsigned cancelled_lanes_[2];  // lanes whose pair cancels, for the lower and the upper classes
};

// Compute the logits [B, K] of the type Z, R [M, K] and, if kNeedSlots, the slots [B, K]; all blocks of a row tile
// write the same R.
//
// Grid: (tiles of rows, blocks of classes). Block: Shape::kThreads. Dynamic shared memory: fused_logits_bytes.
template <class Shape, class Z, bool kNeedSlots>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    fused_logits_kernel(ScoreInputs<typename Shape::T> in, Z* logits, float* center_rnorms) {
  if constexpr (!kHasWgmma) {
    trap();  // the host does not launch it
  } else {
    GISTOPS_ALIGNED_SHARED(1024, unsigned char, memory);
    const int row_tile = static_cast<int>(blockIdx.x), group = static_cast<int>(threadIdx.x) / Shape::kGroupThreads;
    FusedLogits<Shape, Z, kNeedSlots>(in, logits, center_rnorms, row_tile * Shape::kRows, memory)
        .run(static_cast<int>(blockIdx.y) * Shape::kGroups + group, static_cast<int>(gridDim.y) * Shape::kGroups);
  }
}

}  // namespace gistops::cuda
