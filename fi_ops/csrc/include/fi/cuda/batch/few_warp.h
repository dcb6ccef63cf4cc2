// A warp's part of attention of few query rows over a batch: 16 rows against slices of 16 keys, wherever
// their pages are.
//
// K and V come through a ring in shared memory that is the warp's own: cp.async several slices ahead, no
// barrier but the warp's. A lane looks up the page of one key, one slice ahead of the copies, and the lanes
// that copy its row get the row's address from it: pages of any size cost the same. The ring runs on over the
// runs of the block.
#pragma once

#include "fi/cuda/batch/few_runs.h"
#include "fi/cuda/batch/fp8_tile.h"
#include "fi/cuda/pack.h"

namespace fi::cuda::batch {

using decode::RowTable;

// What a warp multiplies: tiles of T, or of fp8.
template <class T, int kDim, Fp8 kFormat>
struct TileOf {
  using type = Fp8Tile<kDim, kFormat>;
};
template <class T, int kDim>
struct TileOf<T, kDim, Fp8::none> {
  using type = decode::WarpTile<T, kDim>;
};

// kPlain: logits are scaled products, and there is no mask; kGeneral: everything but RoPE; kRope: all of it.
enum class FewCall { kPlain, kGeneral, kRope };

template <class T, int kDim, Fp8 kFormat, FewCall kCall>
class FewWarp : public TileOf<T, kDim, kFormat>::type {
  using Tile = typename TileOf<T, kDim, kFormat>::type;
  using Shape = decode::Shape<kDim>;
  using Tile::lane_;
  using Tile::row_of, Tile::column_of;
  static constexpr bool kFp8 = kFormat != Fp8::none;
  static constexpr int kStages = kFp8 ? 4 : Shape::kStages;
  static constexpr int kElementBytes = kFp8 ? 1 : 2;
  static constexpr int kRowBytes = kDim * kElementBytes, kChunks = kRowBytes / 16;
  static constexpr int kChunkElements = 16 / kElementBytes;
  static constexpr int kTileBytes = 16 * kRowBytes, kStageBytes = 2 * kTileBytes;  // K, then V
  // Where a stage has no room for the accumulators, they have a place of their own.
  static constexpr int kAccBytes = kFp8 ? 16 * kDim * 4 : 0;

 public:
  using Tile::kRows, Tile::kSliceKeys;
  static constexpr int kHeadDim = kDim;
  static constexpr bool kScalesQuery = kFp8 && !__is_same(T, f16);
  static constexpr bool kPlain = kCall == FewCall::kPlain, kRope = kCall == FewCall::kRope;
  static_assert(!kRope || !kFp8, "rotated keys are rounded to T");
  static constexpr int kSmWarps = Shape::kSmWarps, kBlocksAnSm = Shape::kBlocksAnSm;
  static constexpr int kMinUnits = Shape::kMinUnits;
  static constexpr int kRowChunks = kDim / 4;  // four accumulators each

  static size_t query_bytes(const AttentionParams&) { return kRows * kDim * 2; }
  static size_t warp_bytes(const AttentionParams&) { return kStages * kStageBytes + kAccBytes; }

  FI_DEVICE_INLINE FewWarp(const FewArgs& args, const RunTable& table, unsigned char* query,
                           unsigned char* warp_memory)
      : Tile(query), p_(args.p), table_(table), ring_(warp_memory) {}

  // With a newly filled table, when the slices of the one before are done with.
  FI_DEVICE_INLINE void start() {
    run_ = -1;
    at_ = num_ = 0;
    step();
    cp_async_wait<0>();  // of empty groups
    out_ = 0, used_ = -1;
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) issue(s);
  }

  // Slices of a run that this warp takes: they are dealt out in turn.
  FI_DEVICE_INLINE static int slices_of(const Run& run) {
    const int all = (run.key_end - run.key_begin + kSliceKeys - 1) / kSliceKeys;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    return all > warp ? (all - warp + warps - 1) / warps : 0;
  }

  // The next slice of the ring, of `run`; `scale` of products besides the call's own, for rows lane_ / 4 and
  // 8 further. Only here the stage of the slice before is filled again: publish() may have used it meanwhile.
  FI_DEVICE_INLINE void attend(const RowTable& rows, const Run& run, const float (&scale)[2]) {
    __syncwarp();
    if (used_ >= 0) issue(used_);
    const int key = keys_[0];
    const unsigned absent = absent_[0];
    cp_async_wait<kStages - 1>();
    __syncwarp();
    unsigned char* keys = ring_ + out_ * kStageBytes;
    unsigned char* values = keys + kTileBytes;
    used_ = out_;
    if (++out_ == kStages) out_ = 0;
    if constexpr (kRope) rotate_keys(keys, key);

    float s[2][4] = {}, odd[2][4] = {};
    this->multiply_keys(keys, s, odd);
    const AttentionParams& c = p_.call;
    const bool at_edge = absent != 0 || key < rows.common_begin || key + kSliceKeys > rows.common_end;
    const bool special =
        at_edge || (!kPlain && (p_.custom_mask || c.logits_soft_cap > 0.0f || c.alibi_slopes));
    const float factor = kPlain || !special ? c.scale * kLog2e : 1.0f;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = (s[n][e] + odd[n][e]) * (factor * scale[e / 2]);
    }
    if (special) {
      if constexpr (kPlain) {
        leave_seen(rows, key, absent, s);
      } else {
        general_logits(rows, key, absent, s);
      }
      this->clear_dead_values(values, this->live_keys(s, run.num_rows));
    }
    this->weigh(s);
    using E = typename Tile::Element;
    const uint32_t weights[4] = {pack2<E>(s[0][0], s[0][1]), pack2<E>(s[0][2], s[0][3]),
                                 pack2<E>(s[1][0], s[1][1]), pack2<E>(s[1][2], s[1][3])};
    this->multiply_values(values, weights);
  }

  // The warp's result of a run.
  FI_DEVICE_INLINE void publish(float* row_max, float* row_sum, const float** acc, int num_rows,
                                bool had_slices) {
    unsigned char* stage = ring_ + (kFp8 ? kStages : used_) * kStageBytes;
    this->publish_to(reinterpret_cast<float*>(stage), row_max, row_sum, acc, num_rows, had_slices);
  }

 private:
  FI_DEVICE_INLINE bool done() const { return run_ >= table_.count; }

  // To this warp's next slice, and the page of this lane's key in it: looked up now, used at the next copy.
  FI_DEVICE_INLINE void step() {
    ++at_;
    while (at_ >= num_) {
      if (++run_ >= table_.count) return;
      num_ = slices_of(table_.runs[run_]);
      at_ = 0;
    }
    const Run& run = table_.runs[run_];
    const int warps = blockDim.x / 32;
    key_ = run.key_begin + (at_ * warps + static_cast<int>(threadIdx.x / 32)) * kSliceKeys;
    const int own = key_ + lane_ % kSliceKeys;
    page_ = -1;
    if (own >= run.key_end) return;
    if (!p_.is_paged()) {
      page_ = 0;
      entry_ = run.kv_begin + own;
      return;
    }
    const unsigned page_size = static_cast<unsigned>(p_.table.page_size), nth = unsigned(own) / page_size;
    page_ = p_.table.kv_indices.at(run.kv_begin + nth);
    entry_ = unsigned(own) - nth * page_size;
  }

  // Copies the cursor's slice into a stage. One group of copies a call, empty ones at the end.
  FI_DEVICE_INLINE void issue(int to_stage) {
#pragma unroll
    for (int s = 0; s + 1 < kStages; ++s) keys_[s] = keys_[s + 1], absent_[s] = absent_[s + 1];
    if (!done()) {
      constexpr int kRowsAtOnce = 32 / kChunks;
      const AttentionParams& c = p_.call;
      const int64_t head = table_.runs[run_].kv_head;
      const bool there = page_ >= 0 && (!p_.is_paged() || page_ < p_.table.num_pages);
      const unsigned absent = __ballot_sync(~0u, !there) & 0xffffu;
      absent_[kStages - 1] = absent;
      keys_[kStages - 1] = key_;
      const int row = lane_ / kChunks, chunk = lane_ % kChunks;
      // Of what is absent nothing is read; query is there in every call.
      const auto own = [&](const void* data, int64_t stride_page, int64_t stride_n, int64_t stride_h) {
        const int64_t offset = page_ * stride_page + entry_ * stride_n + head * stride_h;
        return there ? static_cast<const unsigned char*>(data) + offset * kElementBytes
                     : static_cast<const unsigned char*>(c.query);
      };
      const unsigned char* const own_key = own(c.key, p_.k_stride_page, c.k_stride_n, c.k_stride_h);
      const unsigned char* const own_value = own(c.value, p_.v_stride_page, c.v_stride_n, c.v_stride_h);
#pragma unroll 1
      for (int is_value = 0; is_value < 2; ++is_value) {
        const auto from = reinterpret_cast<unsigned long long>(is_value ? own_value : own_key);
        const bool chunk_inside = chunk * kChunkElements < (is_value ? c.head_dim_vo : c.head_dim_qk);
        unsigned char* to = ring_ + to_stage * kStageBytes + is_value * kTileBytes;
#pragma unroll 4
        for (int r = 0; r < kSliceKeys; r += kRowsAtOnce) {
          const auto* src = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, from, r + row));
          cp_async_16(to + this->offset_of(r + row, chunk), src + chunk * 16,
                      chunk_inside && !(absent >> (r + row) & 1));
        }
      }
      step();
    }
    cp_async_commit();
  }

  // Key row r of the tile by the table's row of position key + r; 8 pairs, or 4 neighbouring ones, at once.
  FI_DEVICE_INLINE void rotate_keys(unsigned char* keys, int key) const {
    const RopeTable& t = p_.call.rope;
    const int half = static_cast<int>(t.rotary_dim / 2), step = t.interleaved ? 4 : 8, items = half / step;
#pragma unroll 1
    for (int item = lane_; item < kSliceKeys * items; item += 32) {
      const int row = item / items, first = (item - row * items) * step;
      const int64_t table_row = min(int64_t{key + row}, p_.rope_len - 1) * t.cos_stride_row + first;
      unsigned char* low_at = keys + this->offset_of(row, (t.interleaved ? 2 * first : first) / 8);
      unsigned char* high_at = keys + this->offset_of(row, (first + half) / 8);
      float cos[8], sin[8], low[8], high[8];
#pragma unroll
      for (int e = 0; e < 8; e += 4) {
        if (e >= step) break;
        unpack_16<float>(cos + e, load_16(static_cast<const float*>(t.cos) + table_row + e));
        unpack_16<float>(sin + e, load_16(static_cast<const float*>(t.sin) + table_row + e));
      }
      unpack_16<T>(low, *reinterpret_cast<const uint4*>(low_at));
      if (t.interleaved) {
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
          const float x = low[e], y = low[e + 1];
          low[e] = fmaf(x, cos[e / 2], -y * sin[e / 2]);
          low[e + 1] = fmaf(y, cos[e / 2], x * sin[e / 2]);
        }
      } else {
        unpack_16<T>(high, *reinterpret_cast<const uint4*>(high_at));
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float x = low[e], y = high[e];
          low[e] = fmaf(x, cos[e], -y * sin[e]);
          high[e] = fmaf(y, cos[e], x * sin[e]);
        }
        *reinterpret_cast<uint4*>(high_at) = packed(high);
      }
      *reinterpret_cast<uint4*>(low_at) = packed(low);
    }
    __syncwarp();
  }
  FI_DEVICE_INLINE static uint4 packed(const float (&x)[8]) {
    return {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])};
  }

  // Logits of keys that a row does not see to -inf.
  FI_DEVICE_INLINE void leave_seen(const RowTable& rows, int key, unsigned absent, float (&s)[2][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int begin = rows.begin[row_of(2 * half)] - key, end = rows.end[row_of(2 * half)] - key;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = column_of(n, c);
          if (column < begin || column >= end || (absent >> column & 1)) s[n][2 * half + c] = -kInf;
        }
      }
    }
  }

  FI_DEVICE_INLINE bool sees(const RowTable& rows, int row, int key) const {
    if (!decode::sees(rows, row, key)) return false;
    if (p_.custom_mask == nullptr) return true;
    const int64_t bit = rows.mask[row] + key;
    return bit / 8 < p_.mask_bytes && (p_.custom_mask[bit / 8] >> bit % 8 & 1);
  }

  // One copy of the code for all eight, which take turns in s[0][0].
  FI_DEVICE_INLINE void general_logits(const RowTable& rows, int key, unsigned absent,
                                       float (&s)[2][4]) const {
#pragma unroll 1
    for (int item = 0; item < 8; ++item) {
      const int n = item / 4, e = item % 4;
      const int row = row_of(e), column = column_of(n, e);
      float x = -kInf;
      if (!(absent >> column & 1) && sees(rows, row, key + column))
        x = decode::unmasked_logit(p_.call, rows, row, key + column, s[0][0]);
#pragma unroll
      for (int next = 1; next < 8; ++next) s[(next - 1) / 4][(next - 1) % 4] = s[next / 4][next % 4];
      s[1][3] = x;
    }
  }

  const BatchAttentionParams& p_;
  const RunTable& table_;
  unsigned char* ring_;
  // The slice to be copied next: its run, its number there among this warp's, its first key, this lane's key.
  int run_ = 0, at_ = 0, num_ = 0, key_ = 0;
  int64_t page_ = -1, entry_ = 0;
  int out_ = 0;                    // the stage to use next
  int used_ = -1;                  // the one that attend() used last; -1: none of this table
  int keys_[kStages] = {};         // first keys of the slices in flight, oldest first
  unsigned absent_[kStages] = {};  // a bit for each key that is nowhere
};

}  // namespace fi::cuda::batch
