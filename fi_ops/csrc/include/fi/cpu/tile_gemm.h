// Tile GEMM: C[m, n] = or += A[m, k] B[k, n] in fp32, with B packed into panels of kLanes columns.
//
// A unit is the arithmetic behind it: fp32 FMA (any level), bf16 dot products (avx512_bf16), AMX tiles (amx).
// All read one packed layout: element (k, c) of a panel is at (k / kPair) * kLanes * kPair + c * kPair + k %
// kPair. For bf16 that is the VNNI layout of both the dot product and the tile unit.
#pragma once

#include "fi/cpu/simd.h"

namespace fi::FI_ISA {

// k is at most Unit::kMaxChain products, summed one after the other.
template <class Unit, int kRows, int kPanels>
[[gnu::always_inline]] inline void gemm_chain(const typename Unit::Element* a, int64_t lda,
                                              const typename Unit::Element* b, int64_t panel_stride, float* c,
                                              int64_t ldc, int64_t k, bool accumulate) {
  Vec acc[kRows][kPanels] = {};
  for (int64_t kk = 0; kk < k; kk += Unit::kPair) {
    typename Unit::Operand bv[kPanels];
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) bv[j] = Unit::load_b(b + j * panel_stride + kk * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename Unit::Operand av = Unit::broadcast_a(a + i * lda + kk);
#pragma GCC unroll 4
      for (int j = 0; j < kPanels; ++j) acc[i][j] = Unit::multiply_add(av, bv[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kPanels; ++j) {
      float* dst = c + i * ldc + j * kLanes;
      store(dst, accumulate ? load(dst) + acc[i][j] : acc[i][j]);
    }
  }
}

// Long sums are made of short ones: one chain of 576 products loses the last bits of fp32.
template <class Unit, int kRows, int kPanels>
[[gnu::always_inline]] inline void gemm_block(const typename Unit::Element* a, int64_t lda,
                                              const typename Unit::Element* b, int64_t panel_stride, float* c,
                                              int64_t ldc, int64_t k, bool accumulate) {
  int64_t kk = 0;
  do {
    const int64_t count = k - kk < Unit::kMaxChain ? k - kk : Unit::kMaxChain;
    gemm_chain<Unit, kRows, kPanels>(a + kk, lda, b + kk * kLanes, panel_stride, c, ldc, count,
                                     accumulate || kk > 0);
    kk += Unit::kMaxChain;
  } while (kk < k);
}

// Register blocking for the vector units: panels outside, so that a few panels of B stay in L1 while A
// streams.
template <class Unit>
struct VectorGemm {
#if FI_ISA_LEVEL >= 2
  static constexpr int kBlockRows = 8, kBlockPanels = 3;  // 24 accumulators of 32 registers
#elif FI_ISA_LEVEL == 1
  static constexpr int kBlockRows = 4, kBlockPanels = 3;  // 12 of 16
#else
  static constexpr int kBlockRows = 4, kBlockPanels = 2;  // 8 of 16: without FMA a product needs a register
#endif
  static constexpr int kTaskRows = 128;  // of a task at most
  static constexpr int kPassRows = 128;  // that go through products, softmax and weighted values at a time

  static void begin() {}
  static void end() {}

  template <class E>
  static void gemm(const E* a, int64_t lda, const E* b, int64_t panel_stride, float* c, int64_t ldc,
                   int64_t m, int64_t panels, int64_t k, bool accumulate) {
    int64_t p = 0;
    // 4 panels left go as 2 + 2: a lone panel has too few accumulators to hide the FMA's latency.
    while (p < panels) {
      const int64_t left = panels - p;
      const int64_t take = left == 4 && kBlockPanels == 3 ? 2 : left < kBlockPanels ? left : kBlockPanels;
      const E* bp = b + p * panel_stride;
      float* cp = c + p * kLanes;
      for (int64_t r = 0; r < m; r += kBlockRows) {
        if (take == 3) {
          gemm_block<Unit, kBlockRows, kBlockPanels>(a + r * lda, lda, bp, panel_stride, cp + r * ldc, ldc, k,
                                                     accumulate);
        } else if (take == 2) {
          gemm_block<Unit, kBlockRows, 2>(a + r * lda, lda, bp, panel_stride, cp + r * ldc, ldc, k,
                                          accumulate);
        } else {
          gemm_block<Unit, kBlockRows, 1>(a + r * lda, lda, bp, panel_stride, cp + r * ldc, ldc, k,
                                          accumulate);
        }
      }
      p += take;
    }
  }
};

struct FmaUnit : VectorGemm<FmaUnit> {
  using Element = float;
  using Operand = Vec;
  static constexpr int kPair = 1;
  static constexpr int kStepK = 1;              // k must be a multiple
  static constexpr int kStepRows = kBlockRows;  // m must be a multiple
  static constexpr int64_t kMaxChain = 64;

  FI_INLINE Vec load_b(const float* p) { return load(p); }
  FI_INLINE Vec broadcast_a(const float* p) { return set1(*p); }
  FI_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if FI_ISA_LEVEL >= 3
struct Bf16DotUnit : VectorGemm<Bf16DotUnit> {
  using Element = bf16;
  using Operand = __m512bh;
  static constexpr int kPair = 2;
  static constexpr int kStepK = 2;
  static constexpr int kStepRows = kBlockRows;
  static constexpr int64_t kMaxChain = INT64_MAX;  // the operands' own rounding is far above the sum's

  FI_INLINE __m512bh load_b(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  FI_INLINE __m512bh broadcast_a(const bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  FI_INLINE Vec multiply_add(__m512bh a, __m512bh b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
};
#endif

#if FI_ISA_LEVEL >= 4
// Tiles 0-3 accumulate 32 x 32 of C, 4-5 hold A, 6-7 hold B: four loads feed four multiplies.
struct AmxUnit {
  using Element = bf16;
  static constexpr int kPair = 2;
  static constexpr int kStepK = 32;
  static constexpr int kStepRows = 16;
  static constexpr int kTaskRows = 256;
  static constexpr int kPassRows =
      32;  // one block of tiles: their logits are still near when the softmax reads them

  // Full 16 x 64-byte tiles; the configuration belongs to the thread until end().
  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  static void gemm(const bf16* a, int64_t lda, const bf16* b, int64_t panel_stride, float* c, int64_t ldc,
                   int64_t m, int64_t panels, int64_t k, bool accumulate) {
    asm volatile("" ::: "memory");  // GCC's tile loads don't tell the compiler that they read memory
    for (int64_t p = 0; p < panels; p += 2) {
      const bool two_panels = p + 1 < panels;
      for (int64_t r = 0; r < m; r += 32) {
        const bool two_rows = r + 16 < m;
        const bf16* a0 = a + r * lda;
        const bf16* b0 = b + p * panel_stride;
        float* c0 = c + r * ldc + p * 16;
        if (two_panels && two_rows) {
          block_2x2(a0, lda, b0, panel_stride, c0, ldc, k, accumulate);
        } else {
          for (int i = 0; i <= int(two_rows); ++i) {
            for (int j = 0; j <= int(two_panels); ++j) {
              block_1x1(a0 + i * 16 * lda, lda, b0 + j * panel_stride, c0 + i * 16 * ldc + j * 16, ldc, k,
                        accumulate);
            }
          }
        }
      }
    }
  }

 private:
  static void block_2x2(const bf16* a, int64_t lda, const bf16* b, int64_t panel_stride, float* c,
                        int64_t ldc, int64_t k, bool accumulate) {
    const int64_t c_bytes = ldc * 4, a_bytes = lda * 2;
    if (accumulate) {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16, c_bytes);
      _tile_loadd(2, c + 16 * ldc, c_bytes);
      _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t kk = 0; kk < k; kk += 32) {
      _tile_loadd(6, b + kk * 16, 64);
      _tile_loadd(4, a + kk, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + panel_stride + kk * 16, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * lda + kk, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 16 * ldc, c_bytes);
    _tile_stored(3, c + 16 * ldc + 16, c_bytes);
  }

  static void block_1x1(const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, int64_t k,
                        bool accumulate) {
    if (accumulate) {
      _tile_loadd(0, c, ldc * 4);
    } else {
      _tile_zero(0);
    }
    for (int64_t kk = 0; kk < k; kk += 32) {
      _tile_loadd(4, a + kk, lda * 2);
      _tile_loadd(6, b + kk * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, c, ldc * 4);
  }
};
#endif

}  // namespace fi::FI_ISA
