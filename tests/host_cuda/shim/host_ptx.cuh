// The functions of csrc/cuda/ptx.cuh for the host: each instruction in C++, with the same layouts of fragments (PTX
// ISA).
#pragma once
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

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { load_matrices(r, row, false); }
inline void load_matrix_x4_trans(uint32_t (&r)[4], const void* row) { load_matrices(r, row, true); }
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
