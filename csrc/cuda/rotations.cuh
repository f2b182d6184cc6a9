// Rotations in a loss: slot j of class k has the product P + X[i, 0] Y[0, j, k] + X[i, j] Y[1, j, k] with row i, and
// the norm of its center. The kernels here add the terms to the products, and find the gradients of X and Y from the
// scores.
#pragma once
#include <algorithm>

#include "reduce_partials.cuh"
#include "routing.cuh"
#include "subcenters.cuh"

namespace gistops::cuda {

// The coefficients of all rows and of a chunk of classes.
template <class S>
struct Rotations {
  const S *x, *y;   // [B, slots], [2, slots, ldy]
  int64_t slots;    // M
  int64_t K, B;     // classes of the chunk, rows
  int64_t ld, ldy;  // row lengths of class-major tensors and of y

  __device__ __forceinline__ S x_of(int64_t i, int64_t j) const { return i < B ? x[i * slots + j] : S(0); }
  __device__ __forceinline__ S y_of(int part, int64_t j, int64_t k) const { return y[(part * slots + j) * ldy + k]; }
};

// A warp takes kClasses adjacent classes and 128 rows, so that it loads X once for them.
struct AddRotationsShape {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kRows = 4 * kWarp, kClasses = 4;
};

// Add the largest term of each pair to its product [K, ld], and set its slot [K, ld]: the lowest that attains the
// maximum. The term of slot 0 is 0. NaN is the largest.
//
// Grid: (tiles of 32 classes, tiles of 128 rows). Block: 256 threads.
template <class S>
__global__ void __launch_bounds__(AddRotationsShape::kThreads)
    add_rotations_kernel(Rotations<S> in, S* products, uint8_t* slots) {
  using Shape = AddRotationsShape;
  constexpr int kClasses = Shape::kClasses;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * Shape::kWarps + warp) * kClasses;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * Shape::kRows + lane * 4;
  if (first >= in.K || i >= in.ld) return;
  S x0[4], best[kClasses][4] = {};
  uint32_t slot[kClasses][4] = {};
#pragma unroll
  for (int e = 0; e < 4; ++e) x0[e] = in.x_of(i + e, 0);
#pragma unroll 1
  for (int j = 1; j < static_cast<int>(in.slots); ++j) {
    S xj[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) xj[e] = in.x_of(i + e, j);
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      const int64_t k = min(first + c, in.K - 1);
      const S a = in.y_of(0, j, k), b = in.y_of(1, j, k);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const S term = fma(xj[e], b, x0[e] * a);
        if (term > best[c][e] || (term != term && best[c][e] == best[c][e])) best[c][e] = term, slot[c][e] = j;
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kClasses; ++c) {
    if (first + c >= in.K) break;
    S* to = products + (first + c) * in.ld + i;
    S product[4];
    load_sums<true>(to, 0, 0, product);
#pragma unroll
    for (int e = 0; e < 4; ++e) product[e] += best[c][e];
    store_sums<true>(to, 0, 0, product);
    *reinterpret_cast<uint32_t*>(slots + (first + c) * in.ld + i) =
        slot[c][0] | slot[c][1] << 8 | slot[c][2] << 16 | slot[c][3] << 24;
  }
}

// kSlots: slots whose sums a lane holds; more take several passes over the classes.
struct RotationGradsShape {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp, kRows = 4 * kWarp, kSlots = 4;
};

// Partials of the gradients of the coefficients:
//
//   x [groups, slots, ld]        of sum_k H[k, i] Y[0, j*, k] for j = 0, else of sum_{k: j* = j} H[k, i] Y[1, j, k]
//   y [row tiles, 2, slots, K]   of sum_{i: j* = j} H[k, i] X[i, 0], and of sum_{i: j* = j} H[k, i] X[i, j]; slot 0
//   unset
template <class S>
struct RotationGradPartials {
  S *x, *y;
};

// Compute the partials of a chunk. H is not read but computed again, because it is rounded in half precision, and these
// gradients are sums in float32. Grid and groups: those of a RoutingShape of tiles of eight classes and 128 rows.
// Block: 256 threads.
template <class T>
__global__ void __launch_bounds__(RotationGradsShape::kThreads, 2)
    rotation_grads_kernel(RoutingShape shape, Rotations<Sum<T>> in, GradSource<T> source,
                          RotationGradPartials<Sum<T>> out) {
  using S = Sum<T>;
  using Shape = RotationGradsShape;
  constexpr int kSlots = Shape::kSlots, kWarps = Shape::kWarps;
  // The gradient of each row, times tau / |f_i|.
  __shared__ SoftmaxGradRow<S> rows[Shape::kRows];
  alignas(16) __shared__ S partial[kWarps][kSlots + 1][Shape::kRows];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int M = static_cast<int>(in.slots);
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * Shape::kRows, i = first_row + lane * 4;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * shape.tiles_per_group * kWarps;
  const int64_t end = min(begin + shape.tiles_per_group * kWarps, in.K);
  if (thread < Shape::kRows) {
    const int64_t row = first_row + thread;
    SoftmaxGradRow<S> grad = row < in.B ? source.softmax.row(row) : source.softmax.no_row();
    const S scale = row < in.B ? load_tau(source.p.tau) * source.input_rnorms[row] : S(0);
    grad.factor *= scale, grad.weight_grad *= scale, grad.target_grad *= grad.by_logit * scale;
    rows[thread] = grad;
  }
  __syncthreads();
  S x0[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) x0[e] = in.x_of(i + e, 0);
#pragma unroll 1
  for (int first = 1; first == 1 || first < M; first += kSlots) {
    S sums[kSlots + 1][4] = {};  // of slot 0, then of slots first .. first + kSlots
#pragma unroll 1
    for (int64_t k = begin + warp; k < end; k += kWarps) {
      S z[4] = {};
      uint32_t bytes = 0;
      if (i < in.ld) {
        load_sums<true>(source.scores + k * in.ld + i, 0, 0, z);
        bytes = *reinterpret_cast<const uint32_t*>(source.slots + k * in.ld + i);
      }
      const S rnorm = source.center_rnorms[k];
      S by_class[2 * kSlots] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int slot = min(static_cast<int>(bytes >> (8 * e) & 255), M - 1);
        if (slot == 0 || i + e >= in.B) continue;
        const SoftmaxGradRow<S>& row = rows[lane * 4 + e];
        const S weight = rnorm * (k == row.target ? row.target_grad : source.softmax.other_class_grad(row, k, z[e]));
        if (first == 1) sums[0][e] = fma(weight, in.y_of(0, slot, k), sums[0][e]);
        if (slot < first || slot >= first + kSlots) continue;
        const S b = in.y_of(1, slot, k), xj = in.x_of(i + e, slot);
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
          if (slot != first + j) continue;
          sums[j + 1][e] = fma(weight, b, sums[j + 1][e]);
          by_class[j] = fma(weight, x0[e], by_class[j]);
          by_class[kSlots + j] = fma(weight, xj, by_class[kSlots + j]);
        }
      }
      const S sum = warp_sum_of_8(by_class, lane);
      const int part = lane / 4 / kSlots, j = first + lane / 4 % kSlots;
      if (lane % 4 == 0 && j < M) out.y[((blockIdx.y * int64_t{2} + part) * M + j) * in.K + k] = sum;
    }
    __syncthreads();  // no thread still reads the sums before
#pragma unroll
    for (int j = 0; j <= kSlots; ++j) store_sums<true>(partial[warp][j], lane * 4, 0, sums[j]);
    __syncthreads();
    for (int e = thread; e < (kSlots + 1) * Shape::kRows; e += Shape::kThreads) {
      const int at = e / Shape::kRows, row = e % Shape::kRows, j = at == 0 ? 0 : first + at - 1;
      if (j >= M || (at == 0 && first > 1) || first_row + row >= in.B) continue;
      S sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w][at][row];
      out.x[(static_cast<int64_t>(blockIdx.x) * M + j) * in.ld + first_row + row] = sum;
    }
  }
}

// The grid of reduce_rotation_grads_kernel: blocks for the gradient of X, 32 sums each, then one sum of Y per thread.
struct ReduceRotationsShape {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  int64_t x_blocks, y_blocks;
  ReduceRotationsShape(int64_t ld, int64_t K, int64_t M)
      : x_blocks(ceil_div(ld * M, kWarp)), y_blocks(ceil_div(2 * K * M, kThreads)) {}
};

// Add up the partials of a chunk.
//   grad_x [B, slots]: the chunk's sums are added to it if `accumulate`
//   grad_y [2, slots, ldy]: from the first class of the chunk on
//
// Grid: x_blocks + y_blocks blocks. Block: 256 threads.
template <class S>
__global__ void __launch_bounds__(ReduceRotationsShape::kThreads)
    reduce_rotation_grads_kernel(ReduceRotationsShape shape, RoutingShape routing, Rotations<S> in,
                                 RotationGradPartials<S> partials, S* grad_x, S* grad_y, bool accumulate) {
  constexpr int kWarps = ReduceRotationsShape::kWarps;
  __shared__ S partial[kWarps][kWarp];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t block = blockIdx.x, M = in.slots;
  if (block < shape.x_blocks) {
    const int64_t at = block * kWarp + lane, count = M * in.ld, i = at % in.ld, j = at / in.ld;
    S sum = 0;
    if (at < count && i < in.B) {
#pragma unroll 4
      for (int64_t g = warp; g < routing.groups; g += kWarps) sum += partials.x[g * count + at];
    }
    partial[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || at >= count || i >= in.B) return;
    S* to = grad_x + i * M + j;
    sum = accumulate ? *to : S(0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += partial[w][lane];
    *to = sum;
  } else {
    const int64_t at = (block - shape.x_blocks) * ReduceRotationsShape::kThreads + thread, count = 2 * M * in.K;
    if (at >= count) return;
    S sum = 0;
    if (at / in.K % M != 0)  // the coefficients of slot 0 are 0
      for (int64_t tile = 0; tile < routing.row_tiles; ++tile) sum += partials.y[tile * count + at];
    grad_y[at / in.K * in.ldy + at % in.K] = sum;
  }
}

}  // namespace gistops::cuda
