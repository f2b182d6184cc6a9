// Tiles of matrices in shared memory, the ring of stages that holds them, and tensor-core products of two tiles.
//
// A stage holds one slice of the summed dimension of both operands. Rows are padded, so that neither ldmatrix nor plain
// loads have bank conflicts.
#pragma once
#include "problem.cuh"
#include "ptx.cuh"

namespace gistops::cuda {

// A tile of kRows x kCols elements of T; each row is followed by kPad elements of padding.
template <class T, int kRows, int kCols, int kPad>
struct Tile {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kLd = kCols + kPad;
  static constexpr int kBytes = kRows * kLd * static_cast<int>(sizeof(T));
  static_assert(kCols % kVector == 0 && kLd * sizeof(T) % 16 == 0);

  // Return the index of an element.
  static __device__ __forceinline__ int at(int row, int col) { return row * kLd + col; }

  // Loads one tile of x after another, along its rows or down its columns; elements outside x are zero. All threads of
  // the block take part: a thread copies one vector of every kRowStride-th row.
  // kVectors: the rows of x begin at multiples of 16 bytes and are whole vectors long; the copies are asynchronous.
  template <int kThreads, bool kVectors>
  class Loader {
    static constexpr int kVectorsPerRow = kCols / kVector, kRowStride = kThreads / kVectorsPerRow;
    static_assert(kThreads % kVectorsPerRow == 0);

   public:
    __device__ Loader(const GlobalMatrix<T>& x, int64_t first_row, int64_t first_col) {
      const int row = static_cast<int>(threadIdx.x) / kVectorsPerRow,
                col = static_cast<int>(threadIdx.x) % kVectorsPerRow * kVector;
      to_ = row * kLd + col;
      from_ = x.data + (first_row + row) * x.ld + first_col + col;
      ld_ = x.ld;
      rows_ = x.rows - first_row - row, cols_ = x.cols - first_col - col;
    }

    __device__ __forceinline__ void load(T* tile) const {
      const int rows = cols_ > 0 ? static_cast<int>(min(rows_, int64_t{kRows})) : 0;  // from this thread's row on
      const T* from = from_;
#pragma unroll
      for (int r = 0; r < kRows; r += kRowStride, from += kRowStride * ld_) {
        if (kRows % kRowStride != 0 && to_ / kLd + r >= kRows) break;
        T* to = tile + to_ + r * kLd;
        if constexpr (kVectors) {
          copy_async_16(to, from, r < rows);
        } else {
          for (int e = 0; e < kVector; ++e) to[e] = r < rows && e < cols_ ? from[e] : narrow<T>(0);
        }
      }
    }

    __device__ __forceinline__ void advance_cols() { from_ += kCols, cols_ -= kCols; }
    __device__ __forceinline__ void advance_rows() { from_ += kRows * ld_, rows_ -= kRows; }

   private:
    const T* from_;
    int64_t ld_, rows_, cols_;  // rows_, cols_: from this thread's first element to the ends of x
    int to_;
  };
};

// A tile of 16-bit elements in blocks of 64 columns, each of rows of 128 bytes, as wgmma reads them: without padding,
// but vector v of row r is where vector v ^ r % 8 would be. The address is a multiple of 1024. Neither eight vectors of
// one column nor those of one row have bank conflicts.
template <class T, int kRows, int kCols>
struct SwizzledTile {
  static_assert(sizeof(T) == 2 && kCols % 64 == 0 && kRows % 8 == 0);
  static constexpr int kVector = 8, kBlockCols = 64;
  static constexpr int kBlockBytes = kRows * kBlockCols * 2, kBytes = kCols / kBlockCols * kBlockBytes;

  static __device__ __forceinline__ int at(int row, int col) {
    const unsigned r = row, c = col,
                   vector = (c / kVector ^ r) % (kBlockCols / kVector);  // unsigned: no sign to handle
    return static_cast<int>((c / kBlockCols * kRows + r) * kBlockCols + vector * kVector + c % kVector);
  }

  // As Tile's. The copies are asynchronous.
  template <int kThreads>
  class Loader {
    static constexpr int kVectorsPerRow = kCols / kVector, kRowStride = kThreads / kVectorsPerRow;
    static_assert(kThreads % kVectorsPerRow == 0 && kRowStride % 8 == 0 && kRows % kRowStride == 0);

   public:
    __device__ Loader(const GlobalMatrix<T>& x, int64_t first_row, int64_t first_col) {
      const int row = static_cast<int>(threadIdx.x) / kVectorsPerRow,
                col = static_cast<int>(threadIdx.x) % kVectorsPerRow * kVector;
      to_ = at(row, col);
      from_ = x.data + (first_row + row) * x.ld + first_col + col;
      ld_ = x.ld;
      rows_ = static_cast<int>(min(x.rows - first_row, int64_t{1} << 30)) - row, inside_ = first_col + col < x.cols;
    }

    __device__ __forceinline__ void load(T* tile) const {
      const T* from = from_;
#pragma unroll
      for (int r = 0; r < kRows; r += kRowStride, from += kRowStride * ld_)
        copy_async_16(tile + to_ + r * kBlockCols, from, inside_ && r < rows_);
    }

    __device__ __forceinline__ void advance_rows() { from_ += kRows * ld_, rows_ -= kRows; }

   private:
    const T* from_;
    int64_t ld_;
    int rows_, to_;  // rows_: from this thread's first to the end of x
    bool inside_;
  };
};

// Hands out the stages of a ring in shared memory, in turn.
template <int kStages, int kBytes>
class StageRing {
 public:
  __device__ explicit StageRing(unsigned char* memory) : memory_(memory) {}
  __device__ __forceinline__ unsigned char* next() {
    unsigned char* stage = memory_ + at_;
    at_ = at_ == (kStages - 1) * kBytes ? 0 : at_ + kBytes;
    return stage;
  }

 private:
  unsigned char* memory_;
  int at_ = 0;
};

// Products of bf16 or f16 fragments on tensor cores.
//   A: 16 rows by kStep elements of the summed dimension, element (row, s) at a[row * ld + s]
//   B: kStep elements of the summed dimension by 8 columns, element (s, col) at b[s * ld + col]
// Both lie in shared memory; a and b point to the warp's first row or column and the first element of the step.
// Accumulators lie as in mma.m16n8: c[0..1] belong to row lane / 4, c[2..3] to the row 8 below; columns 2 (lane % 4)
// and the next.
template <class T>
struct MmaPolicy {
  static constexpr int kStep = 16;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2];
  };

  static __device__ __forceinline__ A load_a(const T* a, int ld, int lane) {
    A x;
    load_matrix_x4(x.r, a + lane % 16 * ld + lane / 16 * 8);
    return x;
  }
  // Load two adjacent fragments of B with one instruction.
  static __device__ __forceinline__ void load_b2(B& x, B& y, const T* b, int ld, int lane) {
    uint32_t r[4];
    load_matrix_x4_trans(r, b + lane % 16 * ld + lane / 16 * 8);
    x.r[0] = r[0], x.r[1] = r[1], y.r[0] = r[2], y.r[1] = r[3];
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const A& a, const B& b) { mma_16816<T>(c, a.r, b.r); }
};

}  // namespace gistops::cuda
