// The 16-bit storage types and their conversions, one value at a time.
//
// On the GPU they are single instructions. Conversions round to nearest even and keep NaN a NaN. All helpers
// here are `static`: this header is included by files compiled for different ISA levels, and a weak inline
// function compiled with AVX-512 must not be the one that the linker keeps for the baseline.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#  define FI_HD __host__ __device__ __forceinline__
#  define FI_INLINE static __forceinline__ __host__ __device__
#else
#  define FI_HD [[gnu::always_inline]]
#  define FI_INLINE [[gnu::always_inline]] static inline
#endif

namespace fi {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

enum class DType : int32_t { f32, bf16, f16, boolean, u8, i32, i64 };

FI_INLINE constexpr int64_t size_of(DType t) {
  return t == DType::i64                       ? 8
         : t == DType::f32 || t == DType::i32  ? 4
         : t == DType::bf16 || t == DType::f16 ? 2
                                               : 1;
}

FI_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  return u;
}

FI_INLINE float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof(x));
  return x;
}

FI_INLINE float to_float(float x) { return x; }

FI_INLINE float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }

// Halves are rebuilt with one float multiply (normal numbers) or one subtraction (denormals), so that no
// branch depends on the value.
FI_INLINE float to_float(f16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t w = uint32_t(x.bits) << 16;
  const uint32_t two_w = w + w;
  const float normal = bits_float((two_w >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float denormal = bits_float((two_w >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = two_w < (1u << 27) ? float_bits(denormal) : float_bits(normal);
  return bits_float((w & 0x80000000u) | magnitude);
#endif
}

FI_INLINE bf16 to_bf16(float x) {
#ifdef __CUDA_ARCH__
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40u)};
  return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}

// The float adder does the rounding: adding a power of two whose last bit is the half's last bit.
FI_INLINE f16 to_f16(float x) {
#ifdef __CUDA_ARCH__
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t w = float_bits(x);
  const uint32_t shl1 = w + w;
  const float magnitude = (bits_float(w & 0x7fffffffu) * 0x1.0p+112f) * 0x1.0p-110f;
  uint32_t bias = shl1 & 0xff000000u;
  if (bias < 0x71000000u) bias = 0x71000000u;
  const uint32_t bits = float_bits(bits_float((bias >> 1) + 0x07800000u) + magnitude);
  const uint32_t nonsign = ((bits >> 13) & 0x7c00u) + (bits & 0x0fffu);
  return f16{uint16_t(((w >> 16) & 0x8000u) | (shl1 > 0xff000000u ? 0x7e00u : nonsign))};
#endif
}

template <class T>
FI_INLINE T from_float(float x) {
  if constexpr (__is_same(T, bf16)) {
    return to_bf16(x);
  } else if constexpr (__is_same(T, f16)) {
    return to_f16(x);
  } else {
    return x;
  }
}

}  // namespace fi
