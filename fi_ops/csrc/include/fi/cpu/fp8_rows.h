// Rows of 8-bit floats to the dtypes that kernels compute with: exact, whatever the processor does with
// denormals, for no operand or result here is one.
#pragma once

#include "fi/cpu/rowops.h"
#include "fi/fp8.h"

namespace fi::FI_ISA {

FI_INLINE VecU load_bytes(const uint8_t* p, int64_t n) {
  typedef uint8_t VecB __attribute__((vector_size(kLanes)));
  VecB x{};
  if (n == kLanes) {
    __builtin_memcpy(&x, p, kLanes);
  } else {
    for (int64_t i = 0; i < n; ++i) x[i] = p[i];
  }
  return __builtin_convertvector(x, VecU);
}

// The format's exponent and mantissa in a float's place are off by a power of two; its denormals, written as
// mantissas of its least normal number, are that much too large.
template <int mantissa_bits, int bias>
FI_INLINE VecU widen_magnitude(VecU magnitude) {
  constexpr uint32_t least_normal = (128u - bias) << 23;
  const VecU moved = magnitude << (23 - mantissa_bits);
  const Vec denormal = (Vec)(moved | least_normal) - bits_float(least_normal);
  return magnitude < (1u << mantissa_bits) ? (VecU)denormal : moved + ((127u - bias) << 23);
}

FI_INLINE Vec widen_e4m3(VecU x) {
  const VecU magnitude = x & 0x7fu;
  const VecU y = widen_magnitude<3, 7>(magnitude) | (x & 0x80u) << 24;
  return (Vec)(magnitude == 0x7fu ? VecU{} + 0x7fc00000u : y);
}

FI_INLINE Vec widen_e5m2(VecU x) {
  const VecU magnitude = x & 0x7fu;
  const VecU special = magnitude == 0x7cu ? VecU{} + 0x7f800000u : VecU{} + 0x7fc00000u;
  return (Vec)((magnitude >= 0x7cu ? special : widen_magnitude<2, 15>(magnitude)) | (x & 0x80u) << 24);
}

#if FI_ISA_LEVEL >= 2
// The same 32 at a time, in 16-bit lanes: `T` has 8 (bf16) or 5 (f16) bits of exponent. Denormals, 7 of them
// at most, come out of a table.
template <class T, int mantissa_bits, int bias>
FI_INLINE __m512i widen_to_half(__m256i bytes) {
  constexpr int to_mantissa = __is_same(T, bf16) ? 7 : 10, to_bias = __is_same(T, bf16) ? 127 : 15;
  constexpr uint16_t infinity = __is_same(T, bf16) ? 0x7f80 : 0x7c00;
  constexpr uint16_t nan = infinity | 1 << (to_mantissa - 1);
  const __m512i x = _mm512_cvtepu8_epi16(bytes);
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7f));
  const __m512i sign = _mm512_slli_epi16(_mm512_andnot_si512(_mm512_set1_epi16(0x7f), x), 8);
  __m512i y = _mm512_slli_epi16(magnitude, to_mantissa - mantissa_bits);
  if constexpr (to_bias != bias) {
    // Denormal m is m * 2^(1 - bias - mantissa_bits): of the exponent of its highest bit.
    constexpr auto denormal = [](int m) -> short {
      const int top = m >= 4 ? 2 : m >= 2 ? 1 : 0;
      const int exponent = to_bias + 1 - bias - mantissa_bits + top;
      return m == 0 ? 0
                    : short(exponent << to_mantissa | (m << (to_mantissa - top) & ((1 << to_mantissa) - 1)));
    };
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_setr_epi16(denormal(0), denormal(1), denormal(2), denormal(3), denormal(4),
                                              denormal(5), denormal(6), denormal(7)));
    const __mmask32 small =
        _mm512_testn_epi16_mask(magnitude, _mm512_set1_epi16(0x7f >> mantissa_bits << mantissa_bits));
    y = _mm512_add_epi16(y, _mm512_set1_epi16((to_bias - bias) << to_mantissa));
    y = _mm512_mask_permutexvar_epi16(y, small, magnitude, table);
  }
  if constexpr (mantissa_bits == 3) {
    y = _mm512_mask_mov_epi16(y, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)),
                              _mm512_set1_epi16(nan));
  } else if constexpr (to_bias != bias) {
    const __mmask32 special = _mm512_cmpge_epu16_mask(magnitude, _mm512_set1_epi16(0x7c));
    y = _mm512_mask_mov_epi16(y, special, _mm512_set1_epi16(infinity));
    y = _mm512_mask_mov_epi16(y, _mm512_cmpgt_epu16_mask(magnitude, _mm512_set1_epi16(0x7c)),
                              _mm512_set1_epi16(nan));
  }
  return _mm512_or_si512(y, sign);
}

template <class T, int mantissa_bits, int bias>
FI_INLINE void convert_halves(T* dst, const uint8_t* src, int64_t n) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    _mm512_storeu_si512(dst + i, widen_to_half<T, mantissa_bits, bias>(bytes));
  }
  if (i < n) {
    const __mmask32 mask = (__mmask32(1) << (n - i)) - 1;
    const __m256i bytes = _mm256_maskz_loadu_epi8(mask, src + i);
    _mm512_mask_storeu_epi16(dst + i, mask, widen_to_half<T, mantissa_bits, bias>(bytes));
  }
}
#endif

#if FI_ISA_LEVEL >= 3
// All 128 magnitudes in a dtype of 16 bits, as tables of bytes, which processors with AVX512-VBMI look up 64
// at a time: five instructions for 64 numbers, where arithmetic takes eleven for 32.
template <class T, int mantissa_bits, int bias>
struct WideBytes {
  alignas(64) uint8_t low[128] = {}, high[128] = {};

  constexpr WideBytes() {
    constexpr int to_mantissa = __is_same(T, bf16) ? 7 : 10, to_bias = __is_same(T, bf16) ? 127 : 15;
    constexpr int infinity = __is_same(T, bf16) ? 0x7f80 : 0x7c00, nan = infinity | 1 << (to_mantissa - 1);
    for (int x = 0; x < 128; ++x) {
      const int exponent = x >> mantissa_bits, mantissa = x & ((1 << mantissa_bits) - 1);
      int bits = ((exponent + to_bias - bias) << to_mantissa) + (mantissa << (to_mantissa - mantissa_bits));
      if (exponent == 0 && to_bias == bias) {
        bits = mantissa << (to_mantissa - mantissa_bits);
      } else if (exponent == 0) {  // normal in T: of the exponent of its highest bit
        const int top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;
        const int fraction = (mantissa << (to_mantissa - top)) & ((1 << to_mantissa) - 1);
        bits = mantissa == 0 ? 0 : ((to_bias + 1 - bias - mantissa_bits + top) << to_mantissa) | fraction;
      } else if (mantissa_bits == 3 ? x == 0x7f : exponent == 31) {
        bits = mantissa_bits == 2 && mantissa == 0 ? infinity : nan;
      }
      low[x] = uint8_t(bits), high[x] = uint8_t(bits >> 8);
    }
  }
};

template <class T, int mantissa_bits, int bias>
inline constexpr WideBytes<T, mantissa_bits, bias> kWideBytes;

FI_INLINE bool has_byte_tables() {
  static const bool has = __builtin_cpu_supports("avx512vbmi");
  return has;
}

// `rows` rows of n numbers: src(j) to dst + j * n.
template <class Tables, class T, class Src>
[[gnu::target("avx512vbmi"), gnu::noinline]] void look_up_rows(const Tables& tables, T* dst, const Src& src,
                                                               int64_t rows, int64_t n) {
  const __m512i low0 = _mm512_load_si512(tables.low), low1 = _mm512_load_si512(tables.low + 64);
  const __m512i high0 = _mm512_load_si512(tables.high), high1 = _mm512_load_si512(tables.high + 64);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // what unpacking puts in place
  const __m512i sign = _mm512_set1_epi8(-128);
  auto look_up = [&](__m512i x, __m512i& first, __m512i& second) __attribute__((target("avx512vbmi"))) {
    x = _mm512_permutexvar_epi64(order, x);
    const __m512i low = _mm512_permutex2var_epi8(low0, x, low1);
    __m512i high = _mm512_permutex2var_epi8(high0, x, high1);
    high = _mm512_ternarylogic_epi64(high, x, sign, 0xF8);  // high | (x & sign)
    first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
  };
  for (int64_t j = 0; j < rows; ++j, dst += n) {
    const uint8_t* row = src(j);
    __m512i first, second;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      look_up(_mm512_loadu_si512(row + i), first, second);
      _mm512_storeu_si512(dst + i, first);
      _mm512_storeu_si512(dst + i + 32, second);
    }
    if (i == n) continue;
    const __mmask64 mask = (__mmask64(1) << (n - i)) - 1;
    look_up(_mm512_maskz_loadu_epi8(mask, row + i), first, second);
    _mm512_mask_storeu_epi16(dst + i, __mmask32(mask), first);
    _mm512_mask_storeu_epi16(dst + i + 32, __mmask32(mask >> 32), second);
  }
}
#endif

template <class T>
FI_INLINE void convert_row_by_arithmetic(T* dst, const uint8_t* src, int64_t n, Fp8 format) {
#if FI_ISA_LEVEL >= 2
  if constexpr (!__is_same(T, float)) {
    return format == Fp8::e4m3 ? convert_halves<T, 3, 7>(dst, src, n) : convert_halves<T, 2, 15>(dst, src, n);
  }
#endif
  auto convert = [&](const auto& widen) {
    for_each_vec(
        n, [&](int64_t i, int64_t count) { store_n(dst + i, widen(load_bytes(src + i, count)), count); });
  };
  if (format == Fp8::e4m3) {
    convert([](VecU x) { return widen_e4m3(x); });
  } else {
    convert([](VecU x) { return widen_e5m2(x); });
  }
}

// Rows of n numbers, src(j) to dst + j * n.
template <class T, class Src>
FI_INLINE void convert_rows(T* dst, const Src& src, int64_t rows, int64_t n, Fp8 format) {
#if FI_ISA_LEVEL >= 3
  if constexpr (!__is_same(T, float)) {
    if (has_byte_tables()) {
      return format == Fp8::e4m3 ? look_up_rows(kWideBytes<T, 3, 7>, dst, src, rows, n)
                                 : look_up_rows(kWideBytes<T, 2, 15>, dst, src, rows, n);
    }
  }
#endif
  for (int64_t j = 0; j < rows; ++j) convert_row_by_arithmetic(dst + j * n, src(j), n, format);
}

template <class T>
FI_INLINE void convert_row(T* dst, const uint8_t* src, int64_t n, Fp8 format) {
  convert_rows(dst, [src](int64_t) { return src; }, 1, n, format);
}

}  // namespace fi::FI_ISA
