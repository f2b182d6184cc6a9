// The tile, shared memory, arguments and results of grad_centers_kernel.
#pragma once
#include "routing.cuh"
#include "tile.cuh"

namespace gistops::cuda {

constexpr int kGradCentersClasses = 128;  // of a tile

// A block takes 128 classes by kDims dims. Eight warps, four along the classes by two along the dims, share the
// product.
template <class T_, int kDims_>
struct GradCentersShape {
  using T = T_;
  using S = Sum<T>;
  static_assert(sizeof(T) == 2);
  static constexpr int kClasses = kGradCentersClasses, kDims = kDims_, kStages = 3;
  static constexpr int kRows = 32;  // of the batch, per stage: the summed dimension
  static constexpr int kWarpsC = 4, kWarpsD = 2, kWarps = kWarpsC * kWarpsD, kThreads = kWarps * kWarp;
  static constexpr int kFragmentsC = kClasses / kWarpsC / 16, kFragmentsD = kDims / kWarpsD / 8;  // of a warp
  static constexpr int kBlocks = 2;                                                               // per multiprocessor
  static constexpr int kSlots = 4;  // displacements at a time

  static constexpr int kVector = 16 / sizeof(T);
  using H = Tile<T, kClasses, kRows, kVector>;
  using F = Tile<T, kRows, kDims, kVector>;
  static constexpr int kStageBytes = H::kBytes + F::kBytes;

  // After the product a thread takes one vector of dims of every kClassStride-th class.
  static constexpr int kVectorsPerClass = kDims / kVector, kClassStride = kThreads / kVectorsPerClass;
  struct Sums {
    S sums[kClasses][kDims + 8];
    S partials[kWarps][kSlots][kDims];
  };
  struct Shared {
    S t_sums[kClasses];                 // s_k
    alignas(16) S t[kClasses][kSlots];  // of the current displacements
    int cancelled[kClasses];            // true if the class has a cancelled pair
    union {
      alignas(16) unsigned char ring[kStages * kStageBytes];  // during the product
      Sums epilogue;                                          // after it
    };
  };
  static constexpr int kSharedBytes = sizeof(Shared);
};

template <class T>
struct GradCentersInputs {
  GradSource<T> source;
  const T* h;  // [K, ld]: whole vectors, zeros from B on
  int64_t ld;
  const Sum<T>* t;       // [K, M]
  const int* cancelled;  // [1]
};

template <class T>
struct GradCentersOutputs {
  T* centers;             // [K, d], or null
  Sum<T>* displacements;  // partials [tiles of classes, m, d], or null
};

}  // namespace gistops::cuda
