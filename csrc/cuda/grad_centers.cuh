// The gradient of the centers in half precision, and the centers' part of the gradient of the displacements, with one
// pass over the centers:
//
//   dw_k = sum_i H[k, i] f_i - s_k w_k - sum_j T[k, j] delta_j          s_k = sum_j T[k, j]
//   partials [tiles of classes, m, d] of  sum_k T[k, j] w_k + (sum_k T[k, j]) delta_j
//
// H and S do not contain cancelled pairs, and T and s are set to 0 for them here. Their terms are added from w + delta,
// which is summed before it is weighted, and from their rows, to both gradients.
#pragma once
#include "grad_centers_product.cuh"

namespace gistops::cuda {

template <class Shape, bool kVectors>
class GradCenters : private GradCentersProduct<Shape, kVectors> {
  using Base = GradCentersProduct<Shape, kVectors>;
  using Base::class_tile_, Base::first_class_, Base::first_dim_, Base::thread_, Base::lane_, Base::warp_;
  using Base::in_, Base::p_, Base::out_, Base::shared_;
  using typename Base::S;
  using typename Base::T;
  static constexpr int kSlots = Shape::kSlots, kVector = Shape::kVector;

 public:
  __device__ GradCenters(const GradCentersInputs<T>& in, const GradCentersOutputs<T>& out,
                         typename Shape::Shared& shared)
      : Base(in, out, shared) {}

  __device__ __forceinline__ void run() {
    const bool any_cancelled = *in_.cancelled;
    load_t_sums(any_cancelled);
    if (out_.centers) {
      this->multiply();
      this->store_product();
      if (any_cancelled) add_cancelled();
    }
    const int m = static_cast<int>(p_.m());
    int first = 0;
    do {
      load_t(first, any_cancelled);
      __syncthreads();
      subtract_norm_terms(first, first + kSlots >= m);
      if (out_.displacements) store_displacement_partials(first, any_cancelled);
      first += kSlots;
    } while (first < m);
  }

 private:
  __device__ __forceinline__ S t(int64_t k, int64_t j) const { return in_.t[k * p_.M() + j]; }
  __device__ __forceinline__ bool is_cancelled(int64_t k, int64_t j) const {
    return in_.source.center_rnorms[j * in_.source.ldr + k] < S(0);
  }
  // Return element x of w_k + delta_j, where slot j = 0 is w_k.
  __device__ __forceinline__ S slot_element(int64_t k, int64_t j, int64_t x) const {
    const S w = wide(p_.centers.data[k * p_.centers.ld + x]);
    return j ? w + wide(p_.displacements.data[(j - 1) * p_.displacements.ld + x]) : w;
  }
  __device__ __forceinline__ S input_element(int64_t i, int64_t x) const {
    return wide(p_.input.data[i * p_.input.ld + x]);
  }

  // Load s_k of the tile's classes, and find those with a cancelled pair.
  __device__ __forceinline__ void load_t_sums(bool any_cancelled) {
    for (int c = thread_; c < Shape::kClasses; c += Shape::kThreads) {
      const int64_t k = first_class_ + c;
      S sum = 0;
      int any = 0;
      for (int64_t j = 0; j < p_.M() && k < p_.K(); ++j) {
        const bool cancelled = any_cancelled && is_cancelled(k, j);
        any |= cancelled;
        if (!cancelled) sum += t(k, j);
      }
      shared_.t_sums[c] = sum, shared_.cancelled[c] = any;
    }
  }

  // Load T of displacements first .. first + kSlots; 0 past the last.
  __device__ __forceinline__ void load_t(int first, bool any_cancelled) {
    if (first > 0) __syncthreads();  // no thread still reads the displacements before
    for (int i = thread_; i < Shape::kClasses * kSlots; i += Shape::kThreads) {
      const int64_t k = first_class_ + i / kSlots, j = first + i % kSlots + 1;
      const bool valid = k < p_.K() && j < p_.M() && !(any_cancelled && is_cancelled(k, j));
      shared_.t[i / kSlots][i % kSlots] = valid ? t(k, j) : S(0);
    }
  }

  // Add the terms of cancelled pairs to the product.
  __device__ __forceinline__ void add_cancelled() {
    for (int e = thread_; e < Shape::kClasses * Shape::kDims; e += Shape::kThreads) {
      const int c = e / Shape::kDims, dim = e % Shape::kDims;
      const int64_t k = first_class_ + c, x = first_dim_ + dim;
      if (!shared_.cancelled[c] || x >= p_.d()) continue;
      S sum = shared_.epilogue.sums[c][dim];
      for (int64_t i = 0; i < p_.B(); ++i) {
        int slot;
        const S h = in_.source.cancelled_weight(k, i, slot);
        if (h != S(0)) sum = fma(h, input_element(i, x), sum);
      }
      for (int64_t j = 1; j < p_.M(); ++j)
        if (is_cancelled(k, j)) sum = fma(-t(k, j), slot_element(k, j, x), sum);
      shared_.epilogue.sums[c][dim] = sum;
    }
  }

  using Vector = Pack<T, kVector>;

  // Load a vector of a row, of which the first `inside` elements exist; the others are zero.
  __device__ __forceinline__ Vector load(const GlobalMatrix<T>& x, int64_t row, int64_t col, int inside) const {
    const T* from = x.data + row * x.ld + col;
    Vector out;
    if constexpr (kVectors) {
      if (inside > 0) return *reinterpret_cast<const Vector*>(from);
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) out.e[e] = !kVectors && e < inside ? from[e] : narrow<T>(0);
    return out;
  }

  __device__ __forceinline__ void store_center(int64_t k, int64_t x, int inside, const S (&values)[kVector]) const {
    T* to = out_.centers + k * p_.d() + x;
    if constexpr (kVectors) {
      Vector pack;
#pragma unroll
      for (int e = 0; e < kVector; ++e) pack.e[e] = narrow<T>(values[e]);
      if (inside > 0) *reinterpret_cast<Vector*>(to) = pack;
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        if (e < inside) to[e] = narrow<T>(values[e]);
    }
  }

  // Subtract the terms of the current displacements from the product, and with the first of them s_k w_k; write the
  // gradient with the last. Sum the current displacements' partials over the classes of each warp.
  __device__ __forceinline__ void subtract_norm_terms(int first, bool last) {
    const int dim = thread_ % Shape::kVectorsPerClass * kVector, first_c = thread_ / Shape::kVectorsPerClass;
    const int64_t x = first_dim_ + dim;
    const int inside = static_cast<int>(min(p_.d() - x, int64_t{kVector}));  // elements of the vector within d
    S delta[kSlots][kVector], partial[kSlots][kVector] = {}, t_sum[kSlots] = {};
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const Vector values = load(p_.displacements, first + j, x, first + j < p_.m() ? inside : 0);
#pragma unroll
      for (int e = 0; e < kVector; ++e) delta[j][e] = wide(values.e[e]);
    }
    constexpr int kPrefetched = !kVectors ? 1 : kFitsIn128Registers ? 4 : 2;  // classes loaded before any is used
    static_assert(Shape::kClasses % (Shape::kClassStride * kPrefetched) == 0);
#pragma unroll 1
    for (int start = first_c; start < Shape::kClasses; start += Shape::kClassStride * kPrefetched) {
      Vector centers[kPrefetched];
#pragma unroll
      for (int i = 0; i < kPrefetched; ++i) {
        const int64_t k = first_class_ + start + i * Shape::kClassStride;
        centers[i] = load(p_.centers, k, x, k < p_.K() ? inside : 0);
      }
#pragma unroll
      for (int i = 0; i < kPrefetched; ++i) {
        const int c = start + i * Shape::kClassStride;
        S weights[kSlots], w[kVector];
#pragma unroll
        for (int j = 0; j < kSlots; ++j) weights[j] = shared_.t[c][j];
#pragma unroll
        for (int e = 0; e < kVector; ++e) w[e] = wide(centers[i].e[e]);
        if (out_.displacements) {
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            t_sum[j] += weights[j];
#pragma unroll
            for (int e = 0; e < kVector; ++e) partial[j][e] = fma(weights[j], w[e], partial[j][e]);
          }
        }
        if (!out_.centers) continue;
        S* sums = &shared_.epilogue.sums[c][dim];
        const S s = first == 0 ? shared_.t_sums[c] : S(0);
        S sum[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          sum[e] = fma(-s, w[e], sums[e]);
#pragma unroll
          for (int j = 0; j < kSlots; ++j) sum[e] = fma(-weights[j], delta[j][e], sum[e]);
        }
        if (last) {
          const int64_t k = first_class_ + c;
          store_center(k, x, k < p_.K() ? inside : 0, sum);
        } else {
#pragma unroll
          for (int e = 0; e < kVector; ++e) sums[e] = sum[e];
        }
      }
    }
    if (!out_.displacements) return;
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        S sum = fma(t_sum[j], delta[j][e], partial[j][e]);
      // Over the lanes of the warp that have these dims.
#pragma unroll
        for (int lanes = Shape::kVectorsPerClass; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        if (lane_ < Shape::kVectorsPerClass) shared_.epilogue.partials[warp_][j][dim + e] = sum;
      }
  }

  // Write the current displacements' partials, summed over the warps, with the terms of cancelled pairs.
  __device__ __forceinline__ void store_displacement_partials(int first, bool any_cancelled) {
    __syncthreads();
    for (int e = thread_; e < kSlots * Shape::kDims; e += Shape::kThreads) {
      const int64_t j = first + e / Shape::kDims, x = first_dim_ + e % Shape::kDims;
      if (j >= p_.m() || x >= p_.d()) continue;
      S sum = 0;
#pragma unroll
      for (int warp = 0; warp < Shape::kWarps; ++warp)
        sum += shared_.epilogue.partials[warp][e / Shape::kDims][e % Shape::kDims];
      for (int c = any_cancelled ? 0 : Shape::kClasses; c < Shape::kClasses; ++c) {
        const int64_t k = first_class_ + c;
        if (!shared_.cancelled[c] || !is_cancelled(k, j + 1)) continue;
        sum = fma(t(k, j + 1), slot_element(k, j + 1, x), sum);
        for (int64_t i = 0; i < p_.B(); ++i) {
          int slot;
          const S h = in_.source.cancelled_weight(k, i, slot);
          if (h != S(0) && slot == j + 1) sum = fma(-h, input_element(i, x), sum);
        }
      }
      out_.displacements[(class_tile_ * p_.m() + j) * p_.d() + x] = sum;
    }
  }
};

// Compute both results above. Grid: tiles of 128 classes times tiles of Shape::kDims dims, the dims fastest. Block: 256
// threads. Dynamic shared memory: Shape::kSharedBytes.
template <class Shape, bool kVectors>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    grad_centers_kernel(GradCentersInputs<typename Shape::T> in, GradCentersOutputs<typename Shape::T> out) {
  GISTOPS_DYNAMIC_SHARED(typename Shape::Shared, shared);
  GradCenters<Shape, kVectors>(in, out, *shared).run();
}

}  // namespace gistops::cuda
