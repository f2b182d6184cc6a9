// The logits of all classes: logits[i, k] = tau * max_j (P[i, k] + Q[i, j]) R[k, j] / |f_i|, with P = f W' in blocks,
// and the maximum taken while a block of P is in cache.
#pragma once
#include "scores.h"

namespace gistops {

// logits [B, K], slots [B, K], center_rnorms [M, K], input_rnorms [B]; the last two may be null.
template <class T>
void forward(const Problem<T>& p, T* logits, uint8_t* slots, T* center_rnorms, T* input_rnorms) {
  const int64_t threads = workers(p);
  const Features<T> features(p);
  if (input_rnorms) std::copy_n(features.rnorm.get(), p.B, input_rnorms);

  // Threads share out the classes. Where there are too few, they share the rows too, and each makes the norms itself.
  const Partition blocks(p.K, p.stored(), threads);
  const int64_t groups = blocks.count >= threads ? 1
                                                 : std::clamp<int64_t>(threads / std::max<int64_t>(blocks.count, 1), 1,
                                                                       std::max<int64_t>(1, p.B / 64));
  const int64_t group_rows = ceil_div(p.B, groups);
  torch::stable::parallel_for(0, blocks.count * groups, 1, [&](int64_t begin, int64_t end) {
    ClassBlock<T> block(p, features, blocks.size, std::min(kRows, p.B));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = blocks.begin(task / groups), n = blocks.classes(task / groups);
      const int64_t first = task % groups * group_rows, last = std::min(first + group_rows, p.B);
      block.load(k, n);
      for (int64_t i = first; i < last; i += kRows)
        block.score(i, std::min(kRows, last - i), logits + i * p.K + k, slots + i * p.K + k, p.K);
      if (first == 0 && center_rnorms)
        for (int64_t j = 0; j < p.M(); ++j) std::copy_n(block.r() + j * blocks.size, n, center_rnorms + j * p.K + k);
    }
  });
}

// R [M, K] for Problem::norms. Of the features only the number is used: none.
template <class T>
void center_norms(const Problem<T>& p, T* norms) {
  const Features<T> features(p);
  const Partition blocks(p.K, p.stored(), torch::stable::get_num_threads());
  const int64_t count = std::min<int64_t>(blocks.count, torch::stable::get_num_threads());
  std::vector<ClassBlock<T>> workers;
  workers.reserve(count);
  for (int64_t i = 0; i < count; ++i) workers.emplace_back(p, features, blocks.size, 0);
  blocks.each(count, [&](int64_t worker, int64_t k, int64_t n) {
    workers[worker].load(k, n);
    workers[worker].save_norms(k, norms);
  });
}

}  // namespace gistops
