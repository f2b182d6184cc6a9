// The norms and dot products of norms.cuh in half precision, for aligned rows: the dot products on tensor cores.
#pragma once
#include "norms.cuh"
#include "ptx.cuh"

namespace gistops::cuda {

// A warp takes a tile of rows and some of the dims, kStep at a time; the warps of a block are divided between tiles and
// dims, so that few rows of many dims have enough loads in flight too.
struct HalfNormsShape {
  static constexpr int kThreads = 128, kWarps = kThreads / kWarp, kTileRows = 16;
  static constexpr int kStep = 128, kMostDimWarps = 4;
  static constexpr int kGroup = 8;  // displacements at a time
  int dim_bits = 0;                 // 1 << dim_bits warps share a tile

  explicit HalfNormsShape(int64_t d) {
    while ((1 << dim_bits) < kMostDimWarps && (int64_t{kStep} << dim_bits) < d) ++dim_bits;
  }
  __host__ __device__ int rows() const { return (kWarps >> dim_bits) * kTileRows; }  // per block
};

// Add the squares of the two elements of a word to two sums.
template <class T>
__device__ __forceinline__ void add_squares(uint32_t word, float (&sums)[2]) {
  float low, high;
  if constexpr (__is_same(T, bf16)) {
    low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
  } else {
    const T* elements = reinterpret_cast<const T*>(&word);
    low = wide(elements[0]), high = wide(elements[1]);
  }
  sums[0] = fma(low, low, sums[0]), sums[1] = fma(high, high, sums[1]);
}

// The sums of a warp, over its dims.
struct HalfNormsSums {
  float squares[HalfNormsShape::kTileRows], delta_squares[HalfNormsShape::kGroup];
  float dots[HalfNormsShape::kGroup][HalfNormsShape::kTileRows + 1];
};

// Compute all of NormOutputs, with one pass over the input and one over the centers for each group of displacements.
//
// Lane l loads four words, eight dims, of rows l / 4 and l / 4 + 8 of its tile and of displacement l / 4, as fragments
// of mma.sync: the order of the dims does not matter as long as it is the same in both factors. Words 0 and 1 of
// displacement l / 4 are row l / 4 of the left factor, words 2 and 3 are row l / 4 + 8; so the words of a row, two by
// two, are the right factor as they were loaded. The squares of the rows are sums of floats as in norms.cuh.
//
// kWhole: d is a multiple of kStep
//
// Grid: input_blocks blocks of shape.rows() input rows, then enough blocks for the centers. Block: 128 threads.
template <class T, bool kWhole>
__global__ void __launch_bounds__(HalfNormsShape::kThreads, 4)
    norms_half_kernel(HalfNormsShape shape, Problem<T> p, int64_t input_blocks, NormOutputs<float> out) {
  using Shape = HalfNormsShape;
  constexpr int kPart = kVector<T>, kLoads = Shape::kStep / (4 * kPart), kTileRows = Shape::kTileRows;
  __shared__ HalfNormsSums sums[Shape::kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  if (out.blocks_done && blockIdx.x == 0 && thread == 0) *out.blocks_done = 0;
  const int block = static_cast<int>(blockIdx.x), center_block = block - static_cast<int>(input_blocks);
  const bool is_input = center_block < 0;
  const int rows = static_cast<int>(is_input ? p.B() : p.K());
  const int d = static_cast<int>(p.d()), m = static_cast<int>(p.m()), dim_warps = 1 << shape.dim_bits;
  const int dim_warp = warp & (dim_warps - 1), first_warp = warp - dim_warp, part = lane % 4 * kPart;
  const int first = (is_input ? block : center_block) * shape.rows() + (first_warp >> shape.dim_bits) * kTileRows;
  const T* data = is_input ? p.input.data : p.centers.data;
  const T* row[2];  // rows past the end repeat the last
#pragma unroll
  for (int r = 0; r < 2; ++r) row[r] = data + int64_t{min(first + lane / 4 + 8 * r, rows - 1)} * d + part;

#pragma unroll 1
  for (int group = 0; group == 0 || group < m; group += Shape::kGroup) {
    // Dots with displacements that do not exist are not used.
    const T* delta = m > 0 ? p.displacements.data + int64_t{min(group + lane / 4, m - 1)} * d + part : row[0];
    // [0]: dims of the lane's first pairs of words, in elements 0 and 1; [1]: of the others, in elements 2 and 3
    float dots[2][2][4] = {}, delta_products[2][4] = {}, squares[2][2] = {};
#pragma unroll 1
    for (int x = dim_warp * Shape::kStep; x < d; x += dim_warps * Shape::kStep) {
      const uint4 zeros = {0, 0, 0, 0};
      const auto load_part = [&](const T* from, int load) {
        const int at = x + load * 4 * kPart;
        return kWhole || at + part < d ? *reinterpret_cast<const uint4*>(from + at) : zeros;
      };
      uint4 w[kLoads][2];
#pragma unroll
      for (int load = 0; load < kLoads; ++load)
#pragma unroll
        for (int r = 0; r < 2; ++r) w[load][r] = load_part(row[r], load);
      __syncwarp();  // all loads are under way before any value is used
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        const uint4 v = load_part(delta, load);
        const uint32_t deltas[4] = {v.x, v.z, v.y, v.w};
        const auto multiply = [&](float (&products)[2][4], const uint4& columns) {
          const uint32_t low[2] = {columns.x, columns.y}, high[2] = {columns.z, columns.w};
          mma_16816<T>(products[0], deltas, low);
          mma_16816<T>(products[1], deltas, high);
        };
        multiply(delta_products, v);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          multiply(dots[r], w[load][r]);
          add_squares<T>(w[load][r].x, squares[r]), add_squares<T>(w[load][r].y, squares[r]);
          add_squares<T>(w[load][r].z, squares[r]), add_squares<T>(w[load][r].w, squares[r]);
        }
      }
    }
    if (group > 0) __syncthreads();  // no thread still reads the sums of the group before
    const auto sum_of_four_lanes = [](float x) {
      x += __shfl_xor_sync(~0u, x, 1);
      return x + __shfl_xor_sync(~0u, x, 2);
    };
    // The squares are the diagonal of the products of the displacements.
    if (lane / 4 / 2 == lane % 4)
      sums[warp].delta_squares[lane / 4] =
          lane / 4 % 2 ? delta_products[0][1] + delta_products[1][3] : delta_products[0][0] + delta_products[1][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float square = sum_of_four_lanes(squares[r][0] + squares[r][1]);
      if (lane % 4 == 0) sums[warp].squares[lane / 4 + 8 * r] = square;
#pragma unroll
      for (int c = 0; c < 2; ++c)
        sums[warp].dots[lane / 4][lane % 4 * 2 + c + 8 * r] = dots[r][0][c] + dots[r][1][c + 2];
    }
    __syncthreads();
    // The warps of a tile divide its pairs of a row and a slot. The first group has slot 0 too.
    const int first_slot = group == 0 ? 0 : group + 1,
              pairs = (min(group + Shape::kGroup, m) + 1 - first_slot) * kTileRows;
#pragma unroll 1
    for (int pair = dim_warp * kWarp + lane; pair - lane < pairs; pair += dim_warps * kWarp) {
      const int r = pair % kTileRows, slot = first_slot + pair / kTileRows, j = max(slot - 1 - group, 0);
      const int i = first + r;
      const bool valid = pair < pairs && i < rows;
      float square = 0, delta_sum = 0, dot = 0;
      if (valid) {
#pragma unroll
        for (int w = 0; w < Shape::kMostDimWarps; ++w) {
          if (w >= dim_warps) break;
          const HalfNormsSums& partial = sums[first_warp + w];
          square += partial.squares[r], delta_sum += partial.delta_squares[j], dot += partial.dots[j][r];
        }
      }
      if (slot == 0) delta_sum = 0, dot = 0;
      if (is_input) {
        if (!valid) continue;
        out.input_dots[slot * out.ld + i] = dot;
        if (slot == 0) out.input_rnorms[i] = clamped_rnorm(square);
        continue;
      }
      const float sum = square + delta_sum + 2 * dot;
      const bool cancelled = valid && slot > 0 && cancels(sum, square, delta_sum);
      float rnorm = clamped_rnorm(sum);
      if (__any_sync(~0u, cancelled)) {
#pragma unroll 1
        for (int other = 0; other < kWarp; ++other) {
          if (!__shfl_sync(~0u, static_cast<int>(cancelled), other)) continue;
          const int64_t k = first + __shfl_sync(~0u, r, other), index = __shfl_sync(~0u, slot, other) - 1;
          const float direct =
              squared_norm_of_slot<true>(p.centers.data + k * d, p.displacements.data + index * d, d, lane);
          if (other == lane) rnorm = -clamped_rnorm(direct);
        }
      }
      if (valid) out.center_rnorms[slot * out.ldr + i] = rnorm;
    }
  }
}

}  // namespace gistops::cuda
