// Attention over a batch for many rows on mma.sync (sm_80 and later): the loop of prefill_kernel.h on rows
// and keys that are found through the requests' index tensors.
//
// A block takes kRows rows of one KV head of one of the plan's tiles, and then those of another tile: the
// grid is as large as the GPU, since how many tiles there are is the device's to know.
#pragma once

#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/batch.h"
#include "fi/cuda/sm80/batch_keys.h"
#include "fi/cuda/sm80/mask_words.h"
#include "fi/cuda/sm80/prefill.h"
#include "fi/cuda/sm80/rotate_tile.h"
#include "fi/cuda/sm80/warp_rows.h"

namespace fi::cuda {

// kVariants: soft cap, ALiBi, custom mask, RoPE; else only what causal, window and length exclude.
template <class T_, int kDimQK_, int kDimVO_, bool kFp8_, bool kVariants_>
struct BatchTilesConfig {
  using T = T_;
  static constexpr int kDimQK = kDimQK_, kDimVO = kDimVO_, kM = kDimQK < 256 ? 2 : 1;
  static constexpr bool kFp8 = kFp8_, kVariants = kVariants_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kM * kWarps;
  static constexpr int kKeys = prefill_keys(kDimQK, kRows, kVariants);
  static constexpr unsigned kBlocksOfTile = kTileQueries / kRows;  // for each query head of a group
  static_assert(kDimQK >= kDimVO);  // the output takes the query's place in shared memory

  struct Smem {
    alignas(128) T q[kRows * kDimQK];
    typename BatchKeys<BatchTilesConfig>::Smem keys;
    uint64_t mask_words[2][kVariants ? kRows : 1];
    Row rows[kRows];
    int partial[5 * kWarps];
    BlockOfRows block;
    BlockRange range;
    Request request;
    float scale2;  // base 2, with k_scale
  };
};

template <class C>
class BatchTilesBlock : WarpRows<C> {
  using T = typename C::T;
  using Rows = WarpRows<C>;
  using Rows::warp_row, Rows::o, Rows::row_max, Rows::row_sum;

 public:
  FI_DEVICE_INLINE BatchTilesBlock(const BatchTilesArgs& args, typename C::Smem& smem)
      : args(args), p(args.p), smem(smem), keys(args.p, args.plan.header, smem.keys) {}

  // The tiles come longest first. A block's turn changes its end of the grid from round to round, so that who
  // had the longest of one round has the shortest of the next.
  FI_DEVICE_INLINE void run() {
    const unsigned items = num_items();
    for (unsigned round = 0; round * gridDim.x < items; ++round) {
      const unsigned turn = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
      const unsigned item = round * gridDim.x + turn;
      if (item < items && begin(item)) {
        attend();
        write();
      }
      __syncthreads();  // all are done with what lies in shared memory
    }
  }

 private:
  FI_DEVICE_INLINE unsigned num_items() const {
    return static_cast<unsigned>(args.plan.num_tiles()) * blocks_of_tile() *
           static_cast<unsigned>(p.call.num_kv_heads);
  }
  FI_DEVICE_INLINE unsigned blocks_of_tile() const { return C::kBlocksOfTile * args.group; }

  // Finds the item's rows and keys; false: it has no rows. What the loop and its end ask about them goes to
  // shared memory: registers are short.
  FI_DEVICE_INLINE bool begin(unsigned item) {
    const unsigned kv_heads = static_cast<unsigned>(p.call.num_kv_heads),
                   heads_item = item / blocks_of_tile();
    const unsigned nth = blocks_of_tile() - 1 - item % blocks_of_tile();
    const PlanTile tile = args.plan.tiles[heads_item / kv_heads];
    if (tile.request < 0 || tile.request >= p.call.batch) return false;
    const Request r = request_of(p, tile.request);
    if (tile.q_begin < 0 || tile.q_begin >= r.qo_len) return false;
    const unsigned q_end = static_cast<unsigned>(min(tile.q_begin + kTileQueries, r.qo_len));
    const BlockOfRows block{tile.request, static_cast<int>(heads_item % kv_heads),
                            static_cast<unsigned>(tile.q_begin) * args.group + nth * C::kRows,
                            q_end * args.group, args.group};
    if (block.row_begin >= block.num_rows) return false;
    load_queries(block, r.q_begin);
    AttentionParams call = p.call;
    call.kv_len = r.kv_len;
    call.q_offset = r.kv_len - r.qo_len;
    const BlockRange range = load_rows<C::kRows, C::kThreads>(call, block, smem.rows, true, smem.partial);
    if (threadIdx.x == 0) {
      smem.block = block;
      smem.range = range;
      smem.request = r;
      smem.scale2 = p.call.scale * (p.k_scale ? p.k_scale.at(block.kv_head) : 1.0f) * kLog2e;
      keys.set_request(r, range);
    }
    keys.set_head(block.kv_head);
    this->init();
    __syncthreads();
    return true;
  }

  FI_DEVICE_INLINE void load_queries(const BlockOfRows& block, int64_t q_begin) {
    using Share = CopyShare<C::kDimQK, C::kThreads>;
    const Share share;
    const AttentionParams& c = p.call;
    const T* query = static_cast<const T*>(c.query);
#pragma unroll
    for (int n = 0; n < C::kRows / Share::kStep; ++n) {
      const int r = share.row + n * Share::kStep;
      const T* src = query;
      if (block.has(r)) src += block.head(r) * c.q_stride_h + (q_begin + block.query(r)) * c.q_stride_n;
#pragma unroll
      for (int panel = 0; panel < Share::kPanels; ++panel) {
        const int d = share.chunk * 8 + panel * 64;
        const bool valid = block.has(r) && d < c.head_dim_qk;
        cp_async_16(smem.q + share.offset(n, panel), valid ? src + d : query, valid);
      }
    }
  }

  FI_DEVICE_INLINE void attend() {
    const bool masked = C::kVariants && p.custom_mask, rotates = C::kVariants && p.call.rope.cos;
    int stage = 0, tile = next_tile((smem.range.end + C::kKeys - 1) / C::kKeys, stage);
    bool rotate_q = rotates;
    if (tile >= 0) {
      keys.look_up(tile);
      cp_async_commit();
      cp_async_wait<0>();
      load(tile, stage, masked);
    }
    cp_async_commit();
    while (tile >= 0) {
      cp_async_wait<0>();
      __syncthreads();  // this tile has arrived; all warps are done with the one before it
      if constexpr (C::kFp8) keys.widen();
      const int next = next_tile(tile, stage ^ 1);
      if (next >= 0) {
        if (masked) {
          keys.look_up(next);
          cp_async_commit();
          cp_async_wait<0>();
        }
        load(next, stage ^ 1, masked);
      }
      cp_async_commit();
      if constexpr (C::kFp8) __syncthreads();
      if (rotates) {
        rotate(tile, stage, rotate_q);
        rotate_q = false;
        __syncthreads();
      }
      attend_tile(tile, stage);
      tile = next, stage ^= 1;
    }
    cp_async_wait<0>();  // of q, where there was no tile
  }

  FI_DEVICE_INLINE int first_tile() const { return smem.range.begin / C::kKeys; }

  // The next tile down from `tile` that has a key for some row, -1 after the last.
  FI_DEVICE_INLINE int next_tile(int tile, int stage) {
    while (--tile >= first_tile()) {
      if (!C::kVariants || !p.custom_mask || read_mask(tile, stage)) return tile;
    }
    return -1;
  }

  // Whether the mask leaves a key to some row.
  FI_DEVICE_INLINE bool read_mask(int tile, int stage) {
    const int r = threadIdx.x;
    uint64_t word = 0;
    if (r < C::kRows && smem.block.has(r))
      word = mask_word<C::kKeys>(p, smem.request, smem.rows[r], smem.block.query(r), tile * C::kKeys);
    if (r < C::kRows) smem.mask_words[stage][r] = word;
    return __syncthreads_or(word != 0);
  }

  FI_DEVICE_INLINE void load(int tile, int stage, bool masked) {
    keys.load(tile, stage);
    if (!masked && tile > first_tile()) keys.look_up(tile - 1);
  }

  FI_DEVICE_INLINE void rotate(int tile, int stage, bool rotate_q) {
    const int first = tile * C::kKeys;
    rotate_tile<C::kDimQK, C::kThreads>(keys.k(stage), C::kKeys, p, [&](int r) { return first + r; });
    if (!rotate_q) return;
    const BlockOfRows block = smem.block;
    const int64_t offset = smem.request.kv_len - smem.request.qo_len;
    rotate_tile<C::kDimQK, C::kThreads>(smem.q, C::kRows, p, [&](int r) { return block.query(r) + offset; });
  }

  FI_DEVICE_INLINE void attend_tile(int tile, int stage) {
    const int first = tile * C::kKeys;
    typename Rows::Logits s;
    multiply_keys<C::kDimQK, C::kM, C::kKeys>(s, smem.q, warp_row, keys.k(stage));
    float scale2 = smem.scale2;
    if constexpr (C::kVariants) {
      this->apply_variants(s, first, smem.rows, scale2, p.call.logits_soft_cap);
      scale2 = 1.0f;
    } else if (!(scale2 > 0.0f)) {  // softmax() has the maximum of products, not of logits
      this->for_each_row([&](int m, int half) {
        this->for_each_logit(s, m, half, [&](float& x, int, int) { x *= scale2; });
      });
      scale2 = 1.0f;
    }
    if (C::kVariants && p.custom_mask) {
      apply_mask(s, stage);
    } else if (first < smem.range.open_begin || first + C::kKeys > smem.range.open_end) {
      this->exclude_keys(s, first, smem.rows);
    }
    if (!keys.all_somewhere(stage)) exclude_nowhere(s, stage);
    this->softmax(s, scale2);
    add_values<C::kDimVO, C::kM, C::kKeys>(o, s, keys.v(stage));
  }

  FI_DEVICE_INLINE void apply_mask(typename Rows::Logits& s, int stage) const {
    this->for_each_row([&](int m, int half) {
      const uint64_t word = smem.mask_words[stage][this->row_of(m, half)] >> this->key_of(0, 0);
      const uint32_t low = static_cast<uint32_t>(word), high = static_cast<uint32_t>(word >> 32);
      this->for_each_logit(s, m, half, [&](float& x, int n, int e) {
        if (!((n < 4 ? low : high) >> (8 * (n % 4) + e) & 1)) x = -kInf;
      });
    });
  }

  FI_DEVICE_INLINE void exclude_nowhere(typename Rows::Logits& s, int stage) const {
    this->for_each_row([&](int m, int half) {
      this->for_each_logit(s, m, half, [&](float& x, int n, int e) {
        if (keys.is_nowhere(stage, this->key_of(n, e))) x = -kInf;
      });
    });
  }

  FI_DEVICE_INLINE void write() {
    this->join_sums();
    __syncthreads();  // q's copies, which other threads waited for, have landed even where there was no tile
    const AttentionParams& c = p.call;
    const BlockOfRows block = smem.block;
    const int64_t q_begin = smem.request.q_begin;
    const float v_scale = p.v_scale ? p.v_scale.at(block.kv_head) : 1.0f;
    auto factor_of = [&](int m, int half, int r) {
      if (!block.has(r)) return 0.0f;
      const int64_t h = block.head(r);
      const RowResult result = finish_row(c, h, row_max[m][half], row_sum[m][half]);
      if (c.lse && threadIdx.x % 4 == 0) c.lse[(q_begin + block.query(r)) * c.num_qo_heads + h] = result.lse;
      return result.factor * v_scale;
    };
    T* out = static_cast<T*>(c.out) + q_begin * c.o_stride_n;
    this->write_rows(smem.q, c.head_dim_vo, factor_of, [&](int r) -> T* {
      return block.has(r) ? out + block.head(r) * c.o_stride_h + block.query(r) * c.o_stride_n : nullptr;
    });
  }

  const BatchTilesArgs& args;
  const BatchAttentionParams& p;
  typename C::Smem& smem;
  BatchKeys<C> keys;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    batch_tiles_kernel(const __grid_constant__ BatchTilesArgs args) {
  BatchTilesBlock<C>(args, *reinterpret_cast<typename C::Smem*>(dynamic_smem())).run();
}

template <class C>
void launch_batch_tiles(const BatchTilesArgs& args, const Gpu& gpu) {
  constexpr int64_t bytes = sizeof(typename C::Smem), reserved = 1024;  // of each block, by the system
  static_assert(bytes <= 99 * 1024);
  const int64_t on_an_sm = (gpu.max_block_smem + reserved) / (bytes + reserved);
  const int64_t most =
      int64_t{args.plan.max_tiles} * args.group * C::kBlocksOfTile * args.p.call.num_kv_heads;
  const int64_t at_once = gpu.num_sms * (on_an_sm < 2 ? 1 : 2);
  launch(gpu, batch_tiles_kernel<C>, dim3(static_cast<unsigned>(most < at_once ? most : at_once)),
         dim3(C::kThreads), bytes, args);
}

template <class T, int kDimQK, int kDimVO, bool kFp8>
void run_batch_tiles(const BatchTilesArgs& args, const Gpu& gpu) {
  if (needs_variants(args.p)) {
    launch_batch_tiles<BatchTilesConfig<T, kDimQK, kDimVO, kFp8, true>>(args, gpu);
  } else {
    launch_batch_tiles<BatchTilesConfig<T, kDimQK, kDimVO, kFp8, false>>(args, gpu);
  }
}

}  // namespace fi::cuda
