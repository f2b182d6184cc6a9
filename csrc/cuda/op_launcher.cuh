// An operator is a sequence of kernels around PyTorch's matrix products. Scores and the weights of the backward lie
// class-major, [K, B rounded up to whole vectors], so that every product is aligned whatever the number of classes.
// All on the caller's stream; nothing waits for the device, and sizes alone decide what runs, so that a CUDA graph can
// hold it.
#pragma once
#include "launch.cuh"
#include "norms.cuh"
#include "op_table.h"
#include "scores.cuh"

namespace gistops::cuda {

// What the sequences have in common.
template <class T>
class Sequence {
 public:
  Sequence(const Arguments& a, Workspace& workspace)
      : workspace_(workspace), stream_(a.stream), ld_(padded_rows(a.B)),
        p_{matrix(a.input, a.B, a.d), matrix(a.centers, a.K, a.d),
           matrix(a.m ? a.displacements : a.input, a.m, a.d),  // not null, as an empty tensor's pointer is
           static_cast<const Sum<T>*>(a.tau)} {}

 protected:
  using S = Sum<T>;

  static Global<T> matrix(const void* data, int64_t rows, int64_t cols) {
    return {static_cast<const T*>(data), rows, cols, cols};
  }

  // Whether all rows of d elements are whole vectors.
  bool aligned() const {
    const auto begins = [](const T* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    return p_.d() % kVector<T> == 0 && begins(p_.input.data) && begins(p_.centers.data) &&
           (p_.m() == 0 || begins(p_.displacements.data));
  }

  // With `count` classes at most.
  Problem<T> classes(int64_t first, int64_t count) const {
    Problem<T> p = p_;
    p.centers.data += first * p_.d();
    p.centers.rows = std::min(count, p_.K() - first);
    return p;
  }

  // So many classes' scores and centres stay in the cache of a large GPU from one kernel to the next.
  int64_t cached_classes() const {
    if (p_.K() * ld_ <= 2 * limits.cached) return p_.K();
    return std::max<int64_t>(limits.cached / ld_ / ScoresShape::kClasses, 1) * ScoresShape::kClasses;
  }

  dim3 tiles(int64_t classes) const {
    return blocks(ceil_div(classes, ScoresShape::kClasses), ceil_div(p_.B(), ScoresShape::kFeatures));
  }

  // with_input: also what is made of the features.
  void norms(const Problem<T>& p, bool with_input, const Norms<S>& out) {
    p.m() <= 4 ? norms_of<4>(p, with_input, out) : norms_of<8>(p, with_input, out);
  }

  template <int kGroup>
  void norms_of(const Problem<T>& p, bool with_input, const Norms<S>& out) {
    using Shape = NormsShape<kGroup>;
    const int64_t input_blocks = with_input ? ceil_div(p.B(), Shape::kRowsABlock) : 0;
    const int64_t count = input_blocks + (out.center_rnorms ? ceil_div(p.K(), Shape::kRowsABlock) : 0);
    launch("norms", aligned() ? norms_kernel<T, kGroup, true> : norms_kernel<T, kGroup, false>, blocks(count),
           Shape::kThreads, 0, stream_, p, input_blocks, out);
  }

  // Arguments in braces have names here: what nvcc makes of them otherwise is no C++ in templates.
  void multiply_scores(const Problem<T>& p, S* products) {
    const Matrix left{p.centers.data, p.K(), p.d(), p.d(), 1}, right{p.input.data, p.d(), p.B(), 1, p.d()};
    workspace_.multiply(left, right, products, ld_);
  }

  Workspace& workspace_;
  void* stream_;
  int64_t ld_;  // of what lies class-major
  Problem<T> p_;
};

}  // namespace gistops::cuda
