// The emulator's stand-in for CUDA C++: keywords, builtin variables and device functions. See ../README.md.
#pragma once

#include <math.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <type_traits>

#include "emulation/block.h"
#include "emulation/types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other
#define __constant__
#define __grid_constant__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __builtin_assume(x) ((void)0)

#define threadIdx (::fi::emulation::current().thread_idx)
#define blockIdx (::fi::emulation::block_idx())
#define blockDim (::fi::emulation::block_dim())
#define gridDim (::fi::emulation::grid_dim())
#define warpSize 32

// ---- barriers, votes, shuffles ----

inline void __syncthreads() { ::fi::emulation::meet_block(0, 0, "__syncthreads"); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  const char nothing = 0;
  ::fi::emulation::meet_warp(mask, "__syncwarp", &nothing, 1);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned mine = predicate ? 1u << ::fi::emulation::current().lane : 0u;
  return ::fi::emulation::fold_lanes(mask, "__ballot_sync", mine, 0u,
                                     [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline unsigned __activemask() { return 0xffffffffu; }

inline int __syncthreads_count(int predicate) {
  return ::fi::emulation::block_count("__syncthreads_count", predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return ::fi::emulation::block_count("__syncthreads_or", predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate) {
  return ::fi::emulation::block_count("__syncthreads_and", predicate == 0) == 0;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = ::fi::emulation::current().lane;
  return ::fi::emulation::from_lane(mask, "__shfl_sync", value,
                                    (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
  const int lane = ::fi::emulation::current().lane, source = lane ^ other;
  return ::fi::emulation::from_lane(mask, "__shfl_xor_sync", value,
                                    source < (lane & ~(width - 1)) + width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = ::fi::emulation::current().lane, source = lane + int(delta);
  return ::fi::emulation::from_lane(mask, "__shfl_down_sync", value,
                                    source < (lane & ~(width - 1)) + width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = ::fi::emulation::current().lane, source = lane - int(delta);
  return ::fi::emulation::from_lane(mask, "__shfl_up_sync", value,
                                    source >= (lane & ~(width - 1)) ? source : lane);
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return ::fi::emulation::fold_lanes(mask, "__reduce_add_sync", value, T(0),
                                     [](T a, T b) { return T(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return ::fi::emulation::fold_lanes(mask, "__reduce_max_sync", value, value,
                                     [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return ::fi::emulation::fold_lanes(mask, "__reduce_min_sync", value, value,
                                     [](T a, T b) { return a < b ? a : b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return ::fi::emulation::fold_lanes(mask, "__reduce_or_sync", value, 0u,
                                     [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return ::fi::emulation::fold_lanes(mask, "__reduce_and_sync", value, ~0u,
                                     [](unsigned a, unsigned b) { return a & b; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const auto* slots = ::fi::emulation::meet_warp(mask, "__match_any_sync", &value, sizeof(T));
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1) && std::memcmp(slots[lane], &value, sizeof(T)) == 0) same |= 1u << lane;
  return same;
}

// ---- memory ----

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { ::fi::emulation::yield(); }
[[noreturn]] inline void __trap() { ::fi::emulation::fail("__trap()"); }

// One CPU thread runs all of them, so a plain read and write is atomic.
template <class T, class U>
T atomicAdd(T* p, U value) {
  const T old = *p;
  *p = T(old + value);
  return old;
}
template <class T, class U>
T atomicSub(T* p, U value) {
  return atomicAdd(p, T(0) - T(value));
}
template <class T, class U>
T atomicMax(T* p, U value) {
  const T old = *p;
  if (T(value) > old) *p = T(value);
  return old;
}
template <class T, class U>
T atomicMin(T* p, U value) {
  const T old = *p;
  if (T(value) < old) *p = T(value);
  return old;
}
template <class T, class U>
T atomicOr(T* p, U value) {
  const T old = *p;
  *p = T(old | value);
  return old;
}
template <class T, class U>
T atomicAnd(T* p, U value) {
  const T old = *p;
  *p = T(old & value);
  return old;
}
template <class T, class U>
T atomicExch(T* p, U value) {
  const T old = *p;
  *p = T(value);
  return old;
}
template <class T>
T atomicCAS(T* p, T compare, T value) {
  const T old = *p;
  if (old == compare) *p = value;
  return old;
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  const unsigned old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, const T& value) {
  *p = value;
}
template <class T>
void __stcg(T* p, const T& value) {
  *p = value;
}

// ---- arithmetic ----

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fadd_rz(float a, float b) {
  const double sum = double(a) + double(b);
  const float rounded = float(sum);
  return fabs(double(rounded)) > fabs(sum) ? nextafterf(rounded, 0.0f) : rounded;
}
inline float __fmaf_rz(float a, float b, float c) {
  const double sum = fma(double(a), double(b), double(c));
  const float rounded = float(sum);
  return fabs(double(rounded)) > fabs(sum) ? nextafterf(rounded, 0.0f) : rounded;
}
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return int(lrintf(x)); }
inline int __float2int_rz(float x) { return int(x); }
inline long long __float2ll_rn(float x) { return llrintf(x); }
inline unsigned long long __float2ull_rn(float x) { return (unsigned long long)(rintf(x)); }
inline long long __double2ll_rn(double x) { return llrint(x); }
inline unsigned long long __double2ull_rn(double x) { return (unsigned long long)(rint(x)); }
inline float __double2float_rn(double x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero((unsigned long long)(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline int __ffsll(long long x) { return x ? std::countr_zero((unsigned long long)(x)) + 1 : 0; }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = (unsigned long long)(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= unsigned(both >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)(a)*b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)(a)*b >> 64);
}

template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) > T(b) ? T(a) : T(b);
}
