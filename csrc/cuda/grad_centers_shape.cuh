// What the gradient of the centres is made in: a block's tile, its shared memory, what it is given and what it leaves.
#pragma once
#include "routing.cuh"
#include "tile.cuh"

namespace gistops::cuda {

constexpr int kCenterClasses = 128;  // of a tile, each of which has a partial

template <class T_, int kDims_>
struct CentersShape {
  using T = T_;
  using S = Sum<T>;
  static_assert(sizeof(T) == 2);
  static constexpr int kClasses = kCenterClasses, kDims = kDims_, kStages = 3;
  static constexpr int kDepth = 32;  // features, a stage
  static constexpr int kWarpsC = 4, kWarpsD = 2, kWarps = kWarpsC * kWarpsD, kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = kClasses / kWarpsC / 16, kColTiles = kDims / kWarpsD / 8;
  static constexpr int kBlocks = 2;  // on a multiprocessor
  static constexpr int kSlots = 4;   // displacements at a time

  static constexpr int kVector = 16 / sizeof(T);
  using H = Tile<T, kClasses, kDepth, kVector>;
  using F = Tile<T, kDepth, kDims, kVector>;
  static constexpr int kStageBytes = H::kBytes + F::kBytes;

  // After the products a thread takes one vector of columns of every kRuns-th class.
  static constexpr int kColumns = kDims / kVector, kRuns = kThreads / kColumns;
  struct Sums {
    S sums[kClasses][kDims + 8];
    S partials[kWarps][kSlots][kDims];
  };
  struct Shared {
    S s[kClasses];
    alignas(16) S t[kClasses][kSlots];  // of the displacements at hand
    int cancelled[kClasses];            // whether a vector of the class cancels
    union {
      alignas(16) unsigned char ring[kStages * kStageBytes];
      Sums after;
    };
  };
  static constexpr int kShared = sizeof(Shared);
};

template <class T>
struct CenterInputs {
  Pairs<T> pairs;
  const T* h;  // [K, ld]: whole vectors, zeros from B on
  int64_t ld;
  const Sum<T>* t;       // [K, M]
  const int* cancelled;  // [1]
};

template <class T>
struct CenterGradients {
  T* centers;             // [K, d], or null
  Sum<T>* displacements;  // [tiles, m, d], or null
};

}  // namespace gistops::cuda
