// Attention of many query rows on Hopper: TMA loads, wgmma products, warpgroups with roles.
//
// A block has one producer warpgroup, of which one warp starts the copies (prefill_producer.h), and
// kConsumers warpgroups of 64 query rows each. Blocks stay: each takes query tiles from PrefillQueue until
// none is left, and the producer runs ahead into the next tile. A consumer has two products in flight: it
// starts the scores of the next KV tile, then the output of the one before, and computes the softmax of the
// former while the latter runs. Over a batch
// (batch_kernel.h) the producer says which query tile is next.
#pragma once

#include "fi/cuda/sm90/fragment.h"
#include "fi/cuda/sm90/prefill_producer.h"
#include "fi/cuda/sm90/prefill_softmax.h"
#include "fi/cuda/sm90/wgmma.h"

namespace fi::cuda::sm90 {

template <class Config>
class PrefillConsumer {
 public:
  using T = typename Config::T;
  static constexpr bool kDeviceKeys = Config::kDeviceKeys, kBatch = Config::kBatch, kMasked = Config::kMasked;
  static constexpr bool kListed = kDeviceKeys || kMasked;  // the producer lists the KV tiles
  using Smem =
      std::conditional_t<kBatch, BatchSmem<Config>,
                         std::conditional_t<kDeviceKeys, DeviceKeysSmem<Config>, PrefillSmem<Config>>>;
  using Args = std::conditional_t<kBatch, BatchArgsOf<Config>, PrefillArgs>;
  static constexpr int kBlockN = Config::kBlockN, kDimQK = Config::kDimQK, kDimVO = Config::kDimVO;

  FI_DEVICE_INLINE PrefillConsumer(Smem& smem, const Args& args, int group)
      : smem_(smem),
        args_(args),
        lane_(threadIdx.x % 32),
        group_row_(64 * group),
        warp_row_(64 * group + threadIdx.x % kWarpgroupThreads / 32 * 16) {}

  FI_DEVICE_INLINE void run() {
    if constexpr (kBatch) {
      for (;;) {
        barrier_wait(smem_.q_full, q_at_.parity);
        const PrefillWork work = uniform(batch_tile().work);
        if (work.head < 0) return;
        if constexpr (kMasked) {
          attend(batch_tile().work);  // read where it is needed: registers are short
        } else {
          attend(work);
        }
        q_at_.advance();
      }
    } else {
      PrefillQueue<Config::kBlockM, kBlockN> queue(args_.shape);
      PrefillWork work;
      while (queue.next(work)) attend(work);
    }
  }

 private:
  using Tile = std::conditional_t<kListed, ListedTile, int>;

  FI_DEVICE_INLINE void attend(const PrefillWork& work) {
    float o[kDimVO / 2];
#pragma unroll
    for (int i = 0; i < kDimVO / 2; ++i) o[i] = 0.0f;
    OnlineSoftmax softmax(start_scale());
    Tile tile = first_tile(work);
    if (is_tile(tile, work)) {
      float s[kBlockN / 2], rescale[2];
      uint32_t p[kBlockN / 4];
      barrier_wait(smem_.q_full, q_at_.parity);
      if constexpr (Config::kQInRegisters) {
        load_q();
        if constexpr (kBatch) {
          if (batch_tile().k_scale < 0.0f) negate_q();
        }
        release_queries();
      }
      barrier_wait(smem_.k_full[k_at_.stage], k_at_.parity);
      if constexpr (Config::kByRows) fence_for_products();
      start_scores(s);
      Tile next = tile_after(tile);
      wgmma_wait<0>();
      hold(s);
      release(smem_.k_empty[k_at_.stage]);
      k_at_.advance();
      vary(s, work, tile);
      mask(s, work, tile);
      softmax.weigh(s, rescale);
      pack(p, s);
      barrier_wait(smem_.v_full[v_at_.stage], v_at_.parity);
      take_rows(next, work);

      while (is_tile(next, work)) {
        tile = next;
        barrier_wait(smem_.k_full[k_at_.stage], k_at_.parity);
        start_scores(s);
        start_output(o, p);
        next = tile_after(tile);
        const int v_stage = v_at_.stage;
        v_at_.advance();
        wgmma_wait<1>();
        hold(s);
        release(smem_.k_empty[k_at_.stage]);
        k_at_.advance();
        vary(s, work, tile);
        mask(s, work, tile);
        const bool moved = softmax.weigh(s, rescale);
        hold(s);
        // The next output's values are waited for here, not where they are used: the assembler moves no wgmma
        // wait up over a loop.
        barrier_wait(smem_.v_full[v_at_.stage], softmax.after_weights(v_at_.parity));
        take_rows(next, work);
        wgmma_wait<0>();
        hold(o);
        hold(p);
        release(smem_.v_empty[v_stage]);
        pack(p, s);
        if (moved) {
#pragma unroll
          for (int i = 0; i < kDimVO / 2; ++i) o[i] *= rescale[i / 2 % 2];
        }
      }
      if constexpr (!Config::kQInRegisters) release_queries();
      if constexpr (!kBatch) q_at_.advance();

      start_output(o, p);
      wgmma_wait<0>();
      hold(o);
      release(smem_.v_empty[v_at_.stage]);
      v_at_.advance();
    } else if constexpr (kDeviceKeys || kBatch) {
      release_queries();
      if constexpr (!kBatch) q_at_.advance();
    }
    store(o, softmax, work);
  }

  // ---- which tiles there are ----
  //
  // Which one is next is known a step ahead. What lane 0 reads counts for its warp: it is the one that
  // releases the place; and the compiler knows then that the warp's lanes go the same way.

  FI_DEVICE_INLINE Tile first_tile(const PrefillWork& work) {
    if constexpr (kDeviceKeys) {
      barrier_wait(smem_.q_full, q_at_.parity);
      return ListedTile(__shfl_sync(kAllLanes, smem_.rows[q_at_.parity].first_tile, 0));
    } else if constexpr (kMasked) {
      return ListedTile(__shfl_sync(kAllLanes, batch_tile().next_tile, 0));
    } else {
      return work.tiles.end - 1;
    }
  }
  // Once the keys of `tile` have arrived, and before their place is released.
  FI_DEVICE_INLINE Tile tile_after(Tile tile) const {
    if constexpr (kDeviceKeys) {
      return ListedTile(__shfl_sync(kAllLanes, smem_.tiles[k_at_.stage], 0));
    } else if constexpr (kMasked) {
      return ListedTile(__shfl_sync(kAllLanes, smem_.after[k_at_.stage], 0));
    } else {
      return tile - 1;
    }
  }
  FI_DEVICE_INLINE static bool is_tile(Tile tile, const PrefillWork& work) {
    if constexpr (kListed) {
      return static_cast<bool>(tile);
    } else {
      return tile >= work.tiles.begin;
    }
  }

  // With kBatch: the query tile at hand, until q_at_ moves on.
  FI_DEVICE_INLINE const auto& batch_tile() const { return smem_.tiles[q_at_.parity]; }

  // What the softmax multiplies scores by. A batch's scale of keys joins it, its sign q (the softmax relies
  // on a scale above 0).
  FI_DEVICE_INLINE float start_scale() {
    if constexpr (kBatch) {
      if constexpr (Config::kVariant == PrefillVariant::kSoftCap) {
        to_variant_ = args_.to_variant * batch_k_scale();
      } else {
        return args_.scale_log2 * batch_k_scale();
      }
    }
    return args_.scale_log2;
  }
  FI_DEVICE_INLINE float batch_k_scale() const { return fmaxf(fabsf(batch_tile().k_scale), 1e-30f); }
  FI_DEVICE_INLINE float to_variant() const {
    if constexpr (kMasked) {
      return args_.to_variant * batch_k_scale();
    } else if constexpr (kBatch) {
      return to_variant_;
    } else {
      return args_.to_variant;
    }
  }

  // Of the call, or of the request at hand: qo_len, kv_len, first_key, last_key.
  FI_DEVICE_INLINE const auto& shape() const {
    if constexpr (kBatch) {
      return batch_tile();
    } else {
      return args_.shape;
    }
  }

  // ---- the products ----

  // This warp's 16 rows of q, as operands in registers.
  FI_DEVICE_INLINE void load_q() {
    load_operand<kDimQK / 16>(q_, smem_.q, Smem::kQPanelBytes, warp_row() + lane() % 16, lane());
  }

  FI_DEVICE_INLINE void negate_q() {
#pragma unroll
    for (uint32_t& pair : q_) pair ^= 0x80008000u;
  }

  // With kByRows: values that have arrived, and the next tile's keys once they have, are copies of ordinary
  // threads, and there for products only after a fence, which takes a while: done where products run.
  FI_DEVICE_INLINE void take_rows(Tile next, const PrefillWork& work) {
    if constexpr (Config::kByRows) {
      if (is_tile(next, work)) barrier_wait(smem_.k_full[k_at_.stage], k_at_.parity);
      fence_for_products();
    }
  }

  // Where the assembler keeps all descriptors of q over the loop then, instead of making them between
  // products.
  static constexpr bool kQIn32Bits = kBatch && kDimQK <= 128;

  // s = q k^T
  FI_DEVICE_INLINE void start_scores(float (&s)[kBlockN / 2]) {
    const uint64_t q = k_major(smem_address(smem_.q) + first_row() * 128);
    const uint64_t k = k_major(smem_address(smem_.k[k_at_.stage]));
    hold(s);
    if constexpr (Config::kQInRegisters) hold(q_);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDimQK / 16; ++step) {
      const int panel = step / 4, inside = step % 4 * 32;
      const uint64_t k_step = at(k, panel * Smem::kKvPanelBytes + inside);
      if constexpr (Config::kQInRegisters) {
        Wgmma<kBlockN>::template registers_by_k<T>(s, q_ + 4 * step, k_step, step > 0);
      } else {
        const uint32_t q_bytes = panel * Smem::kQPanelBytes + inside;
        Wgmma<kBlockN>::template k_by_k<T>(s, kQIn32Bits ? at_low(q, q_bytes) : at(q, q_bytes), k_step,
                                           step > 0);
      }
    }
    wgmma_commit();
  }

  // o += p v
  FI_DEVICE_INLINE void start_output(float (&o)[kDimVO / 2], uint32_t (&p)[kBlockN / 4]) {
    const uint64_t v = mn_major(smem_address(smem_.v[v_at_.stage]), Smem::kKvPanelBytes);
    hold(o);
    hold(p);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlockN / 16; ++step)
      Wgmma<kDimVO>::template registers_by_mn<T>(o, p + 4 * step, at(v, step * 2048), true);
    wgmma_commit();
  }

  // One arrival a warp: every warp has seen its own part of the products finished.
  FI_DEVICE_INLINE void release(Barrier& empty) {
    if (lane_ == 0) barrier_arrive(empty);
  }
  // What the warp read of the query tile before, lane by lane, is read too.
  FI_DEVICE_INLINE void release_queries() {
    __syncwarp();
    release(smem_.q_empty);
  }

  // ---- what the softmax takes instead of scores ----

  FI_DEVICE_INLINE void vary(float (&s)[kBlockN / 2], const PrefillWork& work, Tile tile) {
    if constexpr (Config::kVariant == PrefillVariant::kSoftCap) tanh_of(s, to_variant());
    if constexpr (Config::kVariant == PrefillVariant::kMask) {
      switch (args_.p.mask_dtype) {
        case DType::f32:
          return add_mask_values<float>(s, work, tile);
        case DType::bf16:
          return add_mask_values<bf16>(s, work, tile);
        default:
          return add_mask_values<f16>(s, work, tile);
      }
    }
  }

  template <class M>
  FI_DEVICE_INLINE void add_mask_values(float (&s)[kBlockN / 2], const PrefillWork& work, int tile) {
    const AttentionParams& p = args_.p;
    const int row = work.q_start + warp_row_ + lane_ / 4, last = args_.shape.qo_len - 1;
    const int key = tile * kBlockN + lane_ % 4 * 2;
    const M* mask =
        static_cast<const M*>(p.mask) + work.b * p.mask_stride_b + work.head * p.mask_stride_h + key;
    const M* const rows[2] = {mask + min(row, last) * p.mask_stride_q,
                              mask + min(row + 8, last) * p.mask_stride_q};
    add_mask(s, args_.to_variant, rows, args_.shape.kv_len - key);
  }

  // ---- keys that a row doesn't see ----

  // The ring of values is at the tile's.
  FI_DEVICE_INLINE void mask(float (&s)[kBlockN / 2], const PrefillWork& work, Tile tile) {
    if constexpr (kDeviceKeys) {
      if (tile.cut()) mask_listed(s, work, tile);
    } else if constexpr (kMasked) {
      if (tile.cut()) mask_packed(s, work, tile);
    } else {
      const auto& shape = this->shape();
      const int key = tile * kBlockN + lane_ % 4 * 2;
      if (tile >= work.whole.end) {
        const int last[2] = {min(query(work, 0) + shape.last_key, shape.kv_len - 1),
                             min(query(work, 1) + shape.last_key, shape.kv_len - 1)};
        mask_after(s, key, last);
      }
      if (tile < work.whole.begin) {
        const int first[2] = {query(work, 0) + shape.first_key, query(work, 1) + shape.first_key};
        mask_before(s, key, first);
      }
      if constexpr (kBatch && !Config::kByRows) {  // rows that are not seen come as zeros
        if (tile >= work.whole.end || tile < work.whole.begin) {
          const Range values = batch_tile().values;
          if (tile * kBlockN < values.begin || (tile + 1) * kBlockN > values.end)
            clear_unseen(tile * kBlockN, values, nullptr);
        }
      }
    }
  }

  // With kMasked.
  static constexpr int kMaskWords = (kBlockN + 31) / 32;  // of a row

  FI_DEVICE_INLINE void mask_packed(float (&s)[kBlockN / 2], const PrefillWork& work, ListedTile tile) {
    uint32_t bits[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int first = tile.index() * kBlockN + lane() % 4 * 32;
      bits[r] = in_fragment_order(seen_keys(args_.mask, batch_tile(), query(work, r), first), lane());
    }
    mask_unset(s, bits);
    if (tile.has_unseen()) {
      find_columns(work, tile.index() * kBlockN);
      clear_unseen(tile.index() * kBlockN, {}, nullptr);
    }
  }

  // Which keys of the tile are seen by some row of the block: each warpgroup finds it out for itself.
  FI_DEVICE_INLINE void find_columns(const PrefillWork& work, int first) {
    const int thread = static_cast<int>(thread_now() % kWarpgroupThreads);
#pragma unroll 1  // registers are short
    for (int w = 0; w < kMaskWords; ++w) {
      const uint32_t column = __reduce_or_sync(
          kAllLanes, seen_keys(args_.mask, batch_tile(), work.q_start + thread, first + 32 * w));
      if (thread % 32 == 0) smem_.columns[group()][thread / 32][w] = column;
    }
    warpgroup_barrier(1 + group());
  }

  // With kMasked after find_columns().
  FI_DEVICE_INLINE bool is_seen(int key, int first, Range seen, const uint32_t* columns) const {
    if constexpr (kMasked) {
      uint32_t column = 0;
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) column |= smem_.columns[group()][warp][key / 32];
      return column >> key % 32 & 1;
    } else {
      return columns ? columns[key / 32] >> key % 32 & 1
                     : first + key >= seen.begin && first + key < seen.end;
    }
  }

  FI_DEVICE_INLINE void mask_listed(float (&s)[kBlockN / 2], const PrefillWork& work, ListedTile tile) {
    const uint32_t* columns = nullptr;
    if (args_.mask.classes) {
      const int index = args_.mask.list_of(work.b, work.head, work.q_start / Config::kBlockM) + tile.index();
      const uint32_t* tile_bits = args_.mask.bits + static_cast<int64_t>(index) * (4 * (Config::kBlockM + 1));
      columns = tile_bits + 4 * Config::kBlockM;
      const uint32_t* rows = tile_bits + 4 * (warp_row_ + lane_ / 4) + lane_ % 4;
      const uint32_t bits[2] = {rows[0], rows[4 * 8]};
      mask_unset(s, bits);
    } else {
      const int row = warp_row_ + lane_ / 4, key = tile.index() * kBlockN + lane_ % 4 * 2;
      const RowKeys<Config::kBlockM>& keys = smem_.rows[q_at_.parity];
      const KeyRange a = keys.rows[row], b = keys.rows[row + 8];
      const int first[2] = {a.begin, b.begin}, last[2] = {a.end - 1, b.end - 1};
      mask_after(s, key, last);
      if (args_.p.window_left >= 0) mask_before(s, key, first);
    }
    if (tile.has_unseen()) clear_unseen(tile.index() * kBlockN, smem_.rows[q_at_.parity].seen, columns);
  }

  // Values of keys that no row sees become 0 once they have arrived: a weight of 0 times what lies there must
  // not be NaN. Every warpgroup clears them for itself, to the same effect. `first`: the tile's first key;
  // `columns`: the last line of the tile's bits, or null.
  FI_DEVICE_INLINE void clear_unseen(int first, Range seen, const uint32_t* columns) {
    barrier_wait(smem_.v_full[v_at_.stage], v_at_.parity);
    const int thread = threadIdx.x % kWarpgroupThreads;
#pragma unroll 1  // registers are short
    for (int key = thread / 8; key < kBlockN; key += kWarpgroupThreads / 8) {
      if (is_seen(key, first, seen, columns)) continue;
      unsigned char* v = smem_.v[v_at_.stage] + key * 128 + thread % 8 * 16;
#pragma unroll
      for (int panel = 0; panel < Config::kPanelsVO; ++panel)
        *reinterpret_cast<uint4*>(v + panel * Smem::kKvPanelBytes) = {0, 0, 0, 0};
    }
    fence_for_products();
    warpgroup_barrier(1 + group());
  }

  FI_DEVICE_INLINE static void pack(uint32_t (&p)[kBlockN / 4], const float (&s)[kBlockN / 2]) {
#pragma unroll
    for (int i = 0; i < kBlockN / 4; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  // The thread's lane, its warp's first row in the query tile, its own row r, its warpgroup. With kMasked
  // registers are too short to keep them.
  FI_DEVICE_INLINE int lane() const {
    if constexpr (kMasked) {
      return static_cast<int>(thread_now() % 32);
    } else {
      return lane_;
    }
  }
  FI_DEVICE_INLINE int warp_row() const {
    if constexpr (kMasked) {
      return static_cast<int>(thread_now() - kWarpgroupThreads) / 32 * 16;
    } else {
      return warp_row_;
    }
  }
  // The warpgroup's, which the assembler knows to be the same in all lanes.
  FI_DEVICE_INLINE int first_row() const {
    if constexpr (kMasked) {
      return 64 * __shfl_sync(kAllLanes, group(), 0);
    } else {
      return group_row_;
    }
  }
  FI_DEVICE_INLINE int row(int r) const { return warp_row() + lane() / 4 + 8 * r; }
  FI_DEVICE_INLINE int group() const {
    if constexpr (kMasked) {
      return static_cast<int>(thread_now() / kWarpgroupThreads) - 1;
    } else {
      return group_row_ / 64;
    }
  }

  // The query that this thread's row r is of, and its head.
  FI_DEVICE_INLINE int query(const PrefillWork& work, int r) const {
    const int row = this->row(r);
    if constexpr (kBatch) {
      if (batch_tile().packed)
        return work.q_start + static_cast<int>(args_.shape.by_group_size.divide(static_cast<unsigned>(row)));
    }
    return work.q_start + row;
  }
  FI_DEVICE_INLINE int head(const PrefillWork& work, int r) const {
    if constexpr (kBatch) {
      if (batch_tile().packed)
        return work.head + row(r) - (query(work, r) - work.q_start) * args_.shape.group_size;
    }
    return work.head;
  }
  // Where the tile's rows end, of those that there are.
  FI_DEVICE_INLINE int query_end() const {
    if constexpr (kBatch) {
      return batch_tile().q_end;
    } else {
      return args_.shape.qo_len;
    }
  }

  FI_DEVICE_INLINE void store(const float (&o)[kDimVO / 2], const OnlineSoftmax& softmax,
                              const PrefillWork& work) const {
    const int head_dim = static_cast<int>(args_.p.head_dim_vo);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = query(work, r), head = this->head(work, r);
      const bool inside = row < query_end();
      const float sum = softmax.sum(r);
      const auto [factor, lse] = finish(head, softmax.base(r, sum), sum);
      T* out = out_row(work.b, head, row) + lane() % 4 * 8;
#pragma unroll
      for (int i = 0; i < kDimVO / 32; ++i) {
        uint32_t w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* x = o + 4 * (4 * i + j) + 2 * r;
          w[j] = pack2<T>(x[0] * factor, x[1] * factor);
        }
        gather_quad(w, lane());
        if (inside && lane() % 4 * 8 + 32 * i < head_dim)
          *reinterpret_cast<uint4*>(out + 32 * i) = make_uint4(w[0], w[1], w[2], w[3]);
      }
      if (lse_out() != nullptr && inside && lane() % 4 == 0) lse_out()[lse_index(work.b, head, row)] = lse;
    }
  }

  FI_DEVICE_INLINE RowResult finish(int head, float row_max, float row_sum) const {
    if constexpr (kBatch) {
      const auto [factor, lse] = finish_row(args_.p, head, row_max, row_sum);
      return {factor * batch_tile().v_scale, lse};
    } else {
      return finish_row(args_.p, head, row_max, row_sum);
    }
  }
  FI_DEVICE_INLINE T* out_row(int b, int head, int row) const {
    if constexpr (kBatch) {
      const AttentionParams& p = args_.p;
      return static_cast<T*>(p.out) + head * p.o_stride_h + (batch_tile().q_begin + row) * p.o_stride_n;
    } else {
      return static_cast<T*>(args_.out) + b * args_.o_stride_b + head * args_.o_stride_h +
             row * args_.o_stride_n;
    }
  }
  FI_DEVICE_INLINE float* lse_out() const {
    if constexpr (kBatch) {
      return args_.p.lse;
    } else {
      return args_.lse;
    }
  }
  FI_DEVICE_INLINE int64_t lse_index(int b, int head, int row) const {
    if constexpr (kBatch) {
      return (batch_tile().q_begin + row) * args_.p.num_qo_heads + head;
    } else {
      const PrefillShape& shape = args_.shape;
      return (static_cast<int64_t>(b) * shape.num_qo_heads + head) * shape.qo_len + row;
    }
  }

  Smem& smem_;
  const Args& args_;
  float to_variant_ = 0.0f;          // with kBatch
  int lane_, group_row_, warp_row_;  // the warpgroup's and the warp's first row in the query tile
  uint32_t q_[Config::kQInRegisters ? kDimQK / 4 : 1];
  RingPosition<1> q_at_;
  RingPosition<Config::kStages> k_at_, v_at_;
};

// By one thread. `producers`: of keys and of values, how many arrive once a tile of theirs is there, besides
// who says which tile follows, where nobody else speaks for him.
template <class Config>
FI_DEVICE_INLINE void init_barriers(PrefillSmem<Config>& smem, uint32_t producers) {
  constexpr int kReaders = 4 * Config::kConsumers;  // warps
  barrier_init(smem.q_full, 1);
  barrier_init(smem.q_empty, kReaders);
  for (int stage = 0; stage < Config::kStages; ++stage) {
    barrier_init(smem.k_full[stage], producers + (Config::kMasked && Config::kByRows ? 1 : 0));
    barrier_init(smem.k_empty[stage], kReaders);
    barrier_init(smem.v_full[stage], producers);
    barrier_init(smem.v_empty[stage], kReaders);
  }
  barrier_init_fence();
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillArgs args, const __grid_constant__ CUtensorMap q_map,
                   const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
  auto& smem = *reinterpret_cast<typename PrefillConsumer<Config>::Smem*>(dynamic_smem());
  if (threadIdx.x == 0) {
    prefetch_tensor_map(q_map);
    prefetch_tensor_map(k_map);
    prefetch_tensor_map(v_map);
    init_barriers<Config>(smem, 1);
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();

  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    lower_registers<Config::kProducerRegisters>();
    if constexpr (Config::kDeviceKeys) {
      if (threadIdx.x < 32) DeviceKeysProducer<Config>::run(smem, args, q_map, k_map, v_map);
    } else {
      if (threadIdx.x == 0) PrefillProducer<Config>::run(smem, args.shape, q_map, k_map, v_map);
    }
  } else {
    raise_registers<Config::kConsumerRegisters>();
    PrefillConsumer<Config>(smem, args, warpgroup - 1).run();
  }
}

}  // namespace fi::cuda::sm90
