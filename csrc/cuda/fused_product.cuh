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
  static constexpr int kStep = 32;                  // dims
  static constexpr int kBuffers = 2;                // steps of centers in registers
  using F = SwizzledTile<T, kDots + kRows, 64>;

  static __host__ __device__ int64_t f_bytes(int64_t d) { return ceil_div(d, F::kBlockCols) * F::kBlockBytes; }
};

// Sums of a tile: those of a lane are of classes lane / 4 and lane / 4 + 8 of its warp.
//
// The order of the dims does not matter as long as it is the same in both factors. Lane l loads eight adjacent dims of
// a step, four words, and interleaves the elements of two words at a time; f lies in shared memory in the same order.
// The interleaved words are new registers, so that those of a load have no use before it is complete.
template <class Shape>
class FusedProduct {
  using T = typename Shape::T;
  using F = typename Shape::F;
  static constexpr int kStep = Shape::kStep, kBuffers = Shape::kBuffers;
  static_assert(kStep == kWarp / 8 * kVector<T> && kBuffers % 2 == 0);

 public:
  static constexpr int kDotFragments = Shape::kDots / 8, kFragments = kDotFragments + Shape::kRows / 8;

  // memory: Shape::f_bytes(d) bytes, at a multiple of 1024
  __device__ FusedProduct(const Problem<T>& p, unsigned char* memory) : p_(p), f_(reinterpret_cast<T*>(memory)) {
    lane_ = static_cast<int>(threadIdx.x) % kWarp, warp_ = static_cast<int>(threadIdx.x) / kWarp;
  }

  // Start to load the first steps of the group's first tile.
  __device__ __forceinline__ void start(int tile) {
    prefetch(tile);
    point_to(tile);
#pragma unroll
    for (int step = 0; step < kBuffers; ++step)
      if (step < steps()) load(buffers_[step], step);
  }

  // Fill the shared memory, by all threads of the block. A barrier must follow.
  __device__ __forceinline__ void load_rows(int64_t first_row) const {
    constexpr int kColumns = Shape::kDots + Shape::kRows;
    const int units = steps() * (kColumns / 8);
#pragma unroll 4
    for (int unit = warp_; unit < units; unit += Shape::kWarps) {  // eight columns by kStep dims
      const int column = unit % (kColumns / 8) * 8 + lane_ / 4, dim = unit / (kColumns / 8) * kStep;
      const bool is_delta = column < Shape::kDots;
      const int64_t row = is_delta ? column : first_row + column - Shape::kDots;
      const GlobalMatrix<T>& from = is_delta ? p_.displacements : p_.input;
      const int x = dim + lane_ % 4 * 8;
      uint4 vector = {0, 0, 0, 0};
      if (row < from.rows && x < dims()) vector = *reinterpret_cast<const uint4*>(from.data + row * from.ld + x);
      const uint32_t words[4] = {even(vector.x, vector.y), odd(vector.x, vector.y), even(vector.z, vector.w),
                                 odd(vector.z, vector.w)};
#pragma unroll
      for (int q = 0; q < 4; ++q)  // word q of a lane is word l % 4 of vector q
        *reinterpret_cast<uint32_t*>(f_ + F::at(column, dim + q * 8 + lane_ % 4 * 2)) = words[q];
    }
    fence_wgmma_operands();
  }

  // Compute the sums of the tile whose first steps are being loaded, and start to load those of the next tile.
  __device__ __forceinline__ void multiply(int next_tile) {
    hold(lane_);
    prefetch(next_tile);
    squares_[0][0] = squares_[0][1] = squares_[1][0] = squares_[1][1] = 0;
    Operands operands[2] = {};
#pragma unroll 1
    for (int step = 0; step < padded_steps(); step += kBuffers) {
#pragma unroll
      for (int buffer = 0; buffer < kBuffers; ++buffer)
        multiply_step(step + buffer, buffer, operands[buffer % 2], operands[(buffer + 1) % 2], next_tile);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < kFragments; ++j) hold(sums_[j]);
    hold(operands[0].first), hold(operands[0].second), hold(operands[1].first), hold(operands[1].second);
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
  // Return the first, or the second, elements of two words.
  static __device__ __forceinline__ uint32_t even(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
  static __device__ __forceinline__ uint32_t odd(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

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
  __device__ __forceinline__ int dims() const { return static_cast<int>(p_.d()); }
  __device__ __forceinline__ int steps() const { return (dims() + kStep - 1) / kStep; }
  // Return a multiple of kBuffers, so that a step has the same buffer in every tile.
  __device__ __forceinline__ int padded_steps() const { return (steps() + kBuffers - 1) / kBuffers * kBuffers; }
  __device__ __forceinline__ int part() const { return lane_ % 4 * kVector<T>; }
  __device__ __forceinline__ void load(Centers& to, int step) const {
    const int x = step * kStep;
    const bool inside = x + part() < dims();
    const uint4 zeros = {0, 0, 0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half)
      to.vectors[half] = inside ? *reinterpret_cast<const uint4*>(row_[half] + x) : zeros;
  }

  // While the step before is multiplied, the squares of this one are added; later steps are being loaded.
  // last: the operands of the step before, which are in use until it is complete
  __device__ __forceinline__ void multiply_step(int step, int buffer, Operands& own, Operands& last, int next_tile) {
    const bool exists = step < steps();
    if (exists) {
      const uint4(&w)[2] = buffers_[buffer].vectors;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        own.first[half] = even(w[half].x, w[half].y), own.first[half + 2] = odd(w[half].x, w[half].y);
        own.second[half] = even(w[half].z, w[half].w), own.second[half + 2] = odd(w[half].z, w[half].w);
        add_squares<T>(w[half].x, squares_[half]), add_squares<T>(w[half].y, squares_[half]);
        add_squares<T>(w[half].z, squares_[half]), add_squares<T>(w[half].w, squares_[half]);
      }
    }
    int ahead = step + kBuffers;
    if (ahead >= padded_steps()) {
      ahead -= padded_steps();
      if (buffer == 0) point_to(next_tile);
    }
    if (ahead < steps()) load(buffers_[buffer], ahead);
    if (exists) {
      constexpr int kElementBytes = sizeof(T), kBlockElements = F::kBlockBytes / kElementBytes;
      const WgmmaMatrix f =
          advance(wgmma_matrix(f_ + step / 2 * kBlockElements, 16, 1024), buffer % 2 * kStep * kElementBytes);
      wgmma_fence();
      wgmma<T>(sums_, own.first, f, step > 0);
      wgmma<T>(sums_, own.second, advance(f, kStep / 2 * kElementBytes), true);
      wgmma_commit();
      wgmma_wait<1>();
      hold(last.first), hold(last.second);
    }
  }

  const Problem<T>& p_;
  T* f_;
  int lane_, warp_;
  const T* row_[2];
  Centers buffers_[kBuffers];
  float squares_[2][2];
  float sums_[kFragments][4];
};

}  // namespace gistops::cuda
