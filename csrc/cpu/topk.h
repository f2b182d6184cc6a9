// The k largest of z + bias per row, largest first, and the log-sum-exp over all classes, streaming over blocks of
// classes. Ties are broken by the lower class. A NaN counts as larger than all numbers, as in torch.topk.
#pragma once
#include <cmath>
#include <vector>

#include "logsumexp.h"
#include "scores.h"

namespace gistops {

// The k best candidates so far, one sorted list per row.
template <class T>
class TopLists {
 public:
  TopLists(int64_t rows, int64_t k) : k_(k), filled_(rows), values_(rows * k), classes_(rows * k), slots_(rows * k) {
    filled_.zero();
  }
  // True if any of these n scores may enter the row's list.
  bool may_take(int64_t row, const T* z, int64_t n, const T* bias) const {
    return filled_[row] < k_ || kernels<T>().any_above(z, n, bias, values_[row * k_ + k_ - 1]);
  }
  // Offers of a row come in the order of the classes.
  void offer(int64_t row, T value, int64_t k, uint8_t slot) {
    const int64_t begin = row * k_;
    int64_t at = filled_[row];
    if (at == k_ && !larger(value, values_[begin + k_ - 1])) return;
    if (at < k_) {
      ++filled_[row];
    } else {
      --at;
    }
    for (; at > 0 && larger(value, values_[begin + at - 1]); --at) {
      values_[begin + at] = values_[begin + at - 1];
      classes_[begin + at] = classes_[begin + at - 1];
      slots_[begin + at] = slots_[begin + at - 1];
    }
    values_[begin + at] = value, classes_[begin + at] = k, slots_[begin + at] = slot;
  }
  // Offers a row's list to a list of lower classes.
  void offer_to(TopLists& other, int64_t row) const {
    for (int64_t e = row * k_; e < row * k_ + filled_[row]; ++e) other.offer(row, values_[e], classes_[e], slots_[e]);
  }
  const T* values() const { return values_.get(); }
  const int64_t* classes() const { return classes_.get(); }
  const uint8_t* slots() const { return slots_.get(); }

 private:
  static bool larger(T a, T b) { return a > b || (std::isnan(a) && !std::isnan(b)); }
  int64_t k_;
  Scratch<int64_t> filled_;
  Scratch<T> values_;
  Scratch<int64_t> classes_;
  Scratch<uint8_t> slots_;
};

// Outputs: values, classes, slots [B, k], with k <= K; lse [B], or null. bias is [K] or null.
template <class T>
void topk(const Problem<T>& p, const T* bias, int64_t k, T* values, int64_t* classes, uint8_t* slots, T* lse) {
  const Input<T> input(p);
  const int64_t threads = num_threads(p), chunk = std::min(kBlockRows, p.B);
  const Partition partition(p, threads);
  struct Shard {
    ClassBlock<T> block;
    TopLists<T> top;
    Scratch<T> scores;       // [chunk, size]
    Scratch<uint8_t> slots;  // [chunk, size]
    RunningLogSumExp<T> lse;
  };
  const int64_t workers = partition.workers(threads);
  std::vector<Shard> shards;
  shards.reserve(workers);
  for (int64_t i = 0; i < workers; ++i)
    shards.push_back({.block = ClassBlock<T>(p, input, partition.size, chunk),
                      .top = TopLists<T>(p.B, k),
                      .scores = Scratch<T>(chunk * partition.size),
                      .slots = Scratch<uint8_t>(chunk * partition.size),
                      .lse = RunningLogSumExp<T>(p.B)});
  partition.for_each_block(workers, [&](int64_t worker, int64_t first, int64_t n) {
    Shard& shard = shards[worker];
    shard.block.load(first, n);
    for (int64_t i = 0; i < p.B; i += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, p.B - i);
      T* z = shard.scores.get();
      shard.block.score(i, rows, z, shard.slots.get(), n);
      const T* block_bias = bias ? bias + first : nullptr;
      if (lse) shard.lse.add(i, rows, z, n, block_bias);
      for (int64_t row = 0; row < rows; ++row, z += n) {
        if (!shard.top.may_take(i + row, z, n, block_bias)) continue;
        for (int64_t c = 0; c < n; ++c)
          shard.top.offer(i + row, block_bias ? z[c] + block_bias[c] : z[c], first + c, shard.slots[row * n + c]);
      }
    }
  });
  const TopLists<T>& top = shards[0].top;
  for (int64_t i = 1; i < workers; ++i)
    for (int64_t row = 0; row < p.B; ++row) shards[i].top.offer_to(shards[0].top, row);
  std::copy_n(top.values(), p.B * k, values);
  std::copy_n(top.classes(), p.B * k, classes);
  std::copy_n(top.slots(), p.B * k, slots);
  if (!lse) return;
  std::vector<const RunningLogSumExp<T>*> parts;
  for (const Shard& shard : shards) parts.push_back(&shard.lse);
  RunningLogSumExp<T>::merge(parts, p.B, lse);
}

}  // namespace gistops
