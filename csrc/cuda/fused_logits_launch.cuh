// The choice of fused_logits_kernel, which has not run on a GPU yet and must be asked for, and its launch.
#pragma once
#include "class_stream.cuh"
#include "fused_logits.cuh"
#include "launch.cuh"

namespace gistops::cuda {

template <class Shape, class Z>
int64_t fused_logits_bytes(int64_t d) {
  return Shape::f_bytes(d) + static_cast<int64_t>(sizeof(FusedLogitsShared<Shape, Z>));
}

// Return true if one kernel computes the logits, of the type Z.
//   aligned: rows of d elements begin at multiples of 16 bytes and are whole vectors long
template <class T, class Z>
bool takes_fused_logits(const Problem<T>& p, bool aligned) {
  if constexpr (sizeof(T) != 2) {
    return false;
  } else {
    using Shape = FusedShape<T, 8>;  // the one with the most shared memory
    return fused_logits_are_asked() && aligned && p.M() <= Shape::kSlots && has_wgmma("logits") &&
           fused_logits_bytes<Shape, Z>(p.d()) <= shared_memory_limit("logits");
  }
}

template <class T, class Z>
void launch_fused_logits(void* stream, const ScoreInputs<T>& in, Z* logits, float* center_rnorms) {
  with_slots<T>(in.p.M(), [&](auto slot_count) {
    using Shape = FusedShape<T, slot_count>;
    const int64_t row_tiles = ceil_div(in.p.B(), Shape::kRows);
    const int64_t tiles = ceil_div(in.p.K(), Shape::kClasses);
    const int64_t class_blocks =
        std::clamp<int64_t>(multiprocessors("logits") / row_tiles, 1, ceil_div(tiles, Shape::kGroups));
    const auto launch_kernel = [&](auto kernel) {
      launch("logits", kernel, blocks(row_tiles, class_blocks), Shape::kThreads,
             static_cast<int>(fused_logits_bytes<Shape, Z>(in.p.d())), stream, in, logits, center_rnorms);
    };
    in.slots ? launch_kernel(fused_logits_kernel<Shape, Z, true>) : launch_kernel(fused_logits_kernel<Shape, Z, false>);
  });
}

}  // namespace gistops::cuda
