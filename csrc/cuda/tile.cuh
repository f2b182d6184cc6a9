// Tiles of matrices in shared memory, and the products of a warp's share of two tiles.
//
// A stage of the ring holds, of each operand, 128 bytes of the summed dimension (the forward: rows of centres and of
// features as they lie in memory) or a slice of it (the gradient of the centres: both operands summed over their rows).
// Rows are padded so that neither ldmatrix nor plain loads meet a bank twice.
#pragma once
#include "device.cuh"
#include "ptx.cuh"

namespace gistops::cuda {

// A row-major matrix in global memory.
template <class T>
struct Global {
  const T* data;
  int64_t rows, cols, ld;
};

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

// How a pair of operands is multiplied. kStep: elements of the summed dimension that one fragment takes. A and B are
// pointers into shared memory, at the warp's first row of each and the step's first element:
//   rows of the summed dimension within a row (by_row):      a[row * ld + s], b[col * ld + s]
//   or in a column (by_column):                              a[s * ld + row], b[s * ld + col]
// Accumulators lie as in mma.m16n8: c[0..1] of row lane / 4, c[2..3] of 8 rows below; columns 2 (lane % 4) and the
// next.
enum class Along { row, column };

// bf16 and f16 on tensor cores.
template <class T>
struct Mma16 {
  using Element = T;
  using Accumulator = float;
  static constexpr int kStep = 16;
  struct A {
    uint32_t r[4];
  };
  struct B {
    uint32_t r[2];
  };

  template <Along along>
  static __device__ __forceinline__ A load_a(const T* a, int ld, int lane) {
    A x;
    if constexpr (along == Along::row) {
      load_matrix_x4(x.r, a + lane % 16 * ld + lane / 16 * 8);
    } else {
      load_matrix_x4_trans(x.r, a + (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8);
    }
    return x;
  }
  template <Along along>
  static __device__ __forceinline__ B load_b(const T* b, int ld, int lane) {
    B x;
    lane %= 16;  // only the first 16 lanes' addresses are used; the others' must be valid
    if constexpr (along == Along::row) {
      load_matrix_x2(x.r, b + lane % 8 * ld + lane / 8 * 8);
    } else {
      load_matrix_x2_trans(x.r, b + lane * ld);
    }
    return x;
  }
  // Two fragments of B side by side, with one instruction.
  template <Along along>
  static __device__ __forceinline__ void load_b2(B& x, B& y, const T* b, int ld, int lane) {
    uint32_t r[4];
    if constexpr (along == Along::row) {
      load_matrix_x4(r, b + (lane / 16 * 8 + lane % 8) * ld + lane / 8 % 2 * 8);
    } else {
      load_matrix_x4_trans(r, b + lane % 16 * ld + lane / 16 * 8);
    }
    x.r[0] = r[0], x.r[1] = r[1], y.r[0] = r[2], y.r[1] = r[3];
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const A& a, const B& b) { mma_16816<T>(c, a.r, b.r); }
  // Adds this lane's share of the squares of rows lane / 4 and lane / 4 + 8.
  static __device__ __forceinline__ void add_squares(float (&sum)[2], const A& a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x, y;
      unpack(a.r[i], x, y);
      sum[i % 2] = fmaf(x, x, fmaf(y, y, sum[i % 2]));
    }
  }

 private:
  static __device__ __forceinline__ void unpack(uint32_t pair, float& x, float& y) {
    if constexpr (__is_same(T, bf16)) {  // a bf16 is the upper half of a float
      x = __uint_as_float(pair << 16), y = __uint_as_float(pair & 0xffff0000u);
    } else {
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
      x = both.x, y = both.y;
    }
  }
};

// What one lane reads of 32- and 64-bit elements, where ldmatrix does not help.
template <Along along, class T>
__device__ __forceinline__ T element(const T* x, int ld, int index, int s) {
  return along == Along::row ? x[index * ld + s] : x[s * ld + index];
}

// float32 on tensor cores, rounded to tf32; norms from the unrounded values.
struct MmaTf32 {
  using Element = float;
  using Accumulator = float;
  static constexpr int kStep = 8;
  struct A {
    float r[4];
  };
  struct B {
    uint32_t r[2];
  };

  template <Along along>
  static __device__ __forceinline__ A load_a(const float* a, int ld, int lane) {
    const int g = lane / 4, t = lane % 4;
    return {{element<along>(a, ld, g, t), element<along>(a, ld, g + 8, t), element<along>(a, ld, g, t + 4),
             element<along>(a, ld, g + 8, t + 4)}};
  }
  template <Along along>
  static __device__ __forceinline__ B load_b(const float* b, int ld, int lane) {
    const int g = lane / 4, t = lane % 4;
    return {{to_tf32(element<along>(b, ld, g, t)), to_tf32(element<along>(b, ld, g, t + 4))}};
  }
  template <Along along>
  static __device__ __forceinline__ void load_b2(B& x, B& y, const float* b, int ld, int lane) {
    x = load_b<along>(b, ld, lane);
    y = load_b<along>(b + (along == Along::row ? 8 * ld : 8), ld, lane);
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const A& a, const B& b) {
    const uint32_t r[4] = {to_tf32(a.r[0]), to_tf32(a.r[1]), to_tf32(a.r[2]), to_tf32(a.r[3])};
    mma_1688_tf32(c, r, b.r);
  }
  static __device__ __forceinline__ void add_squares(float (&sum)[2], const A& a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i % 2] = fmaf(a.r[i], a.r[i], sum[i % 2]);
  }
};

// float32 and float64 in full precision, without tensor cores, in the same layout of accumulators.
template <class T>
struct Fma {
  using Element = T;
  using Accumulator = T;
  static constexpr int kStep = 4;
  struct A {
    T r[2][kStep];
  };
  struct B {
    T r[2][kStep];
  };

  template <Along along>
  static __device__ __forceinline__ A load_a(const T* a, int ld, int lane) {
    A x;
#pragma unroll
    for (int s = 0; s < kStep; ++s) {
      x.r[0][s] = element<along>(a, ld, lane / 4, s);
      x.r[1][s] = element<along>(a, ld, lane / 4 + 8, s);
    }
    return x;
  }
  template <Along along>
  static __device__ __forceinline__ B load_b(const T* b, int ld, int lane) {
    B x;
#pragma unroll
    for (int s = 0; s < kStep; ++s) {
      x.r[0][s] = element<along>(b, ld, lane % 4 * 2, s);
      x.r[1][s] = element<along>(b, ld, lane % 4 * 2 + 1, s);
    }
    return x;
  }
  template <Along along>
  static __device__ __forceinline__ void load_b2(B& x, B& y, const T* b, int ld, int lane) {
    x = load_b<along>(b, ld, lane);
    y = load_b<along>(b + (along == Along::row ? 8 * ld : 8), ld, lane);
  }
  static __device__ __forceinline__ void multiply(T (&c)[4], const A& a, const B& b) {
#pragma unroll
    for (int s = 0; s < kStep; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = fma(a.r[i / 2][s], b.r[i % 2][s], c[i]);
    }
  }
  // The four lanes of a row hold the same elements: each takes those of its own remainder.
  static __device__ __forceinline__ void add_squares(T (&sum)[2], const A& a) {
    const int mine = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int s = 0; s < kStep; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i) sum[i] = fma(a.r[i][s], s == mine ? a.r[i][s] : T(0), sum[i]);
    }
  }
};

}  // namespace gistops::cuda
