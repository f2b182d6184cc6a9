// The launches of the cross-entropy and its gradients, without the logits [B, K].
#pragma once
#include "backward.cuh"
#include "lse_partials.cuh"
#include "route_loss_grad.cuh"
#include "row_loss.cuh"

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
  using Base::p_, Base::ld_, Base::stream_, Base::workspace_;
  using S = Sum<T>;

 public:
  CrossEntropyLauncher(const Arguments& a, const LossArguments& loss, Workspace& workspace)
      : Base(a, workspace), loss_(loss) {}

  void forward(const LossResults& results) {
    // Scores that are not kept for the backward are computed in chunks of classes that stay in the cache.
    const int64_t step = results.scores ? p_.K() : std::min(this->cached_classes(), p_.K());
    const LseShape shape(p_.K(), step);
    const int64_t scratch_classes = results.scores ? 0 : step;
    const int64_t chunk_partials = ceil_div(step, shape.group_classes);
    const int64_t last_chunk = (p_.K() - 1) / step;
    const int64_t tiles = last_chunk * chunk_partials + ceil_div(p_.K() - last_chunk * step, shape.group_classes);
    const int64_t smoothed = loss_.label_smoothing > 0;
    const int64_t row_blocks = std::max<int64_t>(ceil_div(p_.B(), RowLossShape<S>::kRows), 1);
    S *input_dots, *products, *loss_partials;
    uint8_t* slots;
    int* blocks_done;
    LsePartials<S> lse;
    Scratch(workspace_)
        .add(input_dots, p_.M() * ld_)
        .add(products, scratch_classes * ld_)
        .add(slots, scratch_classes * ld_)
        .add(lse.max, tiles * p_.B())
        .add(lse.sum, tiles * p_.B())
        .add(lse.weighted, smoothed * tiles * p_.B())
        .add(lse.weight_sums, smoothed * tiles)
        .add(lse.bias_sums, smoothed * tiles)
        .add(lse.target_logits, p_.B())
        .add(loss_partials, row_blocks * 3)
        .add(blocks_done, 1)
        .allocate();
    if (results.scores) products = static_cast<S*>(results.scores), slots = results.slots;
    S *center_rnorms = static_cast<S*>(results.center_rnorms), *input_rnorms = static_cast<S*>(results.input_rnorms);
    for (int64_t first = 0; first < p_.K(); first += step) {
      const Problem<T> p = this->chunk(first, step);
      const NormOutputs<S> norms{.input_rnorms = input_rnorms,
                                 .input_dots = input_dots,
                                 .ld = ld_,
                                 .center_rnorms = center_rnorms + first,
                                 .ldr = p_.K(),
                                 .blocks_done = first == 0 ? blocks_done : nullptr};
      this->launch_norms(p, first == 0, norms);
      if (p_.B() == 0) continue;
      launch_scores(shape, score_inputs(p, first, input_dots, center_rnorms, input_rnorms, products, slots),
                    results.parked, first, first / step * chunk_partials, lse);
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
    if (p_.B() == 0) return this->clear(out);
    // A chunk of recomputed scores is as large as memory allows.
    const int64_t step = saved.scores ? p_.K() : std::min(p_.K(), limits.recomputed / ld_ + 1);
    const int64_t tile_rows = row_tile();
    RoutingShape shape(step, saved.parked ? 1 : p_.B(), ClassStream<T, 1>::kWarps, saved.parked ? 1 : tile_rows);
    if (saved.parked) shape.row_passes = ceil_div(p_.B(), tile_rows);
    this->allocate(shape, step, out, true, saved.parked ? static_cast<T*>(saved.scores) : nullptr);
    const S *center_rnorms = static_cast<const S*>(saved.center_rnorms),
            *input_rnorms = static_cast<const S*>(saved.input_rnorms);
    S *input_dots = nullptr, *scores = static_cast<S*>(saved.scores), *unused;
    uint8_t* slots = saved.slots;
    if (!saved.scores) {
      Scratch(workspace_)
          .add(input_dots, p_.M() * ld_)
          .add(scores, step * ld_)
          .add(slots, step * ld_)
          .add(unused, p_.B())
          .allocate();
      const NormOutputs<S> norms{.input_rnorms = unused,
                                 .input_dots = input_dots,
                                 .ld = ld_,
                                 .center_rnorms = nullptr,
                                 .ldr = 0,
                                 .blocks_done = nullptr};
      this->launch_norms(p_, true, norms);
    }
    const LsePartials<S> no_partials{};
    for (int64_t first = 0; first < p_.K(); first += step) {
      const Problem<T> p = this->chunk(first, step);
      if (!saved.scores)
        launch_scores(LseShape(step, step),
                      score_inputs(p, first, input_dots, center_rnorms, input_rnorms, scores, slots), false, first, 0,
                      no_partials);
      const GradSource<T> source{.p = p,
                                 .center_rnorms = center_rnorms + first,
                                 .ldr = p_.K(),
                                 .input_rnorms = input_rnorms,
                                 .scores = scores,
                                 .slots = slots,
                                 .score_class = saved.parked ? parked_class() : ld_,
                                 .score_row = 1,
                                 .grad = nullptr,
                                 .softmax = softmax_grad(grads, saved, first),
                                 .scores_gone = saved.parked};
      const RoutingShape chunk_shape =
          saved.scores ? shape : RoutingShape(p.K(), p_.B(), ClassStream<T, 1>::kWarps, tile_rows);
      this->require_memory(chunk_shape);
      launch_route(chunk_shape, source, saved.parked);
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

  // The chunk p begins at class `first`; scores and slots are those of the chunk.
  ScoreInputs<T> score_inputs(const Problem<T>& p, int64_t first, const S* input_dots, const S* center_rnorms,
                              const S* input_rnorms, S* scores, uint8_t* slots) const {
    return {.p = p,
            .products = scores,
            .ld = ld_,
            .score_class = slots ? ld_ : parked_class(),
            .input_dots = input_dots,
            .center_rnorms = center_rnorms + first,
            .ldr = p_.K(),
            .input_rnorms = input_rnorms,
            .slots = slots,
            .slot_class = ld_,
            .slot_row = 1};
  }

  // Return the distance between the parked scores of two classes, in sums: a row of the gradient of the centers.
  int64_t parked_class() const { return p_.d() * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(S)); }

  // Return the number of rows in a tile of the kernels over scores.
  int64_t row_tile() const {
    int64_t rows = 0;
    with_slots<T>(p_.M(), [&](auto slots) { rows = ClassStream<T, slots>::kRows; });
    return rows;
  }

  // Make the products of a chunk, and the scores in their place.
  void launch_scores(const LseShape& shape, const ScoreInputs<T>& inputs, bool park, int64_t first,
                     int64_t first_partial, const LsePartials<S>& lse) {
    const Matrix centers{inputs.p.centers.data, inputs.p.K(), p_.d(), p_.d(), 1},
        input_transposed{p_.input.data, p_.d(), p_.B(), 1, p_.d()};
    workspace_.multiply(centers, input_transposed, inputs.products, inputs.score_class);
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

  void launch_route(const RoutingShape& shape, const GradSource<T>& source, bool parked) {
    with_slots<T>(p_.M(), [&](auto slots) {
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
