// Shapes and pointers of one operator call, as the kernels receive them. Letters as in csrc/README.md.
#pragma once
#include "device.cuh"

namespace gistops::cuda {

// A row-major matrix in global memory.
template <class T>
struct GlobalMatrix {
  const T* data;
  int64_t rows, cols, ld;
};

template <class T>
struct Problem {
  GlobalMatrix<T> input, centers, displacements;  // [B, d], [K, d], [m, d]
  const Sum<T>* tau;                              // [1]

  __host__ __device__ int64_t B() const { return input.rows; }
  __host__ __device__ int64_t K() const { return centers.rows; }
  __host__ __device__ int64_t d() const { return input.cols; }
  __host__ __device__ int64_t m() const { return displacements.rows; }
  __host__ __device__ int64_t M() const { return m() + 1; }
};

}  // namespace gistops::cuda
