// 16 query rows against 16 fp8 keys at a time on tensor cores, by one warp.
//
// Keys and values are widened between ldmatrix and mma, to f16: exact, and one instruction for two. ldmatrix
// moves pairs of bytes where it would move 16-bit elements, so the four bytes that a lane gets are neighbours
// along head_dim. For the products that is another order of the sum, which the query's fragments follow; for
// the values, of which it has two keys and two columns, two mma have the even and the odd columns.
#pragma once

#include "fi/cuda/decode/warp_tile.h"
#include "fi/cuda/fp8.h"

namespace fi::cuda::batch {

// The query is f16 too (FewQuery scales rows of bf16 so that nothing of them is lost).
template <int kDim, Fp8 kFormat>
class Fp8Tile : public decode::WarpTile<f16, kDim> {
  using Tile = decode::WarpTile<f16, kDim>;
  using Tile::kSteps, Tile::kTwoChains, Tile::kQueryInRegisters;

 public:
  using Tile::kRows, Tile::kSliceKeys;

  FI_DEVICE_INLINE void begin_segment() {
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_query(q_[step], step);
    }
    this->clear();
  }

 protected:
  using Tile::lane_, Tile::query_, Tile::q_, Tile::acc_;
  using Tile::row_of, Tile::column_of;

  FI_DEVICE_INLINE explicit Fp8Tile(unsigned char* query) : Tile(query) {}

  // Chunks of 16 bytes: a column of them lies in all banks.
  FI_DEVICE_INLINE static int offset_of(int row, int chunk) {
    return row * kDim + ((chunk ^ (kDim == 64 ? row >> 1 & 3 : row & 7)) << 4);
  }

  FI_DEVICE_INLINE void multiply_keys(const unsigned char* keys, float (&s)[2][4], float (&odd)[2][4]) {
#pragma unroll
    for (int pair = 0; pair < kSteps / 2; ++pair) {
      uint32_t k[4];
      ldmatrix_x4(k, keys + offset_of_lane(pair));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int step = 2 * pair + n;
        uint32_t q[4];
        if constexpr (!kQueryInRegisters) load_query(q, step);
        const uint32_t (&query)[4] = kQueryInRegisters ? q_[kQueryInRegisters ? step : 0] : q;
        float (&sum)[2][4] = kTwoChains && n ? odd : s;
        multiply(sum[0], query, k[2 * n]);
        multiply(sum[1], query, k[2 * n + 1]);
      }
    }
  }

  FI_DEVICE_INLINE void multiply_values(const unsigned char* values, const uint32_t (&weights)[4]) {
#pragma unroll
    for (int pair = 0; pair < kSteps / 2; ++pair) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, values + offset_of_lane(pair));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        multiply(acc_[4 * pair + 2 * n], weights, __byte_perm(v[2 * n], v[2 * n + 1], 0x6420));
        multiply(acc_[4 * pair + 2 * n + 1], weights, __byte_perm(v[2 * n], v[2 * n + 1], 0x7531));
      }
    }
  }

  FI_DEVICE_INLINE void clear_dead_values(unsigned char* values, unsigned live) const {
    if ((live & 0xffffu) == 0xffffu) return;
#pragma unroll 1
    for (int item = lane_; item < kSliceKeys * kSteps; item += 32) {
      if (!(live >> item / kSteps & 1)) *reinterpret_cast<uint4*>(values + item * 16) = uint4{0, 0, 0, 0};
    }
    __syncwarp();
  }

  FI_DEVICE_INLINE void publish_to(float* stage, float* row_max, float* row_sum, const float** acc,
                                   int num_rows, bool had_slices) {
    this->publish_sums(row_max, row_sum);
    if (!had_slices) return;
    __syncwarp();
    if (lane_ == 0) *acc = stage;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(2 * half);
      if (row >= num_rows) continue;
#pragma unroll
      for (int n = 0; n < kSteps; ++n)
        *reinterpret_cast<float4*>(stage + this->acc_offset(row, 4 * n + lane_ % 4)) =
            float4{acc_[2 * n][2 * half], acc_[2 * n + 1][2 * half], acc_[2 * n][2 * half + 1],
                   acc_[2 * n + 1][2 * half + 1]};
    }
  }

 private:
  // Of the row that this lane names to ldmatrix: keys 0 .. 7 and 8 .. 15 of chunk 2 * pair, then of the next.
  FI_DEVICE_INLINE int offset_of_lane(int pair) const {
    return offset_of(lane_ / 8 % 2 * 8 + lane_ % 8, 2 * pair + lane_ / 16);
  }
  FI_DEVICE_INLINE static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t bytes) {
    const uint2 b = widen_fp8<kFormat>(bytes);
    mma_m16n8k16<f16>(d, a, b.x, b.y);
  }

  FI_DEVICE_INLINE void load_query(uint32_t (&q)[4], int step) const {
    const int t = lane_ % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 four = *reinterpret_cast<const uint2*>(
          query_ + Tile::offset_of(lane_ / 4 + 8 * half, 2 * step + t / 2) + t % 2 * 8);
      q[half] = four.x, q[half + 2] = four.y;
    }
  }
};

}  // namespace fi::cuda::batch
