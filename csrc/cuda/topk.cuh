// The launches of top-k, without the logits [B, K].
#pragma once
#include "op_launcher.cuh"
#include "topk_merge.cuh"

namespace gistops::cuda {

template <class T>
class TopkLauncher : private OpLauncher<T> {
  using Base = OpLauncher<T>;
  using Base::p_, Base::ld_, Base::stream_, Base::workspace_;
  using S = Sum<T>;
  using Shape = TopkShape<S>;

 public:
  using OpLauncher<T>::OpLauncher;

  // A chunk takes three launches, all chunks together one more.
  void run(const TopkArguments& a, const TopkResults& results) {
    if (p_.B() == 0) return;
    const int64_t step = chunk_classes(), row_tiles = ceil_div(p_.B(), Shape::kRows);
    const bool need_lse = results.lse != nullptr;
    TopkPartials<S> partials{.lists = nullptr,
                             .max = nullptr,
                             .sum = nullptr,
                             .ranges = static_cast<int>(ranges(step, row_tiles, a.k)),
                             .k = static_cast<int>(a.k),
                             .capacity = candidate_capacity(a.k)};
    S *input_dots, *products, *center_rnorms, *input_rnorms;
    uint8_t* slots;
    Scratch(workspace_)
        .add(input_dots, p_.M() * ld_)
        .add(input_rnorms, p_.B())
        .add(center_rnorms, p_.M() * step)
        .add(products, step * ld_)
        .add(slots, step * ld_)
        .add(partials.lists, p_.B() * partials.ranges * a.k)
        .add(partials.max, need_lse * p_.B() * partials.ranges)
        .add(partials.sum, need_lse * p_.B() * partials.ranges)
        .allocate();
    if (!need_lse) partials.max = partials.sum = nullptr;
    for (int64_t first = 0; first < p_.K(); first += step) {
      const Problem<T> p = this->chunk(first, step);
      const NormOutputs<S> norms{.input_rnorms = input_rnorms,
                                 .input_dots = input_dots,
                                 .ld = ld_,
                                 .center_rnorms = center_rnorms,
                                 .ldr = step,
                                 .blocks_done = nullptr};
      const ScoreInputs<T> inputs = this->norms_and_products(p, first == 0, norms, products, slots);
      const int64_t tiles = ceil_div(p.K(), Shape::kClasses);
      const TopkChunk chunk{.first_class = first,
                            .range_tiles = static_cast<int>(ceil_div(tiles, partials.ranges)),
                            .is_first = first == 0};
      launch("topk_partials", topk_partials_kernel<T>, blocks(row_tiles, partials.ranges), Shape::kThreads,
             list_bytes(Shape::kRows, partials.capacity), stream_, chunk, inputs, static_cast<const S*>(a.class_bias),
             partials);
    }
    const TopkResult<S> out{.values = static_cast<S*>(results.values),
                            .classes = results.classes,
                            .slots = results.slots,
                            .lse = static_cast<S*>(results.lse)};
    launch("topk_merge", topk_merge_kernel<S>, blocks(p_.B()), TopkMergeShape::kThreads,
           list_bytes(TopkMergeShape::kWarps, partials.capacity), stream_, partials, out);
  }

 private:
  static int list_bytes(int lists, int capacity) { return lists * capacity * static_cast<int>(sizeof(Candidate<S>)); }

  // Return the classes of a chunk: 32 MB of float products, which stay in the cache of a large GPU.
  int64_t chunk_classes() const {
    const int64_t tiles = std::max<int64_t>(2 * limits.cached / ld_ / Shape::kClasses, 1);
    return std::min(tiles * Shape::kClasses, p_.K());
  }

  // Return the ranges per row: two blocks per multiprocessor of a large GPU, if the lists then take at most a quarter
  // of the bytes of the logits.
  int64_t ranges(int64_t classes, int64_t row_tiles, int64_t k) const {
    constexpr int64_t kBlocks = 264;
    const int64_t most = std::min(ceil_div(classes, Shape::kClasses), p_.K() / (8 * k));
    return std::max<int64_t>(std::min(ceil_div(kBlocks, row_tiles), most), 1);
  }
};

}  // namespace gistops::cuda
