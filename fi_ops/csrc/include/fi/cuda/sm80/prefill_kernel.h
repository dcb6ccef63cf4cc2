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
class PrefillBlock {
  using T = typename C::T;
  static constexpr int kTiles = C::kKeys / 8;

 public:
  FI_DEVICE_INLINE PrefillBlock(const PrefillArgs& args, typename C::Smem& smem)
      : args(args), p(args.p), smem(smem), warp_row(static_cast<int>(threadIdx.x / 32) * 16 * C::kM) {}

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
    finish();
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
    init();
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

  FI_DEVICE_INLINE void init() {
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int d = 0; d < C::kDimVO / 8; ++d) o[m][d][0] = o[m][d][1] = o[m][d][2] = o[m][d][3] = 0.0f;
      row_max[m][0] = row_max[m][1] = -kInf;
      row_sum[m][0] = row_sum[m][1] = 0.0f;
    }
  }

  // The row of the block that accumulators m, `half` belong to, and the tile's key that element e of tile n
  // is.
  FI_DEVICE_INLINE int row_of(int m, int half) const {
    return warp_row + 16 * m + static_cast<int>(threadIdx.x % 32 / 4) + 8 * half;
  }
  FI_DEVICE_INLINE int key_of(int n, int e) const {
    return 8 * n + 2 * static_cast<int>(threadIdx.x % 4) + e;
  }

  FI_DEVICE_INLINE void attend_tile(int tile, bool open, int stage) {
    const int first = tile * C::kKeys;
    float s[C::kM][kTiles][4];
    multiply_keys<C::kDimQK, C::kM, C::kKeys>(s, smem.q, warp_row, smem.k[stage]);
    float scale2 = p.scale * kLog2e;
    if constexpr (C::kVariants) {
      apply_variants(s, first);
      if (!open) with_mask_type(p.mask_dtype, [&](auto* type) { apply_mask(s, first, type); });
      scale2 = 1.0f;
    }
    if (first < smem.range.open_begin || first + C::kKeys > smem.range.open_end) exclude_keys(s, first);
    softmax(s, scale2);
    add_values<C::kDimVO, C::kM, C::kKeys>(o, s, smem.v[stage]);
  }

  // Products to logits, base 2.
  FI_DEVICE_INLINE void apply_variants(float (&s)[C::kM][kTiles][4], int first) const {
    const float cap = p.logits_soft_cap, to_cap = cap > 0.0f ? 2.0f * kLog2e * p.scale / cap : 0.0f;
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Row row = smem.rows[row_of(m, half)];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[m][n][2 * half + e];
            x = cap > 0.0f ? cap * kLog2e * tanh_exp2(x * to_cap) : x * (p.scale * kLog2e);
            x += (static_cast<float>(first + key_of(n, e)) - row.position) * row.slope;
          }
        }
      }
    }
  }

  template <class M>
  FI_DEVICE_INLINE void apply_mask(float (&s)[C::kM][kTiles][4], int first, const M*) const {
    const BlockOfRows block = smem.block;
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(m, half);
        if (!block.has(r)) continue;
        const M* mask = static_cast<const M*>(p.mask) + block.b * p.mask_stride_b +
                        block.head(r) * p.mask_stride_h + block.query(r) * p.mask_stride_q;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int j = first + key_of(n, e);
            float& x = s[m][n][2 * half + e];
            const float addend = j < smem.range.end ? mask_addend(mask[j * p.mask_stride_k]) : -kInf;
            x = addend == -kInf ? addend : x + addend;
          }
        }
      }
    }
  }

  // Keys that a row may not see become -inf, even where their product is NaN.
  FI_DEVICE_INLINE void exclude_keys(float (&s)[C::kM][kTiles][4], int first) const {
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Row row = smem.rows[row_of(m, half)];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int j = first + key_of(n, e);
            if (j < row.begin || j >= row.end) s[m][n][2 * half + e] = -kInf;
          }
        }
      }
    }
  }

  // Logits / scale2 to weights. The maximum moves only when it grows by 2^kSlack or more: weights up to that
  // are as good as weights up to 1, and what has been accumulated is rarely rescaled.
  FI_DEVICE_INLINE void softmax(float (&s)[C::kM][kTiles][4], float scale2) {
    constexpr float kSlack = 8.0f;
    float rescale[C::kM][2];
    bool moved = false;
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -kInf;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2)) * scale2;
        const float old = row_max[m][half];
        const bool moves = top > old + kSlack;
        rescale[m][half] = moves ? exp2_approx(old - top) : 1.0f;
        row_max[m][half] = moves ? top : old;
        moved = moved || moves;
      }
    }
    if (__any_sync(kAllLanes, moved)) {
#pragma unroll
      for (int m = 0; m < C::kM; ++m) {
        row_sum[m][0] *= rescale[m][0];
        row_sum[m][1] *= rescale[m][1];
#pragma unroll
        for (int d = 0; d < C::kDimVO / 8; ++d) {
          o[m][d][0] *= rescale[m][0];
          o[m][d][1] *= rescale[m][0];
          o[m][d][2] *= rescale[m][1];
          o[m][d][3] *= rescale[m][1];
        }
      }
    }
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shift = usable_max(row_max[m][half]);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[m][n][2 * half + e];
            x = exp2_approx(fmaf(x, scale2, -shift));
            row_sum[m][half] += x;
          }
        }
      }
    }
  }

  FI_DEVICE_INLINE void finish() {
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& sum = row_sum[m][half];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
      }
    }
    args.partials.parts > 1 ? write_partial() : write();
  }

  // Through shared memory, in the place of this warp's own queries, so that 16 bytes go out at a time.
  FI_DEVICE_INLINE void write() {
    const BlockOfRows block = smem.block;
    const int lane = threadIdx.x % 32;
    __syncthreads();  // q's copies, which other threads waited for, have landed even where there was no tile
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(m, half);
        const int64_t h = block.head(r);
        float factor = 0.0f;
        if (block.has(r)) {
          const RowResult result = finish_row(p, h, row_max[m][half], row_sum[m][half]);
          factor = result.factor;
          if (p.lse && lane % 4 == 0)
            p.lse[(block.b * p.num_qo_heads + h) * p.qo_len + block.query(r)] = result.lse;
        }
#pragma unroll
        for (int d = 0; d < C::kDimVO / 8; ++d) {
          *reinterpret_cast<uint32_t*>(smem.q + tile_offset<C::kDimQK>(r, d) + 2 * (lane % 4)) =
              pack2<T>(o[m][d][2 * half] * factor, o[m][d][2 * half + 1] * factor);
        }
      }
    }
    __syncwarp();
    constexpr int kChunks = C::kDimVO / 8;
    T* out = static_cast<T*>(p.out) + block.b * p.o_stride_b;
#pragma unroll 4
    for (int at = lane; at < 16 * C::kM * kChunks; at += 32) {
      const int r = warp_row + at / kChunks, chunk = at % kChunks;
      if (!block.has(r) || chunk * 8 >= p.head_dim_vo) continue;
      *reinterpret_cast<uint4*>(out + block.head(r) * p.o_stride_h + block.query(r) * p.o_stride_n +
                                chunk * 8) =
          *reinterpret_cast<const uint4*>(smem.q + tile_offset<C::kDimQK>(r, chunk));
    }
  }

  FI_DEVICE_INLINE void write_partial() const {
    const BlockOfRows block = smem.block;
    const PrefillArgs::Place place = args.place(blockIdx.x);
#pragma unroll
    for (int m = 0; m < C::kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row_of(m, half);
        if (!block.has(r)) continue;
        const int64_t row = args.partials.row(place.part, place.head, block.row_begin + r);
        float* out = args.partials.out + row * args.partials.width;
#pragma unroll
        for (int d = 0; d < C::kDimVO / 8; ++d)
          *reinterpret_cast<float2*>(out + key_of(d, 0)) = {o[m][d][2 * half], o[m][d][2 * half + 1]};
        if (threadIdx.x % 4 == 0) {
          args.partials.state[2 * row] = row_max[m][half];
          args.partials.state[2 * row + 1] = row_sum[m][half];
        }
      }
    }
  }

  const PrefillArgs& args;
  const AttentionParams& p;
  typename C::Smem& smem;
  const T* key;
  const T* value;
  int warp_row;
  float o[C::kM][C::kDimVO / 8][4];
  float row_max[C::kM][2], row_sum[C::kM][2];
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 2) prefill_kernel(const __grid_constant__ PrefillArgs args) {
  PrefillBlock<C>(args, *reinterpret_cast<typename C::Smem*>(dynamic_smem())).run();
}

template <class C>
void launch_prefill(const PrefillArgs& args, const Gpu& gpu) {
  launch(gpu, prefill_kernel<C>, dim3(args.num_thread_blocks()), dim3(C::kThreads), sizeof(typename C::Smem),
         args);
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
