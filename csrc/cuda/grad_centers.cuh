// The gradient of centres in half precision, and their part of the displacements' gradient, in one pass over them:
//
//   dw[k] = sum_i H[k, i] f_i - s_k w_k - sum_j T[k, j] delta_j          s_k = sum_j T[k, j]
//   dd[j] = ... - sum_k T[k, j] w_k - (sum_k T[k, j]) delta_j            partials [tiles of classes, m, d]
//
// Pairs that cancel are in neither H, T nor s here: they are added from w + delta, summed before it is weighted. Their
// features are added too, to both: S does not have them either.
#pragma once
#include "grad_centers_shape.cuh"
#include "launch.cuh"

namespace gistops::cuda {

template <class Shape, bool kVectors>
class Centers {
  using T = typename Shape::T;
  using Engine = Mma16<T>;
  using S = Sum<T>;
  using Shared = typename Shape::Shared;
  static constexpr int kRowTiles = Shape::kRowTiles, kColTiles = Shape::kColTiles, kSlots = Shape::kSlots;
  static constexpr int kVector = Shape::kVector;

 public:
  __device__ Centers(const CenterInputs<T>& in, const CenterGradients<T>& out, Shared& shared)
      : in_(in), p_(in.pairs.p), out_(out), e_(shared) {
    const int64_t across = ceil_div(p_.d(), Shape::kDims);
    tile_ = blockIdx.x / across;
    first_class_ = tile_ * Shape::kClasses;
    first_dim_ = blockIdx.x % across * Shape::kDims;
    thread_ = static_cast<int>(threadIdx.x);
    lane_ = thread_ % kWarp, warp_ = thread_ / kWarp;
    row_ = warp_ / Shape::kWarpsD * kRowTiles * 16;
    col_ = warp_ % Shape::kWarpsD * kColTiles * 8;
  }

  __device__ __forceinline__ void run() {
    const bool cancelled = *in_.cancelled;
    load_sums_of_t(cancelled);
    if (out_.centers) {
      multiply();
      put_sums();
      if (cancelled) add_cancelled();
    }
    const int m = static_cast<int>(p_.m());
    int first = 0;
    do {
      load_t(first, cancelled);
      __syncthreads();
      subtract(first, first + kSlots >= m);
      if (out_.displacements) store_displacements(first, cancelled);
      first += kSlots;
    } while (first < m);
  }

 private:
  __device__ __forceinline__ S t(int64_t k, int64_t j) const { return in_.t[k * p_.M() + j]; }
  __device__ __forceinline__ bool cancels(int64_t k, int64_t j) const {
    return in_.pairs.center_rnorms[j * in_.pairs.ldr + k] < S(0);
  }
  __device__ __forceinline__ S moved(int64_t k, int64_t j, int64_t x) const {  // an element of w_k + delta_j
    const S w = wide(p_.centers.data[k * p_.centers.ld + x]);
    return j ? w + wide(p_.displacements.data[(j - 1) * p_.displacements.ld + x]) : w;
  }

  __device__ __forceinline__ S feature(int64_t b, int64_t x) const { return wide(p_.input.data[b * p_.input.ld + x]); }

  __device__ __forceinline__ void load_sums_of_t(bool cancelled) {
    for (int i = thread_; i < Shape::kClasses; i += Shape::kThreads) {
      const int64_t k = first_class_ + i;
      S sum = 0;
      int any = 0;
      for (int64_t j = 0; j < p_.M() && k < p_.K(); ++j) {
        const bool apart = cancelled && cancels(k, j);
        any |= apart;
        if (!apart) sum += t(k, j);
      }
      e_.s[i] = sum, e_.cancelled[i] = any;
    }
  }

  // Of displacements first .. first + kSlots; zeros beyond their end.
  __device__ __forceinline__ void load_t(int first, bool cancelled) {
    if (first > 0) __syncthreads();  // all are done with those before
    for (int i = thread_; i < Shape::kClasses * kSlots; i += Shape::kThreads) {
      const int64_t k = first_class_ + i / kSlots, j = first + i % kSlots + 1;
      const bool there = k < p_.K() && j < p_.M() && !(cancelled && cancels(k, j));
      e_.t[i / kSlots][i % kSlots] = there ? t(k, j) : S(0);
    }
  }

  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColTiles; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[i][j][c] = 0;
    using Stages = Ring<Shape::kStages, Shape::kStageBytes>;
    const Global<T> h{in_.h, p_.K(), in_.ld, in_.ld};
    typename Shape::H::template Walk<Shape::kThreads, true> weights(h, first_class_, 0);
    typename Shape::F::template Walk<Shape::kThreads, kVectors> features(p_.input, 0, first_dim_);
    Stages loaded(e_.ring), multiplied(e_.ring);
    const int64_t chunks = ceil_div(p_.B(), Shape::kDepth);
    const auto load = [&](bool any) {
      if (any) {
        unsigned char* stage = loaded.next();
        weights.load(reinterpret_cast<T*>(stage));
        features.load(reinterpret_cast<T*>(stage + Shape::H::kBytes));
        weights.along(), features.down();
      }
      copy_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < Shape::kStages - 1; ++i) load(i < chunks);
#pragma unroll 1
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      copy_async_wait<Shape::kStages - 2>();
      __syncthreads();  // this chunk is there for all, and all are done with the one whose place the next load takes
      load(chunk + Shape::kStages - 1 < chunks);
      multiply(multiplied.next());
    }
    copy_async_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void multiply(const unsigned char* base) {
    constexpr int kLd = Shape::H::kLd;
    const T* h = reinterpret_cast<const T*>(base);
    const T* f = reinterpret_cast<const T*>(base + Shape::H::kBytes) + col_;
#pragma unroll
    for (int s = 0; s < Shape::kDepth; s += Engine::kStep) {
      typename Engine::A a[kRowTiles];
      typename Engine::B b[kColTiles];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) a[i] = Engine::load_a(h + (row_ + i * 16) * kLd + s, kLd, lane_);
#pragma unroll
      for (int j = 0; j < kColTiles; j += 2)
        Engine::load_b2(b[j], b[j + 1], f + s * Shape::F::kLd + j * 8, Shape::F::kLd, lane_);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) Engine::multiply(sums_[i][j], a[i], b[j]);
    }
  }

  __device__ __forceinline__ void put_sums() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColTiles; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          S* to = &e_.after.sums[row_ + i * 16 + lane_ / 4 + half * 8][col_ + j * 8 + lane_ % 4 * 2];
          *reinterpret_cast<Pack<S, 2>*>(to) = {sums_[i][j][half * 2], sums_[i][j][half * 2 + 1]};
        }
    __syncthreads();
  }

  // What H, T and s leave out of classes with a vector that cancels.
  __device__ __forceinline__ void add_cancelled() {
    for (int i = thread_; i < Shape::kClasses * Shape::kDims; i += Shape::kThreads) {
      const int row = i / Shape::kDims, col = i % Shape::kDims;
      const int64_t k = first_class_ + row, x = first_dim_ + col;
      if (!e_.cancelled[row] || x >= p_.d()) continue;
      S sum = e_.after.sums[row][col];
      for (int64_t b = 0; b < p_.B(); ++b) {
        int slot;
        const S h = in_.pairs.apart(k, b, slot);
        if (h != S(0)) sum = fma(h, feature(b, x), sum);
      }
      for (int64_t j = 1; j < p_.M(); ++j)
        if (cancels(k, j)) sum = fma(-t(k, j), moved(k, j, x), sum);
      e_.after.sums[row][col] = sum;
    }
  }

  using Vector = Pack<T, kVector>;

  // A vector of a row, of which the first `inside` elements are there; zeros beyond.
  __device__ __forceinline__ Vector read(const Global<T>& x, int64_t row, int64_t col, int inside) const {
    const T* from = x.data + row * x.ld + col;
    Vector out;
    if constexpr (kVectors) {
      if (inside > 0) return *reinterpret_cast<const Vector*>(from);
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) out.e[c] = !kVectors && c < inside ? from[c] : narrow<T>(0);
    return out;
  }

  __device__ __forceinline__ void write(int64_t row, int64_t col, int inside, const S (&values)[kVector]) const {
    T* to = out_.centers + row * p_.d() + col;
    if constexpr (kVectors) {
      Vector pack;
#pragma unroll
      for (int c = 0; c < kVector; ++c) pack.e[c] = narrow<T>(values[c]);
      if (inside > 0) *reinterpret_cast<Vector*>(to) = pack;
    } else {
#pragma unroll
      for (int c = 0; c < kVector; ++c)
        if (c < inside) to[c] = narrow<T>(values[c]);
    }
  }

  // Subtracts the corrections with the displacements at hand, and sums these displacements' partials.
  // last: there are no more of them, and the sums are the gradient.
  __device__ __forceinline__ void subtract(int first, bool last) {
    const int column = thread_ % Shape::kColumns * kVector, run = thread_ / Shape::kColumns;
    const int64_t x = first_dim_ + column;
    const int columns = static_cast<int>(min(p_.d() - x, int64_t{kVector}));  // of the vector, those inside
    S delta[kSlots][kVector], partial[kSlots][kVector] = {}, all[kSlots] = {};
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const Vector values = read(p_.displacements, first + j, x, first + j < p_.m() ? columns : 0);
#pragma unroll
      for (int c = 0; c < kVector; ++c) delta[j][c] = wide(values.e[c]);
    }
    constexpr int kAtOnce = !kVectors ? 1 : kSqueezes ? 4 : 2;  // rows whose centres are read before any is used
    static_assert(Shape::kClasses % (Shape::kRuns * kAtOnce) == 0);
#pragma unroll 1
    for (int rows = run; rows < Shape::kClasses; rows += Shape::kRuns * kAtOnce) {
      Vector centers[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t k = first_class_ + rows + i * Shape::kRuns;
        centers[i] = read(p_.centers, k, x, k < p_.K() ? columns : 0);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = rows + i * Shape::kRuns;
        S weights[kSlots], w[kVector];
#pragma unroll
        for (int j = 0; j < kSlots; ++j) weights[j] = e_.t[row][j];
#pragma unroll
        for (int c = 0; c < kVector; ++c) w[c] = wide(centers[i].e[c]);
        if (out_.displacements) {
#pragma unroll
          for (int j = 0; j < kSlots; ++j) {
            all[j] += weights[j];
#pragma unroll
            for (int c = 0; c < kVector; ++c) partial[j][c] = fma(weights[j], w[c], partial[j][c]);
          }
        }
        if (!out_.centers) continue;
        S* sums = &e_.after.sums[row][column];
        const S s = first == 0 ? e_.s[row] : S(0);
        S sum[kVector];
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          sum[c] = fma(-s, w[c], sums[c]);
#pragma unroll
          for (int j = 0; j < kSlots; ++j) sum[c] = fma(-weights[j], delta[j][c], sum[c]);
        }
        if (last) {
          const int64_t k = first_class_ + row;
          write(k, x, k < p_.K() ? columns : 0, sum);
        } else {
#pragma unroll
          for (int c = 0; c < kVector; ++c) sums[c] = sum[c];
        }
      }
    }
    if (!out_.displacements) return;
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        S sum = fma(all[j], delta[j][c], partial[j][c]);
      // Over the warp's lanes that have these columns.
#pragma unroll
        for (int lanes = Shape::kColumns; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        if (lane_ < Shape::kColumns) e_.after.partials[warp_][j][column + c] = sum;
      }
  }

  __device__ __forceinline__ void store_displacements(int first, bool cancelled) {
    __syncthreads();
    for (int i = thread_; i < kSlots * Shape::kDims; i += Shape::kThreads) {
      const int64_t j = first + i / Shape::kDims, x = first_dim_ + i % Shape::kDims;
      if (j >= p_.m() || x >= p_.d()) continue;
      S sum = 0;
#pragma unroll
      for (int warp = 0; warp < Shape::kWarps; ++warp)
        sum += e_.after.partials[warp][i / Shape::kDims][i % Shape::kDims];
      for (int row = cancelled ? 0 : Shape::kClasses; row < Shape::kClasses; ++row) {
        const int64_t k = first_class_ + row;
        if (!e_.cancelled[row] || !cancels(k, j + 1)) continue;
        sum = fma(t(k, j + 1), moved(k, j + 1, x), sum);
        for (int64_t b = 0; b < p_.B(); ++b) {
          int slot;
          const S h = in_.pairs.apart(k, b, slot);
          if (h != S(0) && slot == j + 1) sum = fma(-h, feature(b, x), sum);
        }
      }
      out_.displacements[(tile_ * p_.m() + j) * p_.d() + x] = sum;
    }
  }

  const CenterInputs<T>& in_;
  const Problem<T>& p_;
  const CenterGradients<T>& out_;
  Shared& e_;
  int64_t tile_, first_class_, first_dim_;
  int thread_, lane_, warp_, row_, col_;  // row_, col_: the warp's first within the tile
  S sums_[kRowTiles][kColTiles][4];
};

template <class Shape, bool kVectors>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    centers_kernel(CenterInputs<typename Shape::T> in, CenterGradients<typename Shape::T> out) {
  GISTOPS_DYNAMIC_SHARED(typename Shape::Shared, shared);
  Centers<Shape, kVectors>(in, out, *shared).run();
}

template <class Shape, bool kVectors>
void launch_centers(void* stream, const CenterInputs<typename Shape::T>& in,
                    const CenterGradients<typename Shape::T>& out) {
  const Problem<typename Shape::T>& p = in.pairs.p;
  launch("centers", centers_kernel<Shape, kVectors>,
         blocks(ceil_div(p.K(), Shape::kClasses) * ceil_div(p.d(), Shape::kDims)), Shape::kThreads, Shape::kShared,
         stream, in, out);
}

// Wide tiles read less, narrow ones keep a small problem from idling.
template <class T>
void make_center_gradients(void* stream, bool vectors, const CenterInputs<T>& in, const CenterGradients<T>& out) {
  using Narrow = CentersShape<T, 64>;
  if (!vectors) return launch_centers<Narrow, false>(stream, in, out);
  using Wide = CentersShape<T, 128>;
  constexpr int64_t kEnough = 256;  // blocks
  const bool enough = ceil_div(in.pairs.p.K(), Wide::kClasses) * ceil_div(in.pairs.p.d(), Wide::kDims) >= kEnough;
  enough ? launch_centers<Wide, true>(stream, in, out) : launch_centers<Narrow, true>(stream, in, out);
}

}  // namespace gistops::cuda
