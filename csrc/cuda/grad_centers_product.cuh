// The product H f of grad_centers_kernel: tensor cores, and a pipeline of asynchronous copies to shared memory.
#pragma once
#include "grad_centers_shape.cuh"

namespace gistops::cuda {

// A block's tile of H [K, B] times f [B, d]. Each warp accumulates kFragmentsC x kFragmentsD fragments of 16 classes by
// 8 dims in registers.
//
// GradCenters derives from this class. If it has the product as a member instead, nvcc 13.0 spills on sm_90.
template <class Shape, bool kVectors>
class GradCentersProduct {
 protected:
  using T = typename Shape::T;
  using S = Sum<T>;
  using Shared = typename Shape::Shared;

  __device__ GradCentersProduct(const GradCentersInputs<T>& in, const GradCentersOutputs<T>& out, Shared& shared)
      : in_(in), p_(in.source.p), out_(out), shared_(shared) {
    const int64_t dim_tiles = ceil_div(p_.d(), Shape::kDims);
    class_tile_ = blockIdx.x / dim_tiles;
    first_class_ = class_tile_ * Shape::kClasses;
    first_dim_ = blockIdx.x % dim_tiles * Shape::kDims;
    thread_ = static_cast<int>(threadIdx.x);
    lane_ = thread_ % kWarp, warp_ = thread_ / kWarp;
    warp_class_ = warp_ / Shape::kWarpsD * kFragmentsC * 16;
    warp_dim_ = warp_ % Shape::kWarpsD * kFragmentsD * 8;
  }

  // Compute the product. Afterward, the ring is free for other use.
  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int i = 0; i < kFragmentsC; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsD; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[i][j][c] = 0;
    using Stages = StageRing<Shape::kStages, Shape::kStageBytes>;
    const GlobalMatrix<T> h{in_.h, p_.K(), in_.ld, in_.ld};
    typename Shape::H::template Loader<Shape::kThreads, true> h_loader(h, first_class_, 0);
    typename Shape::F::template Loader<Shape::kThreads, kVectors> f_loader(p_.input, 0, first_dim_);
    Stages loaded(shared_.ring), multiplied(shared_.ring);
    const int64_t stages = ceil_div(p_.B(), Shape::kRows);
    const auto load_stage = [&](bool exists) {
      if (exists) {
        unsigned char* stage = loaded.next();
        h_loader.load(reinterpret_cast<T*>(stage));
        f_loader.load(reinterpret_cast<T*>(stage + Shape::H::kBytes));
        h_loader.advance_cols(), f_loader.advance_rows();
      }
      copy_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < Shape::kStages - 1; ++i) load_stage(i < stages);
#pragma unroll 1
    for (int64_t stage = 0; stage < stages; ++stage) {
      copy_async_wait<Shape::kStages - 2>();
      __syncthreads();  // this stage is complete, and no thread still reads the stage that the next load overwrites
      load_stage(stage + Shape::kStages - 1 < stages);
      multiply_stage(multiplied.next());
    }
    copy_async_wait<0>();
    __syncthreads();
  }

  // Store the accumulators in shared memory.
  __device__ __forceinline__ void store_product() {
#pragma unroll
    for (int i = 0; i < kFragmentsC; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsD; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          S* to =
              &shared_.epilogue.sums[warp_class_ + i * 16 + lane_ / 4 + half * 8][warp_dim_ + j * 8 + lane_ % 4 * 2];
          *reinterpret_cast<Pack<S, 2>*>(to) = {sums_[i][j][half * 2], sums_[i][j][half * 2 + 1]};
        }
    __syncthreads();
  }

  const GradCentersInputs<T>& in_;
  const Problem<T>& p_;
  const GradCentersOutputs<T>& out_;
  Shared& shared_;
  int64_t class_tile_, first_class_, first_dim_;
  int thread_, lane_, warp_;

 private:
  using Mma = MmaPolicy<T>;
  static constexpr int kFragmentsC = Shape::kFragmentsC, kFragmentsD = Shape::kFragmentsD;

  __device__ __forceinline__ void multiply_stage(const unsigned char* stage) {
    constexpr int kLd = Shape::H::kLd;
    const T* h = reinterpret_cast<const T*>(stage);
    const T* f = reinterpret_cast<const T*>(stage + Shape::H::kBytes) + warp_dim_;
#pragma unroll
    for (int s = 0; s < Shape::kRows; s += Mma::kStep) {
      typename Mma::A a[kFragmentsC];
      typename Mma::B b[kFragmentsD];
#pragma unroll
      for (int i = 0; i < kFragmentsC; ++i) a[i] = Mma::load_a(h + (warp_class_ + i * 16) * kLd + s, kLd, lane_);
#pragma unroll
      for (int j = 0; j < kFragmentsD; j += 2)
        Mma::load_b2(b[j], b[j + 1], f + s * Shape::F::kLd + j * 8, Shape::F::kLd, lane_);
#pragma unroll
      for (int i = 0; i < kFragmentsC; ++i)
#pragma unroll
        for (int j = 0; j < kFragmentsD; ++j) Mma::multiply(sums_[i][j], a[i], b[j]);
    }
  }

  int warp_class_, warp_dim_;  // the first of the warp, within the tile
  S sums_[kFragmentsC][kFragmentsD][4];
};

}  // namespace gistops::cuda
