// The end of a segment: joining the warps' results, writing rows.
#pragma once

#include "fi/cuda/decode/rows.h"

namespace fi::cuda::decode {

// What the warps of a block leave for each other, in shared memory.
struct WarpResults {
  float max[kMaxWarps][kMaxRows], sum[kMaxWarps][kMaxRows];
  const float* acc[kMaxWarps];  // set where the warp attended to anything
};

// Four columns of a row, with the row's maximum and sum so far.
struct Part {
  float max = -kInf, sum = 0.0f, acc[4] = {};

  // acc += factor * four floats.
  FI_DEVICE_INLINE void add_scaled(const float4& x, float factor) {
    acc[0] = fmaf(x.x, factor, acc[0]);
    acc[1] = fmaf(x.y, factor, acc[1]);
    acc[2] = fmaf(x.z, factor, acc[2]);
    acc[3] = fmaf(x.w, factor, acc[3]);
  }
};

template <class Engine>
FI_DEVICE_INLINE Part join_warps(const WarpResults& results, const Engine& engine, int row, int chunk) {
  constexpr int kMost = Engine::kSmWarps < kMaxWarps ? Engine::kSmWarps : kMaxWarps;
  const int warps = blockDim.x / 32;
  Part all;
#pragma unroll
  for (int w = 0; w < kMost; ++w) {
    if (w < warps) all.max = fmaxf(all.max, results.max[w][row]);
  }
#pragma unroll 1
  for (int w = 0; w < warps; ++w) {
    const float sum = results.sum[w][row];
    if (sum == 0.0f) continue;  // nothing seen; the accumulators may not even be there
    const float factor = exp2_approx(results.max[w][row] - usable_max(all.max));
    all.sum = fmaf(sum, factor, all.sum);
    all.add_scaled(*reinterpret_cast<const float4*>(results.acc[w] + engine.acc_offset(row, chunk)), factor);
  }
  return all;
}

template <class T, bool kAligned>
FI_DEVICE_INLINE void store_columns(T* out, const float (&x)[4], int columns) {
  if constexpr (kAligned) {
    *reinterpret_cast<uint2*>(out) = uint2{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3])};
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < columns) out[e] = from_float<T>(x[e]);
    }
  }
}

// Four columns of a result, and with the first of them the LSE. kPlain: of a call that is is_plain().
template <class T, bool kAligned, bool kPlain = false>
FI_DEVICE_INLINE void write_columns(const AttentionParams& p, const Plan& plan, const SegmentPlace& at,
                                    int row, int chunk, Part part) {
  const QueryRow q = query_row(plan, at, row);
  RowResult result;
  if constexpr (kPlain) {
    result.factor = part.sum == 0.0f ? 0.0f : 1.0f / part.sum;
  } else {
    result = finish_row(p, q.head, part.max, part.sum);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) part.acc[e] *= result.factor;
  T* out = static_cast<T*>(p.out) + at.b * p.o_stride_b + q.head * p.o_stride_h + q.i * p.o_stride_n;
  store_columns<T, kAligned>(out + chunk * 4, part.acc, static_cast<int>(p.head_dim_vo) - chunk * 4);
  if (!kPlain && p.lse && chunk == 0) p.lse[(at.b * p.num_qo_heads + q.head) * p.qo_len + q.i] = result.lse;
}

}  // namespace fi::cuda::decode
