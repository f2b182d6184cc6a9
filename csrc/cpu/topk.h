// The k largest of z + bias per row, largest first, and the log-sum-exp over all classes, streaming over blocks of
// classes. Ties are broken by the lower class. A NaN counts as larger than all numbers, as in torch.topk.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "logsumexp.h"
#include "scores.h"

namespace gistops {

// A score and the class and slot that attain it. Candidates have a total order, so that no result depends on the
// blocks or on the order in which workers are merged.
template <class T>
struct Candidate {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static constexpr Bits kSign = Bits(1) << (8 * sizeof(T) - 1);

  // An integer that is larger for a larger score. One number for both zeros, and one above all others for NaN.
  static Bits order_of(T score) {
    if (std::isnan(score)) return ~Bits(0);
    const Bits bits = std::bit_cast<Bits>(score + T(0));
    return bits & kSign ? ~bits : bits | kSign;
  }
  Candidate() = default;
  Candidate(Bits order, int64_t k, uint8_t slot) : order(order), place(k << 8 | slot) {}
  T score() const {
    if (order == ~Bits(0)) return std::numeric_limits<T>::quiet_NaN();
    return std::bit_cast<T>(order & kSign ? order ^ kSign : ~order);
  }
  int64_t k() const { return place >> 8; }
  uint8_t slot() const { return static_cast<uint8_t>(place); }
  bool operator<(const Candidate& other) const {  // the better candidate is the lesser
    return order != other.order ? order > other.order : place < other.place;
  }

  Bits order;
  int64_t place;  // the class, then the slot in the low byte
};

// The candidates of a worker: per row at least its k best, unordered. A row whose buffer is full is pruned to its k
// best, so that a score costs constant time on average for any k.
template <class T>
class Candidates {
 public:
  // classes: the most that are offered to a row.
  Candidates(int64_t rows, int64_t k, int64_t classes)
      : k_(k), capacity_(std::min(2 * k + kSmall, classes)), filled_(rows), bound_(rows), data_(rows * capacity_) {
    filled_.zero();
    std::fill_n(bound_.get(), rows, -std::numeric_limits<T>::infinity());
  }
  Candidate<T>* begin(int64_t row) const { return data_.get() + row * capacity_; }
  Candidate<T>* end(int64_t row) const { return begin(row) + filled_[row]; }

  // Offers the scores z [n] of the classes from `first` on. A row is offered its classes in ascending order.
  void offer(int64_t row, const T* z, const uint8_t* slots, int64_t n, int64_t first, const T* bias) {
    constexpr int64_t kGroup = 64;
    if (!may_take(row, z, n, bias)) return;
    for (int64_t c = 0; c < n; c += kGroup) {
      const int64_t size = std::min(kGroup, n - c);
      const T* group_bias = bias ? bias + c : nullptr;
      if (may_take(row, z + c, size, group_bias)) add(row, z + c, slots + c, size, first + c, group_bias);
    }
    // For a small k the best bound pays: it rejects most blocks as a whole.
    if (k_ <= kSmall && filled_[row] > k_) prune(row);
  }

 private:
  // True if any of these scores may be among the k best.
  bool may_take(int64_t row, const T* z, int64_t n, const T* bias) const {
    return filled_[row] < k_ || kernels<T>().any_above(z, n, bias, bound_[row]);
  }
  void add(int64_t row, const T* z, const uint8_t* slots, int64_t n, int64_t first, const T* bias) {
    int64_t filled = filled_[row];
    T bound = bound_[row];
    for (int64_t c = 0; c < n; ++c) {
      const T score = bias ? z[c] + bias[c] : z[c];
      if (filled >= k_ && score <= bound) continue;
      const auto order = Candidate<T>::order_of(score);
      if (filled == capacity_) {
        filled_[row] = filled;
        prune(row);
        filled = k_, bound = bound_[row];
      }
      if (filled >= k_ && order <= Candidate<T>::order_of(bound)) continue;
      begin(row)[filled++] = Candidate<T>(order, first + c, slots[c]);
    }
    filled_[row] = filled;
  }
  void prune(int64_t row) {
    std::nth_element(begin(row), begin(row) + k_ - 1, end(row));
    filled_[row] = k_;
    bound_[row] = begin(row)[k_ - 1].score();
  }
  static constexpr int64_t kSmall = 16;
  int64_t k_, capacity_;
  Scratch<int64_t> filled_;
  Scratch<T> bound_;  // no score up to it is among the k best
  Scratch<Candidate<T>> data_;
};

// Outputs: values, classes, slots [B, k], with k <= K; lse [B], or null. bias is [K] or null.
template <class T>
void topk(const Problem<T>& p, const T* bias, int64_t k, T* values, int64_t* classes, uint8_t* slots, T* lse) {
  const Input<T> input(p);
  const int64_t threads = num_threads(p), chunk = std::min(kBlockRows, p.B);
  const Partition partition(p, threads);
  struct Shard {
    ClassBlock<T> block;
    Candidates<T> candidates;
    Scratch<T> scores;       // [chunk, size]
    Scratch<uint8_t> slots;  // [chunk, size]
    RunningLogSumExp<T> lse;
  };
  const int64_t workers = partition.workers(threads);
  std::vector<Shard> shards;
  shards.reserve(workers);
  for (int64_t i = 0; i < workers; ++i)
    shards.push_back(
        {.block = ClassBlock<T>(p, input, partition.size, chunk),
         .candidates = Candidates<T>(p.B, k, std::min(p.K, ceil_div(partition.count, workers) * partition.size)),
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
      for (int64_t row = 0; row < rows; ++row)
        shard.candidates.offer(i + row, z + row * n, shard.slots.get() + row * n, n, first, block_bias);
    }
  });
  torch::stable::parallel_for(0, p.B, ceil_div(kWorkPerThread / 64, p.K), [&](int64_t begin, int64_t end) {
    std::vector<Candidate<T>> all;
    for (int64_t row = begin; row < end; ++row) {
      all.clear();
      for (const Shard& shard : shards) all.insert(all.end(), shard.candidates.begin(row), shard.candidates.end(row));
      if (std::ssize(all) > k) std::nth_element(all.begin(), all.begin() + k, all.end());
      std::sort(all.begin(), all.begin() + k);
      for (int64_t e = 0; e < k; ++e) {
        values[row * k + e] = all[e].score(), classes[row * k + e] = all[e].k(), slots[row * k + e] = all[e].slot();
      }
    }
  });
  if (!lse) return;
  std::vector<const RunningLogSumExp<T>*> parts;
  for (const Shard& shard : shards) parts.push_back(&shard.lse);
  RunningLogSumExp<T>::merge(parts, p.B, lse);
}

}  // namespace gistops
