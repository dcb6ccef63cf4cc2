// Attention for many rows on mma.sync (sm_80 and later): FlashAttention-2's loop.
//
// A thread block of four warps takes kRows rows of one KV head (see block_rows.h), each warp 16 or 32 of
// them, and walks the live tiles of KV from the last one back, so that the masked tiles of a causal call come
// first. K and V are double-buffered with cp.async: one barrier a tile.
#pragma once

#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/partials.h"
#include "fi/cuda/sm80/prefill.h"
#include "fi/cuda/sm80/prefill_tile.h"
#include "fi/cuda/sm80/warp_rows.h"

namespace fi::cuda {

// kM: tiles of 16 rows a warp. kVariants: soft cap, ALiBi, mask, a scale that is not positive; else only what
// causal, window and length exclude.
template <class T_, int kDimQK_, int kDimVO_, int kM_, int kKeys_, bool kVariants_>
struct PrefillConfig {
  using T = T_;
  static constexpr int kDimQK = kDimQK_, kDimVO = kDimVO_, kM = kM_, kKeys = kKeys_;
  static constexpr bool kVariants = kVariants_;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kM * kWarps;
  static_assert(kDimQK >= kDimVO);  // the output takes the query's place in shared memory

  struct Smem {
    alignas(128) T q[kRows * kDimQK];
    T k[2][kKeys * kDimQK];
    T v[2][kKeys * kDimVO];
    Row rows[kRows];
    int partial[5 * kWarps];
    BlockOfRows block;
    BlockRange range;
  };
};

template <class C>
class PrefillBlock : WarpRows<C> {
  using T = typename C::T;
  using Rows = WarpRows<C>;
  using Rows::warp_row, Rows::o, Rows::row_max, Rows::row_sum;

 public:
  FI_DEVICE_INLINE PrefillBlock(const PrefillArgs& args, typename C::Smem& smem)
      : args(args), p(args.p), smem(smem) {}

  FI_DEVICE_INLINE void run() {
    TileWalk<C::kVariants> walk = begin();
    bool open = true;
    int tile = walk.next(open), stage = 0;
    if (tile >= 0) load_keys_values(tile, 0);
    cp_async_commit();
    while (tile >= 0) {
      cp_async_wait<0>();
      __syncthreads();  // this tile has arrived; all warps are done with the one before it
      bool next_open = true;
      const int next = walk.next(next_open);
      if (next >= 0) load_keys_values(next, stage ^ 1);
      cp_async_commit();
      attend_tile(tile, open, stage);
      tile = next, open = next_open, stage ^= 1;
    }
    cp_async_wait<0>();  // of q, where there was no tile
    this->join_sums();
    args.partials.parts > 1 ? write_partial() : write();
  }

 private:
  // What the loop and its end ask about the block goes to shared memory: registers are short.
  FI_DEVICE_INLINE TileWalk<C::kVariants> begin() {
    const PrefillArgs::Place place = args.place(blockIdx.x);
    const BlockOfRows block = args.rows_of(place, C::kRows);
    key = static_cast<const T*>(p.key) + block.b * p.k_stride_b + block.kv_head * p.k_stride_h;
    value = static_cast<const T*>(p.value) + block.b * p.v_stride_b + block.kv_head * p.v_stride_h;
    load_queries(block);
    const bool drop = !C::kVariants || can_drop_negligible(p, args.mask, block, place.block, threadIdx.x);
    const BlockRange range = load_rows<C::kRows, C::kThreads>(p, block, smem.rows, drop, smem.partial);
    if (threadIdx.x == 0) {
      smem.block = block;
      smem.range = range;
    }
    this->init();
    __syncthreads();
    int first = range.begin / C::kKeys, last = (range.end + C::kKeys - 1) / C::kKeys;
    if (args.partials.parts > 1) {
      const int64_t tiles = last - first, parts = args.partials.parts;
      last = first + static_cast<int>(tiles * (place.part + 1) / parts);
      first += static_cast<int>(tiles * place.part / parts);
    }
    const uint8_t* classes = nullptr;
    if (C::kVariants && args.mask.classes)
      classes =
          args.mask.classes + args.mask.list_of(block.b, block.kv_head, place.block) * args.mask.num_tiles;
    return {classes, first, last, range.flag};
  }

  FI_DEVICE_INLINE void load_queries(const BlockOfRows& block) {
    using Share = CopyShare<C::kDimQK, C::kThreads>;
    const Share share;
    const T* query = static_cast<const T*>(p.query) + block.b * p.q_stride_b;
#pragma unroll
    for (int n = 0; n < C::kRows / Share::kStep; ++n) {
      const int r = share.row + n * Share::kStep;
      const T* src = query;
      if (block.has(r)) src += block.head(r) * p.q_stride_h + block.query(r) * p.q_stride_n;
#pragma unroll
      for (int panel = 0; panel < Share::kPanels; ++panel) {
        const int d = share.chunk * 8 + panel * 64;
        const bool valid = block.has(r) && d < p.head_dim_qk;
        cp_async_16(smem.q + share.offset(n, panel), valid ? src + d : query, valid);
      }
    }
  }

  FI_DEVICE_INLINE void load_keys_values(int tile, int stage) {
    const int first = tile * C::kKeys, begin = smem.range.begin, end = smem.range.end;
    load_tile<C::kKeys, C::kDimQK, C::kThreads>(smem.k[stage], key, p.k_stride_n, first, begin, end,
                                                static_cast<int>(p.head_dim_qk));
    load_tile<C::kKeys, C::kDimVO, C::kThreads>(smem.v[stage], value, p.v_stride_n, first, begin, end,
                                                static_cast<int>(p.head_dim_vo));
  }

  FI_DEVICE_INLINE void attend_tile(int tile, bool open, int stage) {
    const int first = tile * C::kKeys;
    typename Rows::Logits s;
    multiply_keys<C::kDimQK, C::kM, C::kKeys>(s, smem.q, warp_row, smem.k[stage]);
    float scale2 = p.scale * kLog2e;
    if constexpr (C::kVariants) {
      this->apply_variants(s, first, smem.rows, scale2, p.logits_soft_cap);
      if (!open) with_mask_type(p.mask_dtype, [&](auto* type) { apply_mask(s, first, type); });
      scale2 = 1.0f;
    }
    if (first < smem.range.open_begin || first + C::kKeys > smem.range.open_end)
      this->exclude_keys(s, first, smem.rows);
    this->softmax(s, scale2);
    add_values<C::kDimVO, C::kM, C::kKeys>(o, s, smem.v[stage]);
  }

  template <class M>
  FI_DEVICE_INLINE void apply_mask(typename Rows::Logits& s, int first, const M*) const {
    const BlockOfRows block = smem.block;
    this->for_each_row([&](int m, int half) {
      const int r = this->row_of(m, half);
      if (!block.has(r)) return;
      const M* mask = static_cast<const M*>(p.mask) + block.b * p.mask_stride_b +
                      block.head(r) * p.mask_stride_h + block.query(r) * p.mask_stride_q;
      this->for_each_logit(s, m, half, [&](float& x, int n, int e) {
        const int j = first + this->key_of(n, e);
        const float addend = j < smem.range.end ? mask_addend(mask[j * p.mask_stride_k]) : -kInf;
        x = addend == -kInf ? addend : x + addend;
      });
    });
  }

  FI_DEVICE_INLINE void write() {
    const BlockOfRows block = smem.block;
    __syncthreads();  // q's copies, which other threads waited for, have landed even where there was no tile
    auto factor_of = [&](int m, int half, int r) {
      if (!block.has(r)) return 0.0f;
      const int64_t h = block.head(r);
      const RowResult result = finish_row(p, h, row_max[m][half], row_sum[m][half]);
      if (p.lse && threadIdx.x % 4 == 0)
        p.lse[(block.b * p.num_qo_heads + h) * p.qo_len + block.query(r)] = result.lse;
      return result.factor;
    };
    T* out = static_cast<T*>(p.out) + block.b * p.o_stride_b;
    this->write_rows(smem.q, p.head_dim_vo, factor_of, [&](int r) -> T* {
      return block.has(r) ? out + block.head(r) * p.o_stride_h + block.query(r) * p.o_stride_n : nullptr;
    });
  }

  FI_DEVICE_INLINE void write_partial() const {
    const BlockOfRows block = smem.block;
    const PrefillArgs::Place place = args.place(blockIdx.x);
    const Partials& s = args.partials;
    this->write_partial_rows(s.out, s.state, s.width, [&](int r) -> int64_t {
      return block.has(r) ? s.row(place.part, place.head, block.row_begin + r) : -1;
    });
  }

  const PrefillArgs& args;
  const AttentionParams& p;
  typename C::Smem& smem;
  const T* key;
  const T* value;
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2) prefill_kernel(const __grid_constant__ PrefillArgs args) {
  PrefillBlock<C>(args, *reinterpret_cast<typename C::Smem*>(dynamic_smem())).run();
}

template <class C>
void launch_prefill(const PrefillArgs& args, const Gpu& gpu) {
  launch_with<prefill_kernel<C>, sizeof(typename C::Smem)>(gpu, dim3(args.num_thread_blocks()),
                                                           dim3(C::kThreads),
                                                           /*overlap=*/false, args);
}

template <class T, int kDimQK, int kDimVO>
void run_prefill(const PrefillArgs& args, const Gpu& gpu, int block_rows) {
  auto with = [&]<int kM, bool kVariants>() {
    constexpr int kKeys = prefill_keys(kDimQK, 64 * kM, kVariants);
    launch_prefill<PrefillConfig<T, kDimQK, kDimVO, kM, kKeys, kVariants>>(args, gpu);
  };
  const bool variants = needs_variants(args.p);
  if (block_rows == 64) {
    variants ? with.template operator()<1, true>() : with.template operator()<1, false>();
  } else if constexpr (kDimQK < 256) {
    variants ? with.template operator()<2, true>() : with.template operator()<2, false>();
  }
}

}  // namespace fi::cuda
