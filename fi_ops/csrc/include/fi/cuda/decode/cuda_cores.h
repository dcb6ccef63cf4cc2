// A warp's part of decode attention on CUDA cores: fp32, and whatever the tensor cores can't take (strides
// and sizes that are no multiple of 16 bytes, head_dim above 256).
//
// A lane takes a key for the products, then a few columns of the values. K and V are read where they lie.
#pragma once

#include "fi/cuda/decode/rope.h"
#include "fi/cuda/decode/rows.h"
#include "fi/cuda/decode/slices.h"

namespace fi::cuda::decode {

template <class T>
class CudaCores {
 public:
  static constexpr int kRows = 4, kSliceKeys = 32;
  // Small blocks, for registers: what hides the latency of loads here is the number of warps an SM.
  static constexpr int kSmWarps = 12;
  static constexpr int kBlocksAnSm = 3;
  static constexpr int kMinUnits = 4;
  static constexpr bool kAligned = false;
  using Cursor = SliceCursor<kSliceKeys, kRows>;

  FI_INLINE int query_width(const AttentionParams& p) {
    return static_cast<int>((p.head_dim_qk + 3) / 4 * 4);
  }
  FI_INLINE int acc_width(const AttentionParams& p) { return static_cast<int>((p.head_dim_vo + 3) / 4 * 4); }
  FI_INLINE int row_chunks(const AttentionParams& p) { return acc_width(p) / 4; }
  static size_t query_bytes(const AttentionParams& p) { return kRows * query_width(p) * sizeof(float); }
  static size_t warp_bytes(const AttentionParams& p) {
    return kRows * (acc_width(p) + kSliceKeys) * sizeof(float);
  }

  FI_DEVICE_INLINE CudaCores(const AttentionParams& p, const Plan&, const Cursor& cursor,
                             unsigned char* query, unsigned char* warp_memory)
      : p_(p),
        query_(reinterpret_cast<const float*>(query)),
        acc_(reinterpret_cast<float*>(warp_memory)),
        weights_(acc_ + kRows * acc_width(p)),
        lane_(threadIdx.x % 32),
        cursor_(cursor) {
    auto whole = [](const void* data, int64_t b, int64_t h, int64_t n) {
      return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (b | h | n) % (16 / int64_t(sizeof(T))) == 0;
    };
    key_vectors_ = !p.rope_keys && whole(p.key, p.k_stride_b, p.k_stride_h, p.k_stride_n);
    value_vectors_ = whole(p.value, p.v_stride_b, p.v_stride_h, p.v_stride_n);
  }

  // The query rows of a segment, as floats, into shared memory. There is no ring to come before.
  struct Query {
    FI_DEVICE_INLINE void fetch(const AttentionParams&, const Plan&, const SegmentPlace&) {}
    FI_DEVICE_INLINE void finish(const AttentionParams&, const Plan&, const SegmentPlace&) {}
    FI_DEVICE_INLINE void store(const AttentionParams& p, const Plan& plan, const SegmentPlace& at,
                                unsigned char* query) const {
      float* to = reinterpret_cast<float*>(query);
      const int width = query_width(p);
      for (int item = threadIdx.x; item < kRows * width; item += blockDim.x) {
        const int d = item % width, row = item / width;
        float x = 0.0f;
        if (at.row_begin + row < plan.rows && d < p.head_dim_qk) {
          const QueryRow q = query_row(plan, at, row);
          const T* src = static_cast<const T*>(p.query) + at.b * p.q_stride_b + q.head * p.q_stride_h +
                         q.i * p.q_stride_n;
          x = to_float(p.rope.cos ? rotated(p.rope, at.b, q.i + p.rope_q_offset, src, d) : src[d]);
        }
        to[item] = x;
      }
    }
  };

  FI_DEVICE_INLINE void begin_segment() {
    for (int d = lane_; d < kRows * acc_width(p_); d += 32) acc_[d] = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) max_[r] = -kInf, sum_[r] = 0.0f;
    __syncwarp();
  }

  FI_DEVICE_INLINE void attend(const RowTable& rows, const SegmentPlace& at, int num_rows) {
    const Slice slice = cursor_.slice();
    const int key = slice.key + lane_;
    const bool inside = key < cursor_.key_end();
    const bool masked = p_.mask != nullptr && !slice.open;
    const T* keys = static_cast<const T*>(p_.key) + at.b * p_.k_stride_b + at.kv_head * p_.k_stride_h;
    const T* values = static_cast<const T*>(p_.value) + at.b * p_.v_stride_b + at.kv_head * p_.v_stride_h +
                      slice.key * p_.v_stride_n;
    float s[kRows] = {};
    if (inside) multiply_key(keys + key * p_.k_stride_n, at.b, key, s);
    float rescale[kRows];
    bool live = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      s[r] = inside ? logit(p_, rows, r, key, masked, s[r]) : -kInf;
      live = live || (r < num_rows && s[r] != -kInf);
      float top = s[r];
#pragma unroll
      for (int other = 16; other > 0; other /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
      top = fmaxf(top, max_[r]);
      const float weight = exp2_approx(s[r] - usable_max(top));
      rescale[r] = exp2_approx(max_[r] - usable_max(top));
      max_[r] = top;
      sum_[r] = sum_[r] * rescale[r] + weight;
      weights_[r * kSliceKeys + lane_] = weight;
    }
    const unsigned live_keys = __ballot_sync(~0u, live);
    __syncwarp();
    constexpr int kVector = 16 / sizeof(T);
    if (value_vectors_) {
      const int columns = static_cast<int>(p_.head_dim_vo) / kVector * kVector;
      for (int d = lane_ * kVector; d < columns; d += 32 * kVector)
        add_values<kVector>(values, d, live_keys, rescale);
      for (int d = columns + lane_; d < p_.head_dim_vo; d += 32) add_values<1>(values, d, live_keys, rescale);
    } else {
      for (int d = lane_; d < p_.head_dim_vo; d += 32) add_values<1>(values, d, live_keys, rescale);
    }
    __syncwarp();
    cursor_.step();
  }

  FI_DEVICE_INLINE void publish(float* row_max, float* row_sum, const float** acc, int, bool) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int other = 16; other > 0; other /= 2) sum_[r] += __shfl_xor_sync(~0u, sum_[r], other);
      if (lane_ == 0) row_max[r] = max_[r], row_sum[r] = sum_[r];
    }
    if (lane_ == 0) *acc = acc_;
  }

  FI_DEVICE_INLINE int acc_offset(int row, int chunk) const { return row * acc_width(p_) + chunk * 4; }

 private:
  // N neighbours as floats; 16 bytes at once where N > 1. kOnce: the rest of the cache line is read by the
  // same warp's load, else by later ones, for which L1 keeps it.
  template <bool kOnce, int N>
  FI_DEVICE_INLINE static void load(float (&x)[N], const T* src) {
    if constexpr (N == 1) {
      x[0] = to_float(*src);
    } else {
      static_assert(N * sizeof(T) == 16);
      unpack_16<T>(x, kOnce ? load_streaming_16(src) : *reinterpret_cast<const uint4*>(src));
    }
  }

  // s[r] = row r of the query times one key. Four sums a row, whose roundings (fp32) add up to less than
  // those of one, and which don't wait for each other.
  FI_DEVICE_INLINE void multiply_key(const T* k, int b, int key, float (&s)[kRows]) const {
    constexpr int kSums = 4, kVector = 16 / sizeof(T);
    const int dim = static_cast<int>(p_.head_dim_qk), width = query_width(p_);
    float sums[kRows][kSums] = {};
    int d = 0;
    if (key_vectors_) {
#pragma unroll 4
      for (; d + kVector <= dim; d += kVector) {
        float x[kVector];
        load<false>(x, k + d);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int e = 0; e < kVector; e += kSums) {
            const float4 q = *reinterpret_cast<const float4*>(query_ + r * width + d + e);
            sums[r][0] = fmaf(q.x, x[e], sums[r][0]);
            sums[r][1] = fmaf(q.y, x[e + 1], sums[r][1]);
            sums[r][2] = fmaf(q.z, x[e + 2], sums[r][2]);
            sums[r][3] = fmaf(q.w, x[e + 3], sums[r][3]);
          }
        }
      }
    }
    for (; d < dim; d += kSums) {
#pragma unroll
      for (int e = 0; e < kSums; ++e) {
        if (d + e >= dim) continue;
        const float x = to_float(p_.rope_keys ? rotated(p_.rope, b, key, k, d + e) : k[d + e]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r][e] = fmaf(query_[r * width + d + e], x, sums[r][e]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) s[r] = (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
  }

  // Columns [d, d + N) of the accumulators: rescaled, then weights times the values of the live keys.
  template <int N>
  FI_DEVICE_INLINE void add_values(const T* values, int d, unsigned live_keys,
                                   const float (&rescale)[kRows]) {
    const int width = acc_width(p_);
    float acc[kRows][N];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int e = 0; e < N; ++e) acc[r][e] = acc_[r * width + d + e] * rescale[r];
    }
#pragma unroll 8
    for (int j = 0; j < kSliceKeys; ++j) {
      if (!(live_keys >> j & 1)) continue;
      float x[N];
      load<true>(x, values + j * p_.v_stride_n + d);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int e = 0; e < N; ++e) acc[r][e] = fmaf(weights_[r * kSliceKeys + j], x[e], acc[r][e]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int e = 0; e < N; ++e) acc_[r * width + d + e] = acc[r][e];
    }
  }

  const AttentionParams& p_;
  const float* query_;  // [kRows][query_width], rotated
  float* acc_;          // [kRows][acc_width]
  float* weights_;      // [kRows][kSliceKeys]
  int lane_;
  Cursor cursor_;
  bool key_vectors_, value_vectors_;
  float max_[kRows], sum_[kRows];
};

}  // namespace fi::cuda::decode
