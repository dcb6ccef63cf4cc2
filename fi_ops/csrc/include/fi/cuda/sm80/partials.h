// Split keys: partial results of the parts, and their joining.
#pragma once

#include "fi/cuda/attention_rows.h"

namespace fi::cuda {

// Partial results of a block whose tiles were split: joined in order of the parts by combine().
struct Partials {
  float* out = nullptr;    // [parts][heads][num_rows][width]: not divided; null: nothing is split
  float* state = nullptr;  // [parts][heads][num_rows][2]: maximum, sum
  int parts = 1;
  int64_t width = 0;  // of head_dim_vo, padded
  int64_t heads = 0;  // batch * num_kv_heads
  int64_t num_rows = 0;

  FI_DEVICE_INLINE int64_t row(int64_t part, int64_t head, int64_t r) const {
    return (part * heads + head) * num_rows + r;
  }
};

// Joins one row's partial results, a part `part_rows` rows after the one before, in their order; a warp a
// row, a lane four columns at a time (head_dim_vo and the output's rows are multiples of 8). finish(maximum,
// sum): the factor of the values.
template <class T, class Finish>
FI_DEVICE_INLINE void join_row(const float* partial, const float* state, int parts, int64_t part_rows,
                               int64_t width, T* out, int64_t head_dim_vo, const Finish& finish) {
  const int lane = threadIdx.x % 32;
  float top = -kInf, sum = 0.0f;
  for (int part = lane; part < parts; part += 32) top = fmaxf(top, state[2 * part * part_rows]);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
  const float shift = usable_max(top);
  for (int part = lane; part < parts; part += 32)
    sum += state[2 * part * part_rows + 1] * exp2f(state[2 * part * part_rows] - shift);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  const float factor = finish(top, sum);
  for (int64_t d = 4 * lane; d < head_dim_vo; d += 4 * 32) {
    float4 x{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
      const float weight = exp2f(state[2 * part * part_rows] - shift);
      const float4 y = *reinterpret_cast<const float4*>(partial + part * part_rows * width + d);
      x.x = fmaf(y.x, weight, x.x);
      x.y = fmaf(y.y, weight, x.y);
      x.z = fmaf(y.z, weight, x.z);
      x.w = fmaf(y.w, weight, x.w);
    }
    *reinterpret_cast<uint2*>(out + d) = {pack2<T>(x.x * factor, x.y * factor),
                                          pack2<T>(x.z * factor, x.w * factor)};
  }
}

// Writes p.out and p.lse from the partial results (host).
void combine(const AttentionParams& p, const Partials& partials, const Gpu& gpu);

}  // namespace fi::cuda
