// The tile and the shared memory of grad_centers_stationary_kernel.
#pragma once
#include "grad_centers_shape.cuh"

namespace gistops::cuda {

// The parts that the shapes for the two kinds of tensor-core products share.
template <class T_, int kClasses_, int kDims_, int kThreads_>
struct StationaryShapeBase {
  using T = T_;
  static_assert(sizeof(T) == 2);
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kClasses = kClasses_, kDims = kDims_, kThreads = kThreads_, kWarps = kThreads / kWarp;
  static constexpr int kRows = 32;  // of the batch, per stage
  static constexpr int kSlots = 8;  // displacements in a group

  // T is split into terms of the operands' type: two terms for T delta, which is rounded to this type in the end, and
  // as many for the sums of T w as have the bits of a float. Float16 also needs other scales: by class for T delta, by
  // displacement for T w.
  static constexpr bool kScaled = __is_same(T, f16);
  static constexpr int kTermsW = kScaled ? 2 : 3;
  static constexpr int kTRowsDelta = kScaled ? kTermsW * kSlots : 0;  // the first row of the terms for T delta
  static constexpr int kTRows = kScaled ? 4 * kSlots : 3 * kSlots;    // of a group
  static constexpr int kTLd = kClasses + kVector;

  using Delta = Tile<T, kSlots, kDims, kVector>;
  using DeltaLoader = typename Delta::template Loader<kThreads, true>;
};

// A block keeps H of kClasses classes and all rows in shared memory, and takes kDims dims after kDims dims of f. Each
// of the eight warps multiplies 64 classes by 32 dims at a time: it loads six fragments per 16 tensor-core products,
// where the tiled kernel loads six per eight. Few classes take wide tiles, which leave more blocks; many classes take
// high tiles, which read f less often.
template <class T, int kClasses>
struct StationaryShape : StationaryShapeBase<T, kClasses, 64 * 256 / kClasses, 256> {
  using Base = StationaryShapeBase<T, kClasses, 64 * 256 / kClasses, 256>;
  using Base::kDims, Base::kRows, Base::kThreads, Base::kVector;
  static constexpr bool kWgmma = false;
  static constexpr int kBlocks = 1;                          // per multiprocessor
  static constexpr int kFragmentsC = 4, kFragmentsD = 4;     // of a warp
  static constexpr int kWarpsD = kDims / (kFragmentsD * 8);  // the others lie along the classes
  static constexpr int kStages = kClasses > 64 ? 5 : 3;
  static constexpr int kStoredRows = 8;  // of the gradient, that a warp writes with one instruction

  using F = Tile<T, kRows, kDims, kVector>;
  using W = Tile<T, kClasses, kDims, kVector>;  // the centers, then their gradient
  using FLoader = typename F::template Loader<kThreads, true>;
  using WLoader = typename W::template Loader<kThreads, true>;

  // Return the number of elements of H of B rows, the index of one of them, and its distance to that of the next class.
  static __host__ __device__ int64_t h_size(int64_t B) { return kClasses * h_ld(B); }
  static __device__ __forceinline__ int h_at(int c, int row, int64_t B) { return c * h_class(B) + row; }
  static __device__ __forceinline__ int h_class(int64_t B) { return static_cast<int>(h_ld(B)); }
  static __host__ __device__ int64_t h_ld(int64_t B) { return ceil_div(B, kRows) * kRows + kVector; }
};

// The same for wgmma: each group of four warps multiplies 64 classes by all dims of the tile, from shared memory. Two
// blocks fit into a multiprocessor of a Hopper GPU up to 256 rows, so that one multiplies while the other corrects.
template <class T, int kClasses>
struct WgmmaShape : StationaryShapeBase<T, kClasses, 64 * 128 / kClasses, 2 * kClasses> {
  using Base = StationaryShapeBase<T, kClasses, 64 * 128 / kClasses, 2 * kClasses>;
  using Base::kDims, Base::kRows, Base::kThreads, Base::kVector;
  static constexpr bool kWgmma = true;
  static constexpr int kBlocks = 2;
  static constexpr int kFragmentsC = 1, kFragmentsD = kDims / 8, kWarpsD = 1;
  static constexpr int kStages = kClasses > 64 ? 5 : 6;
  static constexpr int kStoredRows = kWarp / (kDims / kVector);

  using F = SwizzledTile<T, kRows, kDims>;
  using W = SwizzledTile<T, kClasses, kDims>;
  using FLoader = typename F::template Loader<kThreads>;
  using WLoader = typename W::template Loader<kThreads>;

  // H lies in blocks of 64 rows of the batch, swizzled. h_class: the distance between multiples of eight classes.
  static constexpr int kHRows = 64;
  using H = SwizzledTile<T, kClasses, kHRows>;
  static __host__ __device__ int64_t h_size(int64_t B) { return ceil_div(B, kHRows) * kHRows * kClasses; }
  static __device__ __forceinline__ int h_at(int c, int row, int64_t) {
    const unsigned block = static_cast<unsigned>(row) / kHRows, in_block = static_cast<unsigned>(row) % kHRows;
    return static_cast<int>(block) * (kHRows * kClasses) + H::at(c, static_cast<int>(in_block));
  }
  static __device__ __forceinline__ int h_class(int64_t) { return kHRows; }
};

// The shared memory of a block; the lengths of the arrays depend on the problem. H is first, because wgmma needs its
// alignment.
template <class Shape>
struct StationaryMemory {
  using T = typename Shape::T;
  struct Fixed {
    alignas(16) unsigned char ring[Shape::kStages * Shape::F::kBytes];
    alignas(16) unsigned char w[Shape::W::kBytes];
    float t_sums[Shape::kClasses];   // s_k
    float unscale[Shape::kClasses];  // of T delta
    int cancelled[Shape::kClasses];  // true if the class has a cancelled pair
  };

  T* h;  // [kClasses, rows]: Shape::h_at
  Fixed& fixed;
  T* t;               // [groups, kTRows, kTLd]: terms of -T, class by class in each row
  T* delta;           // [groups, Delta]
  float* slot_sums;   // [groups * kSlots]: sum of T over the classes
  float* slot_scale;  // [groups * kSlots]: the factor that undoes the scale of T w
  float* weights;     // [rows]: of a class with a cancelled pair
  uint8_t* slots;     // [rows]: theirs
  int groups;

  static __host__ __device__ int64_t rows(int64_t B) { return ceil_div(B, Shape::kRows) * Shape::kRows; }
  static __host__ __device__ int64_t h_bytes(int64_t B) { return Shape::h_size(B) * static_cast<int64_t>(sizeof(T)); }

  static __host__ __device__ int64_t bytes(int64_t B, int64_t m) {
    const int64_t groups = ceil_div(m, Shape::kSlots);
    const int64_t t = groups * Shape::kTRows * Shape::kTLd * static_cast<int64_t>(sizeof(T));
    return h_bytes(B) + static_cast<int64_t>(sizeof(Fixed)) + t + groups * Shape::Delta::kBytes +
           groups * Shape::kSlots * 2 * static_cast<int64_t>(sizeof(float)) + rows(B) * 5;
  }

  __device__ StationaryMemory(unsigned char* memory, int64_t B, int64_t m)
      : h(reinterpret_cast<T*>(memory)), fixed(*reinterpret_cast<Fixed*>(memory + h_bytes(B))),
        groups(static_cast<int>(ceil_div(m, Shape::kSlots))) {
    t = reinterpret_cast<T*>(memory + h_bytes(B) + sizeof(Fixed));
    delta = t + groups * Shape::kTRows * Shape::kTLd;
    slot_sums = reinterpret_cast<float*>(delta + groups * (Shape::Delta::kBytes / static_cast<int>(sizeof(T))));
    slot_scale = slot_sums + groups * Shape::kSlots;
    weights = slot_scale + groups * Shape::kSlots;
    slots = reinterpret_cast<uint8_t*>(weights + rows(B));
  }
};

}  // namespace gistops::cuda
