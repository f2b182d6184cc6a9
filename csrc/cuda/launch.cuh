// Launches of kernels, and the memory that a sequence of them needs.
#pragma once
#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

#include "device.cuh"
#include "op_table.h"

namespace gistops::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("gistops: ") + what + ": " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared, void* stream,
            Arguments... arguments) {
  constexpr int kWithoutAsking = 48 << 10;
  if (shared > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  GISTOPS_LAUNCH(kernel, grid, dim3(threads), shared, static_cast<cudaStream_t>(stream), arguments...);
  check(cudaGetLastError(), name);
}

inline dim3 blocks(int64_t n, int64_t parts = 1) {
  return dim3(static_cast<unsigned>(n), static_cast<unsigned>(parts));
}

// Sizes of what is made at a time; only tests change them.
struct Limits {
  // Scores, or sums of gradients, that stay in the cache of a large GPU from one kernel to the next.
  int64_t cached = int64_t{1} << 22;
  // Scores that the backward of a loss makes again at a time, where they were not kept.
  int64_t remade = int64_t{1} << 25;
};
inline Limits limits;

// Several pieces of scratch memory at once: an allocation costs the host more than a launch.
class Scratch {
 public:
  explicit Scratch(Workspace& workspace) : workspace_(workspace) {}

  template <class U>
  Scratch& add(U*& pointer, int64_t n) {
    pieces_[count_++] = {n * static_cast<int64_t>(sizeof(U)), nullptr};
    set_[count_ - 1] = [](void* to, void* value) { *static_cast<U**>(to) = static_cast<U*>(value); };
    to_[count_ - 1] = &pointer;
    return *this;
  }

  void take() {
    workspace_.scratch(pieces_.data(), count_);
    for (int i = 0; i < count_; ++i) set_[i](to_[i], pieces_[i].data);
  }

 private:
  static constexpr int kMost = 16;
  Workspace& workspace_;
  int count_ = 0;
  std::array<Piece, kMost> pieces_;
  std::array<void (*)(void*, void*), kMost> set_;
  std::array<void*, kMost> to_;
};

}  // namespace gistops::cuda
