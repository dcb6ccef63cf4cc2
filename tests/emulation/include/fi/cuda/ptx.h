// The emulated twin of fi/cuda/ptx.h: the same functions in plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "fi/scalar.h"

#define FI_DEVICE_INLINE inline
#define FI_DEVICE_NOINLINE __attribute__((noinline))

namespace fi::cuda {

inline uint32_t smem_address(const void* p) { return uint32_t(reinterpret_cast<uintptr_t>(p)); }

inline void require_aligned(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    emulation::fail(std::string(what) + ": an address is not aligned");
}

// ---- asynchronous copies: the destination is poisoned at once, the data arrive when they are waited for
// ----

inline void cp_async(void* smem, const void* source, bool valid, size_t bytes, const char* what) {
  require_aligned(smem, bytes, what);
  if (valid) require_aligned(source, bytes, what);
  std::memset(smem, 0xff, bytes);
  emulation::current().issued.push_back({smem, valid ? source : nullptr, int(bytes)});
}
inline void cp_async_16(void* smem, const void* source, bool valid = true) {
  cp_async(smem, source, valid, 16, "cp_async_16");
}
template <int kBytes>
void cp_async_small(void* smem, const void* source, bool valid = true) {
  cp_async(smem, source, valid, kBytes, "cp_async_small");
}
inline uint64_t l2_evict_first() { return 0; }
inline uint64_t l2_evict_normal() { return 0; }
inline void cp_async_16(void* smem, const void* source, bool valid, uint64_t) { cp_async_16(smem, source, valid); }
inline void cp_async_commit() {
  auto& thread = emulation::current();
  thread.committed.push_back(std::move(thread.issued));
  thread.issued.clear();
}
inline void deliver(const emulation::Copy& copy) {
  if (copy.source) {
    std::memcpy(copy.smem, copy.source, copy.bytes);
  } else {
    std::memset(copy.smem, 0, copy.bytes);
  }
}
template <int Pending>
void cp_async_wait() {
  if (emulation::current().copies_under_way > 0) emulation::fail("cp_async_wait: after barrier_arrive_after_copies");
  auto& groups = emulation::current().committed;
  while (groups.size() > size_t(Pending)) {
    for (const auto& copy : groups.front()) deliver(copy);
    groups.erase(groups.begin());
  }
}

// ---- global loads and stores ----

inline uint4 load_streaming_16(const void* p) {
  require_aligned(p, 16, "load_streaming_16");
  return *static_cast<const uint4*>(p);
}
inline uint4 load_16(const void* p) {
  require_aligned(p, 16, "load_16");
  return *static_cast<const uint4*>(p);
}
inline void store_16(void* p, uint4 v) {
  require_aligned(p, 16, "store_16");
  *static_cast<uint4*>(p) = v;
}

inline void prefetch_line_l2(const void* p) { (void)*static_cast<const volatile unsigned char*>(p); }
inline void prefetch_l2(const void* p, uint32_t bytes) {
  require_aligned(p, 16, "prefetch_l2");
  if (bytes % 16 != 0) emulation::fail("prefetch_l2: not a multiple of 16 bytes");
  for (uint32_t i = 0; i < bytes; i += 16) (void)*(static_cast<const volatile unsigned char*>(p) + i);
}

// ---- barriers ----

inline void named_barrier_sync(int id, int threads) {
  emulation::meet_block(id, threads, "named_barrier_sync");
}

// ---- matrix fragments ----

template <bool Transposed>
void ldmatrix(uint32_t (&r)[4], const void* row, const char* what) {
  require_aligned(row, 16, what);
  const auto* slots = emulation::meet_warp(0xffffffffu, what, &row, sizeof(row));
  const int lane = emulation::current().lane;
  auto element = [&](int matrix, int i, int j) {
    const unsigned char* address;
    std::memcpy(&address, slots[8 * matrix + i], sizeof(address));
    uint16_t x;
    std::memcpy(&x, address + 2 * j, 2);
    return uint32_t(x);
  };
  for (int m = 0; m < 4; ++m) {
    const int a = lane / 4, b = 2 * (lane % 4);
    r[m] = Transposed ? element(m, b, a) | element(m, b + 1, a) << 16
                      : element(m, a, b) | element(m, a, b + 1) << 16;
  }
  __syncwarp();  // no lane overwrites the memory that another still reads: the instruction is one step for a
                 // warp
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix<false>(r, row, "ldmatrix_x4"); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  ldmatrix<true>(r, row, "ldmatrix_x4_trans");
}

template <class T>
float half_of(uint32_t pair, int which) {
  return to_float(T{uint16_t(which ? pair >> 16 : pair)});
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto* slots = emulation::meet_warp(0xffffffffu, "mma_m16n8k16", mine, sizeof(mine));
  const int lane = emulation::current().lane, g = lane / 4, t = lane % 4;
  auto word = [&](int l, int i) {
    uint32_t x;
    std::memcpy(&x, slots[l] + 4 * i, 4);
    return x;
  };
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * t + i % 2;  // row g or g + 8
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const float x = half_of<T>(word(4 * g + k % 8 / 2, upper + 2 * (k / 8)), k % 2);
      const float y = half_of<T>(word(4 * column + k % 8 / 2, 4 + k / 8), k % 2);
      sum += x * y;
    }
    d[i] += sum;
  }
}

// ---- arithmetic ----

template <class T>
uint32_t pack2(float lo, float hi) {
  return uint32_t(from_float<T>(lo).bits) | uint32_t(from_float<T>(hi).bits) << 16;
}
template <class T>
float2 unpack2(uint32_t v) {
  return {half_of<T>(v, 0), half_of<T>(v, 1)};
}
template <class T>
uint32_t multiply2(uint32_t a, uint32_t b) {
  return pack2<T>(half_of<T>(a, 0) * half_of<T>(b, 0), half_of<T>(a, 1) * half_of<T>(b, 1));
}
inline float exp2_approx(float x) { return exp2f(x); }

// ---- order between blocks: they run one after the other ----

inline int atomic_add_acq_rel(int* p, int value) { return atomicAdd(p, value); }

// ---- order between kernels: they run one after the other ----

inline void allow_next_kernel() {}
inline void wait_for_previous_kernel() {}

}  // namespace fi::cuda
