// The functions of csrc/cuda/ptx.cuh for the host: each instruction in C++, with the same layouts of fragments (PTX
// ISA).
#pragma once
#include <array>
#include <limits>
#include <map>
#include <memory>

#include "device.cuh"

namespace gistops::cuda {

inline void require_vector(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) host_cuda::fail("an address that is no multiple of 16");
}

inline void copy_async_16(void* shared, const void* global, bool valid) {
  require_vector(shared);
  if (valid) require_vector(global);
  host_cuda::copy_later(shared, valid ? global : nullptr);
}
inline void copy_async_commit() { host_cuda::end_copy_group(); }
template <int N>
void copy_async_wait() {
  host_cuda::wait_for_copies(N);
}

inline void barrier_sync(int barrier, int threads) { host_cuda::named_barrier(barrier, threads, true); }
inline void barrier_arrive(int barrier, int threads) { host_cuda::named_barrier(barrier, threads, false); }

// Lane l receives elements 2 (l % 4) and the next of row l / 4 of each matrix, or of column l / 4.
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  const unsigned lane = host_cuda::lane();
  require_vector(row);
  host_cuda::show(&row, sizeof row);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned h = 0; h < 2; ++h) {
      unsigned i = lane / 4, j = lane % 4 * 2 + h;
      if (transposed) std::swap(i, j);
      const uint16_t* from;
      std::memcpy(&from, host_cuda::shown_by(matrix * 8 + i), sizeof from);
      pair[h] = from[j];
    }
    std::memcpy(&r[matrix], pair, sizeof pair);
  }
  __syncwarp();  // until here the other lanes' rows are read
}

inline void store_matrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  const unsigned lane = host_cuda::lane();
  require_vector(row);
  host_cuda::show(&row, sizeof row);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    std::memcpy(pair, &r[matrix], sizeof pair);
    for (unsigned h = 0; h < 2; ++h) {
      uint16_t* to;
      std::memcpy(&to, host_cuda::shown_by(matrix * 8 + lane % 4 * 2 + h), sizeof to);
      to[lane / 4] = pair[h];
    }
  }
}

template <class T>
uint32_t pack(float low, float high) {
  const T both[2] = {narrow<T>(low), narrow<T>(high)};
  uint32_t word;
  std::memcpy(&word, both, sizeof word);
  return word;
}
inline float max_or_nan(float x, float y) { return x > y || x != x ? x : y; }
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { load_matrices(r, row, false); }
inline void load_matrix_x4_trans(uint32_t (&r)[4], const void* row) { load_matrices(r, row, true); }

constexpr bool kHasWgmma = true;
inline void trap() { host_cuda::fail("a trap"); }

// A matrix of 16-bit elements in shared memory, in rows of 128 bytes whose vectors are exchanged by address.
struct WgmmaMatrix {
  uintptr_t start;
  int leading, stride;

  // Return element (major, minor): rows of `major` hold 64 values of `minor`.
  template <class T>
  float at(int major, int minor) const {
    const int row = major % 8 * 128 + minor % 64 * static_cast<int>(sizeof(T));
    const uintptr_t address = start + minor / 64 * leading + major / 8 * stride + row;
    T value;
    std::memcpy(&value, reinterpret_cast<const void*>(address ^ (address >> 7 & 7) << 4), sizeof value);
    return wide(value);
  }
};
inline WgmmaMatrix wgmma_matrix(const void* start, int leading, int stride) {
  require_vector(start);
  return {reinterpret_cast<uintptr_t>(start), leading, stride};
}
inline WgmmaMatrix advance(WgmmaMatrix x, int bytes) { return {x.start + bytes, x.leading, x.stride}; }

inline void fence_wgmma_operands() {}
inline void wgmma_fence() {}
inline void wgmma_commit() { host_cuda::end_operation_group(); }
template <int N>
void wgmma_wait() {
  host_cuda::do_now(N);
}

// The sums of products that have not been waited for.
template <int kFragments>
struct PendingSums {
  float values[kFragments][4];
  int products = 0;
};

// Until the wait for the last product the sums are NaN, and a product reads shared memory when it is waited for.
//   a: the 16 summed elements of rows l / 4 and l / 4 + 8 of the warp, by a(row / 8, element)
//   b: element (element, column)
template <int kFragments, class A, class B>
void multiply_later(float (&c)[kFragments][4], const A& a, const B& b, bool accumulate) {
  static std::map<const void*, std::weak_ptr<PendingSums<kFragments>>> all;
  auto pending = all[&c].lock();
  if (!pending) {
    all[&c] = pending = std::make_shared<PendingSums<kFragments>>();
    std::memcpy(pending->values, c, sizeof c);
  }
  ++pending->products;
  const int first_col = static_cast<int>(host_cuda::lane() % 4 * 2);
  host_cuda::do_later([=, &c] {
    for (int j = 0; j < kFragments; ++j)
      for (int e = 0; e < 4; ++e) {
        float sum = accumulate ? pending->values[j][e] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += a(e / 2, k) * b(k, j * 8 + first_col + e % 2);
        pending->values[j][e] = sum;
      }
    if (--pending->products == 0) std::memcpy(c, pending->values, sizeof c);
  });
  for (auto& fragment : c)
    for (float& sum : fragment) sum = std::numeric_limits<float>::quiet_NaN();
}

template <class T, int kFragments>
void wgmma(float (&c)[kFragments][4], WgmmaMatrix a, WgmmaMatrix b, bool accumulate) {
  const unsigned thread = host_cuda::thread_index().x;
  const int first_row = static_cast<int>(thread / 32 % 4 * 16 + thread % 32 / 4);
  multiply_later(
      c, [=](int half, int k) { return a.template at<T>(first_row + half * 8, k); },
      [=](int k, int col) { return b.template at<T>(k, col); }, accumulate);
}

// With a in registers, as in mma_16816, which must not change until the wait. The columns of b are rows in shared
// memory.
template <class T, int kFragments>
void wgmma(float (&c)[kFragments][4], const uint32_t (&a)[4], WgmmaMatrix b, bool accumulate) {
  host_cuda::show(a, sizeof a);
  std::array<std::array<float, 16>, 2> rows;
  for (unsigned k = 0; k < 16; ++k) {
    const auto* shown = static_cast<const T*>(host_cuda::shown_by(host_cuda::lane() / 4 * 4 + k % 8 / 2));
    for (unsigned half = 0; half < 2; ++half) rows[half][k] = wide(shown[(k / 8 * 2 + half) * 2 + k % 2]);
  }
  std::array<uint32_t, 4> words;
  std::memcpy(words.data(), a, sizeof a);
  const uint32_t* registers = a;
  host_cuda::do_later([=] {
    if (std::memcmp(words.data(), registers, sizeof words) != 0) host_cuda::fail("a factor that changed too early");
  });
  multiply_later(
      c, [=](int half, int k) { return rows[half][k]; }, [=](int k, int col) { return b.template at<T>(col, k); },
      accumulate);
}

inline void hold(uint32_t (&)[4]) {}
inline void hold(float (&)[4]) {}
inline void hold(int&) {}
inline void prefetch_l2(const void*) {}

struct Operands {
  uint32_t a[4], b[2];
};

// A register holds two elements.
//   a [16, 16]: row l / 4, +8 in registers 1 and 3; elements 2 (l % 4) and the next, + 8 in 2 and 3
//   b [16, 8]: column l / 4; elements as a's, + 8 in register 1
template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto value = [](uint32_t pair, int part) {
    T both[2];
    std::memcpy(both, &pair, sizeof both);
    return wide(both[part]);
  };
  Operands own;
  std::memcpy(own.a, a, sizeof own.a);
  std::memcpy(own.b, b, sizeof own.b);
  host_cuda::show(&own, sizeof own);
  const int lane = static_cast<int>(host_cuda::lane());
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int half = k / 8, within = k % 8;
      Operands left, right;
      std::memcpy(&left, host_cuda::shown_by(row % 8 * 4 + within / 2), sizeof left);
      std::memcpy(&right, host_cuda::shown_by(col * 4 + within / 2), sizeof right);
      c[i] += value(left.a[row / 8 + half * 2], within % 2) * value(right.b[half], within % 2);
    }
  }
}

}  // namespace gistops::cuda
