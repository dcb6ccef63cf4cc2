// Thin wrappers, one an instruction, for what CUDA C++ has no builtin for (sm_80 and later).
//
// tests/emulation/include/fi/cuda/ptx.h has the same functions in plain C++; a new one here needs its twin
// there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "fi/scalar.h"

#define FI_DEVICE_INLINE __device__ __forceinline__
#define FI_DEVICE_NOINLINE __device__ __noinline__  // rare paths

namespace fi::cuda {

FI_DEVICE_INLINE uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- asynchronous copies, global to shared ----

// 16 bytes, bypassing L1; zeros arrive where `valid` is false (then `src` is not read, but must be a mapped
// address).
FI_DEVICE_INLINE void cp_async_16(void* smem, const void* src, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(smem_address(smem)), "l"(src),
               "r"(valid ? 16 : 0)
               : "memory");
}
// 4 or 8 bytes, through L1; zeros likewise.
template <int kBytes>
FI_DEVICE_INLINE void cp_async_small(void* smem, const void* src, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(smem_address(smem)), "l"(src),
               "n"(kBytes), "r"(valid ? kBytes : 0)
               : "memory");
}
// The same with a policy for L2: what it drops first, or as usual.
FI_DEVICE_INLINE uint64_t l2_evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}
FI_DEVICE_INLINE uint64_t l2_evict_normal() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}
FI_DEVICE_INLINE void cp_async_16(void* smem, const void* src, bool valid, uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;\n" ::"r"(smem_address(smem)),
      "l"(src), "r"(valid ? 16 : 0), "l"(policy)
      : "memory");
}
FI_DEVICE_INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `Pending` of this thread's committed groups are in flight. Other threads' copies need a
// barrier after it.
template <int Pending>
FI_DEVICE_INLINE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// ---- global loads and stores ----

// 16 bytes that this kernel reads once: no room taken in L1. Only for memory that no thread of this kernel
// writes.
FI_DEVICE_INLINE uint4 load_streaming_16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Brings `bytes` (a multiple of 16, from a 16-byte boundary) into L2, later (sm_90; nothing before). L2 is
// what all SMs see, so that this is safe even where the memory is yet to be written.
FI_DEVICE_INLINE void prefetch_l2(const void* p, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(p), "r"(bytes) : "memory");
#endif
}

// Brings the line of 128 bytes with *p into L2, later.
FI_DEVICE_INLINE void prefetch_line_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p) : "memory");
}

// ---- barriers ----

// Barrier `id` (1 to 15; 0 is __syncthreads) for `threads` threads, a multiple of 32.
FI_DEVICE_INLINE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// 16 bytes, aligned, in one instruction. (An assigned uint4 whose words come from arithmetic is often split
// into four stores.)
FI_DEVICE_INLINE uint4 load_16(const void* p) { return *static_cast<const uint4*>(p); }
FI_DEVICE_INLINE void store_16(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// ---- matrix fragments ----

// Four 8x8 matrices of 16-bit elements; lanes 8i .. 8i+7 give the row addresses (16 bytes each) of matrix i;
// lane l gets elements (l / 4, 2 * (l % 4)) and the next of each.
FI_DEVICE_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}
FI_DEVICE_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}

// d += a (16x16, row) * b (16x8, col), T = bf16 or f16, fp32 accumulators. Lane l = 4g + t holds of a: (g,
// 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..); of b: rows 2t.., 2t+8.. of column g; of d: (g, 2t..), (g+8,
// 2t..).
template <class T>
FI_DEVICE_INLINE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, bf16)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(__is_same(T, f16), "mma_m16n8k16 takes bf16 and f16");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- arithmetic ----

// Two values rounded to T, `lo` in the lower half.
template <class T>
FI_DEVICE_INLINE uint32_t pack2(float lo, float hi) {
  uint32_t r;
  if constexpr (__is_same(T, bf16)) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(r) : "f"(hi), "f"(lo));
  }
  return r;
}

template <class T>
FI_DEVICE_INLINE float2 unpack2(uint32_t v) {
  if constexpr (__is_same(T, bf16)) {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
  } else {
    float2 r;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}\n"
        : "=f"(r.x), "=f"(r.y)
        : "r"(v));
    return r;
  }
}

// The products of two pairs, each rounded to T. Denormals count.
template <class T>
FI_DEVICE_INLINE uint32_t multiply2(uint32_t a, uint32_t b) {
  uint32_t r;
  if constexpr (__is_same(T, bf16)) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
  } else {
    asm("mul.rn.f16x2 %0, %1, %2;\n" : "=r"(r) : "r"(a), "r"(b));
  }
  return r;
}

// 2^x to 2 ulp; 0 for -inf.
FI_DEVICE_INLINE float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(x));
  return r;
}

// ---- order between blocks ----

// Adds and returns what was there. What this thread wrote before, or had seen behind a barrier, is visible to
// the thread that finds this addition in *p.
FI_DEVICE_INLINE int atomic_add_acq_rel(int* p, int value) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;\n" : "=r"(old) : "l"(p), "r"(value) : "memory");
  return old;
}

// ---- order between kernels (sm_90; nothing to do before) ----

// Lets the next kernel of the stream start once all blocks have called it (programmatic dependent launch).
FI_DEVICE_INLINE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
// Waits for the kernel before this one in the stream, whose writes are visible after it.
FI_DEVICE_INLINE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace fi::cuda
