// Tiles of matrices in shared memory, and the products of a warp's share of two tiles.
//
// A stage of the ring holds a slice of the summed dimension of each operand. Rows are padded so that neither ldmatrix
// nor plain loads meet a bank twice.
#pragma once
#include "problem.cuh"
#include "ptx.cuh"

namespace gistops::cuda {

// [kRows, kCols] elements of T, kPad more in each row.
template <class T, int kRows, int kCols, int kPad>
struct Tile {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kLd = kCols + kPad;
  static constexpr int kBytes = kRows * kLd * static_cast<int>(sizeof(T));
  static_assert(kCols % kVector == 0 && kLd * sizeof(T) % 16 == 0);

  // A walk over x by tiles, along its rows or down its columns, with zeros beyond its ends; a thread's part: one vector
  // of every kRowsAtOnce-th row. By all threads of the block. kVectors: x's rows begin at multiples of 16 bytes and
  // are whole vectors long, and the copies are asynchronous.
  template <int kThreads, bool kVectors>
  class Walk {
    static constexpr int kPerRow = kCols / kVector, kRowsAtOnce = kThreads / kPerRow;
    static_assert(kThreads % kPerRow == 0);

   public:
    __device__ Walk(const Global<T>& x, int64_t first_row, int64_t first_col) {
      const int row = static_cast<int>(threadIdx.x) / kPerRow, col = static_cast<int>(threadIdx.x) % kPerRow * kVector;
      to_ = row * kLd + col;
      from_ = x.data + (first_row + row) * x.ld + first_col + col;
      ld_ = x.ld;
      rows_ = x.rows - first_row - row, cols_ = x.cols - first_col - col;
    }

    __device__ __forceinline__ void load(T* tile) const {
      const int rows = cols_ > 0 ? static_cast<int>(min(rows_, int64_t{kRows})) : 0;  // of this thread's, those inside
      const T* from = from_;
#pragma unroll
      for (int r = 0; r < kRows; r += kRowsAtOnce, from += kRowsAtOnce * ld_) {
        if (kRows % kRowsAtOnce != 0 && to_ / kLd + r >= kRows) break;
        T* to = tile + to_ + r * kLd;
        if constexpr (kVectors) {
          copy_async_16(to, from, r < rows);
        } else {
          for (int e = 0; e < kVector; ++e) to[e] = r < rows && e < cols_ ? from[e] : narrow<T>(0);
        }
      }
    }

    __device__ __forceinline__ void along() { from_ += kCols, cols_ -= kCols; }
    __device__ __forceinline__ void down() { from_ += kRows * ld_, rows_ -= kRows; }

   private:
    const T* from_;
    int64_t ld_, rows_, cols_;  // rows_, cols_: from this thread's first element to x's ends
    int to_;
  };
};

// The stages of a ring in shared memory, in turn.
template <int kStages, int kBytes>
class Ring {
 public:
  __device__ explicit Ring(unsigned char* memory) : memory_(memory) {}
  __device__ __forceinline__ unsigned char* next() {
    unsigned char* stage = memory_ + at_;
    at_ = at_ == (kStages - 1) * kBytes ? 0 : at_ + kBytes;
    return stage;
  }

 private:
  unsigned char* memory_;
  int at_ = 0;
};

// Products of bf16 or f16 fragments on tensor cores: of A with 16 rows and kStep elements of the summed dimension in
// each, at a[row * ld + s], and of B with 8 columns and the summed dimension down them, at b[s * ld + col]; both in
// shared memory, at the warp's first row or column and the step's first element. Accumulators lie as in mma.m16n8:
// c[0..1] of row lane / 4, c[2..3] of 8 rows below; columns 2 (lane % 4) and the next.
template <class T>
struct Mma16 {
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
  // Two fragments of B side by side, with one instruction.
  static __device__ __forceinline__ void load_b2(B& x, B& y, const T* b, int ld, int lane) {
    uint32_t r[4];
    load_matrix_x4_trans(r, b + lane % 16 * ld + lane / 16 * 8);
    x.r[0] = r[0], x.r[1] = r[1], y.r[0] = r[2], y.r[1] = r[3];
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const A& a, const B& b) { mma_16816<T>(c, a.r, b.r); }
};

}  // namespace gistops::cuda
