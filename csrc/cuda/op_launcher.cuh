// The base of the ops' launchers. An op is a sequence of kernels around matrix products of PyTorch.
//
// Scores and the weights of the backward lie class-major, [K, ld] with ld = B rounded up to whole vectors, so that
// every product is aligned for every number of classes. All work goes to the caller's stream. Nothing waits for the
// device, and the launches depend on the sizes alone, so that a CUDA graph can capture a call.
#pragma once
#include "launch.cuh"
#include "norms_half.cuh"
#include "op_table.h"
#include "scores.cuh"

namespace gistops::cuda {

template <class T>
class OpLauncher {
 public:
  OpLauncher(const Arguments& a, Workspace& workspace)
      : workspace_(workspace), stream_(a.stream), ld_(padded_rows(a.B)), vectors_(a.vectors),
        p_{matrix(a.input, a.B, a.d), matrix(a.centers, a.K, a.d),
           // The pointer of an empty tensor is null, so an empty matrix gets another.
           matrix(a.m ? a.displacements : a.input, a.m, a.d), static_cast<const Sum<T>*>(a.tau)} {}

 protected:
  using S = Sum<T>;

  static GlobalMatrix<T> matrix(const void* data, int64_t rows, int64_t cols) {
    return {static_cast<const T*>(data), rows, cols, cols};
  }

  // Return true if every row of d elements begins at a multiple of 16 bytes and is a whole number of vectors long.
  bool aligned() const {
    const auto is_aligned = [](const T* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    return p_.d() % kVector<T> == 0 && is_aligned(p_.input.data) && is_aligned(p_.centers.data) &&
           (p_.m() == 0 || is_aligned(p_.displacements.data));
  }

  // Return the problem of a chunk of at most `count` classes.
  Problem<T> chunk(int64_t first, int64_t count) const {
    Problem<T> p = p_;
    p.centers.data += first * vectors_ * p_.d();
    p.centers.rows = std::min(count, p_.K() - first);
    return p;
  }

  // Return the problem whose classes are the sub-centers of the classes of p.
  Problem<T> vectors_of(Problem<T> p) const {
    p.centers.rows *= vectors_;
    return p;
  }

  // Return the number of classes whose scores and centers stay in the cache of a large GPU between kernels.
  int64_t cached_classes() const { return classes_with(limits.cached); }

  // Return the number of classes with about `scores` scores, or K if all classes have at most twice as many.
  int64_t classes_with(int64_t scores) const {
    if (p_.K() * vectors_ * ld_ <= 2 * scores) return p_.K();
    if (vectors_ > 1) return std::max<int64_t>(scores / ld_ / vectors_, 1);
    return std::max<int64_t>(scores / ld_ / kWarp, 1) * kWarp;
  }

  // with_input: also compute the results that depend on the input alone.
  void launch_norms(const Problem<T>& p, bool with_input, const NormOutputs<S>& out) {
    if constexpr (sizeof(T) == 2) {
      if (aligned()) return launch_norms_half(p, with_input, out);
    }
    p.m() <= 4 ? launch_norms_kernel<4>(p, with_input, out) : launch_norms_kernel<8>(p, with_input, out);
  }

  // Compute the products of a chunk, in rows of length score_class; return the arguments of the kernels that make
  // scores of them. norms: those of the chunk; slots: class-major memory, or null.
  //
  // Matrices have names in this class and its subclasses, because nvcc 13.0 with g++ 13.3 generates invalid C++ for
  // aggregates in braces among the arguments of a call.
  ScoreInputs<T> multiply_scores(const Problem<T>& p, const NormOutputs<S>& norms, S* products, int64_t score_class,
                                 uint8_t* slots) {
    const Matrix centers{p.centers.data, p.K(), p.d(), p.d(), 1},
        input_transposed{p.input.data, p.d(), p.B(), 1, p.d()};
    workspace_.multiply(centers, input_transposed, products, score_class);
    return score_inputs(p, norms, products, score_class, slots);
  }

  // Return the arguments of the kernels that make scores, with class-major slots.
  ScoreInputs<T> score_inputs(const Problem<T>& p, const NormOutputs<S>& norms, S* products, int64_t score_class,
                              uint8_t* slots) const {
    return {.p = p,
            .products = products,
            .ld = ld_,
            .score_class = score_class,
            .input_dots = norms.input_dots,
            .center_rnorms = norms.center_rnorms,
            .ldr = norms.ldr,
            .input_rnorms = norms.input_rnorms,
            .slots = slots,
            .slot_class = ld_,
            .slot_row = 1};
  }

  // The same with the norms, which are those of the input too for the first chunk.
  ScoreInputs<T> norms_and_products(const Problem<T>& p, bool is_first, const NormOutputs<S>& norms, S* products,
                                    uint8_t* slots) {
    launch_norms(p, is_first, norms);
    return multiply_scores(p, norms, products, ld_, slots);
  }

  Workspace& workspace_;
  void* stream_;
  int64_t ld_;       // row length of class-major tensors
  int64_t vectors_;  // sub-centers per class
  Problem<T> p_;

 private:
  template <int kGroup>
  void launch_norms_kernel(const Problem<T>& p, bool with_input, const NormOutputs<S>& out) {
    using Shape = NormsShape<kGroup>;
    const int64_t input_blocks = with_input ? ceil_div(p.B(), Shape::kRowsPerBlock) : 0;
    const int64_t center_blocks = out.center_rnorms ? ceil_div(p.K(), Shape::kRowsPerBlock) : 0;
    const auto launch_kernel = [&](auto kernel) {
      launch("norms", kernel, blocks(input_blocks + center_blocks), Shape::kThreads, 0, stream_, p, input_blocks, out);
    };
    if constexpr (sizeof(T) > 2) {
      if (aligned()) return launch_kernel(norms_kernel<T, kGroup, true>);
    }
    launch_kernel(norms_kernel<T, kGroup, false>);
  }

  void launch_norms_half(const Problem<T>& p, bool with_input, const NormOutputs<S>& out) {
    using Shape = HalfNormsShape;
    const Shape shape(p.d());
    const int64_t input_blocks = with_input ? ceil_div(p.B(), int64_t{shape.rows()}) : 0;
    const int64_t center_blocks = out.center_rnorms ? ceil_div(p.K(), int64_t{shape.rows()}) : 0;
    launch("norms", p.d() % Shape::kStep == 0 ? norms_half_kernel<T, true> : norms_half_kernel<T, false>,
           blocks(input_blocks + center_blocks), Shape::kThreads, 0, stream_, shape, p, input_blocks, out);
  }
};

}  // namespace gistops::cuda
