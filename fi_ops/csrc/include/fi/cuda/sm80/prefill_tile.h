// Tiles of 16-bit rows in shared memory, and the two products of a warp on them.
//
// A row of kDim elements (a multiple of 64) is kDim / 8 chunks of 16 bytes; chunk c of row r lies at place
// c ^ (r % 8), so that the eight rows that ldmatrix reads at one chunk are in different banks.
#pragma once

#include "fi/cuda/ptx.h"

namespace fi::cuda {

template <int kDim>
FI_DEVICE_INLINE int tile_offset(int row, int chunk) {
  static_assert(kDim % 64 == 0);
  return row * kDim + (chunk ^ (row & 7)) * 8;
}

// Which 16 bytes of a tile a thread copies: eight lanes a row and panel of 64 columns, so that the next rows
// and panels are at constant distances in shared memory.
template <int kDim, int kThreads>
struct CopyShare {
  static constexpr int kPanels = kDim / 64, kStep = kThreads / 8;
  int row = static_cast<int>(threadIdx.x) / 8, chunk = static_cast<int>(threadIdx.x) % 8;

  FI_DEVICE_INLINE int offset(int n, int panel) const {
    static_assert(kStep % 8 == 0);
    return tile_offset<kDim>(row, chunk) + n * kStep * kDim + panel * 64;
  }
};

// Starts the copy of rows [first_row, first_row + kRows) of a head of K or V; rows outside [begin, end) and
// elements past head_dim become 0. `head` must be readable.
template <int kRows, int kDim, int kThreads, class T>
FI_DEVICE_INLINE void load_tile(T* tile, const T* head, int64_t stride, int first_row, int begin, int end,
                                int head_dim) {
  using Share = CopyShare<kDim, kThreads>;
  const Share share;
  const T* src = head + (first_row + share.row) * stride + share.chunk * 8;
  const int64_t step = Share::kStep * stride;
  if (first_row >= begin && first_row + kRows <= end && head_dim == kDim) {
#pragma unroll
    for (int n = 0; n < kRows / Share::kStep; ++n) {
#pragma unroll
      for (int panel = 0; panel < Share::kPanels; ++panel)
        cp_async_16(tile + share.offset(n, panel), src + panel * 64);
      src += step;
    }
  } else {
#pragma unroll
    for (int n = 0; n < kRows / Share::kStep; ++n) {
      const int row = first_row + share.row + n * Share::kStep;
#pragma unroll
      for (int panel = 0; panel < Share::kPanels; ++panel) {
        const bool valid = row >= begin && row < end && share.chunk * 8 + panel * 64 < head_dim;
        cp_async_16(tile + share.offset(n, panel), valid ? src + panel * 64 : head, valid);
      }
      src += step;
    }
  }
}

// s[m][n] = rows [row, row + 16 * kM) of q times the kKeys rows of k, transposed: accumulators of 16 x 8
// each.
template <int kDim, int kM, int kKeys, class T>
FI_DEVICE_INLINE void multiply_keys(float (&s)[kM][kKeys / 8][4], const T* q, int row, const T* k) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
  }
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
      ldmatrix_x4(a[m], q + tile_offset<kDim>(row + 16 * m + lane % 16, 2 * d + lane / 16));
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, k + tile_offset<kDim>(16 * n + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<T>(s[m][2 * n], a[m], b[0], b[1]);
        mma_m16n8k16<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// o += weights, rounded to T, times the kKeys rows of v. The accumulators of the first product are the
// operands of the second.
template <int kDim, int kM, int kKeys, class T>
FI_DEVICE_INLINE void add_values(float (&o)[kM][kDim / 8][4], const float (&weights)[kM][kKeys / 8][4],
                                 const T* v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const float (&left)[4] = weights[m][2 * n], (&right)[4] = weights[m][2 * n + 1];
      a[m][0] = pack2<T>(left[0], left[1]);
      a[m][1] = pack2<T>(left[2], left[3]);
      a[m][2] = pack2<T>(right[0], right[1]);
      a[m][3] = pack2<T>(right[2], right[3]);
    }
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, v + tile_offset<kDim>(16 * n + lane % 16, 2 * d + lane / 16));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<T>(o[m][2 * d], a[m], b[0], b[1]);
        mma_m16n8k16<T>(o[m][2 * d + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace fi::cuda
