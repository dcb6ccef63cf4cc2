// A warp's part of decode attention on tensor cores: 16 query rows against slices of 16 keys.
//
// K and V come through a ring in shared memory that is the warp's own: cp.async several slices ahead, no
// barrier but the warp's. The ring keeps running over the segments of the block, so that the memory pipe
// stays full while one segment is finished. Products and weights stay in registers: the accumulators of
// Q K^T have the layout that the weights need as the left side of P V.
#pragma once

#include "fi/cuda/decode/query_rows.h"
#include "fi/cuda/decode/slices.h"

namespace fi::cuda::decode {

// How a head_dim is run. A block has half of kSmWarps, with two blocks an SM, so that one loads while the
// other begins or joins; or all of them where there is a block for each SM at most. Either way the stages of
// an SM hold 128 KB of K and V, of which at least half are in flight. That is more than twice what covers the
// latency of HBM at full rate; still more only makes all wait longer, and some SMs much longer than others.
// Devices with less shared memory run fewer warps.
template <int kDim>
struct Shape {
  static constexpr int kSmWarps = kDim <= 128 ? kMaxWarps : 4;
  static constexpr int kStages = kDim <= 64 ? 4 : 2;
  static constexpr int kBlocksAnSm = kDim <= 128 ? 2 : 1;
  static constexpr int kMinUnits = 2;                     // two slices for each warp of a half block
  static constexpr bool kQueryInRegisters = kDim <= 128;  // else read from shared memory for each slice
};

// kIsPlain: for calls that are is_plain(), whose query the threads hold.
template <class T, int kDim, class TheCursor = SliceCursor<16, 16>, bool kIsPlain = false>
class TensorCores {
  static constexpr int kStages = Shape<kDim>::kStages;
  static constexpr bool kQueryInRegisters = Shape<kDim>::kQueryInRegisters;
  static constexpr bool kTwoChains = kQueryInRegisters;
  static constexpr int kRowBytes = kDim * 2, kChunks = kDim / 8, kSteps = kDim / 16;
  static constexpr int kStageBytes = 2 * 16 * kRowBytes;  // K, then V

 public:
  static constexpr int kRows = 16, kSliceKeys = 16, kRingSlices = kStages;
  static constexpr int kSmWarps = Shape<kDim>::kSmWarps;
  static constexpr int kBlocksAnSm = Shape<kDim>::kBlocksAnSm;
  static constexpr int kMinUnits = Shape<kDim>::kMinUnits;
  static constexpr bool kAligned = true;
  static constexpr bool kPlain = kIsPlain;
  using Cursor = TheCursor;
  static_assert(kStageBytes == kRows * kDim * sizeof(float), "publish() puts the accumulators into a stage");

  static size_t query_bytes(const AttentionParams&) { return kRows * kRowBytes; }
  static size_t added_bytes(const Plan& plan) {
    return size_t(2 * plan.added.count) * kRowBytes;
  }  // behind it
  static size_t warp_bytes(const AttentionParams&) { return kStages * kStageBytes; }
  static int acc_width(const AttentionParams&) { return kDim; }
  static constexpr int kRowChunks = kDim / 4;  // four accumulators each
  FI_INLINE int row_chunks(const AttentionParams&) { return kRowChunks; }

  using Query = QueryRows<T, kDim, kSmWarps / kBlocksAnSm * 32, kIsPlain>;

  FI_DEVICE_INLINE TensorCores(const AttentionParams& p, const Plan& plan, const Cursor& cursor,
                               unsigned char* query, unsigned char* warp_memory)
      : p_(p), plan_(plan), query_(query), ring_(warp_memory), lane_(threadIdx.x % 32), cursor_(cursor) {
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) issue(s);
  }

  // After Query::store and a barrier.
  FI_DEVICE_INLINE void begin_segment() {
    if constexpr (kQueryInRegisters) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_query_fragment(q_[step], step);
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_[n][e] = 0.0f;
    }
    max_[0] = max_[1] = -kInf;
    sum_[0] = sum_[1] = 0.0f;
  }

  // The next slice of the ring. Only here the stage of the slice before is filled again: publish() may have
  // used it meanwhile.
  FI_DEVICE_INLINE void attend(const RowTable& rows, const SegmentPlace& at, int num_rows) {
    __syncwarp();
    if (used_ >= 0) issue(used_);
    const int key = keys_[0] >> 1, own_key = key + lane_ % kSliceKeys;
    const bool masked = p_.mask != nullptr && !(keys_[0] & 1);
    float addend = 0.0f;  // of own_key, where one row of mask is for all
    if (Cursor::kOneMaskRow && masked && own_key < p_.kv_len) addend = own_addend(at.b, own_key);
    cp_async_wait<kStages - 1>();
    __syncwarp();
    unsigned char* stage = ring_ + out_ * kStageBytes;
    used_ = out_;
    if (++out_ == kStages) out_ = 0;
    if (!kPlain && p_.rope_keys) rotate_keys(stage, at.b, key);
    if (plan_.added.count) put_new_rows(stage, key, rows);

    float s[2][4] = {}, odd[2][4] = {};
    multiply_keys(stage, s, odd);
    unsigned char* values = stage + kSliceKeys * kRowBytes;
    bool special;
    if constexpr (kPlain) {
      special = masked || key < cursor_.key_begin() || key + kSliceKeys > cursor_.key_end();
    } else {
      special = masked || p_.logits_soft_cap > 0.0f || p_.alibi_slopes || key < rows.common_begin ||
                key + kSliceKeys > rows.common_end;
    }
    if (kPlain || !special) {
      const float scale = p_.scale * kLog2e;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = (s[n][e] + odd[n][e]) * scale;
      }
    }
    if (special) {
      if constexpr (kPlain) {
        const unsigned live = __ballot_sync(
            ~0u, own_key >= cursor_.key_begin() && own_key < cursor_.key_end() && addend == 0.0f);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[n][e] = live >> column_of(n, e) & 1 ? s[n][e] : -kInf;
        }
        clear_dead_values(values, live);
      } else {
        general_logits(rows, key, masked, addend, s, odd);
        clear_dead_values(values, live_keys(s, num_rows));
      }
    }
    weigh(s);
    const uint32_t weights[4] = {pack2<T>(s[0][0], s[0][1]), pack2<T>(s[0][2], s[0][3]),
                                 pack2<T>(s[1][0], s[1][1]), pack2<T>(s[1][2], s[1][3])};
    multiply_values(values, weights);
  }

  // The warp's result of a segment, for all warps to read: maxima and sums of the rows, the accumulators over
  // the stage that was used last. Where the warp had no slice, only sums of 0.
  FI_DEVICE_INLINE void publish(float* row_max, float* row_sum, const float** acc, int num_rows,
                                bool had_slices) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int other = 1; other < 4; other *= 2) sum_[half] += __shfl_xor_sync(~0u, sum_[half], other);
      const int row = row_of(2 * half);
      if (lane_ % 4 == 0) row_max[row] = max_[half], row_sum[row] = sum_[half];
    }
    if (!had_slices) return;
    __syncwarp();
    float* stage = reinterpret_cast<float*>(ring_ + used_ * kStageBytes);
    if (lane_ == 0) *acc = stage;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(2 * half);
      if (row >= num_rows) continue;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        // acc_offset(row, 2 * n + lane_ % 4 / 2): four addresses serve all.
        const int offset = acc_offset(lane_ / 4, n % 4 * 2 + lane_ % 4 / 2) + n / 4 * 32 + half * 8 * kDim;
        *reinterpret_cast<float2*>(stage + offset + lane_ % 2 * 2) =
            float2{acc_[n][2 * half], acc_[n][2 * half + 1]};
      }
    }
  }

  // Where four columns of a published row are.
  FI_DEVICE_INLINE static int acc_offset(int row, int chunk) { return row * kDim + (chunk ^ (row & 7)) * 4; }

 private:
  FI_DEVICE_INLINE static int offset_of(int row, int chunk) { return row_chunk_offset<kDim>(row, chunk); }
  // offset_of(row, 2 * pair + chunk), chunk 0 or 1, for a constant pair: four addresses serve all pairs.
  FI_DEVICE_INLINE static int offset_of_pair(int row, int pair, int chunk) {
    return offset_of(row, pair % 4 * 2 + chunk) + pair / 4 * 128;
  }
  // Row and column, in the tile, of an accumulator of this lane.
  FI_DEVICE_INLINE int row_of(int e) const { return lane_ / 4 + (e / 2) * 8; }
  FI_DEVICE_INLINE int column_of(int n, int e) const { return n * 8 + lane_ % 4 * 2 + e % 2; }

  // Copies the cursor's slice into a stage. One group of copies a call, empty ones at the end.
  FI_DEVICE_INLINE void issue(int to_stage) {
#pragma unroll
    for (int s = 0; s + 1 < kStages; ++s) keys_[s] = keys_[s + 1];
    if (!cursor_.done()) {
      constexpr int kRowsAtOnce = 32 / kChunks;
      if (cursor_.entered()) {
        const SegmentPlace at = cursor_.place();
        k_ = static_cast<const T*>(p_.key) + at.b * p_.k_stride_b + at.kv_head * p_.k_stride_h;
        v_ = static_cast<const T*>(p_.value) + at.b * p_.v_stride_b + at.kv_head * p_.v_stride_h;
      }
      const Slice slice = cursor_.slice();
      const int row = lane_ / kChunks, chunk = lane_ % kChunks;
      unsigned char* stage = ring_ + to_stage * kStageBytes;
      const bool whole = slice.key + kSliceKeys <= cursor_.key_end();
      auto copy = [&](unsigned char* to, const T* head, int64_t stride, int64_t dim) {
        const T* src = head + (slice.key + row) * stride + chunk * 8;
        to += row * kRowBytes;
        const int column = (chunk ^ row) << 4;
        const bool chunk_inside = chunk * 8 < dim;
        if (whole && dim == kDim) {
#pragma unroll
          for (int r = 0; r < kSliceKeys; r += kRowsAtOnce, src += kRowsAtOnce * stride)
            cp_async_16(to + r * kRowBytes + (column ^ (r & 7) << 4), src);
        } else {
#pragma unroll 1
          for (int r = 0; r < kSliceKeys; r += kRowsAtOnce, src += kRowsAtOnce * stride) {
            const bool inside = chunk_inside && slice.key + row + r < cursor_.key_end();
            cp_async_16(to + r * kRowBytes + (column ^ (r & 7) << 4), inside ? src : head, inside);
          }
        }
      };
      copy(stage, k_, p_.k_stride_n, p_.head_dim_qk);
      copy(stage + kSliceKeys * kRowBytes, v_, p_.v_stride_n, p_.head_dim_vo);
      keys_[kStages - 1] = slice.key << 1 | int(slice.open);
      cursor_.step();
    }
    cp_async_commit();
  }

  FI_DEVICE_INLINE void load_query_fragment(uint32_t (&q)[4], int step) const {
    ldmatrix_x4(q, query_ + offset_of_pair(lane_ % 16, step, lane_ / 16));
  }

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
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t v[4];
      ldmatrix_x4_trans(v, values + offset_of_pair(row, n, chunk));
      mma_m16n8k16<T>(acc_[2 * n], weights, v[0], v[1]);
      mma_m16n8k16<T>(acc_[2 * n + 1], weights, v[2], v[3]);
    }
  }

  // One copy of the code for all eight, which take turns in s[0][0]: where it runs, it mostly runs once a
  // call, and fetching it takes longer than running it.
  FI_DEVICE_INLINE void general_logits(const RowTable& rows, int key, bool masked, float addend,
                                       float (&s)[2][4], const float (&odd)[2][4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] += odd[n][e];
    }
#pragma unroll 1
    for (int item = 0; item < 8; ++item) {
      const int n = item / 4, e = item % 4;
      const int row = row_of(e), column = column_of(n, e);
      float x = -kInf;
      if constexpr (Cursor::kOneMaskRow) {
        const float added = __shfl_sync(~0u, addend, column);
        if (sees(rows, row, key + column))
          x = add_mask(unmasked_logit(p_, rows, row, key + column, s[0][0]), added);
      } else {
        x = logit(p_, rows, row, key + column, masked, s[0][0]);
      }
#pragma unroll
      for (int next = 1; next < 8; ++next) s[(next - 1) / 4][(next - 1) % 4] = s[next / 4][next % 4];
      s[1][3] = x;
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
    for (int n = 0; n < kDim / 8; ++n) {
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
    for (int item = lane_; item < kSliceKeys * kChunks; item += 32) {
      const int row = item / kChunks;
      if (!(live >> row & 1))
        *reinterpret_cast<uint4*>(values + offset_of(row, item % kChunks)) = uint4{0, 0, 0, 0};
    }
    __syncwarp();
  }

  // Of the one row of mask that is there, at a key.
  FI_DEVICE_INLINE float own_addend(int b, int key) const {
    const int64_t at = b * p_.mask_stride_b + key;
    if constexpr (kPlain) return mask_addend(static_cast<const uint8_t*>(p_.mask)[at]);
    return addend_at(p_, at);
  }

  // New rows take the place of what came from their slots: that may be what was there before.
  FI_DEVICE_INLINE void put_new_rows(unsigned char* stage, int key, const RowTable& rows) {
#pragma unroll 1
    for (int i = 0; i < plan_.added.count; ++i) {
      const int row = rows.slot[i] - key;
      if (row < 0 || row >= kSliceKeys) continue;
#pragma unroll
      for (int item = lane_; item < 2 * kChunks; item += 32) {
        const bool is_value = item >= kChunks;
        const int chunk = item % kChunks;
        *reinterpret_cast<uint4*>(stage + (is_value ? kSliceKeys * kRowBytes : 0) + offset_of(row, chunk)) =
            *reinterpret_cast<const uint4*>(query_ + offset_of(added_row(plan_, i, is_value), chunk));
      }
    }
    __syncwarp();
  }

  FI_DEVICE_INLINE void rotate_keys(unsigned char* keys, int b, int key) {
    const int half = static_cast<int>(p_.rope.rotary_dim / 2);
#pragma unroll 1
    for (int row = 0; row < kSliceKeys && key + row < p_.kv_len; ++row) {
#pragma unroll 1
      for (int i = lane_; i < half; i += 32) {
        const int first = p_.rope.interleaved ? 2 * i : i, second = rope_partner(p_.rope, first);
        T* low = element(keys, row, first);
        T* high = element(keys, row, second);
        const float x = to_float(*low), y = to_float(*high);
        *low = from_float<T>(rotated(p_.rope, b, key + row, x, y, first));
        *high = from_float<T>(rotated(p_.rope, b, key + row, y, x, second));
      }
    }
    __syncwarp();
  }
  FI_DEVICE_INLINE static T* element(unsigned char* tile, int row, int d) {
    return reinterpret_cast<T*>(tile + offset_of(row, d / 8)) + d % 8;
  }

  const AttentionParams& p_;
  const Plan& plan_;
  unsigned char* query_;
  unsigned char* ring_;
  int lane_;
  Cursor cursor_;
  const T* k_ = nullptr;  // of the cursor's segment
  const T* v_ = nullptr;
  int out_ = 0;             // the stage to use next
  int used_ = -1;           // the one that attend() used last; -1: none in this segment
  int keys_[kStages] = {};  // first key << 1 | open of the slices in flight, oldest first
  uint32_t q_[kQueryInRegisters ? kSteps : 1][4];
  float acc_[kDim / 8][4];
  float max_[2], sum_[2];
};

}  // namespace fi::cuda::decode
