// Masking and online softmax on a warpgroup's fragment of scores (fi/cuda/sm90/wgmma.h has its layout).
#pragma once

#include <cmath>

#include "fi/cuda/attention_rows.h"

namespace fi::cuda::sm90 {

// A thread's two rows are g and g + 8 of its warp's 16; its quad (four lanes) holds whole rows.
FI_DEVICE_INLINE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
FI_DEVICE_INLINE float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Scores of keys past last[r], or before first[r], become -inf; `key` is the key of the thread's first score.
template <int N>
FI_DEVICE_INLINE void mask_after(float (&s)[N], int key, const int (&last)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i / 4 * 8 + i % 2 > last[i / 2 % 2] - key) s[i] = -INFINITY;
}
template <int N>
FI_DEVICE_INLINE void mask_before(float (&s)[N], int key, const int (&first)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i / 4 * 8 + i % 2 < first[i / 2 % 2] - key) s[i] = -INFINITY;
}

// Scores of keys whose bit is not set: bit 2j + e of bits[r] is the key of score 4j + 2r + e.
template <int N>
FI_DEVICE_INLINE void mask_unset(float (&s)[N], const uint32_t (&bits)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (!(bits[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1)) s[i] = -INFINITY;
}

// Scores become the tanh that caps them (PrefillArgs). As a rule all of a warp's are near 0. Few at a time:
// registers are short.
template <int N>
FI_DEVICE_INLINE void tanh_of(float (&s)[N], float to_cap) {
  constexpr int kAtOnce = 8;
  static_assert(N % kAtOnce == 0);
#pragma unroll
  for (int first = 0; first < N; first += kAtOnce) {
    float most = 0.0f;
#pragma unroll
    for (int i = first; i < first + kAtOnce; ++i) {
      s[i] *= to_cap;
      most = fmaxf(most, fabsf(s[i]));
    }
    if (__any_sync(kAllLanes, most >= kTanhNear)) {
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) s[i] = tanh_exp2(s[i]);
    } else {
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) s[i] = tanh_near(s[i]);
    }
  }
}

// Scores become logits in base 2 with a mask added. rows[r]: the mask at the thread's first key; pairs of its
// values are aligned, and none is half behind the last key. Keys behind it are excluded afterwards.
template <class M, int N>
FI_DEVICE_INLINE void add_mask(float (&s)[N], float scale_log2, const M* const (&rows)[2], int keys_left) {
  struct alignas(2 * sizeof(M)) Pair {
    M value[2];
  };
  constexpr int kAtOnce = 16;  // registers are short; nothing is read ahead over the branch
#pragma unroll
  for (int first = 0; first < N; first += kAtOnce) {
    if (first / 4 * 8 >= keys_left) break;
#pragma unroll
    for (int i = first; i < first + kAtOnce && i < N; i += 2) {
      Pair pair = {};
      if (i / 4 * 8 < keys_left) pair = *reinterpret_cast<const Pair*>(rows[i / 2 % 2] + i / 4 * 8);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float addend = mask_addend(pair.value[e]);
        s[i + e] = addend == -kInf ? addend : fmaf(s[i + e], scale_log2, addend);
      }
    }
  }
}

// Softmax of two rows as their scores come. Weights are 2^((s - origin) * scale_log2), where the origin
// follows the row's maximum only once it lags behind by a factor of 2^kLag: any origin near the maximum gives
// the same quotient, and one that stays spares the rescaling of everything summed so far.
class OnlineSoftmax {
 public:
  // `lag`: in place of kLag; `top`: weights at the origin are 2^top.
  FI_DEVICE_INLINE explicit OnlineSoftmax(float scale_log2, float top = 0.0f, float lag = kLag)
      : scale_log2_(scale_log2), top_(top), lag_(lag) {}

  // Scores become weights. True where an origin of this warp's rows moved: earlier weights are then to be
  // multiplied by rescale[r].
  template <int N>
  FI_DEVICE_INLINE bool weigh(float (&s)[N], float (&rescale)[2]) {
    float top[2] = {s[0], s[2]};
#pragma unroll
    for (int i = 0; i < N; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
    const bool moves = __any_sync(
        kAllLanes, (top[0] - origin_[0]) * scale_log2_ > lag_ || (top[1] - origin_[1]) * scale_log2_ > lag_);
    if (moves) {
#pragma unroll
      for (int r = 0; r < 2; ++r) rescale[r] = move(r, quad_max(fmaxf(origin_[r], top[r])));
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      s[i] = exp2_approx(fmaf(s[i], scale_log2_, -base_[i / 2 % 2]));
      sum_[i / 2 % 2] += s[i];
    }
    return moves;
  }

  // Takes over origins that who has other tiles of the same rows moved to. True as above.
  FI_DEVICE_INLINE bool follow(float origin0, float origin1, float (&rescale)[2]) {
    const bool moves = __any_sync(kAllLanes, origin0 != origin_[0] || origin1 != origin_[1]);
    if (moves) rescale[0] = move(0, origin0), rescale[1] = move(1, origin1);
    return moves;
  }

  // `value`, known to the assembler only once the weights are: what is done with it comes after them. (The
  // sum is never below 0.) Left alone, it moves the exponentials down past a wgmma wait, which is there to be
  // hidden.
  FI_DEVICE_INLINE uint32_t after_weights(uint32_t value) const {
    return sum_[0] + sum_[1] < 0.0f ? ~value : value;
  }

  // The row as finish_row() takes it: the sum of its weights over the quad, and what they are relative to.
  FI_DEVICE_INLINE float sum(int r) const { return quad_sum(sum_[r]); }
  FI_DEVICE_INLINE float base(int r, float sum) const { return sum == 0.0f ? -kInf : base_[r]; }
  // The score that has weight 2^top.
  FI_DEVICE_INLINE float origin(int r) const { return origin_[r]; }

 private:
  // What was summed before is then to be multiplied by the result.
  FI_DEVICE_INLINE float move(int r, float origin) {
    const float finite = origin == -INFINITY ? 0.0f : origin;  // a row that saw nothing yet has weights 0
    const float rescale = exp2_approx((origin_[r] - finite) * scale_log2_);
    sum_[r] *= rescale;
    origin_[r] = origin;
    base_[r] = finite * scale_log2_ - top_;
    return rescale;
  }

  static constexpr float kLag = 8.0f;  // weights up to 2^8: far from the end of fp16

  float scale_log2_, top_, lag_;
  float origin_[2] = {-INFINITY, -INFINITY};
  float base_[2] = {0.0f, 0.0f};  // origin * scale_log2 - top
  float sum_[2] = {0.0f, 0.0f};   // this thread's part
};

}  // namespace fi::cuda::sm90
