// Online softmax over rows of logits, base 2: the running maximum, sum and the passes over one tile row.
#pragma once

#include "fi/attention.h"
#include "fi/cpu/live_tiles.h"
#include "fi/cpu/simd.h"

namespace fi::FI_ISA {

// Stands for a finite logit that overflows in base 2 (finfo.min * log2(e)): still "attend, with next to no
// weight", where -inf would be "excluded".
inline constexpr float kLowestLogit = -3.0e38f;

// What turns q.k into a logit, base 2, for one row of a tile.
struct RowVariant {
  float scale;            // of q.k, natural base
  float soft_cap;         // 0: none
  float alibi;            // slope * log2(e); 0: none
  int64_t distance;       // of the tile's first key from the row's position
  const float* additive;  // [n] base 2, -inf excludes; null: none
};

// In place: n (a multiple of kLanes) products to logits. An excluded key is -inf even where its product is
// NaN.
FI_INLINE void apply_variant(float* s, int64_t n, const RowVariant& v) {
  const Vec lanes = to_vec(iota_i());
  for (int64_t j = 0; j < n; j += kLanes) {
    Vec x = load(s + j) * v.scale;
    if (v.soft_cap > 0.0f) x = tanh(x / v.soft_cap) * v.soft_cap;
    x *= kLog2e;
    if (v.alibi != 0.0f) x += (lanes + float(v.distance + j)) * v.alibi;
    if (v.additive) {
      const Vec m = load(v.additive + j);
      x = select(m == -kInf, m, x + m);
    }
    store(s + j, x);
  }
}

// Mask values [begin, begin + n) of one query row as base-2 addends; lanes up to the next multiple of kLanes
// are 0. A finite value stays finite.
template <class T>
FI_INLINE void stage_additive(float* dst, const T* m, int64_t stride, int64_t n) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t width = n - j < kLanes ? n - j : kLanes;
    Vec x{};
    if (stride == 1) {
      x = width == kLanes ? load(m + j) : load_partial(m + j, width);
    } else {
      float lanes[kLanes] = {};
      for (int64_t c = 0; c < width; ++c) lanes[c] = to_float(m[(j + c) * stride]);
      x = load(lanes);
    }
    store(dst + j, select(x == -kInf, x, max(set1(kLowestLogit), x * kLog2e)));
  }
}

FI_INLINE void stage_bool(float* dst, const uint8_t* m, int64_t stride, int64_t n) {
  for (int64_t j = 0; j < n; ++j) dst[j] = m[j * stride] ? 0.0f : -kInf;
  for (int64_t j = n; j % kLanes != 0; ++j) dst[j] = 0.0f;
}

FI_INLINE void stage_mask(float* dst, const AttentionParams& p, int64_t b, int64_t h, int64_t i,
                          int64_t begin, int64_t n) {
  const int64_t stride = p.mask_stride_k;
  const int64_t offset = b * p.mask_stride_b + h * p.mask_stride_h + i * p.mask_stride_q + begin * stride;
  switch (p.mask_dtype) {
    case DType::boolean:
      return stage_bool(dst, static_cast<const uint8_t*>(p.mask) + offset, stride, n);
    case DType::f32:
      return stage_additive(dst, static_cast<const float*>(p.mask) + offset, stride, n);
    case DType::bf16:
      return stage_additive(dst, static_cast<const bf16*>(p.mask) + offset, stride, n);
    default:
      return stage_additive(dst, static_cast<const f16*>(p.mask) + offset, stride, n);
  }
}

// The columns of a row, of `cols` in all, that hold a key it may see, widened to whole vectors; the columns
// that this adds are set to -inf. Only these need a softmax.
FI_INLINE Range visible_columns(float* s, int64_t cols, int64_t begin, int64_t end) {
  if (begin >= end) return {0, 0};
  Range wide{begin / kLanes * kLanes, (end + kLanes - 1) / kLanes * kLanes};
  if (wide.end > cols) wide.end = cols;
  for (int64_t j = wide.begin; j < begin; ++j) s[j] = -kInf;
  for (int64_t j = end; j < wide.end; ++j) s[j] = -kInf;
  return wide;
}

// The maximum so far that may be subtracted: 0 while nothing was attended to.
FI_INLINE float usable_max(float m) { return m == -kInf ? 0.0f : m; }

// One row of one tile, first pass: n logits / scale2 (n a multiple of kLanes) raise the running maximum.
// Returns the factor for what the row has accumulated so far.
FI_INLINE float raise_max(const float* s, int64_t n, float scale2, float& row_max) {
  Vec top0 = set1(-kInf), top1 = top0;
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    top0 = max(load(s + j), top0);
    top1 = max(load(s + j + kLanes), top1);
  }
  if (j < n) top0 = max(load(s + j), top0);
  const float tile_max = reduce_max(max(top0, top1)) * scale2, old_max = row_max;
  if (!(tile_max > old_max)) return 1.0f;
  row_max = tile_max;
  return old_max == -kInf ? 0.0f : exp2(set1(old_max - tile_max))[0];
}

// Second pass: the logits become `weights`, which may lie over s but not beyond what has been read. Returns
// their sum. kRounded: exponentials to bf16 precision, enough for bf16 weights but not for an LSE.
template <bool kRounded, class P>
FI_INLINE float weigh_row(const float* s, P* weights, int64_t n, float scale2, float row_max) {
  const Vec shift = set1(-usable_max(row_max));
  const Vec factor = set1(scale2);
  Vec sum0 = zero(), sum1 = zero();
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    const Vec w0 = exp2_nonpositive<kRounded>(fma(load(s + j), factor, shift));
    const Vec w1 = exp2_nonpositive<kRounded>(fma(load(s + j + kLanes), factor, shift));
    sum0 += w0;
    sum1 += w1;
    store_pair(weights + j, w0, w1);
  }
  if (j < n) {
    const Vec w = exp2_nonpositive<kRounded>(fma(load(s + j), factor, shift));
    sum0 += w;
    store(weights + j, w);
  }
  return reduce_add(sum0 + sum1);
}

// One row's result: out = acc / sum * factor, the sink joining the sum; returns the LSE, base 2.
template <class T>
FI_INLINE float finish_row(T* out, const float* acc, int64_t n, float row_max, float row_sum,
                           const float* sink, float factor = 1.0f) {
  float total = row_sum, top = row_max, keep = 1.0f;
  if (sink) {
    const float s = *sink * kLog2e;
    top = s > row_max ? s : row_max;
    keep = exp2(set1(row_max - usable_max(top)))[0];
    total = row_sum * keep + exp2(set1(s - usable_max(top)))[0];
  }
  const float inverse = total == 0.0f ? 0.0f : keep / total * factor;
  for (int64_t d = 0; d < n; d += kLanes) {
    const int64_t width = n - d < kLanes ? n - d : kLanes;
    const Vec x = load_partial(acc + d, width) * inverse;
    width == kLanes ? store(out + d, x) : store_partial(out + d, x, width);
  }
  return total == 0.0f || top <= 0.99f * kLowestLogit ? -kInf : usable_max(top) + __builtin_log2f(total);
}

}  // namespace fi::FI_ISA
