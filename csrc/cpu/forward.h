// The logits of all classes: logits[i, k] = tau * max_j (P[i, k] + Q[i, j]) R[j, k] / |f_i|. P = f W' is computed in
// blocks, and the maximum is taken while a block is in cache.
#pragma once
#include "scores.h"

namespace gistops {

// Scores the rows [i, i + rows) of a block of n classes from class k on. Logits in another format than T are converted
// while the block is in cache, from `wide` and `wide_slots`, [rows, n] each.
template <class T>
void store_scores(ClassBlock<T>& block, int64_t K, int64_t i, int64_t rows, int64_t k, int64_t n,
                  const StoredScores& out, const Scratch<T>& wide, const Scratch<uint8_t>& wide_slots) {
  uint8_t* slots = out.slots ? out.slots + i * K + k : nullptr;
  if (out.format == kFormat<T>) return block.score(i, rows, static_cast<T*>(out.logits) + i * K + k, slots, K);
  block.score(i, rows, wide.get(), slots ? wide_slots.get() : nullptr, n);
  for (int64_t row = 0; row < rows; ++row) {
    char* logits = static_cast<char*>(out.logits) + ((i + row) * K + k) * element_size(out.format);
    kernels<T>().store(wide.get() + row * n, n, out.format, logits);
    if (slots) std::copy_n(wide_slots.get() + row * n, n, slots + row * K);
  }
}

// Outputs: logits and slots [B, K], center_rnorms [M, K], input_rnorms [B]; the last two may be null.
template <class T>
void forward(const Problem<T>& p, const StoredScores& out, T* center_rnorms, T* input_rnorms) {
  const int64_t threads = num_threads(p);
  const Input<T> input(p);
  if (input_rnorms) std::copy_n(input.rnorm.get(), p.B, input_rnorms);

  // The threads divide the blocks of classes. With fewer blocks than threads, they divide the rows too; each thread
  // then computes the norms itself.
  const Partition blocks(p, threads);
  const int64_t groups = blocks.count >= threads ? 1
                                                 : std::clamp<int64_t>(threads / std::max<int64_t>(blocks.count, 1), 1,
                                                                       std::max<int64_t>(1, p.B / 64));
  const int64_t group_rows = round_up(ceil_div(p.B, groups), kPad);  // see Input::columns()
  parallel_for(0, blocks.count * groups, 1, [&](int64_t begin, int64_t end) {
    const int64_t block_rows = std::min(kBlockRows, p.B);
    ClassBlock<T> block(p, input, blocks.size, block_rows);
    const int64_t converted = out.format == kFormat<T> ? 0 : block_rows * blocks.size;
    const Scratch<T> wide(converted);
    const Scratch<uint8_t> wide_slots(out.slots ? converted : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = blocks.begin(task / groups), n = blocks.classes(task / groups);
      const int64_t first = task % groups * group_rows, last = std::min(first + group_rows, p.B);
      block.load(k, n);
      for (int64_t i = first, rows = 0; i < last; i += rows) {
        rows = rows_from(i, last);
        store_scores(block, p.K, i, rows, k, n, out, wide, wide_slots);
      }
      if (first == 0 && center_rnorms) block.copy_rnorms(center_rnorms + k, p.K);
    }
  });
}

// Outputs R [M, K] for Problem::norms. The input may have no rows.
template <class T>
void center_norms(const Problem<T>& p, T* norms) {
  const int64_t threads = torch::stable::get_num_threads();
  const Input<T> input(p);
  const Partition partition(p, threads);
  const int64_t workers = partition.workers(threads);
  std::vector<ClassBlock<T>> blocks;
  blocks.reserve(workers);
  for (int64_t i = 0; i < workers; ++i) blocks.emplace_back(p, input, partition.size, 0);
  partition.for_each_block(workers, [&](int64_t worker, int64_t k, int64_t n) {
    blocks[worker].load(k, n);
    blocks[worker].save_norms(norms);
  });
}

}  // namespace gistops
