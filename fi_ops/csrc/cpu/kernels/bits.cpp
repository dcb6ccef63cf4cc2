// Packing of booleans into bits.
#include "fi/bits.h"

#include "fi/cpu/rowops.h"

namespace fi::FI_ISA {
namespace {

// Eight elements, the first in the lowest byte.
FI_INLINE uint8_t pack_8(uint64_t x, bool little) {
  // 1 in each byte that is not 0: the carry out of the low seven bits, or the eighth bit itself.
  const uint64_t low = 0x7f7f7f7f7f7f7f7full;
  const uint64_t ones = (((x & low) + low) | x) >> 7 & 0x0101010101010101ull;
  // The product gathers bit 8i at bit 56 + i (or 63 - i); no two partial products meet.
  return uint8_t(ones * (little ? 0x0102040810204080ull : 0x8040201008040201ull) >> 56);
}

// y[0 : ceil(n / 8)] from n elements.
FI_INLINE void pack(const uint8_t* x, uint8_t* y, int64_t n, bool little) {
  int64_t i = 0;
#if FI_ISA_LEVEL >= 2
  // A mask register has element 0 in bit 0; for the other order each group of eight is reversed first.
  const __m512i reversed =
      _mm512_set4_epi64(0x08090a0b0c0d0e0f, 0x0001020304050607, 0x08090a0b0c0d0e0f, 0x0001020304050607);
  for (; i + 64 <= n; i += 64) {
    __m512i v = _mm512_loadu_si512(x + i);
    if (!little) v = _mm512_shuffle_epi8(v, reversed);
    const uint64_t bits = _mm512_test_epi8_mask(v, v);
    __builtin_memcpy(y + i / 8, &bits, 8);
  }
#elif FI_ISA_LEVEL == 1
  const __m256i reversed =
      _mm256_set_epi64x(0x08090a0b0c0d0e0f, 0x0001020304050607, 0x08090a0b0c0d0e0f, 0x0001020304050607);
  for (; i + 32 <= n; i += 32) {
    __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    if (!little) v = _mm256_shuffle_epi8(v, reversed);
    const uint32_t bits = ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
    __builtin_memcpy(y + i / 8, &bits, 4);
  }
#endif
  for (; i + 8 <= n; i += 8) {
    uint64_t eight = 0;
    for (int k = 0; k < 8; ++k) eight |= uint64_t(x[i + k]) << (8 * k);
    y[i / 8] = pack_8(eight, little);
  }
  if (i < n) {
    uint64_t rest = 0;
    for (int64_t k = 0; k < n - i; ++k) rest |= uint64_t(x[i + k]) << (8 * k);
    y[i / 8] = pack_8(rest, little);
  }
}

}  // namespace

void packbits(const PackBitsParams& p, const Parallel& parallel) {
  constexpr int64_t elements = 8 * kTaskElements;  // of a task; a multiple of 8
  if (p.num_segments == 0) return;
  const Indices &in = p.input_indptr, &out = p.output_indptr;
  if (p.num_segments == 1) {
    const int64_t first = in ? in.at(0) : 0, n = in ? in.at(1) - first : p.num_elements;
    for_each_block(serial_if_small(parallel, n / 8), n, elements, [&](int64_t begin, int64_t end) {
      pack(p.input + first + begin, p.output + begin / 8, end - begin, p.little);
    });
    return;
  }
  const int64_t mean = (in.at(p.num_segments) - in.at(0)) / p.num_segments;
  for_each_block(serial_if_small(parallel, mean * p.num_segments / 8), p.num_segments, elements / (mean + 64),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t s = begin; s < end; ++s)
                     pack(p.input + in.at(s), p.output + out.at(s), in.at(s + 1) - in.at(s), p.little);
                 });
}

}  // namespace fi::FI_ISA
