// All inline PTX, one function per instruction. tests/host_cuda/shim defines the same functions for the host.
// Layouts of fragments: PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix".
#pragma once
#include "device.cuh"

#ifndef __CUDACC__
#include <host_ptx.cuh>
#else

namespace gistops::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Start an asynchronous copy of 16 bytes from global to shared memory; if not valid, write zeros instead. Both
// addresses are multiples of 16.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Close a group of copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until all of this thread's groups except the N latest are complete.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A barrier of some of the block's warps, which have `threads` threads in all. __syncthreads is barrier 0. `arrive`
// does not wait for the others.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Load four 8x8 matrices of 16-bit elements from shared memory. Lane l passes the address of row l % 8 of matrix l / 8,
// and receives elements 2 (l % 4) and the next of row l / 4; with _trans, of column l / 4.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The reverse of load_matrix_x4_trans. Needs a Hopper GPU or a newer one.
__device__ __forceinline__ void store_matrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Return two numbers, rounded, in one word.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (__is_same(T, bf16)) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

// c [16, 8] += a [16, 16] b [16, 8], accumulated in float.
template <class T>
__device__ __forceinline__ void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (__is_same(T, bf16)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// True if the code being compiled may have wgmma.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// End the kernel with an error.
__device__ __forceinline__ void trap() { asm volatile("trap;"); }

// A matrix of 16-bit elements in shared memory, as wgmma reads it: bytes at or after a start, in rows of 128 bytes
// whose vectors of 16 bytes are exchanged (address bits 4 to 6 are xored with bits 7 to 9). PTX ISA, "Matrix
// descriptor".
struct WgmmaMatrix {
  uint64_t bits;
};

// leading, stride: bytes between one 64 columns and the next, and between eight rows and the next; multiples of 1024
__device__ __forceinline__ WgmmaMatrix wgmma_matrix(const void* start, int leading, int stride) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return {static_cast<uint64_t>(shared_address(start) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
          static_cast<uint64_t>(stride >> 4) << 32 | kSwizzle128};
}
__device__ __forceinline__ WgmmaMatrix advance(WgmmaMatrix x, int bytes) { return {x.bits + (bytes >> 4)}; }

// Let wgmma see what this thread has written to shared memory. A barrier must follow.
__device__ __forceinline__ void fence_wgmma_operands() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Order the following products after earlier uses of their accumulators.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Close a group of products.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until all of this warpgroup's groups of products except the N latest are complete.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define GISTOPS_FRAGMENT(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define GISTOPS_FRAGMENTS_4(j) \
  GISTOPS_FRAGMENT(j), GISTOPS_FRAGMENT(j + 1), GISTOPS_FRAGMENT(j + 2), GISTOPS_FRAGMENT(j + 3)
#define GISTOPS_WGMMA(columns, type, registers, a_bits, b_bits, add, ...)                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
               "k16.f32." type "." type " {" registers "}, " a_bits ", " b_bits ", p, 1, 1, 0, 1;\n}"    \
               : __VA_ARGS__                                                                             \
               : "l"(a.bits), "l"(b.bits), "r"(static_cast<int>(accumulate)))
#define GISTOPS_REGISTERS_32                                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define GISTOPS_REGISTERS_64                                                                     \
  GISTOPS_REGISTERS_32                                                                           \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Start c [64, 8 kFragments] = a [64, 16] b [16, 8 kFragments], plus c if accumulate, by four warps. Each warp has 16
// rows of c, which lie as in mma.m16n8. a is row-major in blocks of 64 summed elements; b is row-major in blocks of 64
// columns.
template <class T, int kFragments>
__device__ __forceinline__ void wgmma(float (&c)[kFragments][4], WgmmaMatrix a, WgmmaMatrix b, bool accumulate) {
  static_assert(kFragments == 8 || kFragments == 16);
  if constexpr (kFragments == 8) {
    if constexpr (__is_same(T, bf16)) {
      GISTOPS_WGMMA("64", "bf16", GISTOPS_REGISTERS_32, "%32", "%33", "%34", GISTOPS_FRAGMENTS_4(0),
                    GISTOPS_FRAGMENTS_4(4));
    } else {
      GISTOPS_WGMMA("64", "f16", GISTOPS_REGISTERS_32, "%32", "%33", "%34", GISTOPS_FRAGMENTS_4(0),
                    GISTOPS_FRAGMENTS_4(4));
    }
  } else {
    if constexpr (__is_same(T, bf16)) {
      GISTOPS_WGMMA("128", "bf16", GISTOPS_REGISTERS_64, "%64", "%65", "%66", GISTOPS_FRAGMENTS_4(0),
                    GISTOPS_FRAGMENTS_4(4), GISTOPS_FRAGMENTS_4(8), GISTOPS_FRAGMENTS_4(12));
    } else {
      GISTOPS_WGMMA("128", "f16", GISTOPS_REGISTERS_64, "%64", "%65", "%66", GISTOPS_FRAGMENTS_4(0),
                    GISTOPS_FRAGMENTS_4(4), GISTOPS_FRAGMENTS_4(8), GISTOPS_FRAGMENTS_4(12));
    }
  }
}

// The same with a in registers, as fragments of mma_16816, and with b' row-major in blocks of 64 summed elements. The
// registers of a must keep their values until the product has been waited for: see hold().
#define GISTOPS_WGMMA_RS(columns, type, registers, a_registers, b_bits, add, ...)                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns \
               "k16.f32." type "." type " {" registers "},{" a_registers "}, " b_bits ", p, 1, 1, 0;\n}" \
               : __VA_ARGS__                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(static_cast<int>(accumulate)))
#define GISTOPS_FRAGMENTS_16 \
  GISTOPS_FRAGMENTS_4(0), GISTOPS_FRAGMENTS_4(4), GISTOPS_FRAGMENTS_4(8), GISTOPS_FRAGMENTS_4(12)
template <class T, int kFragments>
__device__ __forceinline__ void wgmma(float (&c)[kFragments][4], const uint32_t (&a)[4], WgmmaMatrix b,
                                      bool accumulate) {
  static_assert(kFragments == 16 || kFragments == 17);
  if constexpr (kFragments == 16) {
    if constexpr (__is_same(T, bf16)) {
      GISTOPS_WGMMA_RS("128", "bf16", GISTOPS_REGISTERS_64, "%64, %65, %66, %67", "%68", "%69", GISTOPS_FRAGMENTS_16);
    } else {
      GISTOPS_WGMMA_RS("128", "f16", GISTOPS_REGISTERS_64, "%64, %65, %66, %67", "%68", "%69", GISTOPS_FRAGMENTS_16);
    }
  } else {
    if constexpr (__is_same(T, bf16)) {
      GISTOPS_WGMMA_RS("136", "bf16", GISTOPS_REGISTERS_64 ", %64, %65, %66, %67", "%68, %69, %70, %71", "%72", "%73",
                       GISTOPS_FRAGMENTS_16, GISTOPS_FRAGMENT(16));
    } else {
      GISTOPS_WGMMA_RS("136", "f16", GISTOPS_REGISTERS_64 ", %64, %65, %66, %67", "%68, %69, %70, %71", "%72", "%73",
                       GISTOPS_FRAGMENTS_16, GISTOPS_FRAGMENT(16));
    }
  }
}
#undef GISTOPS_FRAGMENT
#undef GISTOPS_FRAGMENTS_4
#undef GISTOPS_FRAGMENTS_16
#undef GISTOPS_WGMMA
#undef GISTOPS_WGMMA_RS
#undef GISTOPS_REGISTERS_32
#undef GISTOPS_REGISTERS_64

// Use registers where this stands: they hold their values until here, and are read from here on alone. Without it the
// compiler, which does not know when a product ends, could reuse its operands or read its sums too early.
__device__ __forceinline__ void hold(uint32_t (&x)[4]) {
  asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])::"memory");
}
__device__ __forceinline__ void hold(float (&x)[4]) {
  asm volatile("" : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])::"memory");
}
__device__ __forceinline__ void hold(int& x) { asm volatile("" : "+r"(x)::"memory"); }

// Bring the 128 bytes around an address to the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
}

// Return the larger of two numbers, or NaN if one is NaN.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(x), "f"(y));
  return most;
}

// Return 2^x to about two units in the last place; results below the normal numbers are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace gistops::cuda

#endif
