// The two consumer warpgroups of latent attention.
//
// 64 rows x 512 columns of output are as much as both warpgroups' registers hold, so each has half of the
// columns, and each computes the scores of every other key tile: tile 2i lies in place 0 and is warpgroup
// 0's, tile 2i + 1 in place 1 and warpgroup 1's. A tile's weights go to the other warpgroup through shared
// memory: into the panel of the tile's kpe, which is done with once there are scores. The values of a tile
// are its keys' panels of ckv.
//
//   warpgroup 0: scores 2i     | weights 2i | output 2i (own) | output 2i + 1 (other's)
//   warpgroup 1: scores 2i + 1 | output 2i (other's), meanwhile weights 2i + 1 | output 2i + 1 (own)
//
// While one computes weights the other has products. Both take tiles in their order, so that the origin of
// the weights (OnlineSoftmax has the idea) goes from tile to tile. Warpgroup w is the last to read half w of
// a place's columns, and frees it after its output, own or other's; kpe's panel goes with the half of the
// other's.
#pragma once

#include "fi/cuda/sm90/fragment.h"
#include "fi/cuda/sm90/mla_config.h"
#include "fi/cuda/sm90/mla_ptx.h"
#include "fi/cuda/sm90/prefill_softmax.h"
#include "fi/cuda/sm90/wgmma.h"

namespace fi::cuda::sm90 {

template <class T, MlaCopies kCopies>
class MlaConsumer {
 public:
  FI_DEVICE_INLINE MlaConsumer(MlaSmem& smem, const MlaArgs& args, int group)
      : smem_(smem),
        args_(args),
        group_(group),
        lane_(threadIdx.x % 32),
        warp_row_(threadIdx.x % kWarpgroupThreads / 32 * 16) {}

  FI_DEVICE_INLINE void run() {
    bool more = start_queries(at_);
    while (more) {
      more = attend();
      __syncwarp();
      release(smem_.pieces_empty[at_.stage]);
      at_.advance();
    }
  }

 private:
  // The cache comes as accesses of ordinary threads.
  static constexpr bool kFenced = kCopies == MlaCopies::kRows || kCopies == MlaCopies::kFp8;
  static constexpr int kHalf = kCkvDim / 2;
  static constexpr int kScoreSteps = kBoxColumns / 16;

  FI_DEVICE_INLINE const MlaPiece& piece() const { return smem_.pieces[at_.stage]; }

  // The piece at hand. Whether there is another, whose queries are then on their way.
  FI_DEVICE_INLINE bool attend() {
    float o[kHalf / 2];
#pragma unroll
    for (int i = 0; i < kHalf / 2; ++i) o[i] = 0.0f;
    read_scale();
    OnlineSoftmax softmax(fmaxf(fabsf(scale_log2_), 1e-30f));
    const int tiles = __shfl_sync(kAllLanes, piece().num_tiles, 0);
    cp_async_wait<0>();
    fence_for_products();
    both_groups();
    if (group_ == 0) {
#pragma unroll 1
      for (int tile = 0; tile < tiles; tile += 2) {
        attend_own_first(o, softmax, tile);
        if (tile + 1 < tiles) attend_others(o, softmax, tile + 1);
      }
    } else {
#pragma unroll 1
      for (int tile = 0; tile + 1 < tiles; tile += 2) attend_others_first(o, softmax, tile);
      if (tiles % 2 != 0) attend_others(o, softmax, tiles - 1);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = softmax.sum(r);
      if (lane_ % 4 == 0) smem_.sums[group_][row(r)] = sum;
    }
    both_groups();  // all scores are there, so the queries are done with, too
    RingPosition<2> next = at_;
    next.advance();
    const bool more = start_queries(next);
    store(o, softmax);
    return more;
  }

  // ---- warpgroup 0 ----

  FI_DEVICE_INLINE void attend_own_first(float (&o)[kHalf / 2], OnlineSoftmax& softmax, int tile) {
    float s[kMlaKeys / 2], rescale[2];
    uint32_t p[kMlaKeys / 4];
    start_scores<0>(s);
    wgmma_wait<0>();
    hold(s);
    const bool moved = weigh<0>(s, p, softmax, tile, rescale);
    if (moved) scale(o, rescale);
    clear_unseen<0>(0, tile);
    start_own_output<0>(o, p);
    wgmma_wait<0>();
    hold(o);
    hold(p);
    free_half<0>(0);
    parity_[0] ^= 1;
  }

  // ---- warpgroup 1 ----

  // Tiles `tile`, which is the other's, and tile + 1.
  FI_DEVICE_INLINE void attend_others_first(float (&o)[kHalf / 2], OnlineSoftmax& softmax, int tile) {
    float s[kMlaKeys / 2], rescale[2];
    uint32_t p[kMlaKeys / 4];
    start_scores<1>(s);
    take_weights<0>(o, softmax);
    clear_unseen<1>(0, tile);
    start_others_output<1>(o);
    wgmma_wait<1>();
    hold(s);
    const bool moved = weigh<1>(s, p, softmax, tile + 1, rescale);
    wgmma_wait<0>();
    hold(o);
    free_half<1>(0);
    parity_[0] ^= 1;
    if (moved) scale(o, rescale);
    clear_unseen<1>(1, tile + 1);
    start_own_output<1>(o, p);
    wgmma_wait<0>();
    hold(o);
    hold(p);
    free_half<1>(1);
    parity_[1] ^= 1;
  }

  // ---- either ----

  // The output of a tile of the other warpgroup alone.
  FI_DEVICE_INLINE void attend_others(float (&o)[kHalf / 2], OnlineSoftmax& softmax, int tile) {
    if (group_ == 0) {
      take_weights<1>(o, softmax);
      clear_unseen<0>(1, tile);
      start_others_output<0>(o);
      wgmma_wait<0>();
      hold(o);
      free_half<0>(1);
      parity_[1] ^= 1;
    } else {
      take_weights<0>(o, softmax);
      clear_unseen<1>(0, tile);
      start_others_output<1>(o);
      wgmma_wait<0>();
      hold(o);
      free_half<1>(0);
      parity_[0] ^= 1;
    }
  }

  FI_DEVICE_INLINE void wait_for_half(int place, int half) {
    barrier_wait(smem_.full[place][half], parity_[place]);
    if constexpr (kFenced) fence_for_products();
  }

  // s = q k^T of the tile in the warpgroup's own place. The half that it frees itself is there first.
  template <int kGroup>
  FI_DEVICE_INLINE void start_scores(float (&s)[kMlaKeys / 2]) {
    const uint64_t q = k_major(smem_address(smem_.q)), k = k_major(smem_address(smem_.kv[kGroup]));
    wait_for_half(kGroup, kGroup);
    hold(s);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kMlaPanels; ++i) {
      if (i == kMlaHalfPanels) {
        wait_for_half(kGroup, 1 - kGroup);
        wgmma_fence();
      }
      const int panel = i == kMlaKpePanel ? i : (i + kGroup * kMlaHalfPanels) % (2 * kMlaHalfPanels);
#pragma unroll
      for (int step = 0; step < kScoreSteps; ++step) {
        const int bytes = panel * kMlaPanelBytes + step * 32;
        Wgmma<kMlaKeys>::template k_by_k<T>(s, at(q, bytes), at(k, bytes), i + step > 0);
      }
    }
    wgmma_commit();
  }

  // o += p v, of the warpgroup's own tile.
  template <int kGroup>
  FI_DEVICE_INLINE void start_own_output(float (&o)[kHalf / 2], uint32_t (&p)[kMlaKeys / 4]) {
    const uint64_t v = values<kGroup>(kGroup);
    hold(o);
    hold(p);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kMlaKeys / 16; ++step)
      Wgmma<kHalf>::template registers_by_mn<T>(o, p + 4 * step, at(v, step * 2048), true);
    wgmma_commit();
  }
  // The same of the other's.
  template <int kGroup>
  FI_DEVICE_INLINE void start_others_output(float (&o)[kHalf / 2]) {
    const uint64_t p = k_major(smem_address(weights(1 - kGroup))), v = values<kGroup>(1 - kGroup);
    hold(o);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kMlaKeys / 16; ++step)
      Wgmma<kHalf>::template k_by_mn<T>(o, at(p, step * 32), at(v, step * 2048), true);
    wgmma_commit();
  }

  template <int kGroup>
  FI_DEVICE_INLINE uint64_t values(int place) const {
    return mn_major(smem_address(smem_.kv[place]) + kGroup * kMlaHalfPanels * kMlaPanelBytes, kMlaPanelBytes);
  }
  FI_DEVICE_INLINE unsigned char* weights(int place) const {
    return smem_.kv[place] + kMlaKpePanel * kMlaPanelBytes;
  }

  // Scores of the own tile to weights, in registers and for the other warpgroup.
  template <int kGroup>
  FI_DEVICE_INLINE bool weigh(float (&s)[kMlaKeys / 2], uint32_t (&p)[kMlaKeys / 4], OnlineSoftmax& softmax,
                              int tile, float (&rescale)[2]) {
    if (scale_log2_ < 0.0f) {
#pragma unroll
      for (int i = 0; i < kMlaKeys / 2; ++i) s[i] = -s[i];
    }
    mask(s, tile);
    const bool moved = softmax.weigh(s, rescale);
    if (lane_ % 4 == 0) {
      smem_.origins[kGroup][warp_row_ + lane_ / 4] = softmax.origin(0);
      smem_.origins[kGroup][warp_row_ + lane_ / 4 + 8] = softmax.origin(1);
    }
#pragma unroll
    for (int i = 0; i < kMlaKeys / 4; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
    warpgroup_barrier(1 + kGroup);  // no warp's products read kpe any more
    const int row = warp_row_ + lane_ % 16;
#pragma unroll
    for (int step = 0; step < kMlaKeys / 16; ++step)
      stmatrix_x4(weights(kGroup) + row * 128 + ((2 * step + lane_ / 16) ^ row % 8) * 16, p + 4 * step);
    fence_for_products();
    __syncwarp();
    release(smem_.weights[kGroup]);
    return moved;
  }

  template <int kPlace>
  FI_DEVICE_INLINE void take_weights(float (&o)[kHalf / 2], OnlineSoftmax& softmax) {
    float rescale[2];
    barrier_wait(smem_.weights[kPlace], parity_[kPlace]);
    wait_for_half(kPlace, 1 - kPlace);
    const float* const origins = smem_.origins[kPlace] + warp_row_ + lane_ / 4;
    if (softmax.follow(origins[0], origins[8], rescale)) scale(o, rescale);
  }

  FI_DEVICE_INLINE static void scale(float (&o)[kHalf / 2], const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < kHalf / 2; ++i) o[i] *= by[i / 2 % 2];
  }

  // One arrival a warp: every warp has seen its own part of the products finished.
  FI_DEVICE_INLINE void release(Barrier& barrier) {
    if (lane_ == 0) barrier_arrive(barrier);
  }

  // Its half of a place, to who brings it.
  template <int kGroup>
  FI_DEVICE_INLINE void free_half(int place) {
    if constexpr (kCopies == MlaCopies::kSharedBoxes) {
      if (lane_ == 0) barrier_arrive_at(smem_.empty[place][kGroup], kGroup);
    } else {
      release(smem_.empty[place][kGroup]);
    }
  }

  // ---- keys that a row doesn't see ----

  FI_DEVICE_INLINE int first_key(int tile) const { return (piece().first_tile + tile) * kMlaKeys; }

  FI_DEVICE_INLINE void mask(float (&s)[kMlaKeys / 2], int tile) const {
    const MlaPiece& piece = this->piece();
    if (first_key(tile) + kMlaKeys <= piece.whole_end) return;
    int last[2] = {piece.kv_len - 1, piece.kv_len - 1};
    if (args_.p.batch.call.causal) {
#pragma unroll
      for (int r = 0; r < 2; ++r) last[r] = min(last[r], piece.q_offset + query(r));
    }
    mask_after(s, first_key(tile) + lane_ % 4 * 2, last);
  }

  // Values of keys that no row sees become 0: a weight of 0 times what lies there must not be NaN. Of the
  // warpgroup's own columns.
  template <int kGroup>
  FI_DEVICE_INLINE void clear_unseen(int place, int tile) {
    const int seen = max(piece().seen_end - first_key(tile), 0);
    if (seen >= kMlaKeys) return;
    const int thread = threadIdx.x % kWarpgroupThreads;
    unsigned char* const values = smem_.kv[place] + kGroup * kMlaHalfPanels * kMlaPanelBytes;
#pragma unroll 1
    for (int key = seen + thread / 8; key < kMlaKeys; key += kWarpgroupThreads / 8) {
#pragma unroll
      for (int panel = 0; panel < kMlaHalfPanels; ++panel)
        *reinterpret_cast<uint4*>(values + panel * kMlaPanelBytes + key * 128 + thread % 8 * 16) = {0, 0, 0,
                                                                                                    0};
    }
    fence_for_products();
    warpgroup_barrier(1 + kGroup);
  }

  // ---- queries, results ----

  FI_DEVICE_INLINE void read_scale() {
    scale_log2_ = args_.scale_log2;
    kv_scale_ = 1.0f;
    if (args_.p.batch.k_scale) {
      kv_scale_ = args_.p.batch.k_scale.at(0);
      scale_log2_ *= kv_scale_;
    }
  }

  FI_DEVICE_INLINE void both_groups() { named_barrier_sync(3, 2 * kWarpgroupThreads); }

  // Starts the copies of a piece's rows, by both warpgroups; zeros where there are none. False: it is no
  // piece.
  FI_DEVICE_INLINE bool start_queries(const RingPosition<2>& at) {
    barrier_wait(smem_.pieces_full[at.stage], at.parity);
    const MlaPiece& piece = smem_.pieces[at.stage];
    if (__shfl_sync(kAllLanes, piece.num_rows, 0) < 0) return false;
    const AttentionParams& c = args_.p.batch.call;
    const int thread = group_ * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads, chunk = thread % 8;
#pragma unroll 1
    for (int row = thread / 8; row < kMlaRows; row += 2 * kWarpgroupThreads / 8) {
      const bool valid = row < piece.num_rows;
      const int packed = piece.row_begin + row;
      const int query = static_cast<int>(args_.by_num_heads.divide(static_cast<uint32_t>(packed)));
      const int64_t n = valid ? piece.q_begin + query : 0, h = valid ? packed - query * args_.num_heads : 0;
      const T* const nope = static_cast<const T*>(c.query) + n * c.q_stride_n + h * c.q_stride_h + chunk * 8;
      const T* const pe = static_cast<const T*>(args_.p.q_pe) + n * args_.p.q_pe_stride_n +
                          h * args_.p.q_pe_stride_h + chunk * 8;
      unsigned char* const to = smem_.q + row * 128 + (chunk ^ row % 8) * 16;
#pragma unroll
      for (int panel = 0; panel < kMlaKpePanel; ++panel)
        cp_async_16(to + panel * kMlaPanelBytes, nope + panel * kBoxColumns, valid);
      cp_async_16(to + kMlaKpePanel * kMlaPanelBytes, pe, valid);
    }
    cp_async_commit();
    return true;
  }

  // The query that the thread's row r is of.
  FI_DEVICE_INLINE int query(int r) const {
    return static_cast<int>(args_.by_num_heads.divide(static_cast<uint32_t>(piece().row_begin + row(r))));
  }
  FI_DEVICE_INLINE int row(int r) const { return warp_row_ + lane_ / 4 + 8 * r; }

  FI_DEVICE_INLINE void store(const float (&o)[kHalf / 2], const OnlineSoftmax& softmax) {
    const MlaPiece& piece = this->piece();
    const int slot = __shfl_sync(kAllLanes, piece.slot, 0);
    const bool is_first = group_ == 0 && lane_ % 4 == 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = smem_.sums[0][row(r)] + smem_.sums[1][row(r)];
      const bool inside = row(r) < piece.num_rows;
      if (slot >= 0) {
        float* const partial = args_.partials + (int64_t{2} * blockIdx.x + slot) * kMlaPartialFloats;
        float* const to = partial + row(r) * kCkvDim + group_ * kHalf + lane_ % 4 * 2;
        if (inside) {
#pragma unroll
          for (int j = 0; j < kHalf / 8; ++j)
            *reinterpret_cast<float2*>(to + 8 * j) = {o[4 * j + 2 * r], o[4 * j + 2 * r + 1]};
          if (is_first) {
            float* const tail = partial + kMlaRows * kCkvDim + row(r);
            tail[0] = softmax.base(r, sum);
            tail[kMlaRows] = sum;
          }
        }
      } else {
        const AttentionParams& c = args_.p.batch.call;
        const int query = this->query(r), head = piece.row_begin + row(r) - query * args_.num_heads;
        const int64_t n = piece.q_begin + query;
        const float factor = sum == 0.0f ? 0.0f : kv_scale_ / sum;
        T* const to =
            static_cast<T*>(c.out) + n * c.o_stride_n + head * c.o_stride_h + group_ * kHalf + lane_ % 4 * 8;
#pragma unroll
        for (int i = 0; i < kHalf / 32; ++i) {
          uint32_t w[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float* const x = o + 4 * (4 * i + j) + 2 * r;
            w[j] = pack2<T>(x[0] * factor, x[1] * factor);
          }
          gather_quad(w, lane_);
          if (inside) *reinterpret_cast<uint4*>(to + 32 * i) = make_uint4(w[0], w[1], w[2], w[3]);
        }
        if (inside && is_first && c.lse != nullptr)
          c.lse[n * args_.num_heads + head] = sum == 0.0f ? -kInf : softmax.base(r, sum) + log2f(sum);
      }
    }
  }

  MlaSmem& smem_;
  const MlaArgs& args_;
  int group_, lane_, warp_row_;
  float scale_log2_, kv_scale_;
  uint32_t parity_[2] = {0, 0};  // of the places
  RingPosition<2> at_;           // of the pieces
};

}  // namespace fi::cuda::sm90
