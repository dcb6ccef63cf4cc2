// A warp's part of decode attention on tensor cores: 16 query rows against slices of 16 keys.
//
// K and V come through a ring in shared memory that is the warp's own: cp.async several slices ahead, no
// barrier but the warp's. The ring keeps running over the segments of the block, so that the memory pipe
// stays full while one segment is finished.
#pragma once

#include <numeric>

#include "fi/cuda/decode/slices.h"
#include "fi/cuda/decode/warp_tile.h"

namespace fi::cuda::decode {

// Rows that whole warps copy together, 16 bytes a lane.
template <int kDim>
inline constexpr int kCopyRows = std::lcm(32, kDim / 8) / (kDim / 8);

// kIsPlain: for calls that are is_plain(), whose query the threads hold.
template <class T, int kDimQK, int kDimVO, class TheCursor = SliceCursor<16, 16>, bool kIsPlain = false>
class TensorCores : public WarpTile<T, kDimQK, kDimVO> {
  using Tile = WarpTile<T, kDimQK, kDimVO>;
  using TheShape = Shape<kDimQK, kDimVO>;
  using Tile::kChunks, Tile::kRowBytes, Tile::kTileBytes, Tile::kValueChunks;
  using Tile::lane_, Tile::query_;
  using Tile::row_of, Tile::column_of, Tile::offset_of, Tile::value_offset_of;
  static constexpr int kStages = TheShape::kStages;
  static constexpr int kStageBytes = kTileBytes + Tile::kValueTileBytes;  // K, then V

 public:
  using Tile::kRows, Tile::kSliceKeys;
  static constexpr int kRingSlices = kStages;
  static constexpr int kSmWarps = TheShape::kSmWarps;
  static constexpr int kBlocksAnSm = TheShape::kBlocksAnSm;
  static constexpr int kMinUnits = TheShape::kMinUnits;
  static constexpr bool kAligned = true;
  static constexpr bool kPlain = kIsPlain;
  using Cursor = TheCursor;
  static_assert(kDimVO <= kDimQK && kStageBytes >= kRows * kDimVO * sizeof(float),
                "publish() puts the accumulators into a stage");

  static size_t query_bytes(const AttentionParams&) { return kRows * kRowBytes; }
  static size_t added_bytes(const Plan& plan) {
    return size_t(2 * plan.added.count) * kRowBytes;
  }  // behind it
  static size_t warp_bytes(const AttentionParams&) { return kStages * kStageBytes; }
  static int acc_width(const AttentionParams&) { return kDimVO; }
  static constexpr int kRowChunks = kDimVO / 4;  // four accumulators each
  FI_INLINE int row_chunks(const AttentionParams&) { return kRowChunks; }

  using Query = QueryRows<T, kDimQK, kSmWarps / kBlocksAnSm * 32, kIsPlain>;

  FI_DEVICE_INLINE TensorCores(const AttentionParams& p, const Plan& plan, const Cursor& cursor,
                               unsigned char* query, unsigned char* warp_memory)
      : Tile(query), p_(p), plan_(plan), ring_(warp_memory), cursor_(cursor) {
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) issue(s);
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
    this->multiply_keys(stage, s, odd);
    unsigned char* values = stage + kTileBytes;
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
        this->clear_dead_values(values, live);
      } else {
        general_logits(rows, key, masked, addend, s, odd);
        this->clear_dead_values(values, this->live_keys(s, num_rows));
      }
    }
    this->weigh(s);
    const uint32_t weights[4] = {pack2<T>(s[0][0], s[0][1]), pack2<T>(s[0][2], s[0][3]),
                                 pack2<T>(s[1][0], s[1][1]), pack2<T>(s[1][2], s[1][3])};
    this->multiply_values(values, weights);
  }

  // The warp's result of a segment, over the stage that was used last.
  FI_DEVICE_INLINE void publish(float* row_max, float* row_sum, const float** acc, int num_rows,
                                bool had_slices) {
    this->publish_to(reinterpret_cast<float*>(ring_ + used_ * kStageBytes), row_max, row_sum, acc, num_rows,
                     had_slices);
  }

 private:
  // Copies the cursor's slice into a stage. One group of copies a call, empty ones at the end.
  FI_DEVICE_INLINE void issue(int to_stage) {
#pragma unroll
    for (int s = 0; s + 1 < kStages; ++s) keys_[s] = keys_[s + 1];
    if (!cursor_.done()) {
      if (cursor_.entered()) {
        const SegmentPlace at = cursor_.place();
        k_ = static_cast<const T*>(p_.key) + at.b * p_.k_stride_b + at.kv_head * p_.k_stride_h;
        v_ = static_cast<const T*>(p_.value) + at.b * p_.v_stride_b + at.kv_head * p_.v_stride_h;
      }
      const Slice slice = cursor_.slice();
      unsigned char* stage = ring_ + to_stage * kStageBytes;
      copy<kDimQK>(stage, k_, p_.k_stride_n, p_.head_dim_qk, slice.key);
      copy<kDimVO>(stage + kTileBytes, v_, p_.v_stride_n, p_.head_dim_vo, slice.key);
      keys_[kStages - 1] = slice.key << 1 | int(slice.open);
      cursor_.step();
    }
    cp_async_commit();
  }

  // A slice of keys or of values. Lanes take neighbouring chunks, so many rows at once as these fill.
  template <int kDim>
  FI_DEVICE_INLINE void copy(unsigned char* to, const T* head, int64_t stride, int64_t dim, int key) const {
    constexpr int kRowChunks = kDim / 8, kRowsAtOnce = kCopyRows<kDim>;
    const bool whole = key + kSliceKeys <= cursor_.key_end();
#pragma unroll
    for (int first = 0; first < kRowsAtOnce * kRowChunks; first += 32) {
      const int row = (first + lane_) / kRowChunks, chunk = (first + lane_) % kRowChunks;
      const T* src = head + (key + row) * stride + chunk * 8;
      unsigned char* const place = to + row * kDim * 2;
      const int column = (chunk ^ row) << 4;
      if (whole && dim == kDim) {
#pragma unroll
        for (int r = 0; r < kSliceKeys; r += kRowsAtOnce, src += kRowsAtOnce * stride)
          cp_async_16(place + r * kDim * 2 + (column ^ (r & 7) << 4), src);
      } else {
        const bool chunk_inside = chunk * 8 < dim;
#pragma unroll 1
        for (int r = 0; r < kSliceKeys; r += kRowsAtOnce, src += kRowsAtOnce * stride) {
          const bool inside = chunk_inside && key + row + r < cursor_.key_end();
          cp_async_16(place + r * kDim * 2 + (column ^ (r & 7) << 4), inside ? src : head, inside);
        }
      }
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
      for (int item = lane_; item < kChunks + kValueChunks; item += 32) {
        const bool is_value = item >= kChunks;
        const int chunk = is_value ? item - kChunks : item;
        unsigned char* const to =
            stage + (is_value ? kTileBytes + value_offset_of(row, chunk) : offset_of(row, chunk));
        *reinterpret_cast<uint4*>(to) =
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
  unsigned char* ring_;
  Cursor cursor_;
  const T* k_ = nullptr;  // of the cursor's segment
  const T* v_ = nullptr;
  int out_ = 0;             // the stage to use next
  int used_ = -1;           // the one that attend() used last; -1: none in this segment
  int keys_[kStages] = {};  // first key << 1 | open of the slices in flight, oldest first
};

}  // namespace fi::cuda::decode
