// The maximum over sub-centers in a block of scores, and the products of its backward. Of the M vectors of a class only
// the winner of a pair has a weight: these products multiply B K d numbers, where dense ones would multiply B K M d.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {

using gistops::GradBlock;
using gistops::ScoreBlock;
using gistops::SlotMatrix;

// Copies x [classes, rows] to out [rows, classes] with row stride ld.
template <class E, int N>
GISTOPS_INLINE void store_transposed(const E (&x)[N][N], int64_t classes, int64_t rows, E* out, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < classes; ++k) out[i * ld + k] = x[k][i];
}

// The lanes of a vector are rows: the product has one row per sub-center, so that the slots of a class need no shuffle.
template <class T>
void max_over_subcenters(const T* p, int64_t ld_p, ScoreBlock<T> out, SlotMatrix<T> r, const T* scale) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  using Bytes = typename Simd<T>::Bytes;
  constexpr int N = Simd<T>::N;
  T best_of[N][N];
  uint8_t slots_of[N][N];
  for_each_vector<N>(out.rows, [&](int64_t i, int lanes) GISTOPS_INLINE_LAMBDA {
    const V row_scale = load<V>(scale + i, lanes);
    for (int64_t first = 0; first < out.n; first += N) {
      const int64_t classes = out.n - first < N ? out.n - first : N;
      for (int64_t k = 0; k < classes; ++k) {
        const T *product = p + (first + k) * r.slots * ld_p + i, *rnorm = r.data + first + k;
        V best = load<V>(product, lanes) * rnorm[0];
        I slot = {};
        for (int64_t j = 1; j < r.slots; ++j) {
          const V score = load<V>(product + j * ld_p, lanes) * rnorm[j * r.ld];
          const I wins = (score > best) | ((score != score) & (best == best));  // the first NaN wins
          best = wins ? score : best;
          slot = wins ? I{} + static_cast<int>(j) : slot;
        }
        store(best_of[k], best * row_scale, N);
        store(slots_of[k], __builtin_convertvector(slot, Bytes), N);
      }
      store_transposed(best_of, classes, lanes, out.logits + i * out.ld + first, out.ld);
      if (out.slots) store_transposed(slots_of, classes, lanes, out.slots + i * out.ld + first, out.ld);
    }
  });
}

// The products read a strip of the dimensions of 128 vectors at a time, packed, which stays in L1 (24 to 32 KiB). In
// place, rows whose stride is a power of two would evict each other.
constexpr int kStripVectors = GISTOPS_VECTOR_BYTES == 64 ? 4 : 8;  // sums in registers
constexpr int64_t kPackedRows = 128;

template <class T>
constexpr int64_t kStrip = kStripVectors * Simd<T>::N;

// Copies `width` columns of x [rows, d] to packed [rows, kStrip], and zeros to the other columns.
template <class T>
void pack_strip(const T* x, int64_t rows, int64_t d, int64_t width, T* packed) {
  for (int64_t i = 0; i < rows; ++i, x += d, packed += kStrip<T>) {
    std::memcpy(packed, x, width * sizeof(T));
    std::memset(packed + width, 0, (kStrip<T> - width) * sizeof(T));
  }
}

// A strip of the sum of weighted vectors.
template <class T>
struct StripSum {
  using V = typename Simd<T>::V;
  V v[kStripVectors] = {};

  GISTOPS_INLINE void add(T weight, const T* x) {
    for (int i = 0; i < kStripVectors; ++i) v[i] += weight * load<V>(x + i * Simd<T>::N, Simd<T>::N);
  }
  // out [width] += the sum.
  GISTOPS_INLINE void add_to(T* out, int64_t width) const {
    for_each_vector<Simd<T>::N>(width, [&](int64_t e, int lanes) GISTOPS_INLINE_LAMBDA {
      store(out + e, load<V>(out + e, lanes) + v[e / Simd<T>::N], lanes);
    });
  }
};

template <class T>
void add_winners(GradBlock<T> block, const T* h, int64_t ld_h, const T* w, int64_t slots, int64_t d, T* g) {
  alignas(64) T packed[256 * kStrip<T>];  // at least one class: M <= 256
  const int64_t group = slots < kPackedRows ? kPackedRows / slots : 1;
  for (int64_t e = 0; e < d; e += kStrip<T>) {
    const int64_t width = d - e < kStrip<T> ? d - e : kStrip<T>;
    for (int64_t first = 0; first < block.n; first += group) {
      const int64_t n = block.n - first < group ? block.n - first : group;
      pack_strip(w + first * slots * d + e, n * slots, d, width, packed);
      for (int64_t i = 0; i < block.rows; ++i) {
        const T* weights = h + i * ld_h + first;
        const uint8_t* winners = block.slots + i * block.ld + first;
        StripSum<T> sum;
        for (int64_t k = 0; k < n; ++k) sum.add(weights[k], packed + (k * slots + winners[k]) * kStrip<T>);
        sum.add_to(g + i * d + e, width);
      }
    }
  }
}

// The weights of a class in a group of rows, those of each slot in a row.
template <class T>
struct SortedWeights {
  T weight[kPackedRows];
  uint8_t row[kPackedRows];
  int32_t begin[257];  // of the slots; the last is the number of rows

  void sort(const T* h, int64_t ld_h, const uint8_t* winners, int64_t ld, int64_t rows, int64_t slots) {
    int32_t next[257] = {};
    for (int64_t i = 0; i < rows; ++i) ++next[winners[i * ld] + 1];
    for (int64_t j = 0; j < slots; ++j) next[j + 1] += next[j];
    std::memcpy(begin, next, sizeof(begin));
    for (int64_t i = 0; i < rows; ++i) {
      const int32_t place = next[winners[i * ld]]++;
      weight[place] = h[i * ld_h], row[place] = static_cast<uint8_t>(i);
    }
  }
};

template <class T>
void add_to_winners(GradBlock<T> block, const T* h, int64_t ld_h, const T* f, int64_t slots, int64_t d, T* dw) {
  constexpr int64_t kGroup = 32;  // classes that share a packed strip
  alignas(64) T packed[kPackedRows * kStrip<T>];
  SortedWeights<T> sorted[kGroup];
  for (int64_t i = 0; i < block.rows; i += kPackedRows) {
    const int64_t rows = block.rows - i < kPackedRows ? block.rows - i : kPackedRows;
    for (int64_t first = 0; first < block.n; first += kGroup) {
      const int64_t n = block.n - first < kGroup ? block.n - first : kGroup;
      for (int64_t k = 0; k < n; ++k)
        sorted[k].sort(h + i * ld_h + first + k, ld_h, block.slots + i * block.ld + first + k, block.ld, rows, slots);
      for (int64_t e = 0; e < d; e += kStrip<T>) {
        const int64_t width = d - e < kStrip<T> ? d - e : kStrip<T>;
        pack_strip(f + i * d + e, rows, d, width, packed);
        for (int64_t k = 0; k < n; ++k)
          for (int64_t j = 0; j < slots; ++j) {
            StripSum<T> sum;
            for (int32_t x = sorted[k].begin[j]; x < sorted[k].begin[j + 1]; ++x)
              sum.add(sorted[k].weight[x], packed + sorted[k].row[x] * kStrip<T>);
            sum.add_to(dw + ((first + k) * slots + j) * d + e, width);
          }
      }
    }
  }
}

}  // namespace
