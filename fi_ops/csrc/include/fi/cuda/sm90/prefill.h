// Attention of many query rows on Hopper: TMA loads, wgmma products, warpgroups with roles.
//
// A block has one producer warpgroup, of which one thread starts the copies, and kConsumers warpgroups of 64
// query rows each. Blocks stay: each takes query tiles from PrefillQueue until none is left, and the producer
// runs ahead into the next tile. A consumer has two products in flight: it starts the scores of the next KV
// tile, then the output of the one before, and computes the softmax of the former while the latter runs.
#pragma once

#include "fi/cuda/sm90/mbarrier.h"
#include "fi/cuda/sm90/prefill_softmax.h"
#include "fi/cuda/sm90/prefill_work.h"
#include "fi/cuda/sm90/tensor_map.h"
#include "fi/cuda/sm90/tma.h"
#include "fi/cuda/sm90/warpgroup.h"
#include "fi/cuda/sm90/wgmma.h"

namespace fi::cuda::sm90 {

// T: bf16 or f16. A query tile has 64 * kConsumers rows, a KV tile kBlockN. With kQInRegisters the queries
// are read from shared memory once a tile rather than in every product.
template <class T_, int kHeadDim_, int kConsumers_, int kBlockN_, int kStages_, bool kQInRegisters_>
struct PrefillConfig {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kConsumers = kConsumers_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr bool kQInRegisters = kQInRegisters_;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers);
  static constexpr int kPanels = kHeadDim / kBoxColumns;
  // Of 65536: what the producer gives up, the consumers share.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  static_assert(kHeadDim % kBoxColumns == 0 && kBlockN % 16 == 0);
  static_assert(kConsumers == 2 || kConsumers == 3);
  static_assert(kStages >= 2, "a consumer holds on to one tile of values while it waits for the next");
};

template <class Config>
struct PrefillSmem {
  static constexpr int kQPanelBytes = Config::kBlockM * kBoxColumns * 2;
  static constexpr int kKvPanelBytes = Config::kBlockN * kBoxColumns * 2;

  unsigned char q[Config::kPanels * kQPanelBytes];
  unsigned char k[Config::kStages][Config::kPanels * kKvPanelBytes];
  unsigned char v[Config::kStages][Config::kPanels * kKvPanelBytes];
  Barrier q_full, q_empty;
  Barrier k_full[Config::kStages], k_empty[Config::kStages];
  Barrier v_full[Config::kStages], v_empty[Config::kStages];
};

struct PrefillArgs {
  PrefillShape shape;
  float scale_log2;
  void* out;  // [batch, num_qo_heads, qo_len, head_dim]
  int64_t o_stride_b, o_stride_h, o_stride_n;
  float* lse;  // [batch, num_qo_heads, qo_len] contiguous; null: not wanted
};

template <class Config>
class PrefillProducer {
 public:
  using Smem = PrefillSmem<Config>;

  // By one thread.
  FI_DEVICE_INLINE static void run(Smem& smem, const PrefillShape& shape, const CUtensorMap& q_map,
                                   const CUtensorMap& k_map, const CUtensorMap& v_map) {
    PrefillQueue<Config::kBlockM, Config::kBlockN> queue(shape);
    PrefillWork work;
    RingPosition<1> q_at;
    RingPosition<Config::kStages> k_at, v_at;
    while (queue.next(work)) {
      if (work.tiles.size() == 0) continue;
      const int kv_head = work.head / shape.group_size;
      const auto load_k = [&](int tile) {
        load(smem.k[k_at.stage], smem.k_full[k_at.stage], smem.k_empty[k_at.stage], k_at.parity, k_map,
             tile * Config::kBlockN, kv_head, work.b, Smem::kKvPanelBytes);
        k_at.advance();
      };
      load(smem.q, smem.q_full, smem.q_empty, q_at.parity, q_map, work.q_start, work.head, work.b,
           Smem::kQPanelBytes);
      q_at.advance();
      load_k(work.tiles.end - 1);
      for (int tile = work.tiles.end - 1; tile >= work.tiles.begin; --tile) {
        if (tile > work.tiles.begin) load_k(tile - 1);  // in the order in which they are needed
        load(smem.v[v_at.stage], smem.v_full[v_at.stage], smem.v_empty[v_at.stage], v_at.parity, v_map,
             tile * Config::kBlockN, kv_head, work.b, Smem::kKvPanelBytes);
        v_at.advance();
      }
    }
  }

 private:
  FI_DEVICE_INLINE static void load(unsigned char* tile, Barrier& full, Barrier& empty, uint32_t parity,
                                    const CUtensorMap& map, int row, int head, int b, int panel_bytes) {
    barrier_wait(empty, parity ^ 1);
    barrier_arrive_expect(full, Config::kPanels * panel_bytes);
#pragma unroll
    for (int panel = 0; panel < Config::kPanels; ++panel)
      load_box(tile + panel * panel_bytes, map, panel * kBoxColumns, row, head, b, full);
  }
};

template <class Config>
class PrefillConsumer {
 public:
  using T = typename Config::T;
  using Smem = PrefillSmem<Config>;
  static constexpr int kBlockN = Config::kBlockN, kHeadDim = Config::kHeadDim;

  FI_DEVICE_INLINE PrefillConsumer(Smem& smem, const PrefillArgs& args, int group)
      : smem_(smem),
        args_(args),
        lane_(threadIdx.x % 32),
        group_row_(64 * group),
        warp_row_(64 * group + threadIdx.x % kWarpgroupThreads / 32 * 16) {}

  FI_DEVICE_INLINE void run() {
    PrefillQueue<Config::kBlockM, kBlockN> queue(args_.shape);
    PrefillWork work;
    while (queue.next(work)) attend(work);
  }

 private:
  FI_DEVICE_INLINE void attend(const PrefillWork& work) {
    float o[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
    OnlineSoftmax softmax(args_.scale_log2);
    if (work.tiles.size() > 0) {
      float s[kBlockN / 2], rescale[2];
      uint32_t p[kBlockN / 4];
      barrier_wait(smem_.q_full, q_at_.parity);
      if constexpr (Config::kQInRegisters) {
        load_q();
        release(smem_.q_empty);
      }
      barrier_wait(smem_.k_full[k_at_.stage], k_at_.parity);
      start_scores(s);
      wgmma_wait<0>();
      hold(s);
      release(smem_.k_empty[k_at_.stage]);
      k_at_.advance();
      mask(s, work, work.tiles.end - 1);
      softmax.weigh(s, rescale);
      pack(p, s);
      barrier_wait(smem_.v_full[v_at_.stage], v_at_.parity);

      for (int tile = work.tiles.end - 2; tile >= work.tiles.begin; --tile) {
        barrier_wait(smem_.k_full[k_at_.stage], k_at_.parity);
        start_scores(s);
        start_output(o, p);
        const int v_stage = v_at_.stage;
        v_at_.advance();
        wgmma_wait<1>();
        hold(s);
        release(smem_.k_empty[k_at_.stage]);
        k_at_.advance();
        mask(s, work, tile);
        const bool moved = softmax.weigh(s, rescale);
        hold(s);
        // The next output's values are waited for here, not where they are used: the assembler moves no wgmma
        // wait up over a loop.
        barrier_wait(smem_.v_full[v_at_.stage], softmax.after_weights(v_at_.parity));
        wgmma_wait<0>();
        hold(o);
        hold(p);
        release(smem_.v_empty[v_stage]);
        pack(p, s);
        if (moved) {
#pragma unroll
          for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= rescale[i / 2 % 2];
        }
      }
      if constexpr (!Config::kQInRegisters) release(smem_.q_empty);
      q_at_.advance();

      start_output(o, p);
      wgmma_wait<0>();
      hold(o);
      release(smem_.v_empty[v_at_.stage]);
      v_at_.advance();
    }
    store(o, softmax, work);
  }

  // This warp's 16 rows of q, as operands in registers.
  FI_DEVICE_INLINE void load_q() {
    const int row = warp_row_ + lane_ % 16;
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int chunk = (step % 4 * 2 + lane_ / 16) ^ (row % 8);  // the 128-byte swizzle
      uint32_t x[4];
      ldmatrix_x4(x, smem_.q + step / 4 * Smem::kQPanelBytes + row * 128 + chunk * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) q_[4 * step + i] = x[i];
    }
  }

  // s = q k^T
  FI_DEVICE_INLINE void start_scores(float (&s)[kBlockN / 2]) {
    const uint64_t q = k_major(smem_address(smem_.q) + group_row_ * 128);
    const uint64_t k = k_major(smem_address(smem_.k[k_at_.stage]));
    hold(s);
    if constexpr (Config::kQInRegisters) hold(q_);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int panel = step / 4, inside = step % 4 * 32;
      const uint64_t k_step = at(k, panel * Smem::kKvPanelBytes + inside);
      if constexpr (Config::kQInRegisters) {
        Wgmma<kBlockN>::template registers_by_k<T>(s, q_ + 4 * step, k_step, step > 0);
      } else {
        Wgmma<kBlockN>::template k_by_k<T>(s, at(q, panel * Smem::kQPanelBytes + inside), k_step, step > 0);
      }
    }
    wgmma_commit();
  }

  // o += p v
  FI_DEVICE_INLINE void start_output(float (&o)[kHeadDim / 2], uint32_t (&p)[kBlockN / 4]) {
    const uint64_t v = mn_major(smem_address(smem_.v[v_at_.stage]), Smem::kKvPanelBytes);
    hold(o);
    hold(p);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlockN / 16; ++step)
      Wgmma<kHeadDim>::template registers_by_mn<T>(o, p + 4 * step, at(v, step * 2048), true);
    wgmma_commit();
  }

  // One arrival a warp: every warp has seen its own part of the products finished.
  FI_DEVICE_INLINE void release(Barrier& empty) {
    if (lane_ == 0) barrier_arrive(empty);
  }

  FI_DEVICE_INLINE void mask(float (&s)[kBlockN / 2], const PrefillWork& work, int tile) const {
    const PrefillShape& shape = args_.shape;
    const int row = work.q_start + warp_row_ + lane_ / 4, key = tile * kBlockN + lane_ % 4 * 2;
    if (tile >= work.whole.end) {
      const int last[2] = {min(row + shape.last_key, shape.kv_len - 1),
                           min(row + 8 + shape.last_key, shape.kv_len - 1)};
      mask_after(s, key, last);
    }
    if (tile < work.whole.begin) {
      const int first[2] = {row + shape.first_key, row + 8 + shape.first_key};
      mask_before(s, key, first);
    }
  }

  FI_DEVICE_INLINE static void pack(uint32_t (&p)[kBlockN / 4], const float (&s)[kBlockN / 2]) {
#pragma unroll
    for (int i = 0; i < kBlockN / 4; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  // Four lanes exchange their words so that each has 16 contiguous bytes: of blocks 4i .. 4i+3 of 8 columns,
  // lane t of a quad gets all of block 4i + t.
  FI_DEVICE_INLINE void gather_quad(uint32_t (&w)[4]) const {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
      const bool upper = lane_ & bit;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i & bit) continue;
        const uint32_t other = __shfl_xor_sync(0xffffffff, upper ? w[i] : w[i + bit], bit);
        (upper ? w[i] : w[i + bit]) = other;
      }
    }
  }

  FI_DEVICE_INLINE void store(const float (&o)[kHeadDim / 2], const OnlineSoftmax& softmax,
                              const PrefillWork& work) const {
    const PrefillShape& shape = args_.shape;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = work.q_start + warp_row_ + lane_ / 4 + 8 * r;
      const bool inside = row < shape.qo_len;
      const float total = softmax.total(r);
      const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
      T* out = static_cast<T*>(args_.out) + work.b * args_.o_stride_b + work.head * args_.o_stride_h +
               row * args_.o_stride_n + lane_ % 4 * 8;
#pragma unroll
      for (int i = 0; i < kHeadDim / 32; ++i) {
        uint32_t w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* x = o + 4 * (4 * i + j) + 2 * r;
          w[j] = pack2<T>(x[0] * inverse, x[1] * inverse);
        }
        gather_quad(w);
        if (inside) *reinterpret_cast<uint4*>(out + 32 * i) = make_uint4(w[0], w[1], w[2], w[3]);
      }
      if (args_.lse != nullptr && inside && lane_ % 4 == 0)
        args_.lse[(static_cast<int64_t>(work.b) * shape.num_qo_heads + work.head) * shape.qo_len + row] =
            softmax.lse(r, total);
    }
  }

  Smem& smem_;
  const PrefillArgs& args_;
  int lane_, group_row_, warp_row_;  // the warpgroup's and the warp's first row in the query tile
  uint32_t q_[Config::kQInRegisters ? kHeadDim / 4 : 1];
  RingPosition<1> q_at_;
  RingPosition<Config::kStages> k_at_, v_at_;
};

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillArgs args, const __grid_constant__ CUtensorMap q_map,
                   const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
  auto& smem = *reinterpret_cast<PrefillSmem<Config>*>(dynamic_smem());
  if (threadIdx.x == 0) {
    prefetch_tensor_map(q_map);
    prefetch_tensor_map(k_map);
    prefetch_tensor_map(v_map);
    constexpr int kReaders = 4 * Config::kConsumers;  // warps
    barrier_init(smem.q_full, 1);
    barrier_init(smem.q_empty, kReaders);
    for (int stage = 0; stage < Config::kStages; ++stage) {
      barrier_init(smem.k_full[stage], 1);
      barrier_init(smem.k_empty[stage], kReaders);
      barrier_init(smem.v_full[stage], 1);
      barrier_init(smem.v_empty[stage], kReaders);
    }
    barrier_init_fence();
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();

  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    lower_registers<Config::kProducerRegisters>();
    if (threadIdx.x == 0) PrefillProducer<Config>::run(smem, args.shape, q_map, k_map, v_map);
  } else {
    raise_registers<Config::kConsumerRegisters>();
    PrefillConsumer<Config>(smem, args, warpgroup - 1).run();
  }
}

}  // namespace fi::cuda::sm90
