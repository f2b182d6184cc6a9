// The product W f' of a kernel that reads every center once, with the sums that the norms of all slots need.
#pragma once
#include "norms_half.cuh"
#include "tile.cuh"

namespace gistops::cuda {

// The displacements and a tile of rows of f stay in the shared memory of a block. Each of its groups of four warps
// takes 64 classes after 64 classes, on its own: while one multiplies, others compute scores. The centers go from
// global memory to registers, where wgmma reads them; no other warp needs them.
template <class T_, int kSlots_>
struct FusedShape {
  using T = T_;
  static_assert(sizeof(T) == 2 && kSlots_ <= 8);
  static constexpr int kSlots = kSlots_;
  static constexpr int kGroups = 3, kGroupThreads = 4 * kWarp, kThreads = kGroups * kGroupThreads;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kClasses = 64, kWarpClasses = 16;  // of a tile
  static constexpr int kRows = 128;
  static constexpr int kDots = kSlots > 1 ? 8 : 0;  // columns of w . delta, before those of the rows
  static constexpr int kColumns = kDots + kRows;
  static constexpr int kBlock = 64, kStep = 32;  // dims of a block of f, and of the centers that a lane loads at a time
  using F = SwizzledTile<T, kColumns, kBlock>;

  static __host__ __device__ int64_t f_bytes(int64_t d) { return ceil_div(d, kBlock) * F::kBlockBytes; }
};

// Sums of a tile: those of a lane are of classes lane / 4 and lane / 4 + 8 of its warp.
//
// The order of the dims does not matter as long as it is the same in both factors. Lane l loads eight adjacent dims of
// a step, four words, and interleaves the elements of two words at a time; f lies in shared memory in the same order.
// The interleaved words are new registers: wgmma wants the words of two classes side by side, where a load cannot put
// them.
template <class Shape>
class FusedProduct {
  using T = typename Shape::T;
  using F = typename Shape::F;
  static constexpr int kStep = Shape::kStep, kSteps = Shape::kBlock / kStep, kPart = kVector<T>;
  static_assert(kStep == 4 * kPart && kSteps == 2);

 public:
  static constexpr int kDotFragments = Shape::kDots / 8, kFragments = Shape::kColumns / 8;

  // memory: Shape::f_bytes(d) bytes, at a multiple of 1024
  __device__ FusedProduct(const Problem<T>& p, unsigned char* memory) : p_(p), f_(reinterpret_cast<T*>(memory)) {
    lane_ = static_cast<int>(threadIdx.x) % kWarp, warp_ = static_cast<int>(threadIdx.x) / kWarp;
  }

  // Start to load the first block of the group's first tile.
  __device__ __forceinline__ void start(int tile) {
    prefetch(tile);
    point_to(tile);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) load(step, dims());
  }

  // Fill the shared memory, by all threads of the block. A barrier must follow.
  __device__ __forceinline__ void load_rows(int first_row) const {
    const int units = blocks() * kSteps * (Shape::kColumns / 8);
#pragma unroll 8
    for (int unit = warp_; unit < units; unit += Shape::kWarps) {  // eight columns by kStep dims
      const int column = unit % (Shape::kColumns / 8) * 8 + lane_ / 4, dim = unit / (Shape::kColumns / 8) * kStep;
      const bool is_delta = column < Shape::kDots;
      const int row = is_delta ? column : first_row + column - Shape::kDots;
      const GlobalMatrix<T>& from = is_delta ? p_.displacements : p_.input;
      uint4 vector = {0, 0, 0, 0};
      if (row < from.rows && dim + part() < dims())
        vector = *reinterpret_cast<const uint4*>(from.data + row * from.ld + dim + part());
      const uint32_t words[4] = {even(vector.x, vector.y), odd(vector.x, vector.y), even(vector.z, vector.w),
                                 odd(vector.z, vector.w)};
#pragma unroll
      for (int q = 0; q < 4; ++q)  // word q of a lane is word lane % 4 of vector q
        *reinterpret_cast<uint32_t*>(f_ + F::at(column, dim + q * kPart + lane_ % 4 * 2)) = words[q];
    }
    fence_wgmma_operands();
  }

  // Compute the sums of the tile whose first block is being loaded, and start to load that of the next tile. Call
  // `halfway` after half of the dims.
  template <class Halfway>
  __device__ __forceinline__ void multiply(int next_tile, const Halfway& halfway) {
    hold(lane_);  // so that no address that depends on it takes registers from the product
    prefetch(next_tile);
    squares_[0][0] = squares_[0][1] = squares_[1][0] = squares_[1][1] = 0;
    Operands operands[kSteps] = {};
    WgmmaMatrix f = wgmma_matrix(f_, 16, 1024);
#pragma unroll 1
    for (int block = 0, left = dims() - Shape::kBlock; block < blocks(); ++block, left -= Shape::kBlock) {
      if (left <= 0) {
        point_to(next_tile), left = dims();
      } else {
        row_[0] += Shape::kBlock, row_[1] += Shape::kBlock;
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        interleave(operands[step], centers_[step]);
        load(step, left);
        add_step_squares(operands[step]);
        constexpr int kStepBytes = kStep * static_cast<int>(sizeof(T));
        wgmma_fence();
        wgmma<T>(sums_, operands[step].first, advance(f, step * kStepBytes), block > 0 || step > 0);
        wgmma<T>(sums_, operands[step].second, advance(f, step * kStepBytes + kStepBytes / 2), true);
        wgmma_commit();
        wgmma_wait<1>();
        hold(operands[1 - step]);  // of the step before, which is complete
      }
      f = advance(f, F::kBlockBytes);
      if (block == (blocks() - 1) / 2) halfway();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < kFragments; ++j) cuda::hold(sums_[j]);
    hold(operands[kSteps - 1]);
  }

  // Return |w|^2 of class lane / 4 + 8 half.
  __device__ __forceinline__ float square(int half) const {
    float x = squares_[half][0] + squares_[half][1];
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
  // Return w . delta of this class and displacement 2 (lane % 4) + e.
  __device__ __forceinline__ float dot(int half, int e) const { return sums_[0][half * 2 + e]; }
  // Return the products of rows 8 j + 2 (lane % 4) and the next, with the two classes in turn.
  __device__ __forceinline__ const float (&products(int j) const)[4] { return sums_[kDotFragments + j]; }

 private:
  // The dims of a step that a lane loads, of its two classes.
  struct Centers {
    uint4 vectors[2];
  };
  // The left factors of a step.
  struct Operands {
    uint32_t first[4], second[4];
  };
  static __device__ __forceinline__ void hold(int& x) { cuda::hold(x); }
  static __device__ __forceinline__ void hold(Operands& x) { cuda::hold(x.first), cuda::hold(x.second); }

  // Return the first, or the second, elements of two words.
  static __device__ __forceinline__ uint32_t even(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
  static __device__ __forceinline__ uint32_t odd(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

  __device__ __forceinline__ int dims() const { return static_cast<int>(p_.d()); }
  __device__ __forceinline__ int blocks() const { return (dims() + Shape::kBlock - 1) / Shape::kBlock; }
  __device__ __forceinline__ int part() const { return lane_ % 4 * kPart; }  // this lane's of a step

  // Bring the warp's classes of a tile to the L2 cache, so that few loads in flight cover its latency.
  __device__ __forceinline__ void prefetch(int tile) const {
    constexpr int kLine = 128;
    const int64_t first = int64_t{tile} * Shape::kClasses + warp_ % 4 * Shape::kWarpClasses;
    const int64_t classes = min(int64_t{Shape::kWarpClasses}, p_.K() - first);
    const char* begin = reinterpret_cast<const char*>(p_.centers.data + first * p_.centers.ld);
    const int bytes = static_cast<int>(classes * p_.centers.ld) * static_cast<int>(sizeof(T));
#pragma unroll 1
    for (int at = lane_ * kLine; at < bytes; at += kWarp * kLine) prefetch_l2(begin + at);
  }
  __device__ __forceinline__ void point_to(int tile) {
    const int first = tile * Shape::kClasses + warp_ % 4 * Shape::kWarpClasses + lane_ / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)  // classes past the end repeat the last
      row_[half] = p_.centers.data + min(first + 8 * half, static_cast<int>(p_.K()) - 1) * p_.centers.ld + part();
  }
  // Start to load a step of the block at row_. left: the dims from there on
  __device__ __forceinline__ void load(int step, int left) {
    const uint4 zeros = {0, 0, 0, 0};
    const bool inside = step * kStep + part() < left;
    if (left >= Shape::kBlock) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        centers_[step].vectors[half] = *reinterpret_cast<const uint4*>(row_[half] + step * kStep);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        centers_[step].vectors[half] = inside ? *reinterpret_cast<const uint4*>(row_[half] + step * kStep) : zeros;
    }
  }
  // Set the left factors of a step from the loaded words.
  __device__ __forceinline__ void interleave(Operands& to, const Centers& from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4& w = from.vectors[half];
      to.first[half] = even(w.x, w.y), to.first[half + 2] = odd(w.x, w.y);
      to.second[half] = even(w.z, w.w), to.second[half + 2] = odd(w.z, w.w);
    }
    hold(to);
  }
  // Add the squares of the left factors of a step. After `load`: before it, ptxas would move the sums of the next step
  // before the products of this one, which would then wait for the next step's loads.
  __device__ __forceinline__ void add_step_squares(const Operands& step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      add_squares<T>(step.first[half], squares_[half]), add_squares<T>(step.first[half + 2], squares_[half]);
      add_squares<T>(step.second[half], squares_[half]), add_squares<T>(step.second[half + 2], squares_[half]);
    }
  }

  const Problem<T>& p_;
  T* f_;
  int lane_, warp_;
  const T* row_[2];
  Centers centers_[kSteps];
  float squares_[2][2];
  float sums_[kFragments][4];
};

}  // namespace gistops::cuda
