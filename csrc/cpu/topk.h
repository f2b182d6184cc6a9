// The k largest of z + bias of each row, largest first, and the log-sum-exp of all: streaming over classes. Of equals
// the lowest class comes first; NaN counts as larger than all numbers, as in torch.topk.
#pragma once
#include <cmath>
#include <vector>

#include "log_sums.h"
#include "scores.h"

namespace gistops {

// The best so far, one list for each row.
template <class T>
class BestLists {
 public:
  BestLists(int64_t rows, int64_t k) : k_(k), filled_(rows), values_(rows * k), classes_(rows * k), slots_(rows * k) {
    filled_.zero();
  }
  // Whether a row's list has room for any of these n scores.
  bool wants(int64_t row, const T* z, int64_t n, const T* bias) const {
    return filled_[row] < k_ || kernels<T>().any_above(z, n, bias, values_[row * k_ + k_ - 1]);
  }
  // Later offers of a row must be of higher classes.
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
  // Offers all of a row to a list of lower classes.
  void offer_to(BestLists& other, int64_t row) const {
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

// values, classes, slots: [B, k], k <= K; lse [B], or null; bias [K], or null.
template <class T>
void topk(const Problem<T>& p, const T* bias, int64_t k, T* values, int64_t* classes, uint8_t* slots, T* lse) {
  const Features<T> features(p);
  const int64_t threads = workers(p), chunk = std::min(kRows, p.B);
  const Partition blocks(p.K, p.stored(), threads);
  struct Share {
    ClassBlock<T> block;
    BestLists<T> best;
    Scratch<T> scores;       // [chunk, size]
    Scratch<uint8_t> slots;  // [chunk, size]
    LogSums<T> sums;
  };
  const int64_t count = std::clamp<int64_t>(blocks.count, 1, threads);
  std::vector<Share> shares;
  shares.reserve(count);
  for (int64_t i = 0; i < count; ++i)
    shares.push_back({ClassBlock<T>(p, features, blocks.size, chunk), BestLists<T>(p.B, k),
                      Scratch<T>(chunk * blocks.size), Scratch<uint8_t>(chunk * blocks.size), LogSums<T>(p.B)});
  blocks.each(count, [&](int64_t worker, int64_t first, int64_t n) {
    Share& share = shares[worker];
    share.block.load(first, n);
    for (int64_t i = 0; i < p.B; i += kRows) {
      const int64_t rows = std::min(kRows, p.B - i);
      T* z = share.scores.get();
      share.block.score(i, rows, z, share.slots.get(), n);
      const T* block_bias = bias ? bias + first : nullptr;
      if (lse) share.sums.add(i, rows, z, n, block_bias);
      for (int64_t row = 0; row < rows; ++row, z += n) {
        if (!share.best.wants(i + row, z, n, block_bias)) continue;
        for (int64_t c = 0; c < n; ++c)
          share.best.offer(i + row, block_bias ? z[c] + block_bias[c] : z[c], first + c, share.slots[row * n + c]);
      }
    }
  });
  for (int64_t i = 1; i < count; ++i)
    for (int64_t row = 0; row < p.B; ++row) shares[i].best.offer_to(shares[0].best, row);
  std::copy_n(shares[0].best.values(), p.B * k, values);
  std::copy_n(shares[0].best.classes(), p.B * k, classes);
  std::copy_n(shares[0].best.slots(), p.B * k, slots);
  if (!lse) return;
  std::vector<const LogSums<T>*> sums;
  for (const Share& share : shares) sums.push_back(&share.sums);
  LogSums<T>::finish(sums, p.B, lse);
}

}  // namespace gistops
