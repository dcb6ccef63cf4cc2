// A warp's rows of a block: the logits of a tile to weights, and what they accumulate over the tiles.
//
// Accumulators are those of m16n8k16: a thread has parts of 2 * kM rows, and of each the same columns.
#pragma once

#include "fi/cuda/sm80/block_rows.h"
#include "fi/cuda/sm80/prefill_tile.h"

namespace fi::cuda {

// C: T, kDimQK, kDimVO, kM (tiles of 16 rows a warp), kKeys (keys a tile).
template <class C>
class WarpRows {
  using T = typename C::T;

 protected:
  static constexpr int kTiles = C::kKeys / 8;
  using Logits = float[C::kM][kTiles][4];

  FI_DEVICE_INLINE WarpRows() : warp_row(static_cast<int>(threadIdx.x / 32) * 16 * C::kM) {}

  FI_DEVICE_INLINE void init() {
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int d = 0; d < C::kDimVO / 8; ++d) o[m][d][0] = o[m][d][1] = o[m][d][2] = o[m][d][3] = 0.0f;
      row_max[m][0] = row_max[m][1] = -kInf;
      row_sum[m][0] = row_sum[m][1] = 0.0f;
    }
  }

  // The row of the block that accumulators m, `half` belong to, and the tile's key (or the output's column)
  // that element e of tile n is.
  FI_DEVICE_INLINE int row_of(int m, int half) const {
    return warp_row + 16 * m + static_cast<int>(threadIdx.x % 32 / 4) + 8 * half;
  }
  FI_DEVICE_INLINE int key_of(int n, int e) const {
    return 8 * n + 2 * static_cast<int>(threadIdx.x % 4) + e;
  }

  // f(m, half) of each row.
  template <class F>
  FI_DEVICE_INLINE void for_each_row(const F& f) const {
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) f(m, half);
    }
  }
  // f(logit, n, e) of a row's logits.
  template <class F>
  FI_DEVICE_INLINE void for_each_logit(Logits& s, int m, int half, const F& f) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) f(s[m][n][2 * half + e], n, e);
    }
  }

  // Products to logits, base 2. scale2: the scale times log2(e).
  FI_DEVICE_INLINE void apply_variants(Logits& s, int first, const Row* rows, float scale2, float cap) const {
    const float to_cap = cap > 0.0f ? 2.0f * scale2 / cap : 0.0f;
    for_each_row([&](int m, int half) {
      const Row row = rows[row_of(m, half)];
      const float distance =
          static_cast<float>(first + key_of(0, 0)) - row.position;  // of the thread's first key
      for_each_logit(s, m, half, [&](float& x, int n, int e) {
        x = cap > 0.0f ? cap * kLog2e * tanh_exp2(x * to_cap) : x * scale2;
        x = fmaf(distance + static_cast<float>(8 * n + e), row.slope, x);
      });
    });
  }

  // Keys that a row may not see become -inf, even where their product is NaN.
  template <class R>
  FI_DEVICE_INLINE void exclude_keys(Logits& s, int first, const R* rows) const {
    for_each_row([&](int m, int half) {
      const RowKeys row = rows[row_of(m, half)];
      for_each_logit(s, m, half, [&](float& x, int n, int e) {
        const int j = first + key_of(n, e);
        if (j < row.begin || j >= row.end) x = -kInf;
      });
    });
  }

  // Logits / scale2 to weights. The maximum moves only when it grows by 2^kSlack or more: weights up to that
  // are as good as weights up to 1, and what has been accumulated is rarely rescaled.
  FI_DEVICE_INLINE void softmax(Logits& s, float scale2) {
    constexpr float kSlack = 8.0f;
    float rescale[C::kM][2];
    bool moved = false;
    for_each_row([&](int m, int half) {
      float top = -kInf;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2)) * scale2;
      const float old = row_max[m][half];
      const bool moves = top > old + kSlack;
      rescale[m][half] = moves ? exp2_approx(old - top) : 1.0f;
      row_max[m][half] = moves ? top : old;
      moved = moved || moves;
    });
    if (__any_sync(kAllLanes, moved)) {
      for_each_row([&](int m, int half) {
        row_sum[m][half] *= rescale[m][half];
#pragma unroll
        for (int d = 0; d < C::kDimVO / 8; ++d) {
          o[m][d][2 * half] *= rescale[m][half];
          o[m][d][2 * half + 1] *= rescale[m][half];
        }
      });
    }
    for_each_row([&](int m, int half) {
      const float shift = usable_max(row_max[m][half]);
      for_each_logit(s, m, half, [&](float& x, int, int) {
        x = exp2_approx(fmaf(x, scale2, -shift));
        row_sum[m][half] += x;
      });
    });
  }

  // Sums of whole rows, for all threads that have parts of them.
  FI_DEVICE_INLINE void join_sums() {
    for_each_row([&](int m, int half) {
      float& sum = row_sum[m][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
    });
  }

  // The output, times factor_of(m, half, row), through shared memory, so that 16 bytes go out at a time: `q`,
  // the place of this warp's own queries. out_of(row): where the row goes, or null.
  template <class Factor, class Out>
  FI_DEVICE_INLINE void write_rows(T* q, int64_t head_dim_vo, const Factor& factor_of, const Out& out_of) {
    const int lane = threadIdx.x % 32;
    for_each_row([&](int m, int half) {
      const int r = row_of(m, half);
      const float factor = factor_of(m, half, r);
#pragma unroll
      for (int d = 0; d < C::kDimVO / 8; ++d) {
        *reinterpret_cast<uint32_t*>(q + tile_offset<C::kDimQK>(r, d) + 2 * (lane % 4)) =
            pack2<T>(o[m][d][2 * half] * factor, o[m][d][2 * half + 1] * factor);
      }
    });
    __syncwarp();
    constexpr int kChunks = C::kDimVO / 8;
#pragma unroll 4
    for (int at = lane; at < 16 * C::kM * kChunks; at += 32) {
      const int r = warp_row + at / kChunks, chunk = at % kChunks;
      T* out = chunk * 8 < head_dim_vo ? out_of(r) : nullptr;
      if (out == nullptr) continue;
      *reinterpret_cast<uint4*>(out + chunk * 8) =
          *reinterpret_cast<const uint4*>(q + tile_offset<C::kDimQK>(r, chunk));
    }
  }

  // The output as it is, not divided, with the row's maximum and sum. row_index(row): where, or -1.
  template <class Index>
  FI_DEVICE_INLINE void write_partial_rows(float* out, float* state, int64_t width,
                                           const Index& row_index) const {
    for_each_row([&](int m, int half) {
      const int64_t row = row_index(row_of(m, half));
      if (row < 0) return;
#pragma unroll
      for (int d = 0; d < C::kDimVO / 8; ++d)
        *reinterpret_cast<float2*>(out + row * width + key_of(d, 0)) = {o[m][d][2 * half],
                                                                        o[m][d][2 * half + 1]};
      if (threadIdx.x % 4 == 0) {
        state[2 * row] = row_max[m][half];
        state[2 * row + 1] = row_sum[m][half];
      }
    });
  }

  int warp_row;
  float o[C::kM][C::kDimVO / 8][4];
  float row_max[C::kM][2], row_sum[C::kM][2];
};

}  // namespace fi::cuda
