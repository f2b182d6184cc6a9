// What the kernels are given: shapes and pointers, no tensors. Letters as in csrc/schema.cpp.
#pragma once
#include "tile.cuh"

namespace gistops::cuda {

// The largest m whose products with the centres the forward makes on the way; with more, norms are made before it.
constexpr int kFusedDisplacements = 8;

template <class T>
struct Problem {
  Global<T> input, centers, displacements;  // [B, d], [K, d], [m, d]
  const Sum<T>* tau;

  __host__ __device__ int64_t B() const { return input.rows; }
  __host__ __device__ int64_t K() const { return centers.rows; }
  __host__ __device__ int64_t d() const { return input.cols; }
  __host__ __device__ int64_t m() const { return displacements.rows; }
  __host__ __device__ int64_t M() const { return m() + 1; }
};

// What is made of the features and of the displacements alone.
template <class T>
struct Prepared {
  Sum<T>* input_rnorms;   // [B]      1 / |f_i|
  Sum<T>* products;       // [B, M]   f_i . delta_j, 0 for j = 0
  Sum<T>* delta_squares;  // [M]      |delta_j|^2, 0 for j = 0
};

// The forward's outputs. A pair whose norm was computed from w + delta itself has its reciprocal norm negative.
template <class T>
struct Outputs {
  Sum<T>* logits;         // [B, K]
  uint8_t* slots;         // [B, K]
  Sum<T>* center_rnorms;  // [M, K]
};

}  // namespace gistops::cuda
