// The part of the backward that the logits and the losses share: from the partials of the first pass to the gradients,
// for one chunk of classes after another.
#pragma once
#include "grad_centers_launch.cuh"
#include "grad_epilogues.cuh"
#include "norm_correction.cuh"
#include "op_launcher.cuh"
#include "reduce_partials.cuh"

namespace gistops::cuda {

// The buffers of the gradients to compute: those of the logits, and a loss's class_bias and margin. Null: not needed.
template <class T>
struct GradOutputs {
  using S = Sum<T>;
  T *input, *centers;
  S *displacements, *tau;
  S *class_bias = nullptr, *margin = nullptr;
  bool scalar_margin = false;  // margin has one element

  explicit GradOutputs(const Gradients& g)
      : input(static_cast<T*>(g.input)), centers(static_cast<T*>(g.centers)),
        displacements(static_cast<S*>(g.displacements)), tau(static_cast<S*>(g.tau)) {}
};

template <class T>
class BackwardLauncher : protected OpLauncher<T> {
 public:
  using OpLauncher<T>::OpLauncher;

 protected:
  using Base = OpLauncher<T>;
  using Base::p_, Base::ld_, Base::stream_, Base::vectors_, Base::workspace_;
  using S = Sum<T>;

  // Return the number of slots per class in the first pass.
  int64_t slots() const { return vectors_ > 1 ? vectors_ : p_.M(); }

  // Allocate memory for chunks of at most `classes` classes; the shape is that of such a chunk.
  //   t_class_major: the first pass writes the partials of T class by class
  //   h: memory for H in rows of d elements, or null: it is allocated
  void allocate(const RoutingShape& shape, int64_t classes, const GradOutputs<T>& out, bool t_class_major = false,
                T* h = nullptr) {
    const int64_t vectors = classes * vectors_;
    several_chunks_ = classes < p_.K();
    step_vectors_ = kFusedProduct ? vectors : std::min(vectors, cached_gradients());
    correction_ = NormCorrectionShape(step_vectors_, dim_tiles());
    if constexpr (kFusedProduct) plan_ = plan_grad_centers<T>(p_.B(), vectors, p_.d(), p_.m(), this->aligned(), h);
    const bool displacements = out.displacements && p_.m();
    // Every chunk, and every step of a chunk, begins a new tile.
    const int64_t chunks = ceil_div(p_.K(), classes);
    const int64_t tiles = chunks * ceil_div(vectors, step_vectors_) * most_partial_tiles(step_vectors_);
    const bool t_in_place = t_class_major && shape.row_tiles == 1;  // the sums overwrite the partials
    // In one chunk the partials of the displacements overwrite those of S and the product, which are no longer needed.
    constexpr int64_t kAligned = 64;
    const int64_t s_partials = ceil_div(shape.most_groups * slots() * ld_, kAligned) * kAligned;
    const int64_t product = out.input ? p_.B() * p_.d() : 0;
    const int64_t displacement_partials = displacements ? tiles * p_.m() * p_.d() : 0;
    const int64_t before = s_partials + product;
    const bool expanded = vectors_ > 1 && (out.input || out.centers);
    Scratch(workspace_)
        .add(partials_.h, h ? 0 : classes * ld_)
        .add(vectors_h_, expanded ? vectors * ld_ : 0)
        .add(partials_.s, several_chunks_ ? before : std::max(before, displacement_partials))
        .add(partials_.t, shape.row_tiles * slots() * classes)
        .add(partials_.tau, shape.most_blocks())
        .add(partials_.cancelled, shape.most_blocks())
        .add(partials_.bias, out.class_bias ? shape.row_tiles * classes : 0)
        .add(partials_.margin, out.margin ? shape.row_tiles * classes : 0)
        .add(sums_.s, slots() * ld_)
        .add(sums_.t, t_in_place ? 0 : classes * slots())
        .add(sums_.tau, 1)
        .add(sums_.cancelled, 1)
        .add(total_, several_chunks_ ? product : 0)
        .add(displacement_partials_, several_chunks_ ? displacement_partials : 0)
        .allocate();
    product_ = partials_.s + s_partials;
    if (!several_chunks_) displacement_partials_ = partials_.s;
    if (!out.class_bias) partials_.bias = nullptr;
    if (!out.margin) partials_.margin = nullptr;
    if (!displacements) displacement_partials_ = nullptr;
    if (t_in_place) sums_.t = partials_.t;
    if (h) partials_.h = h;
    if (!expanded) vectors_h_ = vectors_ == 1 ? partials_.h : nullptr;
    partials_.t_class_major = t_class_major;
    partials_.h_class = h ? p_.d() : ld_;
    partials_.ld = sums_.ld = ld_;
    sums_.h = partials_.h;
    if (out.tau) sums_.tau = out.tau;
    sums_.bias = out.class_bias, sums_.margin = out.margin;
    tiles_done_ = 0, most_tiles_ = tiles, most_groups_ = shape.most_groups;
  }

  // Add the contributions of a chunk of classes, which begins at class `first`, from its partials and vectors_h_.
  void add_chunk(const RoutingShape& routing, const GradSource<T>& source, const GradOutputs<T>& out, int64_t first) {
    const bool last = first + source.p.K() == p_.K();
    RoutedSums<T> sums = sums_;
    if (sums.bias) sums.bias += first;
    if (sums.margin && !out.scalar_margin) sums.margin += first;
    const ReduceShape shape(ld_, source.p.K(), slots());
    launch("reduce_partials", reduce_partials_kernel<T>, blocks(shape.blocks()), ReduceShape::kThreads, 0, stream_,
           shape, routing, source, partials_, sums, out.scalar_margin, first > 0);
    const GradSource<T> vectors = source_of_vectors(source);
    const int64_t K = vectors.p.K();
    if (out.input) {
      const Matrix h_transposed{vectors_h_, p_.B(), K, 1, partials_.h_class},
          centers{vectors.p.centers.data, K, p_.d(), p_.d(), 1};
      workspace_.multiply(h_transposed, centers, product_, p_.d());
      launch("grad_input_epilogue",
             this->aligned() ? grad_input_epilogue_kernel<T, true> : grad_input_epilogue_kernel<T, false>,
             blocks(p_.B()), EpilogueShape::kThreads, 0, stream_, vectors, static_cast<const S*>(sums_.s), ld_,
             static_cast<const int*>(sums_.cancelled), product_, several_chunks_ ? total_ : nullptr, first > 0,
             last ? out.input : nullptr, input_moments_);
    }
    if (!out.centers && !displacement_partials_) return;
    for (int64_t at = 0; at < K; at += step_vectors_)
      add_centers(vectors, at, out.centers ? out.centers + (first * vectors_ + at) * p_.d() : nullptr);
  }

  // Write what needs all chunks: the gradient of the displacements.
  void finish(const GradOutputs<T>& out) {
    if (!displacement_partials_) return;
    launch("grad_displacements_epilogue", grad_displacements_epilogue_kernel<T>,
           blocks(p_.m() * ceil_div(p_.d(), kWarp)), DisplacementsEpilogueShape::kThreads, 0, stream_, p_,
           static_cast<const S*>(sums_.s), ld_, static_cast<const S*>(displacement_partials_), tiles_done_,
           out.displacements);
  }

  // Set all gradients to zero, for a problem without rows or classes.
  void clear(const GradOutputs<T>& out) {
    set_zero(out.input, p_.B() * p_.d() * sizeof(T), stream_);
    set_zero(out.centers, p_.K() * vectors_ * p_.d() * sizeof(T), stream_);
    set_zero(out.displacements, p_.m() * p_.d() * sizeof(S), stream_);
    set_zero(out.tau, sizeof(S), stream_);
    set_zero(out.class_bias, p_.K() * sizeof(S), stream_);
    set_zero(out.margin, (out.scalar_margin ? 1 : p_.K()) * sizeof(S), stream_);
  }

  // Throw before the first pass would write more partials than there is memory for.
  void require_memory(const RoutingShape& shape) const { require_memory(shape.groups <= most_groups_); }

  RoutedSums<T> partials_{}, sums_{};
  T* vectors_h_ =
      nullptr;  // H of sub-centers [K vectors, ld], which the caller expands from partials_.h; else the same
  InputMoments<S> input_moments_;

 private:
  static void require_memory(bool enough) {
    if (!enough) throw std::runtime_error("gistops: backward: the memory of partial sums is too small");
  }

  // Return the source with the sub-centers as classes. Their slots have been resolved: H has a row per sub-center.
  GradSource<T> source_of_vectors(GradSource<T> source) const {
    if (vectors_ == 1) return source;
    source.p = this->vectors_of(source.p);
    source.p.displacements = p_.displacements;
    source.slots = nullptr, source.scores = nullptr, source.center_rnorms = nullptr;
    return source;
  }

  // In half precision one kernel makes the product H f and corrects it, because PyTorch would write the product in
  // float32. In other types the library writes the product into the memory of the gradient.
  static constexpr bool kFusedProduct = sizeof(T) == 2;

  // Return the number of partials of the displacements that the classes of a step give.
  int64_t partial_tiles(int64_t classes) const {
    return kFusedProduct ? plan_.groups(classes) : ceil_div(classes, correction_.classes);
  }
  int64_t most_partial_tiles(int64_t classes) const {
    return kFusedProduct ? plan_.most_groups(classes) : ceil_div(classes, correction_.classes);
  }
  int64_t dim_tiles() const { return ceil_div(p_.d(), NormCorrectionShape::kVectors * kVector<T>); }

  // Compute the gradient of the centers (null: not needed) of one step of a chunk, and the displacements' partials. A
  // step is so small that its product is still in the cache when it is corrected.
  void add_centers(const GradSource<T>& chunk, int64_t at, T* centers) {
    GradSource<T> step = chunk;
    step.p.centers.data += at * p_.d();
    step.p.centers.rows = std::min(step_vectors_, chunk.p.K() - at);
    if (step.center_rnorms) step.center_rnorms += at;
    if (step.slots) step.slots += at * step.score_class;
    if (step.scores) step.scores += at * step.score_class;
    if (step.grad) step.grad += at * step.score_class;
    if (step.narrow_grad) step.narrow_grad += at * step.score_class;
    step.softmax.first_class += at;
    const int64_t classes = step.p.K(), tiles = partial_tiles(classes);
    S* partials = displacement_partials_ ? displacement_partials_ + tiles_done_ * p_.m() * p_.d() : nullptr;
    tiles_done_ += tiles;
    require_memory(tiles_done_ <= most_tiles_);
    const S* t = sums_.t + at * p_.M();
    if constexpr (kFusedProduct) {
      const GradCentersInputs<T> inputs{step, vectors_h_ + at * partials_.h_class, partials_.h_class, t,
                                        sums_.cancelled};
      const GradCentersOutputs<T> outputs{centers, partials};
      launch_grad_centers(stream_, plan_, this->aligned(), inputs, outputs);
    } else {
      if (centers) {
        const Matrix h{vectors_h_ + at * partials_.h_class, classes, p_.B(), partials_.h_class, 1},
            input{p_.input.data, p_.B(), p_.d(), p_.d(), 1};
        workspace_.multiply(h, input, centers, p_.d());
      }
      launch("norm_correction", this->aligned() ? norm_correction_kernel<T, true> : norm_correction_kernel<T, false>,
             blocks(tiles, dim_tiles()), NormCorrectionShape::kThreads, 0, stream_, correction_, step, t,
             static_cast<const int*>(sums_.cancelled), centers, centers, partials);
    }
  }

  // Return the number of classes whose gradients stay in the cache of a large GPU from one kernel to the next.
  int64_t cached_gradients() const {
    if (p_.K() * vectors_ * p_.d() <= 2 * limits.cached) return p_.K() * vectors_;
    constexpr int64_t kTile = NormCorrectionShape::kMostClasses;
    return std::max<int64_t>(limits.cached / p_.d() / kTile, 1) * kTile;
  }

  NormCorrectionShape correction_{1, 1};
  GradCentersPlan plan_;
  bool several_chunks_ = false;
  int64_t step_vectors_ = 0, tiles_done_ = 0, most_tiles_ = 0, most_groups_ = 0;
  S *product_ = nullptr, *total_ = nullptr;
  S* displacement_partials_ = nullptr;
};

}  // namespace gistops::cuda
