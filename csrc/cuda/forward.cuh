// The forward in one pass over the centres: a block takes kClasses centres and kFeatures features, and multiplies their
// tiles on the way through d, together with the displacements' tile and the centres' squares. Then, all in shared
// memory, R, the maximum over slots, and the outputs.
#pragma once
#include "arguments.h"

namespace gistops::cuda {

template <class Engine_, int kFeatures_, int kStages_>
struct ForwardShape {
  using Engine = Engine_;
  using T = typename Engine::Element;
  static constexpr int kClasses = 64, kFeatures = kFeatures_, kStages = kStages_;
  static constexpr int kWarpsC = 2, kWarpsF = 4, kThreads = kWarpsC * kWarpsF * kWarp;
  static constexpr int kBlocks = kFeatures > 128 || sizeof(T) == 8
                                     ? 1
                                     : 2;         // on a multiprocessor: the registers that a thread may take
  static constexpr int kDepth = 128 / sizeof(T);  // of d, a stage
  static constexpr int kRowTiles = kClasses / kWarpsC / 16, kColTiles = kFeatures / kWarpsF / 8;
  static constexpr int kSlots = kFusedDisplacements + 1;  // what the epilogue holds at a time

  using W = Tile<T, kClasses, kDepth, 16 / sizeof(T)>;
  using F = Tile<T, kFeatures, kDepth, 16 / sizeof(T)>;
  using D = Tile<T, kFusedDisplacements, kDepth, 16 / sizeof(T)>;
  static constexpr int kStageBytes = W::kBytes + F::kBytes + D::kBytes;
};

// Shared memory after the products, where the ring was.
template <class Shape>
struct ForwardEpilogue {
  using S = Sum<typename Shape::T>;
  static constexpr int kLd = Shape::kClasses + 4;  // lanes of a warp write 4 columns of 8 rows: no bank twice
  S logits[Shape::kFeatures][kLd];
  S r[Shape::kSlots][Shape::kClasses];
  S q[Shape::kSlots][Shape::kFeatures];
  S scale[Shape::kFeatures];  // tau / |f_i|
  S squares[Shape::kWarpsF][Shape::kClasses];
  S dots[Shape::kWarpsF][Shape::kClasses][kFusedDisplacements];
  uint8_t slots[Shape::kFeatures][Shape::kClasses];
};

template <class Shape>
constexpr int forward_shared_bytes() {
  constexpr int ring = Shape::kStages * Shape::kStageBytes, epilogue = sizeof(ForwardEpilogue<Shape>);
  return ring > epilogue ? ring : epilogue;
}

// Dot products of a warp with v = w + delta: |v|^2, or f.v.
template <class T>
__device__ __forceinline__ Sum<T> direct_square(const T* w, const T* delta, int64_t d, int lane) {
  Sum<T> sum = 0;
  for (int64_t x = lane; x < d; x += kWarp) {
    const Sum<T> v = wide(w[x]) + (delta ? wide(delta[x]) : Sum<T>(0));
    sum = fma(v, v, sum);
  }
  return warp_sum(sum);
}

template <class T>
__device__ __forceinline__ Sum<T> direct_product(const T* f, const T* w, const T* delta, int64_t d, int lane) {
  Sum<T> sum = 0;
  for (int64_t x = lane; x < d; x += kWarp)
    sum = fma(wide(f[x]), wide(w[x]) + (delta ? wide(delta[x]) : Sum<T>(0)), sum);
  return warp_sum(sum);
}

// kGiven: out.center_rnorms has been made already (m > kFusedDisplacements). kVectors: of all operands, as in tile.cuh.
template <class Shape, bool kGiven, bool kVectors>
class Forward {
  using Engine = typename Shape::Engine;
  using T = typename Shape::T;
  using S = Sum<T>;
  using Epilogue = ForwardEpilogue<Shape>;
  static constexpr int kRowTiles = Shape::kRowTiles, kColTiles = Shape::kColTiles;

 public:
  __device__ Forward(const Problem<T>& p, const Prepared<T>& prepared, const Outputs<T>& out, unsigned char* shared)
      : p_(p), prepared_(prepared), out_(out), shared_(shared) {
    const int64_t tiles = ceil_div(p.B(), Shape::kFeatures);
    // The tiles of features follow each other, so that a tile of centres stays in L2 between them.
    first_class_ = blockIdx.x / tiles * Shape::kClasses;
    first_feature_ = blockIdx.x % tiles * Shape::kFeatures;
    lane_ = static_cast<int>(threadIdx.x) % kWarp;
    warp_ = static_cast<int>(threadIdx.x) / kWarp;
    row_ = warp_ / Shape::kWarpsF * kRowTiles * 16;
    col_ = warp_ % Shape::kWarpsF * kColTiles * 8;
  }

  __device__ __forceinline__ void run() {
    multiply();
    Epilogue& e = *reinterpret_cast<Epilogue*>(shared_);
    if constexpr (!kGiven) put_partials(e);
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kFeatures; i += Shape::kThreads) {
      const int64_t row = first_feature_ + i;
      e.scale[i] = row < p_.B() ? *p_.tau * prepared_.input_rnorms[row] : S(0);
    }
    __syncthreads();
    const int M = static_cast<int>(p_.M());
    bool cancelled = false;
    for (int first = 0; first < M; first += Shape::kSlots) {
      const int n = min(Shape::kSlots, M - first);
      cancelled |= make_rnorms(e, first, n);
      take_products(e, first, n);
      __syncthreads();
      pool(e, first, n);
      __syncthreads();
    }
    if (cancelled) score_cancelled(e);
    store(e);
  }

 private:
  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      squares_[i][0] = squares_[i][1] = 0;
#pragma unroll
      for (int c = 0; c < 4; ++c) dots_[i][c] = 0;
#pragma unroll
      for (int j = 0; j < kColTiles; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[i][j][c] = 0;
    }
    using Ring = Ring<Shape::kStages, Shape::kStageBytes>;
    typename Shape::W::template Walk<Shape::kThreads, kVectors> centers(p_.centers, first_class_, 0);
    typename Shape::F::template Walk<Shape::kThreads, kVectors> features(p_.input, first_feature_, 0);
    typename Shape::D::template Walk<Shape::kThreads, kVectors> displacements(p_.displacements, 0, 0);
    Ring loaded(shared_), multiplied(shared_);
    const int chunks = static_cast<int>(ceil_div(p_.d(), Shape::kDepth));
    const auto load = [&](bool any) {
      if (any) {
        unsigned char* stage = loaded.next();
        centers.load(reinterpret_cast<T*>(stage));
        features.load(reinterpret_cast<T*>(stage + Shape::W::kBytes));
        centers.along(), features.along();
        if constexpr (!kGiven) {
          displacements.load(reinterpret_cast<T*>(stage + Shape::W::kBytes + Shape::F::kBytes));
          displacements.along();
        }
      }
      copy_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < Shape::kStages - 1; ++i) load(i < chunks);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      copy_async_wait<Shape::kStages - 2>();
      __syncthreads();  // this chunk is there for all, and all are done with the one whose place the next load takes
      load(chunk + Shape::kStages - 1 < chunks);
      multiply(multiplied.next());
    }
    copy_async_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void multiply(const unsigned char* base) {
    const T* w = reinterpret_cast<const T*>(base) + row_ * Shape::W::kLd;
    const T* f = reinterpret_cast<const T*>(base + Shape::W::kBytes) + col_ * Shape::F::kLd;
    const T* delta = reinterpret_cast<const T*>(base + Shape::W::kBytes + Shape::F::kBytes);
#pragma unroll
    for (int s = 0; s < Shape::kDepth / Engine::kStep; ++s) {
      const int x = s * Engine::kStep;
      typename Engine::A a[kRowTiles];
      typename Engine::B b[kColTiles];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
        a[i] = Engine::template load_a<Along::row>(w + i * 16 * Shape::W::kLd + x, Shape::W::kLd, lane_);
#pragma unroll
      for (int j = 0; j < kColTiles; j += 2)
        Engine::template load_b2<Along::row>(b[j], b[j + 1], f + j * 8 * Shape::F::kLd + x, Shape::F::kLd, lane_);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kColTiles; ++j) Engine::multiply(sums_[i][j], a[i], b[j]);
      if constexpr (!kGiven) {
        // The warps that share these centres share the work on them.
        if (s % Shape::kWarpsF == warp_ % Shape::kWarpsF) {
          const typename Engine::B c = Engine::template load_b<Along::row>(delta + x, Shape::D::kLd, lane_);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            Engine::multiply(dots_[i], a[i], c);
            Engine::add_squares(squares_[i], a[i]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void put_partials(Epilogue& e) {
    const int part = warp_ % Shape::kWarpsF;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row_ + i * 16 + lane_ / 4 + h * 8;
        S square = squares_[i][h];
        square += __shfl_xor_sync(~0u, square, 1);
        square += __shfl_xor_sync(~0u, square, 2);
        if (lane_ % 4 == 0) e.squares[part][row] = square;
        e.dots[part][row][lane_ % 4 * 2] = dots_[i][h * 2];
        e.dots[part][row][lane_ % 4 * 2 + 1] = dots_[i][h * 2 + 1];
      }
    }
  }

  // e.r: the reciprocal norms of slots first .. first + n, negative where the pair cancels; whether any of the block's
  // pairs does.
  __device__ __forceinline__ bool make_rnorms(Epilogue& e, int first, int n) {
    bool any = false;
    for (int i = static_cast<int>(threadIdx.x); i < n * Shape::kClasses; i += Shape::kThreads) {
      const int j = i / Shape::kClasses, k = i % Shape::kClasses;
      const int64_t row = first_class_ + k;
      if constexpr (kGiven) {
        const S r = row < p_.K() ? out_.center_rnorms[(first + j) * p_.K() + row] : S(0);
        e.r[j][k] = r;
        any |= r < S(0);
      } else {
        S square = 0, dot = 0;
#pragma unroll
        for (int part = 0; part < Shape::kWarpsF; ++part) {
          square += e.squares[part][k];
          if (j > 0) dot += e.dots[part][k][j - 1];
        }
        const S delta_square = prepared_.delta_squares[j], sum = square + delta_square + 2 * dot;
        const bool lost = j > 0 && cancels(sum, square, delta_square);
        e.r[j][k] = lost ? S(-1) : clamped_rnorm(sum);
        any |= lost;
      }
    }
    any = __syncthreads_or(any);
    if constexpr (!kGiven) {
      if (any) {
        for (int i = warp_; i < n * Shape::kClasses; i += Shape::kThreads / kWarp) {
          const int j = i / Shape::kClasses, k = i % Shape::kClasses;
          if (e.r[j][k] >= S(0) || e.r[j][k] != e.r[j][k]) continue;
          const S square = direct_square(p_.centers.data + (first_class_ + k) * p_.centers.ld,
                                         p_.displacements.data + (j - 1) * p_.displacements.ld, p_.d(), lane_);
          __syncwarp();
          if (lane_ == 0) e.r[j][k] = -clamped_rnorm(square);
        }
      }
      __syncthreads();
      if (first_feature_ == 0) {
        for (int i = static_cast<int>(threadIdx.x); i < n * Shape::kClasses; i += Shape::kThreads) {
          const int64_t row = first_class_ + i % Shape::kClasses;
          if (row < p_.K())
            out_.center_rnorms[i / Shape::kClasses * p_.K() + row] = e.r[i / Shape::kClasses][i % Shape::kClasses];
        }
      }
    }
    return any;
  }

  __device__ __forceinline__ void take_products(Epilogue& e, int first, int n) {
    for (int i = static_cast<int>(threadIdx.x); i < n * Shape::kFeatures; i += Shape::kThreads) {
      const int64_t row = first_feature_ + i / n;
      e.q[i % n][i / n] = row < p_.B() ? prepared_.products[row * p_.M() + first + i % n] : S(0);
    }
  }

  // The maximum over n slots, and over those before them in e. A slot at a time for all of a thread's pairs, so that
  // the code is short.
  __device__ __forceinline__ void pool(Epilogue& e, int first, int n) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const int row = row_ + i * 16 + lane_ / 4, col = col_ + lane_ % 4 * 2;
      S best[kColTiles][4];  // as the accumulators lie
      int slot[kColTiles][4];
#pragma unroll
      for (int t = 0; t < kColTiles; ++t)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          best[t][c] = first == 0 ? -kInfinity<S> : e.logits[col + t * 8 + c % 2][row + c / 2 * 8];
          slot[t][c] = first == 0 ? 0 : e.slots[col + t * 8 + c % 2][row + c / 2 * 8];
        }
#pragma unroll 1
      for (int j = 0; j < n; ++j) {
        const S r[2] = {magnitude(e.r[j][row]), magnitude(e.r[j][row + 8])};
#pragma unroll
        for (int t = 0; t < kColTiles; ++t) {
          const S q[2] = {e.q[j][col + t * 8], e.q[j][col + t * 8 + 1]};
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const S score = (sums_[i][t][c] + q[c % 2]) * r[c / 2];
            // NaN wins, as in torch.max; of equals the lowest
            if (score > best[t][c] || score != score) best[t][c] = score, slot[t][c] = first + j;
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kColTiles; ++t)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          e.logits[col + t * 8 + c % 2][row + c / 2 * 8] = best[t][c];
          e.slots[col + t * 8 + c % 2][row + c / 2 * 8] = static_cast<uint8_t>(slot[t][c]);
        }
    }
  }

  __device__ __forceinline__ S rnorm(const Epilogue& e, int j, int k) {
    return kGiven ? out_.center_rnorms[j * p_.K() + first_class_ + k] : e.r[j][k];
  }

  // Classes with a vector that cancels are scored again from the vectors themselves: a warp for each pair.
  __device__ __forceinline__ void score_cancelled(Epilogue& e) {
    const T* delta = p_.displacements.data;
    const int M = static_cast<int>(p_.M());
    const int classes = static_cast<int>(min(p_.K() - first_class_, int64_t{Shape::kClasses}));
    const int features = static_cast<int>(min(p_.B() - first_feature_, int64_t{Shape::kFeatures}));
    for (int k = 0; k < classes; ++k) {
      bool cancelled = false;
      for (int j = 1; j < M; ++j) cancelled |= rnorm(e, j, k) < S(0);
      if (!cancelled) continue;
      const T* w = p_.centers.data + (first_class_ + k) * p_.centers.ld;
      for (int b = warp_; b < features; b += Shape::kThreads / kWarp) {
        const T* f = p_.input.data + (first_feature_ + b) * p_.input.ld;
        S best = 0;
        int slot = 0;
        for (int j = 0; j < M; ++j) {
          const S score = direct_product(f, w, j ? delta + (j - 1) * p_.displacements.ld : nullptr, p_.d(), lane_) *
                          magnitude(rnorm(e, j, k));
          if (j == 0 || score > best || score != score) best = score, slot = j;
        }
        if (lane_ == 0) e.logits[b][k] = best, e.slots[b][k] = static_cast<uint8_t>(slot);
      }
    }
  }

  // A thread keeps to one class.
  __device__ __forceinline__ void store(const Epilogue& e) {
    __syncthreads();
    constexpr int kAtOnce = Shape::kThreads / Shape::kClasses;
    const int k = static_cast<int>(threadIdx.x) % Shape::kClasses,
              first = static_cast<int>(threadIdx.x) / Shape::kClasses;
    if (first_class_ + k >= p_.K()) return;
    const int features = static_cast<int>(min(p_.B() - first_feature_, int64_t{Shape::kFeatures}));
    const int64_t at = (first_feature_ + first) * p_.K() + first_class_ + k, step = kAtOnce * p_.K();
    S* logits = out_.logits + at;
    uint8_t* slots = out_.slots + at;
#pragma unroll 4
    for (int b = first; b < features; b += kAtOnce, logits += step, slots += step)
      *logits = e.logits[b][k] * e.scale[b], *slots = e.slots[b][k];
  }

  const Problem<T>& p_;
  const Prepared<T>& prepared_;
  const Outputs<T>& out_;
  unsigned char* shared_;
  int64_t first_class_, first_feature_;
  int lane_, warp_, row_, col_;  // row_, col_: the warp's first within the tile
  typename Engine::Accumulator sums_[kRowTiles][kColTiles][4], dots_[kRowTiles][4], squares_[kRowTiles][2];
};

template <class Shape, bool kGiven, bool kVectors>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    forward_kernel(Problem<typename Shape::T> p, Prepared<typename Shape::T> prepared, Outputs<typename Shape::T> out) {
  GISTOPS_DYNAMIC_SHARED(unsigned char, shared);
  Forward<Shape, kGiven, kVectors>(p, prepared, out, shared).run();
}

}  // namespace gistops::cuda
