// The two operators as sequences of kernels, for one type of operands. All on the caller's stream; nothing waits for
// the device, and sizes alone decide what runs, so that a CUDA graph can hold it.
#pragma once
#include "centers.cuh"
#include "finish.cuh"
#include "forward.cuh"
#include "launch.cuh"
#include "operations.h"
#include "prepare.cuh"

namespace gistops::cuda {

template <class Engine>
class Sequence {
  using T = typename Engine::Element;
  using S = Sum<T>;

 public:
  Sequence(const Arguments& a, Workspace& workspace)
      : arguments_(a), workspace_(workspace), stream_(a.stream),
        p_{matrix(a.input, a.B, a.d), matrix(a.centers, a.K, a.d),
           matrix(a.m ? a.displacements : a.input, a.m, a.d),  // not null, as an empty tensor's pointer is
           static_cast<const S*>(a.tau)} {}

  void forward(const Results& results) {
    if (p_.B() == 0 || p_.K() == 0) return;
    const Outputs<T> out{static_cast<S*>(results.logits), results.slots, static_cast<S*>(results.center_rnorms)};
    const Prepared<T> prepared{static_cast<S*>(results.input_rnorms), scratch<S>(p_.B() * p_.M()), scratch<S>(p_.M())};
    launch("prepare", vectors() ? prepare_kernel<T, true> : prepare_kernel<T, false>, blocks(p_.B() + p_.M()),
           kPrepareThreads, 0, stream_, p_, prepared);
    if (p_.m() <= kFusedDisplacements) return choose<false>(prepared, out);
    launch("center_norms", vectors() ? center_norms_kernel<T, true> : center_norms_kernel<T, false>, blocks(p_.K()),
           kPrepareThreads, 0, stream_, p_, prepared, out.center_rnorms);
    choose<true>(prepared, out);
  }

  void backward(const void* grad, const Results& results, const Gradients& gradients) {
    if (p_.B() == 0 || p_.K() == 0) return clear(gradients);
    const Saved<T> saved{static_cast<const S*>(grad), static_cast<const S*>(results.logits), results.slots,
                         static_cast<const S*>(results.center_rnorms), static_cast<const S*>(results.input_rnorms)};
    const RouteShape shape(p_.B(), p_.K(), p_.M());
    const Routed<T> routed = route(shape, saved, static_cast<S*>(gradients.tau));
    if (gradients.input) {
      S* product = static_cast<S*>(workspace_.product(routed.h, routed.ld, arguments_));
      launch("input", vectors() ? input_kernel<T, true> : input_kernel<T, false>, blocks(p_.B()), kInputThreads, 0,
             stream_, shape, p_, saved, routed, product, static_cast<T*>(gradients.input));
    }
    S* displacements = p_.m() ? static_cast<S*>(gradients.displacements) : nullptr;
    if (!gradients.centers && !displacements) return;
    const int64_t tiles = ceil_div(p_.K(), kCenterClasses<T>);
    S* partials = displacements ? scratch<S>(tiles * p_.m() * p_.d()) : nullptr;
    const Pairs<T> pairs{p_,     saved.center_rnorms, p_.K(), saved.input_rnorms, saved.logits, saved.slots, 1,
                         p_.K(), saved.grad,          {}};
    // Named, not in braces: what nvcc makes of those as arguments in templates is no C++.
    const CenterInputs<T> inputs{pairs, routed.h, routed.ld, routed.t, routed.cancelled};
    const CenterGradients<T> outputs{static_cast<T*>(gradients.centers), partials};
    make_center_gradients<Engine, false, T>(stream_, vectors(), inputs, outputs);
    if (displacements)
      launch("displacements", displacements_kernel<T>, blocks(p_.m() * ceil_div(p_.d(), kWarp)), kDisplacementThreads,
             0, stream_, p_, routed, static_cast<const S*>(partials), tiles, displacements);
  }

 private:
  static Global<T> matrix(const void* data, int64_t rows, int64_t cols) {
    return {static_cast<const T*>(data), rows, cols, cols};
  }

  // Whether all operands can be read in vectors of 16 bytes.
  bool vectors() const {
    const auto begins = [](const T* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    return begins(p_.input.data) && begins(p_.centers.data) && begins(p_.displacements.data) &&
           p_.d() * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  }

  template <class U>
  U* scratch(int64_t n) {
    return static_cast<U*>(workspace_.scratch(n * static_cast<int64_t>(sizeof(U))));
  }

  // Wide tiles read the centres once for all of a batch of 256, narrow ones keep small batches from idling. Chosen from
  // traffic and occupancy on paper; not yet measured on hardware. Rows that are no whole vectors are read an element at
  // a time, which is slow with any tile.
  template <bool kGiven>
  void choose(const Prepared<T>& prepared, const Outputs<T>& out) {
    constexpr bool kDouble = sizeof(T) == 8, kFloat = __is_same(Engine, Fma<float>);
    using Middle = ForwardShape<Engine, kDouble ? 64 : 128, 3>;
    if (!vectors()) return pass<Middle, kGiven, false>(prepared, out);
    if constexpr (kGiven && kFloat) {
      pass<ForwardShape<Engine, 64, 4>, kGiven, true>(prepared, out);  // wider tiles do not fit into the registers
    } else if constexpr (kDouble) {
      pass<Middle, kGiven, true>(prepared, out);
    } else {
      if (p_.B() <= 64) return pass<ForwardShape<Engine, 64, 4>, kGiven, true>(prepared, out);
      if constexpr (!kGiven && !kFloat) {
        using Wide = ForwardShape<Engine, 256, 3>;
        int device = 0, shared = 0;
        check(cudaGetDevice(&device), "forward");
        check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "forward");
        if (p_.B() > 128 && shared >= forward_shared_bytes<Wide>()) return pass<Wide, kGiven, true>(prepared, out);
      }
      pass<Middle, kGiven, true>(prepared, out);
    }
  }

  template <class Shape, bool kGiven, bool kVectors>
  void pass(const Prepared<T>& prepared, const Outputs<T>& out) {
    const int64_t tiles = ceil_div(p_.K(), Shape::kClasses) * ceil_div(p_.B(), Shape::kFeatures);
    launch("forward", forward_kernel<Shape, kGiven, kVectors>, blocks(tiles), Shape::kThreads,
           forward_shared_bytes<Shape>(), stream_, p_, prepared, out);
  }

  Routed<T> route(const RouteShape& shape, const Saved<T>& saved, S* tau) {
    constexpr int64_t kVector = 16 / sizeof(T);
    const int64_t ld = ceil_div(p_.K(), kVector) * kVector, rows = p_.B() * p_.M(), classes = p_.K() * p_.M();
    T* h = scratch<T>(p_.B() * ld);
    const Routed<T> partial{h,
                            ld,
                            scratch<S>(shape.groups() * rows),
                            scratch<S>(shape.parts() * classes),
                            scratch<S>(shape.blocks()),
                            scratch<int>(shape.blocks()),
                            nullptr};
    const Routed<T> sums{
        h, ld, scratch<S>(rows), scratch<S>(classes), tau ? tau : scratch<S>(1), partial.flags, scratch<int>(1)};
    launch("route", route_kernel<T>, blocks(shape.groups(), shape.parts()), RouteShape::kThreads, 0, stream_, shape,
           p_.tau, saved, partial);
    const GatherShape gathered(shape);
    launch("gather", gather_kernel<T>, blocks(gathered.blocks()), RouteShape::kThreads, 0, stream_, shape, gathered,
           partial, sums);
    return sums;
  }

  void clear(const Gradients& gradients) {
    const auto zero = [&](void* x, int64_t bytes) {
      if (x && bytes) check(cudaMemsetAsync(x, 0, bytes, static_cast<cudaStream_t>(stream_)), "backward");
    };
    zero(gradients.input, p_.B() * p_.d() * sizeof(T));
    zero(gradients.centers, p_.K() * p_.d() * sizeof(T));
    zero(gradients.displacements, p_.m() * p_.d() * sizeof(S));
    zero(gradients.tau, sizeof(S));
  }

  const Arguments& arguments_;
  Workspace& workspace_;
  void* stream_;
  Problem<T> p_;
};

template <class Engine>
constexpr Operations operations() {
  return {[](const Arguments& a, const Results& results, Workspace& workspace) {
            Sequence<Engine>(a, workspace).forward(results);
          },
          [](const Arguments& a, const void* grad, const Results& saved, const Gradients& gradients,
             Workspace& workspace) { Sequence<Engine>(a, workspace).backward(grad, saved, gradients); }};
}

}  // namespace gistops::cuda
