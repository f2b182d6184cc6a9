// The slots of a class that hold the same vector. A matrix product may sum them in different orders, so that the higher
// of two equal slots may have the larger score. The lower one wins.
#pragma once
#include <vector>

#include "problem.h"

namespace gistops {

class EqualSlots {
 public:
  // Compares the sub-centers of the classes [first, first + n). Different vectors differ at once: this costs little.
  void find(const StoredMatrix& vectors, int64_t first, int64_t n, int64_t slots) {
    equals_.clear();
    switch (element_size(vectors.format)) {
      case 2: return find_as<uint16_t>(vectors, first, n, slots);
      case 4: return find_as<uint32_t>(vectors, first, n, slots);
      default: return find_as<uint64_t>(vectors, first, n, slots);
    }
  }

  template <class T>
  void replace(const ScoreBlock<T>& out) const {
    if (!out.slots) return;
    for (const auto& [k, slot, lowest] : equals_)
      for (int64_t i = 0; i < out.rows; ++i)
        if (uint8_t& winner = out.slots[i * out.ld + k]; winner == slot) winner = lowest;
  }

 private:
  struct Equal {
    int64_t k;  // within the block
    uint8_t slot, lowest;
  };

  template <class Bits>
  void find_as(const StoredMatrix& vectors, int64_t first, int64_t n, int64_t slots) {
    const int64_t d = vectors.d;
    for (int64_t k = 0; k < n; ++k) {
      const auto* v = static_cast<const Bits*>(vectors.row((first + k) * slots));
      for (int64_t j = 1; j < slots; ++j)
        for (int64_t lower = 0; lower < j; ++lower)
          if (are_equal(v + lower * d, v + j * d, d)) {
            equals_.push_back({k, static_cast<uint8_t>(j), static_cast<uint8_t>(lower)});
            break;
          }
    }
  }

  // Equal bits, or zeros of either sign.
  template <class Bits>
  static bool are_equal(const Bits* a, const Bits* b, int64_t d) {
    for (int64_t e = 0; e < d; ++e)
      if (a[e] != b[e] && static_cast<Bits>((a[e] | b[e]) << 1) != 0) return false;
    return true;
  }

  std::vector<Equal> equals_;
};

}  // namespace gistops
