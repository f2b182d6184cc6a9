// The launches of the cross-entropy and its gradients, without the logits [B, K].
#pragma once
#include "backward.cuh"
#include "lse_partials.cuh"
#include "rotations.cuh"
#include "route_loss_grad.cuh"
#include "row_loss.cuh"
#include "subcenters.cuh"

namespace gistops::cuda {

// Return true if the scores of a loss can be parked in the gradient of the centers: in half precision, if the scores
// and slots of a class fit into its row, and the kernel for the gradient may find H there.
template <class T>
bool scores_can_be_parked(const Arguments& a) {
  if constexpr (sizeof(T) != 2) {
    return false;
  } else {
    const auto is_aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    const bool aligned = a.d % kVector<T> == 0 && is_aligned(a.input) && is_aligned(a.centers) &&
                         (a.m == 0 || is_aligned(a.displacements));
    const int64_t score_bytes = padded_rows(a.B) * static_cast<int64_t>(sizeof(Sum<T>));
    return a.B > 0 && a.m < kMostParkedSlots && score_bytes <= a.d * static_cast<int64_t>(sizeof(T)) &&
           grad_centers_fits<T>(a.B, a.K, a.d, a.m, aligned);
  }
}

template <class T>
class CrossEntropyLauncher : private BackwardLauncher<T> {
  using Base = BackwardLauncher<T>;
  using Base::p_, Base::ld_, Base::stream_, Base::vectors_, Base::workspace_;
  using S = Sum<T>;

 public:
  CrossEntropyLauncher(const Arguments& a, const LossArguments& loss, Workspace& workspace)
      : Base(a, workspace), loss_(loss) {}

  void forward(const LossResults& results) {
    const int64_t step = results.scores ? kept_step() : streamed_step();
    const LseShape shape(p_.K(), step);
    const int64_t scratch_classes = results.scores ? 0 : step;
    const int64_t chunk_partials = ceil_div(step, shape.group_classes);
    const int64_t last_chunk = (p_.K() - 1) / step;
    const int64_t tiles = last_chunk * chunk_partials + ceil_div(p_.K() - last_chunk * step, shape.group_classes);
    const int64_t smoothed = loss_.label_smoothing > 0;
    const int64_t row_blocks = std::max<int64_t>(ceil_div(p_.B(), RowLossShape<S>::kRows), 1);
    ChunkMemory memory;
    S *input_dots, *loss_partials;
    int* blocks_done;
    LsePartials<S> lse;
    Scratch(workspace_)
        .add(input_dots, p_.M() * ld_)
        .add(memory.scores, scratch_classes * ld_)
        .add(memory.slots, scratch_classes * ld_)
        .add(memory.products, vectors_ > 1 ? step * vectors_ * ld_ : 0)
        .add(memory.vector_rnorms, vectors_ > 1 ? step * vectors_ : 0)
        .add(lse.max, tiles * p_.B())
        .add(lse.sum, tiles * p_.B())
        .add(lse.weighted, smoothed * tiles * p_.B())
        .add(lse.weight_sums, smoothed * tiles)
        .add(lse.bias_sums, smoothed * tiles)
        .add(lse.target_logits, p_.B())
        .add(loss_partials, row_blocks * 3)
        .add(blocks_done, 1)
        .allocate();
    S* center_rnorms = static_cast<S*>(results.center_rnorms);
    for (int64_t first = 0; first < p_.K(); first += step) {
      const Problem<T> p = this->chunk(first, step);
      NormOutputs<S> norms{.input_rnorms = static_cast<S*>(results.input_rnorms),
                           .input_dots = input_dots,
                           .ld = ld_,
                           .center_rnorms = vectors_ > 1 ? memory.vector_rnorms : center_rnorms + first,
                           .ldr = p_.K(),
                           .blocks_done = first == 0 ? blocks_done : nullptr};
      this->launch_norms(this->vectors_of(p), first == 0, norms);
      if (p_.B() == 0) continue;
      if (results.scores) {
        memory.scores = static_cast<S*>(results.scores) + first * ld_;
        memory.slots = results.slots ? results.slots + first * ld_ : nullptr;
      }
      memory.vector_norms = {memory.vector_rnorms, vectors_, 1};
      memory.copied_norms = vectors_ > 1 ? center_rnorms + first : nullptr;
      launch_scores(shape, p, norms, memory, results.parked, first, first / step * chunk_partials, lse);
    }
    const RowLossArgs<S> args{.B = p_.B(),
                              .classes = p_.K(),
                              .tiles = p_.B() > 0 ? tiles : 0,
                              .tau = p_.tau,
                              .margin = static_cast<const S*>(loss_.margin),
                              .margin_per_class = loss_.margin_per_class,
                              .margin_kind = loss_.margin_kind,
                              .reduction = loss_.reduction,
                              .smoothing = static_cast<S>(loss_.label_smoothing),
                              .loss = static_cast<S*>(results.loss),
                              .lse = static_cast<S*>(results.lse),
                              .row_stats = static_cast<S*>(results.row_stats),
                              .scalars = static_cast<S*>(results.scalars),
                              .targets_in_range = results.targets_in_range,
                              .partials = loss_partials,
                              .blocks_done = blocks_done};
    launch("row_loss", row_loss_kernel<S>, blocks(row_blocks), RowLossShape<S>::kThreads, 0, stream_, terms(0), lse,
           args);
  }

  void backward(const LossOutputGrads& grads, const LossResults& saved, const Gradients& gradients,
                const LossGradients& loss_gradients) {
    GradOutputs<T> out(gradients);
    out.class_bias = static_cast<S*>(loss_gradients.class_bias);
    out.margin = static_cast<S*>(loss_gradients.margin);
    out.scalar_margin = !loss_.margin_per_class;
    Rotations<S> rotations = rotations_of(p_, 0);
    S *grad_x = static_cast<S*>(loss_gradients.input_coeffs), *grad_y = static_cast<S*>(loss_gradients.class_coeffs);
    if (p_.B() == 0) {
      set_zero(grad_y, 2 * rotations.slots * p_.K() * sizeof(S), stream_);
      return this->clear(out);
    }
    const int64_t step = std::min(saved.scores ? kept_step() : large_step(), rotation_step());
    const int64_t tile_rows = row_tile();
    RoutingShape shape(step, saved.parked ? 1 : p_.B(), ClassStream<T, 1>::kWarps, saved.parked ? 1 : tile_rows);
    if (saved.parked) shape.row_passes = ceil_div(p_.B(), tile_rows);
    this->allocate(shape, step, out, true, saved.parked ? static_cast<T*>(saved.scores) : nullptr);
    S* center_rnorms = static_cast<S*>(saved.center_rnorms);
    S *input_dots = nullptr, *unused;
    ChunkMemory memory;
    RotationGradPartials<S> rotation_partials{};
    const RoutingShape rotation_shape(step, p_.B(), RotationGradsShape::kWarps, RotationGradsShape::kRows);
    if (rotations.x) {
      Scratch(workspace_)
          .add(rotation_partials.x, rotation_shape.most_groups * rotations.slots * ld_)
          .add(rotation_partials.y, rotation_shape.row_tiles * 2 * rotations.slots * step)
          .allocate();
      this->input_moments_ = {rotations.x, grad_x, rotations.slots};
    }
    NormOutputs<S> norms{.input_rnorms = static_cast<S*>(saved.input_rnorms),
                         .input_dots = nullptr,
                         .ld = ld_,
                         .center_rnorms = center_rnorms,
                         .ldr = p_.K(),
                         .blocks_done = nullptr};
    if (!saved.scores) {
      Scratch(workspace_)
          .add(input_dots, p_.M() * ld_)
          .add(memory.scores, step * ld_)
          .add(memory.slots, step * ld_)
          .add(memory.products, vectors_ > 1 ? step * vectors_ * ld_ : 0)
          .add(unused, p_.B())
          .allocate();
      norms.input_dots = input_dots;
      const NormOutputs<S> dots{.input_rnorms = unused,
                                .input_dots = input_dots,
                                .ld = ld_,
                                .center_rnorms = nullptr,
                                .ldr = 0,
                                .blocks_done = nullptr};
      if (p_.m() > 0) this->launch_norms(p_, true, dots);
    }
    const LsePartials<S> no_partials{};
    for (int64_t first = 0; first < p_.K(); first += step) {
      const Problem<T> p = this->chunk(first, step);
      norms.center_rnorms = center_rnorms + first;
      if (saved.scores) {
        memory.scores = static_cast<S*>(saved.scores) + first * ld_;
        memory.slots = saved.slots ? saved.slots + first * ld_ : nullptr;
      } else {
        memory.vector_norms = {center_rnorms + first, 1, p_.K()};
        launch_scores(LseShape(step, step), p, norms, memory, false, first, 0, no_partials);
      }
      const GradSource<T> source{.p = problem_of_slots(p),
                                 .center_rnorms = center_rnorms + first,
                                 .ldr = p_.K(),
                                 .input_rnorms = norms.input_rnorms,
                                 .scores = memory.scores,
                                 .slots = memory.slots,
                                 .score_class = saved.parked ? parked_class() : ld_,
                                 .score_row = 1,
                                 .grad = nullptr,
                                 .softmax = softmax_grad(grads, saved, first),
                                 .scores_gone = saved.parked,
                                 .pairs_cancel = p_.m() > 0};
      const RoutingShape chunk_shape =
          p.K() == step ? shape : RoutingShape(p.K(), p_.B(), ClassStream<T, 1>::kWarps, tile_rows);
      this->require_memory(chunk_shape);
      launch_route(chunk_shape, source, saved.parked);
      if (this->vectors_h_ && vectors_ > 1)
        launch("expand_weights", expand_weights_kernel<T>, subcenter_blocks(p), SubcentersShape::kThreads, 0, stream_,
               p.K(), vectors_, ld_, static_cast<const T*>(this->partials_.h),
               static_cast<const uint8_t*>(memory.slots), this->vectors_h_);
      if (rotations.x)
        launch_rotation_grads(rotations_of(p, first), source, rotation_partials, grad_x, grad_y + first, first > 0);
      this->add_chunk(chunk_shape, source, out, first);
    }
    this->finish(out);
  }

 private:
  LossTerms<S> terms(int64_t first_class) const {
    return {.target = loss_.target,
            .bias = static_cast<const S*>(loss_.class_bias),
            .weight = static_cast<const S*>(loss_.weight),
            .first_class = first_class,
            .ignore_index = loss_.ignore_index,
            .smoothed = loss_.label_smoothing > 0};
  }

  // The memory of a chunk's scores and slots [K, ld], and that of sub-centers.
  struct ChunkMemory {
    S* scores = nullptr;
    uint8_t* slots = nullptr;
    S *products = nullptr, *vector_rnorms = nullptr;  // [K vectors, ld]; [K, vectors], which norms_kernel writes
    SubcenterNorms<S> vector_norms{};                 // R of the sub-centers
    S* copied_norms = nullptr;                        // memory for a copy, [vectors, K]; or null
  };

  // Return the classes of a chunk of scores that no backward reads: they stay in the cache, but have about as many
  // partials per row as those of one chunk at most.
  int64_t streamed_step() const {
    const int64_t enough = std::min(large_step(), ceil_div(p_.K(), LseShape::kMostPartials));
    return std::min(std::max(this->cached_classes(), enough), p_.K());
  }

  // Return the classes of a chunk of recomputed scores or of weights of sub-centers: as many as memory allows.
  int64_t large_step() const { return std::min(p_.K(), limits.recomputed / std::max<int64_t>(ld_ * vectors_, 1) + 1); }

  // Return the classes of a chunk of kept scores: all of them, except where sub-centers need memory for their products.
  int64_t kept_step() const { return vectors_ > 1 ? large_step() : p_.K(); }

  // Return the most classes of a chunk of rotations: the partials of the gradient of class_coeffs grow with them.
  int64_t rotation_step() const {
    if (!loss_.input_coeffs) return p_.K();
    const int64_t class_partials = ceil_div(p_.B(), RotationGradsShape::kRows) * 2 * loss_.rotation_slots;
    return limits.recomputed / std::max<int64_t>(class_partials, 1) + 1;
  }

  // Return the problem of a chunk with the sub-centers as slots, for kernels that read neither centers nor
  // displacements.
  Problem<T> problem_of_slots(Problem<T> p) const {
    if (vectors_ > 1) p.displacements.rows = vectors_ - 1;
    return p;
  }

  // Return the coefficients for a chunk that begins at class `first`; x is null if there are none.
  Rotations<S> rotations_of(const Problem<T>& p, int64_t first) const {
    const S* y = static_cast<const S*>(loss_.class_coeffs);
    return {.x = static_cast<const S*>(loss_.input_coeffs),
            .y = y ? y + first : nullptr,
            .slots = loss_.rotation_slots,
            .K = p.K(),
            .B = p.B(),
            .ld = ld_,
            .ldy = p_.K()};
  }

  dim3 subcenter_blocks(const Problem<T>& p) const {
    return blocks(ceil_div(p.K(), SubcentersShape::kWarps), ceil_div(p.B(), SubcentersShape::kRows));
  }

  // Return the distance between the parked scores of two classes, in sums: a row of the gradient of the centers.
  int64_t parked_class() const { return p_.d() * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(S)); }

  // Return the number of rows in a tile of the kernels over scores.
  int64_t row_tile() const {
    int64_t rows = 0;
    with_slots<T>(this->slots(), [&](auto slots) { rows = ClassStream<T, slots>::kRows; });
    return rows;
  }

  // Make the products of the chunk p, and the scores in their place.
  void launch_scores(const LseShape& shape, const Problem<T>& p, const NormOutputs<S>& norms, const ChunkMemory& memory,
                     bool park, int64_t first, int64_t first_partial, const LsePartials<S>& lse) {
    S* products = vectors_ > 1 ? memory.products : memory.scores;
    ScoreInputs<T> inputs =
        this->multiply_scores(this->vectors_of(p), norms, products, park ? parked_class() : ld_, memory.slots);
    // The kernel below then takes one vector per class, and leaves the slots as they are.
    if (vectors_ > 1) {
      launch("best_subcenter", best_subcenter_kernel<S>, subcenter_blocks(p), SubcentersShape::kThreads, 0, stream_,
             p.K(), vectors_, ld_, static_cast<const S*>(products), memory.vector_norms, memory.copied_norms, p_.K(),
             memory.scores, memory.slots);
      inputs.p = p, inputs.products = memory.scores, inputs.center_rnorms = nullptr, inputs.slots = nullptr;
    } else if (loss_.input_coeffs) {
      using Shape = AddRotationsShape;
      launch("add_rotations", add_rotations_kernel<S>,
             blocks(ceil_div(p.K(), Shape::kWarps * Shape::kClasses), ceil_div(p.B(), Shape::kRows)), Shape::kThreads,
             0, stream_, rotations_of(p, first), products, memory.slots);
      inputs.slots = nullptr;
    }
    with_slots<T>(p_.M(), [&](auto slots) {
      const auto launch_kernel = [&](auto kernel) {
        using Stream = ClassStream<T, slots>;
        launch("lse_partials", kernel,
               blocks(ceil_div(inputs.p.K(), shape.group_classes), ceil_div(p_.B(), int64_t{Stream::kRows})),
               Stream::kThreads, 0, stream_, shape, inputs, terms(first), first_partial, lse);
      };
      if constexpr (sizeof(T) == 2) {
        if (park) return launch_kernel(lse_partials_kernel<T, slots, true>);
      }
      launch_kernel(lse_partials_kernel<T, slots, false>);
    });
  }

  // Compute the gradients of the coefficients of a chunk; grad_y begins at the chunk's first class.
  void launch_rotation_grads(const Rotations<S>& rotations, const GradSource<T>& source,
                             const RotationGradPartials<S>& partials, S* grad_x, S* grad_y, bool accumulate) {
    using Shape = RotationGradsShape;
    const RoutingShape shape(rotations.K, p_.B(), Shape::kWarps, Shape::kRows);
    launch("rotation_grads", rotation_grads_kernel<T>, blocks(shape.groups, shape.row_tiles), Shape::kThreads, 0,
           stream_, shape, rotations, source, partials);
    const ReduceRotationsShape reduce(ld_, rotations.K, rotations.slots);
    launch("reduce_rotation_grads", reduce_rotation_grads_kernel<S>, blocks(reduce.x_blocks + reduce.y_blocks),
           ReduceRotationsShape::kThreads, 0, stream_, reduce, shape, rotations, partials, grad_x, grad_y, accumulate);
  }

  void launch_route(const RoutingShape& shape, const GradSource<T>& source, bool parked) {
    with_slots<T>(this->slots(), [&](auto slots) {
      const auto launch_kernel = [&](auto kernel) {
        launch("route_loss_grad", kernel, blocks(shape.groups, shape.row_tiles), ClassStream<T, slots>::kThreads, 0,
               stream_, shape, source, this->partials_);
      };
      if constexpr (sizeof(T) == 2) {
        if (parked) return launch_kernel(route_loss_grad_kernel<T, slots, true>);
      }
      launch_kernel(route_loss_grad_kernel<T, slots, false>);
    });
  }

  SoftmaxGrad<S> softmax_grad(const LossOutputGrads& grads, const LossResults& saved, int64_t first_class) const {
    return {.grad_loss = static_cast<const S*>(grads.loss),
            .grad_lse = static_cast<const S*>(grads.lse),
            .loss_stride = loss_.reduction == 0,
            .lse_stride = 1,
            .row_stats = static_cast<const S*>(saved.row_stats),
            .scalars = static_cast<const S*>(saved.scalars),
            .B = p_.B(),
            .classes = p_.K(),
            .first_class = first_class,
            .target = loss_.target,
            .bias = static_cast<const S*>(loss_.class_bias),
            .weight = static_cast<const S*>(loss_.weight),
            .has_margin = loss_.margin != nullptr,
            .is_mean = loss_.reduction == 1,
            .ignore_index = loss_.ignore_index,
            .smoothing = static_cast<S>(loss_.label_smoothing)};
  }

  const LossArguments& loss_;
};

}  // namespace gistops::cuda
