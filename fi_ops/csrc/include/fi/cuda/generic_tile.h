// 64 query rows against 64 keys at a time on CUDA cores, in fp32 throughout, wherever the elements come from.
//
// 256 threads: thread (y, x) of a 16 x 16 grid has rows 4y .. and keys 4x .. of the products, the same rows
// and columns 4x .. of each 64 columns of the output. Operands pass through shared memory 64 elements of
// depth at a time, transposed where the product sums over them.
#pragma once

#include "fi/cuda/attention_rows.h"
#include "fi/fp8.h"

namespace fi::cuda {

// Element `at` of a cache of T or of 8-bit floats.
template <class T>
FI_DEVICE_INLINE float load_kv(const void* data, int64_t at, Fp8 format) {
  return format == Fp8::none   ? to_float(static_cast<const T*>(data)[at])
         : format == Fp8::e4m3 ? from_e4m3(static_cast<const uint8_t*>(data)[at])
                               : from_e5m2(static_cast<const uint8_t*>(data)[at]);
}

// kParts: 64 columns of the output each.
template <int kParts>
class GenericTile {
 public:
  static constexpr int kThreads = 256, kRows = 64, kKeys = 64, kDepth = 64;
  static constexpr int kPitch = 64 + 4;  // floats; rows of float4, off the power of two

  struct Smem {
    float q[kDepth * kPitch];       // [depth][row]
    float k[kDepth * kPitch];       // [depth][key]; then V, [key][column]
    float weights[kKeys * kPitch];  // [key][row]
  };

  FI_DEVICE_INLINE explicit GenericTile(Smem& smem)
      : x4(threadIdx.x % 16 * 4), y4(threadIdx.x / 16 * 4), smem(smem) {}

  const int x4, y4;  // of this thread: its first key or column, its first row

  FI_DEVICE_INLINE void begin() {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      row_max[r] = -kInf;
      row_sum[r] = 0.0f;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[part][r][c] = 0.0f;
      }
    }
  }

  // query(r, d) and key(j, d): elements, 0 where there is no such row. to_logits(s): products of rows y4 ..
  // and keys x4 .. to logits, base 2. value(j, column): likewise, of the block's columns.
  template <class Query, class Key, class Logits, class Value>
  FI_DEVICE_INLINE void attend(int64_t head_dim_qk, const Query& query, const Key& key,
                               const Logits& to_logits, const Value& value) {
    float s[4][4] = {};
    for (int64_t depth = 0; depth < head_dim_qk; depth += kDepth) {
      __syncthreads();
      for (int at = threadIdx.x; at < kDepth * 64; at += kThreads) {
        const int d = at % kDepth, r = at / kDepth;
        const bool inside = depth + d < head_dim_qk;
        smem.q[d * kPitch + r] = inside ? query(r, depth + d) : 0.0f;
        smem.k[d * kPitch + r] = inside ? key(r, depth + d) : 0.0f;
      }
      __syncthreads();
      add_products(s, smem.q + y4, smem.k + x4);
    }
    to_logits(s);
    softmax(s);
    for (int part = 0; part < kParts; ++part) add_values(part, value);
  }

  // After the last keys, by all threads: row_sum to whole rows' sums.
  FI_DEVICE_INLINE void join_sums() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int lanes = 8; lanes > 0; lanes /= 2) row_sum[i] += __shfl_xor_sync(kAllLanes, row_sum[i], lanes);
    }
  }

  // put(column, what has been accumulated) for this thread's columns of row y4 + i.
  template <class Put>
  FI_DEVICE_INLINE void for_columns(int i, int64_t first_column, int64_t head_dim_vo, const Put& put) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int64_t column = first_column + 64 * part + x4 + c;
        if (column < head_dim_vo) put(column, o[part][i][c]);
      }
    }
  }

  float row_max[4], row_sum[4];

 private:
  // c += the sum over 64 rows of a's 4 floats by b's 4. Sixteen are summed by themselves first: one chain of
  // additions over everything would lose the last bits of fp32.
  static FI_DEVICE_INLINE void add_products(float (&c)[4][4], const float* a, const float* b) {
    for (int first = 0; first < 64; first += 16) {
      float sum[4][4] = {};
#pragma unroll 4
      for (int n = first; n < first + 16; ++n) multiply_add(sum, a + n * kPitch, b + n * kPitch);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) c[i][j] += sum[i][j];
      }
    }
  }

  static FI_DEVICE_INLINE void multiply_add(float (&c)[4][4], const float* a, const float* b) {
    const float4 u = *reinterpret_cast<const float4*>(a), v = *reinterpret_cast<const float4*>(b);
    const float us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) c[i][j] = fmaf(us[i], vs[j], c[i][j]);
    }
  }

  // Logits to weights, in shared memory too; rescales what has been accumulated.
  FI_DEVICE_INLINE void softmax(float (&s)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float top = fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3]));
#pragma unroll
      for (int lanes = 8; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
      top = fmaxf(top, row_max[i]);
      const float shift = usable_max(top), rescale = exp2f(row_max[i] - shift);
      row_max[i] = top;
      row_sum[i] *= rescale;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[part][i][c] *= rescale;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float w = exp2f(s[i][j] - shift);
        row_sum[i] += w;
        smem.weights[(x4 + j) * kPitch + y4 + i] = w;
      }
    }
  }

  template <class Value>
  FI_DEVICE_INLINE void add_values(int part, const Value& value) {
    __syncthreads();
    for (int at = threadIdx.x; at < kKeys * 64; at += kThreads) {
      const int c = at % 64, j = at / 64;
      smem.k[j * kPitch + c] = value(j, 64 * part + c);
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kParts; ++n) {  // a constant index keeps o in registers
      if (n == part) add_products(o[n], smem.weights + y4, smem.k + x4);
    }
  }

  Smem& smem;
  float o[kParts][4][4];
};

}  // namespace fi::cuda
