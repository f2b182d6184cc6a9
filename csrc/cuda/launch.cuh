// Kernel launches, and the scratch memory between them.
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

// Return the bytes of shared memory that a block of the current device may have.
inline int shared_memory_limit(const char* name) {
  int device, bytes;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  return bytes;
}

inline int multiprocessors(const char* name) {
  int device, count;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), name);
  return count;
}

// Return true if the current device is a Hopper GPU and the library has the code for its wgmma instructions: the build
// defines GISTOPS_SM90A if it compiles for sm_90a.
inline bool has_wgmma([[maybe_unused]] const char* name) {
#ifdef GISTOPS_SM90A
  int device, major, minor;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), name);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), name);
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

// Request dynamic shared memory for a kernel if it has less: by default 48 KiB less its static memory. The request is
// for all that there is, so that no thread lowers what another one requested.
template <class... Parameters>
void request_shared_memory(const char* name, void (*kernel)(Parameters...), int shared) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  if (attributes.maxDynamicSharedSizeBytes >= shared) return;
  const int most = shared_memory_limit(name) - static_cast<int>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, std::max(most, shared)), name);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared, void* stream,
            Arguments... arguments) {
  if (shared > 0) request_shared_memory(name, kernel, shared);
  GISTOPS_LAUNCH(kernel, grid, dim3(threads), shared, static_cast<cudaStream_t>(stream), arguments...);
  check(cudaGetLastError(), name);
}

// Return a grid of x by y blocks.
inline dim3 blocks(int64_t x, int64_t y = 1) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); }

// Set `bytes` bytes at x to zero; x may be null.
inline void set_zero(void* x, int64_t bytes, void* stream) {
  if (x && bytes) check(cudaMemsetAsync(x, 0, bytes, static_cast<cudaStream_t>(stream)), "backward");
}

// Sizes of the chunks in which large problems are computed, in elements. Only tests change them.
struct Limits {
  // Scores, or sums of gradients, that stay in the cache of a large GPU from one kernel to the next.
  int64_t cached = int64_t{1} << 22;
  // Scores of a chunk of logits. They do not stay in the cache, but fewer launches save more time.
  int64_t logits = int64_t{1} << 24;
  // Scores that the backward of a loss recomputes at a time, if the forward did not keep them.
  int64_t recomputed = int64_t{1} << 25;
};
inline Limits limits;

// Collects scratch buffers and allocates all of them at once: an allocation costs the host more than a launch.
class Scratch {
 public:
  explicit Scratch(Workspace& workspace) : workspace_(workspace) {}

  // Request n elements; allocate() sets the pointer.
  template <class U>
  Scratch& add(U*& pointer, int64_t n) {
    buffers_[count_] = {n * static_cast<int64_t>(sizeof(U)), nullptr};
    assign_[count_] = [](void* to, void* value) { *static_cast<U**>(to) = static_cast<U*>(value); };
    to_[count_++] = &pointer;
    return *this;
  }

  void allocate() {
    workspace_.allocate(buffers_.data(), count_);
    for (int i = 0; i < count_; ++i) assign_[i](to_[i], buffers_[i].data);
  }

 private:
  static constexpr int kMost = 16;
  Workspace& workspace_;
  int count_ = 0;
  std::array<Buffer, kMost> buffers_;
  std::array<void (*)(void*, void*), kMost> assign_;
  std::array<void*, kMost> to_;
};

}  // namespace gistops::cuda
