// 16 query rows against 16 keys at a time on tensor cores, by one warp.
//
// Keys and values are tiles of kDimQK and kDimVO 16-bit elements a row in shared memory, swizzled
// (row_chunk_offset).
// Products and weights stay in registers: the accumulators of Q K^T have the layout that the weights need as
// the left side of P V.
#pragma once

#include "fi/cuda/decode/query_rows.h"

namespace fi::cuda::decode {

// How a head_dim is run. A block has half of kSmWarps, with two blocks an SM, so that one loads while the
// other begins or joins; or all of them where there is a block for each SM at most. Either way the stages of
// an SM hold 128 KB of K and V (192 / 128: 160), of which at least half are in flight. That is more than
// twice what covers the latency of HBM at full rate; still more only makes all wait longer, and some SMs much
// longer than others. Devices with less shared memory run fewer warps.
template <int kDimQK, int kDimVO = kDimQK>
struct Shape {
  static constexpr int kSmWarps = kDimQK <= 192 ? kMaxWarps : 4;
  static constexpr int kStages = kDimQK <= 64 ? 4 : 2;
  static constexpr int kBlocksAnSm = kDimQK <= 192 ? 2 : 1;
  static constexpr int kMinUnits = 2;                       // two slices for each warp of a half block
  static constexpr bool kQueryInRegisters = kDimQK <= 192;  // else read from shared memory for each slice
};

template <class T, int kDimQK, int kDimVO = kDimQK>
class WarpTile {
 protected:
  static constexpr bool kQueryInRegisters = Shape<kDimQK, kDimVO>::kQueryInRegisters;
  static constexpr bool kTwoChains = kQueryInRegisters;
  static constexpr int kRowBytes = kDimQK * 2, kChunks = kDimQK / 8, kSteps = kDimQK / 16;  // of keys
  static constexpr int kValueRowBytes = kDimVO * 2, kValueChunks = kDimVO / 8;

 public:
  using Element = T;
  static constexpr int kRows = 16, kSliceKeys = 16;
  static constexpr int kTileBytes = kSliceKeys * kRowBytes;  // of keys
  static constexpr int kValueTileBytes = kSliceKeys * kValueRowBytes;

  // After the query rows are stored, and a barrier.
  FI_DEVICE_INLINE void begin_segment() {
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_query_fragment(q_[step], step);
    }
    clear();
  }

  // Where four columns of a published row are.
  FI_DEVICE_INLINE static int acc_offset(int row, int chunk) {
    return row * kDimVO + (chunk ^ (row & 7)) * 4;
  }

 protected:
  FI_DEVICE_INLINE explicit WarpTile(unsigned char* query) : query_(query), lane_(threadIdx.x % 32) {}

  FI_DEVICE_INLINE void clear() {
#pragma unroll
    for (int n = 0; n < kDimVO / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_[n][e] = 0.0f;
    }
    max_[0] = max_[1] = -kInf;
    sum_[0] = sum_[1] = 0.0f;
  }

  FI_DEVICE_INLINE static int offset_of(int row, int chunk) { return row_chunk_offset<kDimQK>(row, chunk); }
  FI_DEVICE_INLINE static int value_offset_of(int row, int chunk) {
    return row_chunk_offset<kDimVO>(row, chunk);
  }
  // offset_of(row, 2 * pair + chunk), chunk 0 or 1, for a constant pair: four addresses serve all pairs.
  FI_DEVICE_INLINE static int offset_of_pair(int row, int pair, int chunk) {
    return offset_of(row, pair % 4 * 2 + chunk) + pair / 4 * 128;
  }
  // Row and column, in the tile, of an accumulator of this lane.
  FI_DEVICE_INLINE int row_of(int e) const { return lane_ / 4 + (e / 2) * 8; }
  FI_DEVICE_INLINE int column_of(int n, int e) const { return n * 8 + lane_ % 4 * 2 + e % 2; }

  // s + odd = Q K^T. Two chains of products for each 8 keys: the latency of one is not waited for by the
  // next.
  FI_DEVICE_INLINE void multiply_keys(const unsigned char* keys, float (&s)[2][4], float (&odd)[2][4]) {
    const int row = lane_ / 16 * 8 + lane_ % 8, chunk = lane_ / 8 % 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t k[4], q[4];
      ldmatrix_x4(k, keys + offset_of_pair(row, step, chunk));
      if constexpr (!kQueryInRegisters) load_query_fragment(q, step);
      const uint32_t (&query)[4] = kQueryInRegisters ? q_[kQueryInRegisters ? step : 0] : q;
      const bool to_odd = kTwoChains && step % 2;
      mma_m16n8k16<T>(to_odd ? odd[0] : s[0], query, k[0], k[1]);
      mma_m16n8k16<T>(to_odd ? odd[1] : s[1], query, k[2], k[3]);
    }
  }

  FI_DEVICE_INLINE void multiply_values(const unsigned char* values, const uint32_t (&weights)[4]) {
    const int row = lane_ / 8 % 2 * 8 + lane_ % 8, chunk = lane_ / 16;
#pragma unroll
    for (int n = 0; n < kDimVO / 16; ++n) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, values + value_offset_of(row, n % 4 * 2 + chunk) + n / 4 * 128);
      mma_m16n8k16<T>(acc_[2 * n], weights, v[0], v[1]);
      mma_m16n8k16<T>(acc_[2 * n + 1], weights, v[2], v[3]);
    }
  }

  // Logits to weights; moves the maxima, sums and accumulators.
  FI_DEVICE_INLINE void weigh(float (&s)[2][4]) {
    float rescale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = 2 * half;
      float top = fmaxf(fmaxf(s[0][e], s[0][e + 1]), fmaxf(s[1][e], s[1][e + 1]));
#pragma unroll
      for (int other = 1; other < 4; other *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
      top = fmaxf(top, max_[half]);
      const float shift = usable_max(top);
      rescale[half] = exp2_approx(max_[half] - shift);
      max_[half] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) sum += s[n][e + c] = exp2_approx(s[n][e + c] - shift);
      }
      sum_[half] = sum_[half] * rescale[half] + sum;
    }
    if (!__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) return;
#pragma unroll
    for (int n = 0; n < kDimVO / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_[n][e] *= rescale[e / 2];
    }
  }

  // Of the slice's keys, a bit each, those that a row sees.
  FI_DEVICE_INLINE unsigned live_keys(const float (&s)[2][4], int num_rows) const {
    unsigned live = 0;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (row_of(e) < num_rows && s[n][e] != -kInf) live |= 1u << column_of(n, e);
      }
    }
    return __reduce_or_sync(~0u, live);
  }

  // Values of keys that no row sees become 0: a weight of 0 times what lies there must not be NaN.
  FI_DEVICE_INLINE void clear_dead_values(unsigned char* values, unsigned live) const {
    constexpr unsigned kAll = (1u << kSliceKeys) - 1u;
    if ((live & kAll) == kAll) return;
#pragma unroll 1
    for (int item = lane_; item < kSliceKeys * kValueChunks; item += 32) {
      const int row = item / kValueChunks;
      if (!(live >> row & 1))
        *reinterpret_cast<uint4*>(values + value_offset_of(row, item % kValueChunks)) = uint4{0, 0, 0, 0};
    }
    __syncwarp();
  }

  // The warp's result of a segment, for all warps to read: maxima and sums of the rows, the accumulators over
  // `stage` (16 rows of kDimVO). Where the warp had no slice, only sums of 0.
  FI_DEVICE_INLINE void publish_to(float* stage, float* row_max, float* row_sum, const float** acc,
                                   int num_rows, bool had_slices) {
    publish_sums(row_max, row_sum);
    if (!had_slices) return;
    __syncwarp();
    if (lane_ == 0) *acc = stage;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(2 * half);
      if (row >= num_rows) continue;
#pragma unroll
      for (int n = 0; n < kDimVO / 8; ++n) {
        // acc_offset(row, 2 * n + lane_ % 4 / 2): four addresses serve all.
        const int offset = acc_offset(lane_ / 4, n % 4 * 2 + lane_ % 4 / 2) + n / 4 * 32 + half * 8 * kDimVO;
        *reinterpret_cast<float2*>(stage + offset + lane_ % 2 * 2) =
            float2{acc_[n][2 * half], acc_[n][2 * half + 1]};
      }
    }
  }
  FI_DEVICE_INLINE void publish_sums(float* row_max, float* row_sum) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int other = 1; other < 4; other *= 2) sum_[half] += __shfl_xor_sync(~0u, sum_[half], other);
      const int row = row_of(2 * half);
      if (lane_ % 4 == 0) row_max[row] = max_[half], row_sum[row] = sum_[half];
    }
  }

  FI_DEVICE_INLINE void load_query_fragment(uint32_t (&q)[4], int step) const {
    ldmatrix_x4(q, query_ + offset_of_pair(lane_ % 16, step, lane_ / 16));
  }

  unsigned char* query_;
  int lane_;
  uint32_t q_[kQueryInRegisters ? kSteps : 1][4];
  float acc_[kDimVO / 8][4];
  float max_[2], sum_[2];
};

}  // namespace fi::cuda::decode
