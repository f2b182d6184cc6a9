// The product H f of grad_centers_stationary_kernel.
#pragma once
#include "grad_centers_stationary_shape.cuh"

namespace gistops::cuda {

// A block's tile of classes, whose H stays in shared memory, times one tile of dims of f after another. Each warp
// accumulates kFragmentsC x kFragmentsD fragments of 16 classes by 8 dims in registers. The copies of the next stages
// of f are under way during each product, and while its result is corrected.
//
// wgmma reads both operands from shared memory while the threads go on: a stage is multiplied while the block waits for
// the copies of the next one and starts its product, so that two stages of the ring are in use.
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
  static constexpr int kAhead = kStages - (Shape::kWgmma ? 2 : 1);  // stages whose copies are under way

  // class_tile: the block's tile of classes
  // dim_parts: number of blocks that share the dims of a tile of classes
  __device__ StationaryProduct(const GradCentersInputs<T>& in, const GradCentersOutputs<T>& out, int64_t class_tile,
                               int64_t dim_parts, unsigned char* memory)
      : in_(in), p_(in.source.p), out_(out), dynamic_(memory, p_.B(), p_.m()), shared_(dynamic_.fixed),
        w_(reinterpret_cast<T*>(shared_.w)), first_class_(class_tile * Shape::kClasses),
        first_dim_(static_cast<int>(blockIdx.x % dim_parts) * dims_of_part(dim_parts)),
        last_dim_(min(static_cast<int>(p_.d()), first_dim_ + dims_of_part(dim_parts))), loaded_(shared_.ring),
        multiplied_(shared_.ring), f_loader_(p_.input, 0, first_dim_), f_loader_dim_(first_dim_) {
    thread_ = static_cast<int>(threadIdx.x);
    lane_ = static_cast<int>(threadIdx.x % kWarp), warp_ = static_cast<int>(threadIdx.x / kWarp);
    stages_ = static_cast<int>(ceil_div(p_.B(), Shape::kRows));
    warp_class_ = warp_ / Shape::kWarpsD * kFragmentsC * 16;
    warp_dim_ = warp_ % Shape::kWarpsD * kFragmentsD * 8;
  }

  // Start to load the first stages.
  __device__ __forceinline__ void start() {
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) load_stage();
  }

  // Compute the product, and load the centers meanwhile.
  __device__ __forceinline__ void multiply(int dim) {
#pragma unroll
    for (int i = 0; i < kFragmentsC; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsD; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[i][j][c] = 0;
#pragma unroll 1
    for (int stage = 0; stage < stages_; ++stage) {
      copy_async_wait<kAhead - 1>();
      if constexpr (Shape::kWgmma) wgmma_wait<1>(), fence_wgmma_operands();
      __syncthreads();  // this stage is complete, and no thread still reads the memory that the next copies overwrite
      if (stage == 0) load_vectors(dim);
      load_stage();
      if (!out_.centers) continue;
      const T* f = reinterpret_cast<const T*>(multiplied_.next());
      if constexpr (Shape::kWgmma) {
        start_products(stage * Shape::kRows, f);
      } else {
        if (dim + warp_dim_ < last_dim_) multiply_stage(stage * Shape::kRows, f + warp_dim_);
      }
    }
    if constexpr (Shape::kWgmma) wgmma_wait<0>();
    if (stages_ <= kAhead) copy_async_wait<0>();  // else the waits of the later stages include the centers
    __syncthreads();
  }
  __device__ __forceinline__ T* delta(int group) const {
    return dynamic_.delta + group * (Delta::kBytes / static_cast<int>(sizeof(T)));
  }

  const GradCentersInputs<T>& in_;
  const Problem<T>& p_;
  const GradCentersOutputs<T>& out_;
  StationaryMemory<Shape> dynamic_;
  typename StationaryMemory<Shape>::Fixed& shared_;
  T* w_;
  int64_t first_class_;
  int first_dim_, last_dim_;  // of the block
  int thread_, lane_, warp_, warp_class_, warp_dim_;
  S sums_[kFragmentsC][kFragmentsD][4];

 private:
  __device__ __forceinline__ int dims_of_part(int64_t dim_parts) const {
    return static_cast<int>(ceil_div(ceil_div(p_.d(), kDims), dim_parts)) * kDims;
  }
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
    static_assert(Shape::kClasses % kStride == 0 && kStride % 8 == 0);
    const int row = first_row + thread_ % kVectors * kVector, first = thread_ / kVectors;
    const bool inside = row < ceil_div(p_.B(), kVector) * kVector;
    T* to = dynamic_.h + Shape::h_at(first, row, p_.B());
    const T* from = in_.h + (first_class_ + first) * in_.ld + row;
#pragma unroll
    for (int c = 0; c < Shape::kClasses; c += kStride, from += kStride * in_.ld)
      copy_async_16(to + c * Shape::h_class(p_.B()), from, inside && first_class_ + first + c < p_.K());
  }
  // Start to load the centers and the displacements of a tile of dims.
  __device__ __forceinline__ void load_vectors(int dim) {
    typename Shape::WLoader(p_.centers, first_class_, dim).load(w_);
#pragma unroll 1
    for (int group = 0; group < dynamic_.groups; ++group)
      typename Shape::DeltaLoader(p_.displacements, group * kSlots, dim).load(delta(group));
  }

  __device__ __forceinline__ void multiply_stage(int first_row, const T* f) {
    const int ld = Shape::h_class(p_.B());
    const T* h = dynamic_.h + warp_class_ * ld + first_row;
#pragma unroll
    for (int s = 0; s < Shape::kRows; s += Mma::kStep) {
      typename Mma::A a[kFragmentsC];
      typename Mma::B b[kFragmentsD];
#pragma unroll
      for (int i = 0; i < kFragmentsC; ++i) a[i] = Mma::load_a(h + i * 16 * ld + s, ld, lane_);
#pragma unroll
      for (int j = 0; j < kFragmentsD; j += 2) Mma::load_b2(b[j], b[j + 1], f + s * F::kLd + j * 8, F::kLd, lane_);
#pragma unroll
      for (int i = 0; i < kFragmentsC; ++i)
#pragma unroll
        for (int j = 0; j < kFragmentsD; ++j) Mma::multiply(sums_[i][j], a[i], b[j]);
    }
  }

  // Start the products of a stage by wgmma. Each group of four warps takes 64 classes.
  __device__ __forceinline__ void start_products(int first_row, const T* f) {
    constexpr int kRowBytes = 128, kEightRows = 8 * kRowBytes;
    const WgmmaMatrix a = wgmma_matrix(dynamic_.h + Shape::h_at(warp_ / 4 * 64, first_row, p_.B()), 16, kEightRows);
    const WgmmaMatrix b = wgmma_matrix(f, F::kBlockBytes, kEightRows);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < Shape::kRows; s += Mma::kStep)
      wgmma<T>(sums_[0], advance(a, s * static_cast<int>(sizeof(T))), advance(b, s * kRowBytes), first_row + s > 0);
    wgmma_commit();
  }

  using Ring = StageRing<kStages, F::kBytes>;
  using FLoader = typename Shape::FLoader;
  Ring loaded_, multiplied_;
  FLoader f_loader_;
  int f_loader_dim_, stages_, f_loader_stage_ = 0;
};

}  // namespace gistops::cuda
