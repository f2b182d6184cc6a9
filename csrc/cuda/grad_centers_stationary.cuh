// The results of grad_centers.cuh, from a block that keeps H of its classes in shared memory and reads f once.
//
// The corrections are tensor-core products as well. T is split into terms of the operands' type, whose sum has the bits
// of a float. One product adds two terms of -T, each of eight displacements, times delta to 16 classes by 8 dims; three
// terms make the sums of T w over the classes. A class with a cancelled pair is computed once more without tensor
// cores.
#pragma once
#include "cancelled.cuh"
#include "grad_centers_stationary_product.cuh"
#include "warp_reduce.cuh"

namespace gistops::cuda {

template <class Shape>
class GradCentersStationary : private StationaryProduct<Shape> {
  using Base = StationaryProduct<Shape>;
  using Base::first_class_, Base::first_dim_, Base::last_dim_, Base::warp_class_, Base::warp_dim_;
  using Base::in_, Base::p_, Base::out_, Base::shared_, Base::dynamic_, Base::w_, Base::sums_, Base::delta;
  using Base::kSlots, Base::kDims, Base::kVector, Base::kFragmentsC, Base::kFragmentsD;
  using Base::thread_, Base::lane_, Base::warp_;
  using typename Base::T, typename Base::S, typename Base::Mma, typename Base::W, typename Base::Delta;

 public:
  // groups: number of partials; the block adds those of all its tiles of classes
  __device__ GradCentersStationary(const GradCentersInputs<T>& in, const GradCentersOutputs<T>& out, int64_t class_tile,
                                   int64_t groups, int64_t dim_parts, unsigned char* memory)
      : Base(in, out, class_tile, dim_parts, memory), group_(static_cast<int>(class_tile % groups)),
        adds_(class_tile >= groups) {}

  __device__ __forceinline__ void run() {
    if (first_dim_ >= last_dim_) return;
    this->start();
    any_cancelled_ = load_t_sums();
    load_t();
    // All of H is in shared memory before the first tile of the gradient is written, which may overwrite it.
#pragma unroll 1
    for (int dim = first_dim_; dim < last_dim_; dim += kDims) {
      this->multiply(dim);
      if (out_.displacements) store_displacement_partials(dim);
      if (out_.centers) {
        subtract_t_delta();
        if (out_.displacements) __syncthreads();  // no warp still reads the centers
        subtract_t_w();
      }
      if (any_cancelled_) add_cancelled(dim);
      if (out_.centers) {
        __syncwarp();
        store_gradient(dim);
      }
    }
  }

 private:
  __device__ __forceinline__ S t(int64_t k, int64_t j) const { return in_.t[k * p_.M() + j]; }
  __device__ __forceinline__ bool is_cancelled(int64_t k, int64_t j) const {
    return in_.source.center_rnorms[j * in_.source.ldr + k] < S(0);
  }
  // Return T, or 0 where it does not exist or where the pair cancels.
  __device__ __forceinline__ S valid_t(int64_t k, int64_t j) const {
    return k < p_.K() && j < p_.M() && !(any_cancelled_ && is_cancelled(k, j)) ? t(k, j) : S(0);
  }
  // Return a power of two that brings x to 2^13, within the range of float16.
  static __device__ __forceinline__ S scale_of(S x) {
    int exponent;
    frexp(x, &exponent);
    return x > S(0) && x < kInfinity<S> ? ldexp(S(1), min(max(13 - exponent, -100), 100)) : S(1);
  }

  // Return 1 / x for a power of two from 2^-100 to 2^100.
  static __device__ __forceinline__ S reciprocal(S x) { return __uint_as_float((254u << 23) - __float_as_uint(x)); }

  // Load s_k and the scale of T of the tile's classes. Return true if any of them has a cancelled pair.
  __device__ __forceinline__ bool load_t_sums() {
    any_cancelled_ = *in_.cancelled;
    bool any = false;
    if (thread_ < Shape::kClasses) {
      const int64_t k = first_class_ + thread_;
      S sum = 0, most = 0;
      for (int64_t j = 0; j < p_.M() && k < p_.K(); ++j) {
        any |= any_cancelled_ && is_cancelled(k, j);
        const S value = valid_t(k, j);
        sum += value;
        if (j > 0) most = max(most, magnitude(value));
      }
      shared_.t_sums[thread_] = sum, shared_.cancelled[thread_] = any;
      if constexpr (Shape::kScaled) shared_.unscale[thread_] = reciprocal(scale_of(most));
    }
    return __syncthreads_or(any);
  }

  // Split T of all displacements into terms; a warp takes every eighth displacement.
  __device__ __forceinline__ void load_t() {
#pragma unroll 1
    for (int j = warp_; j < dynamic_.groups * kSlots; j += Shape::kWarps) {
      S values[Shape::kClasses / kWarp], sum = 0, most = 0;
#pragma unroll
      for (int c = 0; c < Shape::kClasses; c += kWarp) {
        const S value = valid_t(first_class_ + c + lane_, j + 1);
        values[c / kWarp] = -value, sum += value, most = max(most, magnitude(value));
      }
      sum = warp_sum(sum);
#pragma unroll
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) most = max(most, __shfl_xor_sync(~0u, most, lanes));
      const S scale = Shape::kScaled ? scale_of(most) : S(1);
      if (lane_ == 0) dynamic_.slot_sums[j] = sum, dynamic_.slot_scale[j] = reciprocal(scale);
#pragma unroll
      for (int c = 0; c < Shape::kClasses; c += kWarp) {
        const S value = values[c / kWarp];
        T* to = dynamic_.t + (j / kSlots * Shape::kTRows + j % kSlots) * Shape::kTLd + c + lane_;
        store_terms<Shape::kTermsW>(to, value * scale);
        if constexpr (Shape::kScaled)
          store_terms<2>(to + Shape::kTRowsDelta * Shape::kTLd, value * reciprocal(shared_.unscale[c + lane_]));
      }
    }
    // The first barrier of multiply() comes before the terms are read.
  }
  template <int kTerms>
  static __device__ __forceinline__ void store_terms(T* to, S value) {
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      const T rounded = narrow<T>(value);
      to[term * kSlots * Shape::kTLd] = rounded;
      value -= wide(rounded);
    }
  }

  // Write the partials of the displacements: -T w, with the classes as the summed dimension, and T delta. A warp takes
  // every eighth pair of 8 dims.
  __device__ __forceinline__ void store_displacement_partials(int dim) const {
    const int m = static_cast<int>(p_.m());
#pragma unroll 1
    for (int group = 0; group < dynamic_.groups; ++group) {
      const T* terms = dynamic_.t + group * Shape::kTRows * Shape::kTLd;
#pragma unroll 1
      for (int first = warp_ * 16; first < kDims && dim + first < last_dim_; first += Shape::kWarps * 16) {
        S sums[2][4] = {};
#pragma unroll
        for (int c = 0; c < Shape::kClasses; c += Mma::kStep) {
          typename Mma::B b[2];
          load_centers(b, c, first);
          const typename Mma::A a = Mma::load_a(terms + c, Shape::kTLd, lane_);
          Mma::multiply(sums[0], a, b[0]), Mma::multiply(sums[1], a, b[1]);
          if constexpr (Shape::kTermsW == 3) {
            uint32_t third[4];  // eight rows of the third term, twice
            load_matrix_x4(third, terms + (2 * kSlots + lane_ % 8) * Shape::kTLd + c + lane_ / 8 % 2 * 8);
            const typename Mma::A low{third[0], 0, third[1], 0};
            Mma::multiply(sums[0], low, b[0]), Mma::multiply(sums[1], low, b[1]);
          }
        }
        const int slot = group * kSlots + lane_ / 4;
        if (slot >= m) continue;
        const S total = dynamic_.slot_sums[slot], scale = dynamic_.slot_scale[slot];
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          const int column = first + part * 8 + lane_ % 4 * 2;
          if (dim + column >= last_dim_) continue;
          const Pack<T, 2> values =
              *reinterpret_cast<const Pack<T, 2>*>(delta(group) + lane_ / 4 * Delta::kLd + column);
          Pack<S, 2> out{};
          if (adds_) out = *reinterpret_cast<const Pack<S, 2>*>(&partial(slot, dim + column));
#pragma unroll
          for (int e = 0; e < 2; ++e)
            out.e[e] += fma(total, wide(values.e[e]), -(sums[part][e] + sums[part][e + 2]) * scale);
          *reinterpret_cast<Pack<S, 2>*>(&partial(slot, dim + column)) = out;
        }
      }
    }
  }
  // Load two adjacent fragments of 16 classes by 8 dims.
  __device__ __forceinline__ void load_centers(typename Mma::B (&b)[2], int c, int dim) const {
    uint32_t r[4];
    load_matrix_x4_trans(r, w_ + W::at(c + lane_ % 16, dim + lane_ / 16 * 8));
    b[0] = {r[0], r[1]}, b[1] = {r[2], r[3]};
  }
  __device__ __forceinline__ S& partial(int64_t j, int64_t x) const {
    return out_.displacements[(group_ * p_.m() + j) * p_.d() + x];
  }

  // Subtract T delta from the product. Both terms of T meet the same displacements.
  __device__ __forceinline__ void subtract_t_delta() {
#pragma unroll 1
    for (int group = 0; group < dynamic_.groups; ++group) {
      const T* terms = dynamic_.t + (group * Shape::kTRows + Shape::kTRowsDelta) * Shape::kTLd + warp_class_;
      uint32_t a[kFragmentsC][4];
#pragma unroll
      for (int i = 0; i < kFragmentsC; ++i)
        load_matrix_x4_trans(a[i], terms + (lane_ % 8 + lane_ / 16 * 8) * Shape::kTLd + i * 16 + lane_ / 8 % 2 * 8);
#pragma unroll
      for (int first = 0; first < kFragmentsD; first += 4) {
        uint32_t b[4];
        load_matrix_x4_trans(b, delta(group) + lane_ % 8 * Delta::kLd + warp_dim_ + first * 8 + lane_ / 8 * 8);
#pragma unroll
        for (int i = 0; i < kFragmentsC; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) subtract_product(i, first + j, a[i], b[j]);
      }
    }
  }
  __device__ __forceinline__ void subtract_product(int i, int j, const uint32_t (&a)[4], uint32_t b) {
    const uint32_t twice[2] = {b, b};
    if constexpr (Shape::kScaled) {
      S scaled[4] = {};
      mma_16816<T>(scaled, a, twice);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums_[i][j][e] = fma(scaled[e], shared_.unscale[class_of(i, e / 2)], sums_[i][j][e]);
    } else {
      mma_16816<T>(sums_[i][j], a, twice);
    }
  }
  // Return the class, within the tile, of one half of an accumulator.
  __device__ __forceinline__ int class_of(int fragment, int half) const {
    return warp_class_ + fragment * 16 + half * 8 + lane_ / 4;
  }

  // Subtract s_k w_k; the gradient, rounded, replaces the center in shared memory.
  __device__ __forceinline__ void subtract_t_w() const {
#pragma unroll
    for (int i = 0; i < kFragmentsC; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = class_of(i, half);
        const S s = shared_.t_sums[c];
        Pack<T, 2> values[kFragmentsD];  // all loads before the stores, which could be to the same memory
#pragma unroll
        for (int j = 0; j < kFragmentsD; ++j) values[j] = *fragment(c, j);
#pragma unroll
        for (int j = 0; j < kFragmentsD; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            values[j].e[e] = narrow<T>(fma(-s, wide(values[j].e[e]), sums_[i][j][half * 2 + e]));
          *fragment(c, j) = values[j];
        }
      }
  }

  // Return this lane's elements of a fragment in the tile of the centers.
  __device__ __forceinline__ Pack<T, 2>* fragment(int c, int j) const {
    return reinterpret_cast<Pack<T, 2>*>(w_ + W::at(c, warp_dim_ + j * 8 + lane_ % 4 * 2));
  }

  // Write the warp's part of the gradient: kStoredRows classes with one instruction.
  __device__ __forceinline__ void store_gradient(int dim) const {
    constexpr int kRows = Shape::kStoredRows, kVectors = kWarp / kRows;
    static_assert(kVectors * kVector == kFragmentsD * 8);
    const int first_row = Shape::kWgmma ? lane_ / kVectors : lane_ % kRows;  // without bank conflicts in either tile
    const int column = warp_dim_ + (Shape::kWgmma ? lane_ % kVectors : lane_ / kRows) * kVector;
    if (dim + column >= last_dim_) return;
#pragma unroll
    for (int c = 0; c < kFragmentsC * 16; c += kRows) {
      const int row = warp_class_ + c + first_row;
      const int64_t k = first_class_ + row;
      if (k < p_.K())
        *reinterpret_cast<uint4*>(out_.centers + k * p_.d() + dim + column) =
            *reinterpret_cast<const uint4*>(w_ + W::at(row, column));
    }
  }

  // Compute the gradient of classes with a cancelled pair, in place of what the product gave, and add their terms to
  // the partials of the displacements.
  __device__ __forceinline__ void add_cancelled(int dim) {
    __syncthreads();
#pragma unroll 1
    for (int c = 0; c < Shape::kClasses; ++c) {
      if (!shared_.cancelled[c]) continue;
      const int64_t k = first_class_ + c;
      const int x = dim + thread_;
      if (weights_class_ != c) load_weights(c);
      if (thread_ >= kDims || x >= last_dim_) continue;
      const S w = wide(p_.centers.data[k * p_.centers.ld + x]);
      S sum = 0;
#pragma unroll 1
      for (int i = 0; out_.centers && i < p_.B(); ++i)
        sum = fma(dynamic_.weights[i] + wide(dynamic_.h[Shape::h_at(c, i, p_.B())]), input_element(i, x), sum);
      sum = fma(-shared_.t_sums[c], w, sum);
#pragma unroll 1
      for (int j = 1; j < p_.M(); ++j) {
        const S shift = wide(p_.displacements.data[(j - 1) * p_.displacements.ld + x]), t_jk = t(k, j);
        if (!is_cancelled(k, j)) {
          sum = fma(-t_jk, shift, sum);
          continue;
        }
        sum = fma(-t_jk, w + shift, sum);
        if (!out_.displacements) continue;
        S term = t_jk * (w + shift);
#pragma unroll 1
        for (int i = 0; i < p_.B(); ++i)
          if (dynamic_.slots[i] == j && dynamic_.weights[i] != S(0))
            term = fma(-dynamic_.weights[i], input_element(i, x), term);
        partial(j - 1, x) += term;
      }
      if (out_.centers) w_[W::at(c, thread_)] = narrow<T>(sum);
    }
    __syncthreads();
  }
  // Compute the weights of a class with a cancelled pair, once per block if it is the only one.
  __device__ __forceinline__ void load_weights(int c) {
    __syncthreads();  // no thread still reads the weights before
#pragma unroll 1
    for (int first = 0; first < p_.B(); first += Shape::kThreads) {
      const int i = first + thread_;
      int slot = 0;
      const S weight = cancelled_weight(in_.source, first_class_ + c, i, i < p_.B(), slot);
      if (i < p_.B()) dynamic_.weights[i] = weight, dynamic_.slots[i] = static_cast<uint8_t>(slot);
    }
    __syncthreads();
    weights_class_ = c;
  }
  __device__ __forceinline__ S input_element(int64_t i, int64_t x) const {
    return wide(p_.input.data[i * p_.input.ld + x]);
  }

  int group_;
  bool adds_;
  bool any_cancelled_ = false;
  int weights_class_ = -1;  // the class, within the tile, of dynamic_.weights
};

// Grid: groups times dim_parts, the dims fastest; a block takes every groups-th of the tiles of Shape::kClasses
// classes. Block: Shape::kThreads. Dynamic shared memory: StationaryMemory::bytes.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    grad_centers_stationary_kernel(GradCentersInputs<typename Shape::T> in, GradCentersOutputs<typename Shape::T> out,
                                   int64_t groups, int64_t dim_parts) {
  if constexpr (Shape::kWgmma && !kHasWgmma) {
    trap();  // the host does not launch it
  } else {
    GISTOPS_ALIGNED_SHARED(1024, unsigned char, memory);
    const int64_t tiles = ceil_div(in.source.p.K(), Shape::kClasses);
#pragma unroll 1
    for (int64_t tile = blockIdx.x / dim_parts; tile < tiles; tile += groups) {
      GradCentersStationary<Shape>(in, out, tile, groups, dim_parts, memory).run();
      copy_async_wait<0>();
      __syncthreads();  // no thread still uses the memory of this tile
    }
  }
}

}  // namespace gistops::cuda
