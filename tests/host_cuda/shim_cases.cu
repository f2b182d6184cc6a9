// Small kernels that test the shim: correct ones must give the right result, and planted mistakes must be detected.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "device.cuh"
#include "ptx.cuh"
#include "tile.cuh"

namespace py = pybind11;
using namespace gistops::cuda;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Element (row, col) of a fragment of A [16, 16], B [16, 8] (as B' [8, 16]) by ldmatrix, multiplied by mma.
template <class T>
__global__ void product_kernel(const T* a, const T* b, float* c, bool transposed) {
  __shared__ __align__(16) T left[16 * 16];
  __shared__ __align__(16) T right[16 * 8];
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 16 * 16; i += 32) left[transposed ? i % 16 * 16 + i / 16 : i] = a[i];
  for (int i = lane; i < 16 * 8; i += 32) right[transposed ? i : i % 8 * 16 + i / 8] = b[i];  // b [16, 8]
  __syncthreads();
  uint32_t ra[4], rb[4];  // of b the lanes beyond 16 read the same again
  if (transposed) {
    load_matrix_x4_trans(ra, left + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8);
    load_matrix_x4_trans(rb, right + lane % 16 * 8);
  } else {
    load_matrix_x4(ra, left + lane % 16 * 16 + lane / 16 * 8);
    load_matrix_x4(rb, right + lane % 8 * 16 + lane / 8 % 2 * 8);
  }
  float sums[4] = {};
  const uint32_t of_b[2] = {rb[0], rb[1]};
  mma_16816<T>(sums, ra, of_b);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

Array<float> product(const std::string& type, py::array a, py::array b, bool transposed) {
  Array<float> c({16, 8});
  if (type == "bf16") {
    GISTOPS_LAUNCH(product_kernel<bf16>, dim3(1), dim3(32), 0, nullptr, static_cast<const bf16*>(a.data()),
                   static_cast<const bf16*>(b.data()), c.mutable_data(), transposed);
  } else {
    GISTOPS_LAUNCH(product_kernel<f16>, dim3(1), dim3(32), 0, nullptr, static_cast<const f16*>(a.data()),
                   static_cast<const f16*>(b.data()), c.mutable_data(), transposed);
  }
  return c;
}

// c [64, columns] = a [64, 32] b [32, columns] by two steps of wgmma, from tiles that are filled as the kernels do.
//   wait: the groups of products that the last wait leaves
template <class T, int kColumns, int kWait>
__global__ void wgmma_kernel(const T* a, const T* b, float* c) {
  using Left = SwizzledTile<T, 64, 64>;
  using Right = SwizzledTile<T, 32, kColumns>;
  GISTOPS_ALIGNED_SHARED(1024, T, left);
  T* right = left + Left::kBytes / sizeof(T);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  for (int i = thread; i < 64 * 32; i += 128) left[Left::at(i / 32, i % 32)] = a[i];
  typename Right::template Loader<128>(GlobalMatrix<T>{b, 32, kColumns, kColumns}, 0, 0).load(right);
  copy_async_commit();
  copy_async_wait<0>();
  fence_wgmma_operands();
  __syncthreads();
  float sums[kColumns / 8][4] = {};
  const WgmmaMatrix x = wgmma_matrix(left, 16, 1024), y = wgmma_matrix(right, Right::kBlockBytes, 1024);
  for (int step = 0; step < 2; ++step) {
    wgmma_fence();
    wgmma<T>(sums, advance(x, step * 32), advance(y, step * 2048), step > 0);
    wgmma_commit();
  }
  wgmma_wait<kWait>();
  const int row = thread / 32 * 16 + lane / 4;
  for (int j = 0; j < kColumns / 8; ++j)
    for (int e = 0; e < 4; ++e) c[(row + e / 2 * 8) * kColumns + j * 8 + lane % 4 * 2 + e % 2] = sums[j][e];
}

template <class T, int kColumns>
void launch_wgmma(const py::array& a, const py::array& b, float* c, bool wait) {
  const int bytes = (64 * 64 + 32 * kColumns) * 2;
  GISTOPS_LAUNCH((wait ? wgmma_kernel<T, kColumns, 0> : wgmma_kernel<T, kColumns, 1>), dim3(1), dim3(128), bytes,
                 nullptr, static_cast<const T*>(a.data()), static_cast<const T*>(b.data()), c);
}

Array<float> wide_product(const std::string& type, py::array a, py::array b, bool wait) {
  const bool wide = b.shape(1) == 128;
  Array<float> c({64, wide ? 128 : 64});
  float* out = c.mutable_data();
  if (type == "bf16") {
    wide ? launch_wgmma<bf16, 128>(a, b, out, wait) : launch_wgmma<bf16, 64>(a, b, out, wait);
  } else {
    wide ? launch_wgmma<f16, 128>(a, b, out, wait) : launch_wgmma<f16, 64>(a, b, out, wait);
  }
  return c;
}

// Each thread writes its number and reads its neighbor's. Without the barrier some order of threads gives a wrong
// result.
__global__ void neighbor_kernel(int* out, bool barrier) {
  __shared__ int numbers[64];
  const int i = static_cast<int>(threadIdx.x);
  numbers[i] = i + 1;
  if (barrier) __syncthreads();
  out[i] = numbers[(i + 1) % 64];
  __syncthreads();
  numbers[i] = 0;
}

Array<int> neighbor(bool barrier) {
  Array<int> out(64);
  GISTOPS_LAUNCH(neighbor_kernel, dim3(1), dim3(64), 0, nullptr, out.mutable_data(), barrier);
  return out;
}

__global__ void divergent_kernel(bool by_warp) {
  if (by_warp ? threadIdx.x < 7 : threadIdx.x < 32) return;
  by_warp ? __syncwarp() : __syncthreads();
  if (by_warp && threadIdx.x < 16) __syncthreads();
}

__global__ void copy_kernel(const int* in, int* out, bool wait, bool valid) {
  GISTOPS_DYNAMIC_SHARED(int, shared);
  const int i = static_cast<int>(threadIdx.x) * 4;
  copy_async_16(shared + i, in + i, valid);
  copy_async_commit();
  copy_async_commit();
  wait ? copy_async_wait<1>() : copy_async_wait<2>();  // of two groups the first is needed
  for (int e = 0; e < 4; ++e) out[i + e] = shared[i + e];
}

Array<int> copied(Array<int> in, bool wait, bool valid) {
  Array<int> out(128);
  GISTOPS_LAUNCH(copy_kernel, dim3(1), dim3(32), 512, nullptr, in.data(), out.mutable_data(), wait, valid);
  return out;
}

__global__ void misaligned_kernel(const int* in) {
  GISTOPS_DYNAMIC_SHARED(int, shared);
  copy_async_16(shared + 1, in, true);
}

__global__ void beyond_kernel(int* out, int n) {
  GISTOPS_DYNAMIC_SHARED(int, shared);
  shared[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) *out = shared[n - 1];
}

// Launch with `bytes` of shared memory, and read element n - 1 of it.
int beyond(int bytes, int n, bool ask) {
  int out = 0;
  if (ask && cudaFuncSetAttribute(beyond_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return -2;
  GISTOPS_LAUNCH(beyond_kernel, dim3(1), dim3(32), bytes, nullptr, &out, n);
  return cudaGetLastError() == cudaSuccess ? out : -1;
}

}  // namespace

PYBIND11_MODULE(GISTOPS_MODULE, m) {
  m.def("product", &product);
  m.def("wide_product", &wide_product);
  m.def("neighbor", &neighbor);
  m.def("divergent", [](bool by_warp) { GISTOPS_LAUNCH(divergent_kernel, dim3(1), dim3(64), 0, nullptr, by_warp); });
  m.def("copied", &copied);
  m.def("misaligned", [] {
    const int in[4] = {};
    GISTOPS_LAUNCH(misaligned_kernel, dim3(1), dim3(32), 1024, nullptr, in);
  });
  m.def("beyond", &beyond);
  m.def("round_bf16", [](float x) { return wide(narrow<bf16>(x)); });
  m.def("round_f16", [](float x) { return wide(narrow<f16>(x)); });
  m.def("set_reverse",
        [](bool on) { host_cuda::set_order(on ? host_cuda::Order::reverse : host_cuda::Order::forward, 0); });
}
