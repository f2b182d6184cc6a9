// Replaces CUDA's header of this name when kernels are compiled for the host.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (host_cuda::thread_index())
#define blockIdx (host_cuda::block_index())
#define blockDim (host_cuda::block_dim())
#define gridDim (host_cuda::grid_dim())

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};

namespace host_cuda {

constexpr int kSharedWithoutAsking = 48 << 10, kSharedAtMost = 227 << 10;  // of a Hopper GPU
inline std::map<const void*, int> shared_limits;                           // what kernels have asked for
inline cudaError_t last_error = cudaSuccess;
inline int shared_at_most = kSharedAtMost;
inline int compute_capability = 90;
inline int multiprocessors = 132;
inline int launches = 0;
inline bool count_only = false;  // kernels are counted, and not run

// Launch a kernel, as <<<>>> does: an invalid configuration sets the error that cudaGetLastError returns.
template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 block, size_t shared, cudaStream_t, void (*kernel)(Parameters...), Arguments... arguments) {
  const auto asked = shared_limits.find(reinterpret_cast<const void*>(kernel));
  const size_t limit = asked == shared_limits.end() ? kSharedWithoutAsking : asked->second;
  const bool empty = grid.x == 0 || grid.y == 0 || grid.z == 0;
  if (shared > limit || empty || block.x * block.y * block.z > 1024 || grid.y > 65535 || grid.z > 65535) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  ++launches;
  if (!count_only) run({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, [&] { kernel(arguments...); });
}

// Return the value of lane `from`. All lanes of the warp call it.
template <class T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= kSlotBytes);
  show(&value, sizeof(T));
  std::memcpy(&value, shown_by(from), sizeof(T));
  return value;
}

}  // namespace host_cuda

inline cudaError_t cudaGetLastError() { return std::exchange(host_cuda::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid argument";
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (bytes > host_cuda::shared_at_most) return cudaErrorInvalidValue;
  host_cuda::shared_limits[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxDynamicSharedSizeBytes;
};
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  const auto asked = host_cuda::shared_limits.find(reinterpret_cast<const void*>(kernel));
  const bool none = asked == host_cuda::shared_limits.end();
  *attributes = {0, none ? host_cuda::kSharedWithoutAsking : asked->second};
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? host_cuda::compute_capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? host_cuda::compute_capability % 10
           : attribute == cudaDevAttrMultiProcessorCount    ? host_cuda::multiprocessors
                                                            : host_cuda::shared_at_most;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

inline void __syncthreads() { host_cuda::block_barrier(); }
inline int __syncthreads_or(int predicate) { return host_cuda::block_any(predicate); }
inline void __syncwarp(unsigned = ~0u) { host_cuda::warp_barrier(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_cuda::exchange(value, host_cuda::lane() ^ static_cast<unsigned>(mask));
}

template <class T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  const unsigned lane = host_cuda::lane(), in_group = static_cast<unsigned>(width) - 1;
  return host_cuda::exchange(value, (lane & ~in_group) | (static_cast<unsigned>(from) & in_group));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31)) >> 32);
}
// Return the bytes of y:x that the hexadecimal digits of the selector number.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  unsigned bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = selector >> 4 * i & 7;
    bytes |= ((byte < 4 ? x : y) >> byte % 4 * 8 & 255) << 8 * i;
  }
  return bytes;
}
inline int __any_sync(unsigned, int predicate) {
  int any = 0;
  host_cuda::show(&predicate, sizeof predicate);
  for (unsigned lane = 0; lane < 32; ++lane) {
    std::memcpy(&predicate, host_cuda::shown_by(lane), sizeof predicate);
    any |= predicate;
  }
  return any != 0;
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned lanes = 0;
  host_cuda::show(&predicate, sizeof predicate);
  for (unsigned lane = 0; lane < 32; ++lane) {
    std::memcpy(&predicate, host_cuda::shown_by(lane), sizeof predicate);
    lanes |= unsigned{predicate != 0} << lane;
  }
  return lanes;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline double cospi(double x) { return std::cos(x * 3.14159265358979323846); }
inline double sinpi(double x) { return std::sin(x * 3.14159265358979323846); }

inline void __threadfence() {}
inline int atomicOr(int* to, int value) {
  const int before = *to;
  *to |= value;
  return before;
}
inline int atomicAdd(int* to, int value) {  // blocks run one after another
  const int before = *to;
  *to += value;
  return before;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
