// The gradient of the centres, and the centres' part of the displacements' gradient, in one pass over the centres:
//
//   dw[k] = sum_i H[i, k] f_i - sum_j T[k, j] (w_k + delta_j)
//   dd[j] = ... - sum_k T[k, j] (w_k + delta_j)           partials [tiles of classes, m, d]
//
// w + delta is summed before it is weighted, so that nothing cancels. A block takes 128 classes and 64 dimensions.
#pragma once
#include "route.cuh"

namespace gistops::cuda {

template <class Engine_, int kStages_>
struct CentersShape {
  using Engine = Engine_;
  using T = typename Engine::Element;
  using S = Sum<T>;
  static constexpr int kClasses = sizeof(T) == 8 ? 64 : 128, kDims = 64, kStages = kStages_;
  static constexpr int kDepth = sizeof(T) == 2 ? 32 : 16;  // features, a stage
  static constexpr int kWarpsC = 4, kWarpsD = 2, kThreads = kWarpsC * kWarpsD * kWarp;
  static constexpr int kRowTiles = kClasses / kWarpsC / 16, kColTiles = kDims / kWarpsD / 8;
  static constexpr int kSlots = 8;                        // of T, at a time
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;  // on a multiprocessor

  static constexpr int kPad = sizeof(T) == 4 ? 8 : 16 / sizeof(T);
  using H = Tile<T, kDepth, kClasses, kPad>;
  using F = Tile<T, kDepth, kDims, kPad>;
  static constexpr int kStageBytes = H::kBytes + F::kBytes;

  // After the products: thread (x, y) takes columns 2x, 2x + 1 and a run of classes.
  static constexpr int kRuns = kThreads / (kDims / 2), kRunClasses = kClasses / kRuns;
  struct Epilogue {
    S sums[kClasses][kDims + 4];
    S t[kClasses][kSlots];
    S partials[kRuns][kSlots][kDims];
    int cancelled[kClasses];
  };
  static constexpr int kShared = kStages * kStageBytes > static_cast<int>(sizeof(Epilogue)) ? kStages * kStageBytes
                                                                                            : sizeof(Epilogue);
};

template <class T>
struct CenterGradients {
  T* centers;             // [K, d], or null
  Sum<T>* displacements;  // [tiles, m, d], or null
};

template <class Shape, bool kVectors>
class Centers {
  using Engine = typename Shape::Engine;
  using T = typename Shape::T;
  using S = Sum<T>;
  using Epilogue = typename Shape::Epilogue;
  static constexpr int kRowTiles = Shape::kRowTiles, kColTiles = Shape::kColTiles;

 public:
  __device__ Centers(const Problem<T>& p, const Saved<T>& saved, const Routed<T>& routed, const CenterGradients<T>& out,
                     unsigned char* shared)
      : p_(p), saved_(saved), routed_(routed), out_(out), shared_(shared) {
    const int64_t across = ceil_div(p.d(), Shape::kDims);
    tile_ = blockIdx.x / across;
    first_class_ = tile_ * Shape::kClasses;
    first_dim_ = blockIdx.x % across * Shape::kDims;
    lane_ = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    row_ = warp / Shape::kWarpsD * kRowTiles * 16;
    col_ = warp % Shape::kWarpsD * kColTiles * 8;
  }

  __device__ __forceinline__ void run() {
    Epilogue& e = *reinterpret_cast<Epilogue*>(shared_);
    if (out_.centers) {
      multiply();
      put_sums(e);
      if (*routed_.cancelled) add_cancelled(e);
    }
    const int M = static_cast<int>(p_.M());
    for (int first = 0; first < M; first += Shape::kSlots) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < Shape::kClasses * Shape::kSlots; i += Shape::kThreads) {
        const int64_t k = first_class_ + i / Shape::kSlots, j = first + i % Shape::kSlots;
        e.t[i / Shape::kSlots][i % Shape::kSlots] = k < p_.K() && j < M ? routed_.t[k * M + j] : S(0);
      }
      __syncthreads();
      subtract(e, first);
      if (out_.displacements) store_displacements(e, first);
    }
    if (out_.centers) store_centers(e);
  }

 private:
  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColTiles; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[i][j][c] = 0;
    using Ring = Ring<Shape::kStages, Shape::kStageBytes>;
    const Global<T> h{routed_.h, p_.B(), routed_.ld, routed_.ld};
    typename Shape::H::template Walk<Shape::kThreads, true> weights(h, 0, first_class_);
    typename Shape::F::template Walk<Shape::kThreads, kVectors> features(p_.input, 0, first_dim_);
    Ring loaded(shared_), multiplied(shared_);
    const int64_t chunks = ceil_div(p_.B(), Shape::kDepth);
    const auto load = [&](bool any) {
      if (any) {
        unsigned char* stage = loaded.next();
        weights.load(reinterpret_cast<T*>(stage));
        features.load(reinterpret_cast<T*>(stage + Shape::H::kBytes));
        weights.down(), features.down();
      }
      copy_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < Shape::kStages - 1; ++i) load(i < chunks);
#pragma unroll 1
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      copy_async_wait<Shape::kStages - 2>();
      __syncthreads();  // as in the forward
      load(chunk + Shape::kStages - 1 < chunks);
      multiply(multiplied.next());
    }
    copy_async_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void multiply(const unsigned char* base) {
    const T* h = reinterpret_cast<const T*>(base) + row_;
    const T* f = reinterpret_cast<const T*>(base + Shape::H::kBytes) + col_;
#pragma unroll
    for (int s = 0; s < Shape::kDepth; s += Engine::kStep) {
      typename Engine::A a[kRowTiles];
      typename Engine::B b[kColTiles];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
        a[i] = Engine::template load_a<Along::column>(h + s * Shape::H::kLd + i * 16, Shape::H::kLd, lane_);
#pragma unroll
      for (int j = 0; j < kColTiles; j += 2)
        Engine::template load_b2<Along::column>(b[j], b[j + 1], f + s * Shape::F::kLd + j * 8, Shape::F::kLd, lane_);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) Engine::multiply(sums_[i][j], a[i], b[j]);
    }
  }

  __device__ __forceinline__ void put_sums(Epilogue& e) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColTiles; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          e.sums[row_ + i * 16 + lane_ / 4 + c / 2 * 8][col_ + j * 8 + lane_ % 4 * 2 + c % 2] = sums_[i][j][c];
    __syncthreads();
  }

  // Pairs that cancel are not in H: their features are added here.
  __device__ __forceinline__ void add_cancelled(Epilogue& e) {
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kClasses; i += Shape::kThreads) {
      const int64_t k = first_class_ + i;
      int any = 0;
      for (int64_t j = 1; j < p_.M() && k < p_.K(); ++j) any |= saved_.center_rnorms[j * p_.K() + k] < S(0);
      e.cancelled[i] = any;
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kClasses * Shape::kDims; i += Shape::kThreads) {
      const int row = i / Shape::kDims, col = i % Shape::kDims;
      const int64_t k = first_class_ + row, x = first_dim_ + col;
      if (!e.cancelled[row] || x >= p_.d()) continue;
      S sum = e.sums[row][col];
      for (int64_t b = 0; b < p_.B(); ++b) {
        const int64_t at = b * p_.K() + k;
        const S r = saved_.center_rnorms[saved_.slots[at] * p_.K() + k];
        if (r < S(0)) {
          const S h = routed_weight(*p_.tau, saved_.grad[at], r, saved_.input_rnorms[b]);
          sum = fma(h, wide(p_.input.data[b * p_.input.ld + x]), sum);
        }
      }
      e.sums[row][col] = sum;
    }
  }

  __device__ __forceinline__ S value(const Global<T>& x, int64_t row, int64_t col) {
    return row < x.rows && col < x.cols ? wide(x.data[row * x.ld + col]) : S(0);
  }

  // Slots first .. first + kSlots of the sums over j, from e.sums and into the displacements' partials.
  __device__ __forceinline__ void subtract(Epilogue& e, int first) {
    const int pair = static_cast<int>(threadIdx.x) % (Shape::kDims / 2) * 2;
    const int run = static_cast<int>(threadIdx.x) / (Shape::kDims / 2);
    S delta[Shape::kSlots][2], partial[Shape::kSlots][2] = {};
#pragma unroll
    for (int j = 0; j < Shape::kSlots; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        delta[j][c] = first + j > 0 ? value(p_.displacements, first + j - 1, first_dim_ + pair + c) : S(0);
#pragma unroll 2
    for (int i = 0; i < Shape::kRunClasses; ++i) {
      const int row = run * Shape::kRunClasses + i;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const S w = value(p_.centers, first_class_ + row, first_dim_ + pair + c);
        S sum = 0;
#pragma unroll
        for (int j = 0; j < Shape::kSlots; ++j) {
          const S moved = e.t[row][j] * (w + delta[j][c]);
          sum += moved, partial[j][c] += moved;
        }
        if (out_.centers) e.sums[row][pair + c] -= sum;
      }
    }
    if (!out_.displacements) return;
#pragma unroll
    for (int j = 0; j < Shape::kSlots; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) e.partials[run][j][pair + c] = partial[j][c];
  }

  __device__ __forceinline__ void store_displacements(Epilogue& e, int first) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kSlots * Shape::kDims; i += Shape::kThreads) {
      const int64_t j = first + i / Shape::kDims, x = first_dim_ + i % Shape::kDims;
      if (j == 0 || j >= p_.M() || x >= p_.d()) continue;
      S sum = 0;
#pragma unroll
      for (int run = 0; run < Shape::kRuns; ++run) sum += e.partials[run][i / Shape::kDims][i % Shape::kDims];
      out_.displacements[(tile_ * p_.m() + j - 1) * p_.d() + x] = sum;
    }
  }

  __device__ __forceinline__ void store_centers(Epilogue& e) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kClasses * Shape::kDims; i += Shape::kThreads) {
      const int64_t k = first_class_ + i / Shape::kDims, x = first_dim_ + i % Shape::kDims;
      if (k < p_.K() && x < p_.d())
        out_.centers[k * p_.d() + x] = narrow<T>(e.sums[i / Shape::kDims][i % Shape::kDims]);
    }
  }

  const Problem<T>& p_;
  const Saved<T>& saved_;
  const Routed<T>& routed_;
  const CenterGradients<T>& out_;
  unsigned char* shared_;
  int64_t tile_, first_class_, first_dim_;
  int lane_, row_, col_;  // row_, col_: the warp's first within the tile
  typename Engine::Accumulator sums_[kRowTiles][kColTiles][4];
};

template <class Shape, bool kVectors>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    centers_kernel(Problem<typename Shape::T> p, Saved<typename Shape::T> saved, Routed<typename Shape::T> routed,
                   CenterGradients<typename Shape::T> out) {
  GISTOPS_DYNAMIC_SHARED(unsigned char, shared);
  Centers<Shape, kVectors>(p, saved, routed, out, shared).run();
}

}  // namespace gistops::cuda
