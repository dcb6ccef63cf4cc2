// Attention over a batch for many rows on mma.sync (sm_80 and later): the loop of prefill_kernel.h on rows
// and keys that are found through the requests' index tensors.
//
// A block takes kRows rows of one KV head of one of the plan's tiles, and then those of another tile: the
// grid is as large as the GPU, since how many tiles there are is the device's to know.
#pragma once

#include <type_traits>

#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/batch.h"
#include "fi/cuda/sm80/batch_keys.h"
#include "fi/cuda/sm80/mask_words.h"
#include "fi/cuda/sm80/prefill.h"
#include "fi/cuda/sm80/rotate_tile.h"
#include "fi/cuda/sm80/warp_rows.h"

namespace fi::cuda {

// Keys a tile: as many as two stages of them, and what the features need, leave room for in 99 KB.
constexpr int batch_keys(int dim_qk, int block_rows, BatchFeatures features) {
  const bool is_tight = dim_qk > 64 && dim_qk <= 128;
  return features == BatchFeatures::mask_rope && is_tight
             ? 48
             : prefill_keys(dim_qk, block_rows, features == BatchFeatures::all);
}

template <class T_, int kDimQK_, int kDimVO_, bool kFp8_, BatchFeatures kFeatures_>
struct BatchTilesConfig {
  using T = T_;
  static constexpr int kDimQK = kDimQK_, kDimVO = kDimVO_, kM = kDimQK < 256 ? 2 : 1;
  static constexpr bool kFp8 = kFp8_;
  static constexpr BatchFeatures kFeatures = kFeatures_;
  static constexpr bool kMaskRope = kFeatures != BatchFeatures::none;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kM * kWarps;
  static constexpr int kKeys = batch_keys(kDimQK, kRows, kFeatures);
  static constexpr unsigned kBlocksOfTile = kTileQueries / kRows;  // for each query head of a group
  static_assert(kDimQK >= kDimVO);  // the output takes the query's place in shared memory

  // A tile's words are read while the three before it are at work.
  static constexpr int kMaskStages = 4;

  struct Part {
    int item, nth, of;
  };

  struct Smem {
    alignas(128) T q[kRows * kDimQK];
    typename BatchKeys<BatchTilesConfig>::Smem keys;
    MaskWord<kKeys> mask_words[kMaskStages][kMaskRope ? kRows : 1];
    std::conditional_t<kFeatures == BatchFeatures::all, Row, RowKeys> rows[kRows];
    int partial[5 * kWarps];
    BlockOfRows block;
    BlockRange range;
    int first_tile, last_tile;  // of keys, that this block walks
    Request request;
    float scale2;  // base 2, with k_scale
    Part part;
    unsigned next_item;
    bool is_last_part;
  };
};

// Parts that an item's keys are split into at most, and tiles of keys that each of them has at least.
inline constexpr unsigned kMaxParts = 16;
inline constexpr int kMinTilesOfPart = 4;

template <class C>
class BatchTilesBlock : WarpRows<C> {
  using T = typename C::T;
  using Rows = WarpRows<C>;
  using Rows::warp_row, Rows::o, Rows::row_max, Rows::row_sum;

 public:
  FI_DEVICE_INLINE BatchTilesBlock(const BatchTilesArgs& args, typename C::Smem& smem)
      : args(args), p(args.p), smem(smem), keys(args, smem.keys) {}

  // Items come longest first; who is done takes the next. `block` of `blocks` that do this.
  FI_DEVICE_INLINE void run(unsigned block, unsigned blocks) {
    const unsigned items = num_items(), parts = num_parts(items);
    for (unsigned at = block; at < items * parts; at = smem.next_item) {
      const bool is_any = begin(at / parts) && (parts == 1 || take_part(at / parts, at % parts, parts));
      __syncthreads();  // what begin() left is there; the number of this item has been read by all
      int tile = -1, located = -1, looked_up = -1;
      if (is_any) start(tile, located, looked_up);
      if (threadIdx.x == 0)  // while the first copies are on their way
        smem.next_item = blocks + (parts > 1 ? items * parts : atomicAdd(args.next_item, 1u));
      if (is_any) {
        attend(tile, located, looked_up);
        this->join_sums();
        smem.part.of > 1 ? write_part() : write();
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

  // That an item is split into, a thread block each: then there is one round.
  FI_DEVICE_INLINE unsigned num_parts(unsigned items) const {
    return args.partial == nullptr || items == 0 ? 1 : min(max(gridDim.x / items, 1u), kMaxParts);
  }

  // Leaves this block part `nth` of the item's tiles of keys. False: they are too few for so many parts.
  FI_DEVICE_INLINE bool take_part(unsigned item, unsigned nth, unsigned parts) {
    __syncthreads();
    const int first = smem.first_tile, tiles = smem.last_tile - first;
    const int of = max(min(static_cast<int>(parts), tiles / kMinTilesOfPart), 1),
              part = static_cast<int>(nth);
    __syncthreads();
    if (threadIdx.x == 0) {
      smem.first_tile = first + static_cast<int>(int64_t{tiles} * part / of);
      smem.last_tile = first + static_cast<int>(int64_t{tiles} * (part + 1) / of);
      smem.part = {static_cast<int>(item), part, of};
    }
    return part < of;
  }

  // Finds the item's rows and keys, all of it in one part; false: it has no rows. To be seen by all after a
  // barrier. What the loop and its end ask about them goes to shared memory: registers are short.
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
      smem.first_tile = range.begin / C::kKeys;
      smem.last_tile = (range.end + C::kKeys - 1) / C::kKeys;
      smem.request = r;
      smem.scale2 = p.call.scale * (p.k_scale ? p.k_scale.at(block.kv_head) : 1.0f) * kLog2e;
      smem.part = {static_cast<int>(item), 0, 1};
      keys.set_block(r, range, block.kv_head);
    }
    this->init();
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

  // The first three tiles: `tile` on its way, `located` ready to be copied, `looked_up` on its way to that.
  // -1: there is none.
  FI_DEVICE_INLINE void start(int& tile, int& located, int& looked_up) {
    tile = next_tile(smem.last_tile, 0);
    if (tile >= 0) {
      keys.look_up(tile);
      cp_async_commit();
      located = next_tile(tile, 1);
      cp_async_wait<0>();
      keys.locate(tile);
      if (located >= 0) keys.look_up(located);
      cp_async_commit();
      keys.load(0);
      cp_async_commit();
      if (located >= 0) {
        looked_up = next_tile(located, 2);
        cp_async_wait<1>();
        keys.locate(located);
        if (looked_up >= 0) keys.look_up(looked_up);
      }
    }
    cp_async_commit();
  }

  FI_DEVICE_INLINE void attend(int tile, int located, int looked_up) {
    const bool rotates = C::kMaskRope && p.call.rope.cos;
    int nth = 0;  // of the tiles that are attended to
    while (tile >= 0) {
      cp_async_wait<0>();
      __syncthreads();  // this tile has arrived; all warps are done with the one before it
      if constexpr (C::kFp8) keys.widen();
      if (located >= 0) keys.load(1 - nth % 2);
      int after = -1;
      if (looked_up >= 0) {
        keys.locate(looked_up);
        after = next_tile(looked_up, nth + 3);
        if (after >= 0) keys.look_up(after);
      }
      cp_async_commit();
      if constexpr (C::kFp8) __syncthreads();
      if (rotates) {
        rotate(tile, nth);
        __syncthreads();
      }
      attend_tile(tile, nth);
      tile = located, located = looked_up, looked_up = after;
      ++nth;
    }
    cp_async_wait<0>();  // of q, where there was no tile
  }

  // The next tile down from `tile` that has a key for some row, -1 after the last; it becomes the nth.
  FI_DEVICE_INLINE int next_tile(int tile, int nth) {
    while (--tile >= smem.first_tile) {
      if constexpr (C::kMaskRope) {
        if (p.custom_mask && !read_mask(tile, nth)) continue;
      }
      return tile;
    }
    return -1;
  }

  // Whether the mask leaves a key to some row.
  FI_DEVICE_INLINE bool read_mask(int tile, int nth) {
    const int r = threadIdx.x;
    MaskWord<C::kKeys> word = 0;
    if (r < C::kRows && smem.block.has(r))
      word = mask_word<C::kKeys>(p, smem.request, smem.rows[r], smem.block.query(r), tile * C::kKeys);
    if (r < C::kRows) smem.mask_words[nth % C::kMaskStages][r] = word;
    return __syncthreads_or(word != 0);
  }

  FI_DEVICE_INLINE void rotate(int tile, int nth) {
    const int first = tile * C::kKeys;
    rotate_tile<C::kDimQK, C::kKeys, C::kThreads>(keys.k(nth % 2), p, args.rope_has_packs,
                                                  [&](int r) { return first + r; });
    if (nth > 0) return;  // the queries are rotated
    const BlockOfRows block = smem.block;
    const int64_t offset = smem.request.kv_len - smem.request.qo_len;
    rotate_tile<C::kDimQK, C::kRows, C::kThreads>(smem.q, p, args.rope_has_packs,
                                                  [&](int r) { return block.query(r) + offset; });
  }

  FI_DEVICE_INLINE void attend_tile(int tile, int nth) {
    const int stage = nth % 2;
    const int first = tile * C::kKeys;
    typename Rows::Logits s;
    multiply_keys<C::kDimQK, C::kM, C::kKeys>(s, smem.q, warp_row, keys.k(stage));
    float scale2 = smem.scale2;
    if constexpr (C::kFeatures == BatchFeatures::all) {
      this->apply_variants(s, first, smem.rows, scale2, p.call.logits_soft_cap);
      scale2 = 1.0f;
    } else if (!(scale2 > 0.0f)) {  // softmax() has the maximum of products, not of logits
      this->for_each_row([&](int m, int half) {
        this->for_each_logit(s, m, half, [&](float& x, int, int) { x *= scale2; });
      });
      scale2 = 1.0f;
    }
    if (C::kMaskRope && p.custom_mask) {
      apply_mask(s, nth);
    } else if (first < smem.range.open_begin || first + C::kKeys > smem.range.open_end) {
      this->exclude_keys(s, first, smem.rows);
    }
    if (!keys.all_somewhere(stage)) exclude_nowhere(s, stage);
    this->softmax(s, scale2);
    add_values<C::kDimVO, C::kM, C::kKeys>(o, s, keys.v(stage));
  }

  FI_DEVICE_INLINE void apply_mask(typename Rows::Logits& s, int nth) const {
    using Word = MaskWord<C::kKeys>;
    const Word* rows = smem.mask_words[nth % C::kMaskStages];
    constexpr Word kFull = static_cast<Word>(~uint64_t{0} >> (64 - C::kKeys));
    bool full = true;
    this->for_each_row([&](int m, int half) { full = full && rows[this->row_of(m, half)] == kFull; });
    if (__all_sync(kAllLanes, full)) return;
    this->for_each_row([&](int m, int half) {
      const Word word = rows[this->row_of(m, half)] >> this->key_of(0, 0);
      const uint32_t low = static_cast<uint32_t>(word), high = static_cast<uint32_t>(uint64_t{word} >> 32);
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

  FI_DEVICE_INLINE float finish(const BlockOfRows& block, int r, float max, float sum) const {
    const AttentionParams& c = p.call;
    const int64_t h = block.head(r);
    const RowResult result = finish_row(c, h, max, sum);
    if (c.lse) c.lse[(smem.request.q_begin + block.query(r)) * c.num_qo_heads + h] = result.lse;
    return p.v_scale ? result.factor * p.v_scale.at(block.kv_head) : result.factor;
  }
  FI_DEVICE_INLINE T* output_row(const BlockOfRows& block, int r) const {
    const AttentionParams& c = p.call;
    return static_cast<T*>(c.out) + (smem.request.q_begin + block.query(r)) * c.o_stride_n +
           block.head(r) * c.o_stride_h;
  }

  FI_DEVICE_INLINE void write() {
    __syncthreads();  // q's copies, which other threads waited for, have landed even where there was no tile
    const BlockOfRows block = smem.block;
    this->write_rows(
        smem.q, p.call.head_dim_vo,
        [&](int m, int half, int r) {
          return block.has(r) ? finish(block, r, row_max[m][half], row_sum[m][half]) : 0.0f;
        },
        [&](int r) -> T* { return block.has(r) ? output_row(block, r) : nullptr; });
  }

  // Leaves the part's result; the last of an item's parts to arrive joins them all.
  FI_DEVICE_INLINE void write_part() {
    const BlockOfRows block = smem.block;
    const int64_t first_row = int64_t{blockIdx.x} * C::kRows;
    this->write_partial_rows(args.partial, args.state, C::kDimVO,
                             [&](int r) -> int64_t { return block.has(r) ? first_row + r : -1; });
    __syncthreads();
    const typename C::Part part = smem.part;
    if (threadIdx.x == 0) smem.is_last_part = atomic_add_acq_rel(args.arrivals + part.item, 1) == part.of - 1;
    __syncthreads();
    if (!smem.is_last_part) return;
    const int64_t item_row = first_row - int64_t{part.nth} * C::kRows;
    for (int r = warp_row; r < warp_row + 16 * C::kM && block.has(r); ++r) {
      const int64_t row = item_row + r;
      join_row(args.partial + row * C::kDimVO, args.state + 2 * row, part.of, C::kRows, C::kDimVO,
               output_row(block, r), p.call.head_dim_vo,
               [&](float max, float sum) { return finish(block, r, max, sum); });
    }
  }

  const BatchTilesArgs& args;
  const BatchAttentionParams& p;
  typename C::Smem& smem;
  BatchKeys<C> keys;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2)
    batch_tiles_kernel(const __grid_constant__ BatchTilesArgs args) {
  BatchTilesBlock<C>(args, *reinterpret_cast<typename C::Smem*>(dynamic_smem())).run(blockIdx.x, gridDim.x);
}

template <class C>
void launch_batch_tiles(BatchTilesArgs args, const Gpu& gpu) {
  constexpr int64_t bytes = sizeof(typename C::Smem), reserved = 1024;  // of each block, by the system
  static_assert(bytes <= 99 * 1024);
  const int64_t on_an_sm = (gpu.max_block_smem + reserved) / (bytes + reserved);
  const int64_t at_once = gpu.num_sms * (on_an_sm < 2 ? 1 : 2);
  const int64_t items =
      int64_t{args.plan.max_tiles} * args.group * C::kBlocksOfTile * args.p.call.num_kv_heads;
  const int64_t most = args.arrivals ? items * kMaxParts : items, blocks = most < at_once ? most : at_once;
  if (args.arrivals) {
    const Scratch& scratch = args.p.call.scratch;
    const int64_t rows = blocks * C::kRows * int64_t{sizeof(float)};
    args.partial = static_cast<float*>(scratch.allocate(scratch.context, rows * C::kDimVO));
    args.state = static_cast<float*>(scratch.allocate(scratch.context, rows * 2));
  }
  launch_with<batch_tiles_kernel<C>, bytes>(gpu, dim3(static_cast<unsigned>(blocks)), dim3(C::kThreads),
                                            /*overlap=*/false, args);
}

template <class T, int kDimQK, int kDimVO, bool kFp8>
void run_batch_tiles(const BatchTilesArgs& args, const Gpu& gpu) {
  auto with = [&]<BatchFeatures kFeatures>() {
    launch_batch_tiles<BatchTilesConfig<T, kDimQK, kDimVO, kFp8, kFeatures>>(args, gpu);
  };
  switch (features_of(args.p)) {
    case BatchFeatures::none:
      return with.template operator()<BatchFeatures::none>();
    case BatchFeatures::mask_rope:
      return with.template operator()<BatchFeatures::mask_rope>();
    case BatchFeatures::all:
      return with.template operator()<BatchFeatures::all>();
  }
}

}  // namespace fi::cuda
