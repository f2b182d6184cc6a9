// The product H f of grad_centers_stationary_kernel.
#pragma once
#include "grad_centers_stationary_shape.cuh"

namespace gistops::cuda {

// A block's tile of classes, whose H stays in shared memory, times one tile of dims of f after another. Each warp
// accumulates kFragmentsC x kFragmentsD fragments of 16 classes by 8 dims in registers. The copies of the next stages
// of f are under way during each product, and while its result is corrected.
template <class Shape>
class StationaryProduct {
 protected:
  using T = typename Shape::T;
  using S = float;
  using Mma = MmaPolicy<T>;
  using F = typename Shape::F;
  using W = typename Shape::W;
  using Delta = typename Shape::Delta;
  static constexpr int kSlots = Shape::kSlots, kDims = Shape::kDims, kVector = Shape::kVector;
  static constexpr int kFragmentsC = Shape::kFragmentsC, kFragmentsD = Shape::kFragmentsD, kStages = Shape::kStages;

  // class_tile: the block's tile of classes
  // dim_parts: number of blocks that share the dims of a tile of classes
  __device__ StationaryProduct(const GradCentersInputs<T>& in, const GradCentersOutputs<T>& out, int64_t class_tile,
                               int64_t dim_parts, unsigned char* memory)
      : in_(in), p_(in.source.p), out_(out), shared_(*reinterpret_cast<typename Shape::Shared*>(memory)),
        dynamic_(memory, p_.B(), p_.m()), w_(reinterpret_cast<T*>(shared_.w)),
        part_dims_(ceil_div(ceil_div(p_.d(), kDims), dim_parts) * kDims), class_tile_(class_tile),
        first_class_(class_tile_ * Shape::kClasses), first_dim_(blockIdx.x % dim_parts * part_dims_),
        last_dim_(min(p_.d(), first_dim_ + part_dims_)), loaded_(shared_.ring), multiplied_(shared_.ring),
        f_loader_(p_.input, 0, first_dim_), f_loader_dim_(first_dim_) {
    thread_ = static_cast<int>(threadIdx.x);
    lane_ = thread_ % kWarp, warp_ = thread_ / kWarp;
    stages_ = static_cast<int>(ceil_div(p_.B(), Shape::kRows));
    warp_class_ = warp_ / Shape::kWarpsD * kFragmentsC * 16;
    warp_dim_ = warp_ % Shape::kWarpsD * kFragmentsD * 8;
  }

  // Start to load the first stages.
  __device__ __forceinline__ void start() {
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) load_stage();
  }

  // Compute the product, and load the centers meanwhile.
  __device__ __forceinline__ void multiply(int64_t dim) {
#pragma unroll
    for (int i = 0; i < kFragmentsC; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsD; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[i][j][c] = 0;
    const bool inside = dim + warp_dim_ < last_dim_;
#pragma unroll 1
    for (int stage = 0; stage < stages_; ++stage) {
      copy_async_wait<kStages - 2>();
      __syncthreads();  // this stage is complete, and no thread still reads the memory that the next copies overwrite
      if (stage == 0) load_vectors(dim);
      load_stage();
      if (!out_.centers) continue;
      const T* f = reinterpret_cast<const T*>(multiplied_.next());
      if (inside) multiply_stage(dynamic_.h + stage * Shape::kRows, f + warp_dim_);
    }
    if (stages_ < kStages) copy_async_wait<0>();  // else the waits of the later stages include the centers
    __syncthreads();
  }
  __device__ __forceinline__ T* delta(int group) const {
    return dynamic_.delta + group * (Delta::kBytes / static_cast<int>(sizeof(T)));
  }

  const GradCentersInputs<T>& in_;
  const Problem<T>& p_;
  const GradCentersOutputs<T>& out_;
  typename Shape::Shared& shared_;
  StationaryMemory<Shape> dynamic_;
  T* w_;
  int64_t part_dims_, class_tile_, first_class_, first_dim_, last_dim_;
  int thread_, lane_, warp_, warp_class_, warp_dim_;
  S sums_[kFragmentsC][kFragmentsD][4];

 private:
  // Start to load the next stage of f and, with the first dims, the same rows' part of H.
  __device__ __forceinline__ void load_stage() {
    if (f_loader_dim_ < last_dim_ && out_.centers) {
      f_loader_.load(reinterpret_cast<T*>(loaded_.next()));
      if (f_loader_dim_ == first_dim_) load_h(f_loader_stage_ * Shape::kRows);
      f_loader_.advance_rows();
      if (++f_loader_stage_ == stages_) {
        f_loader_stage_ = 0, f_loader_dim_ += kDims;
        f_loader_ = FLoader(p_.input, 0, f_loader_dim_);
      }
    }
    copy_async_commit();
  }
  __device__ __forceinline__ void load_h(int first_row) const {
    constexpr int kVectors = Shape::kRows / kVector, kStride = Shape::kThreads / kVectors;
    const int row = first_row + thread_ % kVectors * kVector;
    const bool inside = row < ceil_div(p_.B(), kVector) * kVector;
#pragma unroll
    for (int c = thread_ / kVectors; c < Shape::kClasses; c += kStride) {
      const int64_t k = first_class_ + c;
      copy_async_16(dynamic_.h + c * dynamic_.h_ld + row, in_.h + k * in_.ld + row, inside && k < p_.K());
    }
  }
  // Start to load the centers and the displacements of a tile of dims.
  __device__ __forceinline__ void load_vectors(int64_t dim) {
    typename W::template Loader<Shape::kThreads, true>(p_.centers, first_class_, dim).load(w_);
    for (int group = 0; group < dynamic_.groups; ++group)
      typename Delta::template Loader<Shape::kThreads, true>(p_.displacements, group * kSlots, dim).load(delta(group));
  }

  __device__ __forceinline__ void multiply_stage(const T* h, const T* f) {
#pragma unroll
    for (int s = 0; s < Shape::kRows; s += Mma::kStep) {
      typename Mma::A a[kFragmentsC];
      typename Mma::B b[kFragmentsD];
#pragma unroll
      for (int i = 0; i < kFragmentsC; ++i)
        a[i] = Mma::load_a(h + (warp_class_ + i * 16) * dynamic_.h_ld + s, dynamic_.h_ld, lane_);
#pragma unroll
      for (int j = 0; j < kFragmentsD; j += 2) Mma::load_b2(b[j], b[j + 1], f + s * F::kLd + j * 8, F::kLd, lane_);
#pragma unroll
      for (int i = 0; i < kFragmentsC; ++i)
#pragma unroll
        for (int j = 0; j < kFragmentsD; ++j) Mma::multiply(sums_[i][j], a[i], b[j]);
    }
  }

  using Ring = StageRing<kStages, F::kBytes>;
  using FLoader = typename F::template Loader<Shape::kThreads, true>;
  Ring loaded_, multiplied_;
  FLoader f_loader_;
  int64_t f_loader_dim_;
  int stages_, f_loader_stage_ = 0;
};

}  // namespace gistops::cuda
