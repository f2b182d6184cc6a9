// The choice between the two kernels for the gradient of the centers in half precision, by the sizes and the device.
#pragma once
#include "grad_centers.cuh"
#include "grad_centers_stationary.cuh"
#include "launch.cuh"
#include "op_table.h"

namespace gistops::cuda {

// How to compute the gradient of the centers.
struct GradCentersPlan {
  bool stationary = false;
  int classes = kGradCentersClasses;  // of a tile
  int64_t dim_parts = 1, shared = 0;  // stationary: blocks per tile of classes; bytes of dynamic shared memory

  // Return the number of partials of the displacements for K classes: of each tile, or of at most 264 groups of tiles,
  // two per multiprocessor of a large GPU.
  int64_t groups(int64_t K) const {
    const int64_t tiles = ceil_div(K, classes);
    return stationary ? ceil_div(tiles, ceil_div(tiles, kMostGroups)) : tiles;
  }
  // Return the largest number of groups of K classes or fewer: fewer tiles can make more groups.
  int64_t most_groups(int64_t K) const {
    const int64_t tiles = ceil_div(K, classes);
    return stationary ? std::min(tiles, kMostGroups) : tiles;
  }

 private:
  static constexpr int64_t kMostGroups = 264;
};

// Choose the kernel and its tile. Parked scores take a stationary tile whatever GISTOPS_CUDA_CENTERS_TILE asks for, so
// that it may change between a forward and its backward.
//   aligned: rows of d elements begin at multiples of 16 bytes and are whole vectors long
//   parked: H lies in the memory of the gradient, so that one block must take all dims of its classes
template <class T>
GradCentersPlan plan_grad_centers(int64_t B, int64_t K, int64_t d, int64_t m, bool aligned, bool parked) {
  using Wide = StationaryShape<T, 64>;
  using High = StationaryShape<T, 128>;
  constexpr int64_t kEnoughBlocks = 128;                   // nearly one per multiprocessor of a large GPU
  const auto parts = [&](int64_t classes, int64_t dims) {  // of the dims, each a whole number of tiles
    const int64_t wanted = parked ? 1 : ceil_div(kEnoughBlocks, std::max<int64_t>(ceil_div(K, classes), 1));
    return ceil_div(ceil_div(d, dims), ceil_div(ceil_div(d, dims), wanted));
  };
  const int asked = asked_centers_tile();
  if (!aligned || (asked == 0 && !parked)) return {};
  const int64_t most = shared_memory_limit("grad_centers"), high = StationaryMemory<High>::bytes(B, m),
                wide = StationaryMemory<Wide>::bytes(B, m);
  const bool few_blocks = parked && ceil_div(K, High::kClasses) < kEnoughBlocks;
  const bool prefers_high = asked > 0 ? asked == High::kClasses : !few_blocks;
  if (high <= most && (prefers_high || wide > most))
    return {true, High::kClasses, parts(High::kClasses, High::kDims), high};
  if (wide <= most) return {true, Wide::kClasses, parts(Wide::kClasses, Wide::kDims), wide};
  return {};
}

// Return true if H may lie in the memory of the gradient of the centers, in rows of d elements.
template <class T>
bool grad_centers_fits(int64_t B, int64_t K, int64_t d, int64_t m, bool aligned) {
  if constexpr (sizeof(T) != 2) {
    return false;
  } else {
    return padded_rows(B) <= d && plan_grad_centers<T>(B, K, d, m, aligned, true).stationary;
  }
}

template <class Shape, bool kVectors>
void launch_grad_centers_tiled(void* stream, const GradCentersInputs<typename Shape::T>& in,
                               const GradCentersOutputs<typename Shape::T>& out) {
  const Problem<typename Shape::T>& p = in.source.p;
  launch("grad_centers", grad_centers_kernel<Shape, kVectors>,
         blocks(ceil_div(p.K(), Shape::kClasses) * ceil_div(p.d(), Shape::kDims)), Shape::kThreads, Shape::kSharedBytes,
         stream, in, out);
}

template <class Shape>
void launch_grad_centers_stationary(void* stream, const GradCentersPlan& plan,
                                    const GradCentersInputs<typename Shape::T>& in,
                                    const GradCentersOutputs<typename Shape::T>& out) {
  const int64_t groups = plan.groups(in.source.p.K());
  launch("grad_centers", grad_centers_stationary_kernel<Shape>, blocks(groups * plan.dim_parts), Shape::kThreads,
         static_cast<int>(plan.shared), stream, in, out, groups, plan.dim_parts);
}

// Launch the kernel that the plan names. Wide tiles of the tiled kernel read less; narrow ones keep the device busy
// when the problem is small.
template <class T>
void launch_grad_centers(void* stream, const GradCentersPlan& plan, bool aligned, const GradCentersInputs<T>& in,
                         const GradCentersOutputs<T>& out) {
  if (plan.stationary) {
    plan.classes == 64 ? launch_grad_centers_stationary<StationaryShape<T, 64>>(stream, plan, in, out)
                       : launch_grad_centers_stationary<StationaryShape<T, 128>>(stream, plan, in, out);
    return;
  }
  using Narrow = GradCentersShape<T, 64>;
  if (!aligned) return launch_grad_centers_tiled<Narrow, false>(stream, in, out);
  using Wide = GradCentersShape<T, 128>;
  constexpr int64_t kEnoughBlocks = 256;
  const int64_t wide_blocks = ceil_div(in.source.p.K(), Wide::kClasses) * ceil_div(in.source.p.d(), Wide::kDims);
  wide_blocks >= kEnoughBlocks ? launch_grad_centers_tiled<Wide, true>(stream, in, out)
                               : launch_grad_centers_tiled<Narrow, true>(stream, in, out);
}

}  // namespace gistops::cuda
