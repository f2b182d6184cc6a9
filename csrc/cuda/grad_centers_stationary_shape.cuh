// The tile and the shared memory of grad_centers_stationary_kernel.
#pragma once
#include "grad_centers_shape.cuh"

namespace gistops::cuda {

// A block keeps H of kClasses classes and all rows in shared memory, and takes kDims dims after kDims dims of f. Each
// of the eight warps multiplies 64 classes by 32 dims at a time: it loads six fragments per 16 tensor-core products,
// where the tiled kernel loads six per eight. Few classes take wide tiles, which leave more blocks; many classes take
// high tiles, which read f less often.
template <class T_, int kClasses_>
struct StationaryShape {
  using T = T_;
  static_assert(sizeof(T) == 2);
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kClasses = kClasses_, kWarps = 8, kThreads = kWarps * kWarp;
  static constexpr int kFragmentsC = 4, kFragmentsD = 4;  // of a warp
  static constexpr int kWarpsC = kClasses / (kFragmentsC * 16), kWarpsD = kWarps / kWarpsC;
  static constexpr int kDims = kWarpsD * kFragmentsD * 8;
  static constexpr int kRows = 32;  // of the batch, per stage
  static constexpr int kStages = kClasses > 64 ? 5 : 3;
  static constexpr int kSlots = 8;  // displacements in a group

  // T is split into terms of the operands' type: two terms for T delta, which is rounded to this type in the end, and
  // as many for the sums of T w as have the bits of a float. Float16 also needs other scales: by class for T delta, by
  // displacement for T w.
  static constexpr bool kScaled = __is_same(T, f16);
  static constexpr int kTermsW = kScaled ? 2 : 3;
  static constexpr int kTRowsDelta = kScaled ? kTermsW * kSlots : 0;  // the first row of the terms for T delta
  static constexpr int kTRows = kScaled ? 4 * kSlots : 3 * kSlots;    // of a group
  static constexpr int kTLd = kClasses + kVector;

  using F = Tile<T, kRows, kDims, kVector>;
  using W = Tile<T, kClasses, kDims, kVector>;  // the centers, then their gradient
  using Delta = Tile<T, kSlots, kDims, kVector>;

  struct Shared {
    alignas(16) unsigned char ring[kStages * F::kBytes];
    alignas(16) unsigned char w[W::kBytes];
    float t_sums[kClasses];   // s_k
    float unscale[kClasses];  // of T delta
    int cancelled[kClasses];  // true if the class has a cancelled pair
  };
};

// The arrays behind Shape::Shared, whose lengths depend on the problem.
template <class Shape>
struct StationaryMemory {
  using T = typename Shape::T;
  T* h;               // [kClasses, h_ld]
  T* t;               // [groups, kTRows, kTLd]: terms of -T, class by class in each row
  T* delta;           // [groups, Delta]
  float* slot_sums;   // [groups * kSlots]: sum of T over the classes
  float* slot_scale;  // [groups * kSlots]: the factor that undoes the scale of T w
  float* weights;     // [rows]: of a class with a cancelled pair
  uint8_t* slots;     // [rows]: theirs
  int h_ld, groups;

  static __host__ __device__ int rows(int64_t B) { return static_cast<int>(ceil_div(B, Shape::kRows)) * Shape::kRows; }

  static __host__ __device__ int64_t bytes(int64_t B, int64_t m) {
    const int64_t groups = ceil_div(m, Shape::kSlots), rows = ceil_div(B, Shape::kRows) * Shape::kRows;
    const int64_t h = Shape::kClasses * (rows + Shape::kVector) * static_cast<int64_t>(sizeof(T));
    const int64_t t = groups * Shape::kTRows * Shape::kTLd * static_cast<int64_t>(sizeof(T));
    return static_cast<int64_t>(sizeof(typename Shape::Shared)) + h + t + groups * Shape::Delta::kBytes +
           groups * Shape::kSlots * 2 * static_cast<int64_t>(sizeof(float)) + rows * 5;
  }

  __device__ StationaryMemory(unsigned char* memory, int64_t B, int64_t m)
      : h_ld(rows(B) + Shape::kVector), groups(static_cast<int>(ceil_div(m, Shape::kSlots))) {
    h = reinterpret_cast<T*>(memory + sizeof(typename Shape::Shared));
    t = h + Shape::kClasses * h_ld;
    delta = t + groups * Shape::kTRows * Shape::kTLd;
    slot_sums = reinterpret_cast<float*>(delta + groups * (Shape::Delta::kBytes / static_cast<int>(sizeof(T))));
    slot_scale = slot_sums + groups * Shape::kSlots;
    weights = slot_scale + groups * Shape::kSlots;
    slots = reinterpret_cast<uint8_t*>(weights + rows(B));
  }
};

}  // namespace gistops::cuda
