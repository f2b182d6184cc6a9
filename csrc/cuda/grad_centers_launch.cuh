// The choice between the two kernels for the gradient of the centers in half precision, by the sizes and the device.
#pragma once
#include "grad_centers.cuh"
#include "grad_centers_stationary.cuh"
#include "launch.cuh"
#include "op_table.h"

namespace gistops::cuda {

// How to compute the gradient of the centers.
struct GradCentersPlan {
  bool stationary = false, wgmma = false;
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

// Return a plan with a stationary shape for wgmma, or no stationary one if neither fits into shared memory.
//   asked: the classes per tile to prefer, or 0
template <class T>
GradCentersPlan plan_wgmma(int64_t B, int64_t K, int64_t d, int64_t m, bool parked, int asked) {
  using Wide = WgmmaShape<T, 64>;
  using High = WgmmaShape<T, 128>;
  constexpr int64_t kMultiprocessors = 132, kReserved = 1024;  // of a Hopper GPU; bytes of each block
  const int64_t most = shared_memory_limit("grad_centers"), most_of_two = (most + kReserved) / 2 - kReserved;
  const int64_t high = StationaryMemory<High>::bytes(B, m), wide = StationaryMemory<Wide>::bytes(B, m);
  // High tiles read f half as often; wide ones leave room for two blocks.
  const bool prefers_wide = asked ? asked == Wide::kClasses : high > most_of_two && wide <= most_of_two;
  const bool takes_wide = prefers_wide ? wide <= most : high > most;
  const int classes = takes_wide ? Wide::kClasses : High::kClasses, dims = takes_wide ? Wide::kDims : High::kDims;
  const int64_t shared = takes_wide ? wide : high, blocks = kMultiprocessors * (shared <= most_of_two ? 2 : 1);
  // One block per multiprocessor is slower than the tiled kernel, which cannot serve parked scores.
  if (shared > (parked || asked ? most : most_of_two)) return {};
  const int64_t tiles = std::max<int64_t>(ceil_div(K, classes), 1), dim_tiles = ceil_div(d, dims);
  const int64_t wanted = parked ? 1 : std::max<int64_t>(blocks / tiles, 1);
  const int64_t parts = ceil_div(dim_tiles, ceil_div(dim_tiles, wanted));  // each a whole number of tiles
  return {true, true, classes, parts, shared};
}

// The same for mma.sync, which is chosen for parked scores alone: the tiled kernel is faster.
template <class T>
GradCentersPlan plan_stationary(int64_t B, int64_t K, int64_t d, int64_t m, bool parked, int asked) {
  using Wide = StationaryShape<T, 64>;
  using High = StationaryShape<T, 128>;
  constexpr int64_t kEnoughBlocks = 128;                   // nearly one per multiprocessor of a large GPU
  const auto parts = [&](int64_t classes, int64_t dims) {  // of the dims, each a whole number of tiles
    const int64_t wanted = parked ? 1 : ceil_div(kEnoughBlocks, std::max<int64_t>(ceil_div(K, classes), 1));
    return ceil_div(ceil_div(d, dims), ceil_div(ceil_div(d, dims), wanted));
  };
  const int64_t most = shared_memory_limit("grad_centers"), high = StationaryMemory<High>::bytes(B, m),
                wide = StationaryMemory<Wide>::bytes(B, m);
  if (high <= most && (asked != Wide::kClasses || wide > most))
    return {true, false, High::kClasses, parts(High::kClasses, High::kDims), high};
  if (wide <= most) return {true, false, Wide::kClasses, parts(Wide::kClasses, Wide::kDims), wide};
  return {};
}

// Choose the kernel and its tile. Parked scores take a stationary tile whatever GISTOPS_CUDA_CENTERS_TILE asks for, so
// that it may change between a forward and its backward.
//   aligned: rows of d elements begin at multiples of 16 bytes and are whole vectors long
//   parked: H lies in the memory of the gradient, so that one block must take all dims of its classes
template <class T>
GradCentersPlan plan_grad_centers(int64_t B, int64_t K, int64_t d, int64_t m, bool aligned, bool parked) {
  const int asked = asked_centers_tile();
  if (!aligned || (asked == 0 && !parked)) return {};
  if (has_wgmma("grad_centers")) {
    const GradCentersPlan plan = plan_wgmma<T>(B, K, d, m, parked, std::max(asked, 0));
    if (plan.stationary) return plan;
  }
  return parked || asked > 0 ? plan_stationary<T>(B, K, d, m, parked, std::max(asked, 0)) : GradCentersPlan{};
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
    if (plan.wgmma)
      return plan.classes == 64 ? launch_grad_centers_stationary<WgmmaShape<T, 64>>(stream, plan, in, out)
                                : launch_grad_centers_stationary<WgmmaShape<T, 128>>(stream, plan, in, out);
    return plan.classes == 64 ? launch_grad_centers_stationary<StationaryShape<T, 64>>(stream, plan, in, out)
                              : launch_grad_centers_stationary<StationaryShape<T, 128>>(stream, plan, in, out);
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
