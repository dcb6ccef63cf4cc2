// Attention of many query rows of 8 bits on Hopper: the structure of fi/cuda/sm90/prefill.h, with products of
// 8 bits and two warps between the copies and the consumers that transpose the values.
#pragma once

#include "fi/cuda/sm90/fp8_values.h"
#include "fi/cuda/sm90/fp8_wgmma.h"
#include "fi/cuda/sm90/fragment.h"
#include "fi/cuda/sm90/prefill_producer.h"
#include "fi/cuda/sm90/prefill_softmax.h"

namespace fi::cuda::sm90 {

template <class Config>
class Fp8Consumer {
 public:
  static constexpr bool kBatch = Config::kBatch;
  using Smem = std::conditional_t<kBatch, Fp8BatchSmem<Config>, Fp8Smem<Config>>;
  using Args = std::conditional_t<kBatch, Fp8BatchArgs, Fp8Args>;
  static constexpr int kBlockN = Config::kBlockN, kHeadDim = Config::kHeadDim;

  FI_DEVICE_INLINE Fp8Consumer(Smem& smem, const Args& args, int group)
      : smem_(smem),
        args_(args),
        lane_(threadIdx.x % 32),
        group_row_(64 * group),
        warp_row_(64 * group + threadIdx.x % kWarpgroupThreads / 32 * 16) {}

  FI_DEVICE_INLINE void run() {
    if constexpr (kBatch) {
      for (;; q_at_.advance()) {
        barrier_wait(smem_.q_full, q_at_.parity);
        const PrefillWork work = uniform(batch_tile().work);
        if (work.head < 0) return;
        attend(work);
      }
    } else {
      PrefillQueue<Config::kBlockM, kBlockN> queue(args_.shape);
      PrefillWork work;
      while (queue.next(work)) attend(work);
    }
  }

 private:
  // e4m3 ends at 448: weights are 2^8 at the origin, and the origin moves before they pass that.
  static constexpr float kTop = 8.0f, kLag = 0.8f;

  FI_DEVICE_INLINE void attend(const PrefillWork& work) {
    const int kv_head = kv_head_of(work);
    const float scale = scale_of(work, kv_head);
    // The softmax takes the maximum of scores: its scale is above 0, and the sign is q's.
    OnlineSoftmax softmax(fmaxf(fabsf(scale), 1e-30f), kTop, kLag);

    float o[kHeadDim / 2], sum[kHeadDim / 2];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] = sum[i] = 0.0f;
    int tile = work.tiles.end - 1;
    if (tile >= work.tiles.begin) {
      float s[kBlockN / 2], rescale[2];
      uint32_t weights[kBlockN / 8];
      int summed = 0;  // KV tiles in o
      barrier_wait(smem_.q_full, q_at_.parity);
      if constexpr (Config::kQInRegisters) {
        load_q();
        if (scale < 0.0f) {
#pragma unroll
          for (uint32_t& four : q_) four ^= 0x80808080u;
        }
        release_queries();
      } else {
        if (scale < 0.0f) negate_q();
      }
      barrier_wait(smem_.k_full[k_at_.stage], k_at_.parity);
      start_scores(s);
      wgmma_wait<0>();
      hold(s);
      release(smem_.k_empty[k_at_.stage]);
      k_at_.advance();
      mask(s, work, tile);
      softmax.weigh(s, rescale);
      pack(weights, s);
      barrier_wait(smem_.transposed_full[v_at_.stage], v_at_.parity);

      while (--tile >= work.tiles.begin) {
        barrier_wait(smem_.k_full[k_at_.stage], k_at_.parity);
        start_scores(s);
        start_output(o, weights, summed > 0);
        const int v_stage = v_at_.stage;
        v_at_.advance();
        wgmma_wait<1>();
        hold(s);
        release(smem_.k_empty[k_at_.stage]);
        k_at_.advance();
        mask(s, work, tile);
        const bool moved = softmax.weigh(s, rescale);
        hold(s);
        // As in prefill.h: a wait that depends on the weights keeps them before the wait for the products.
        barrier_wait(smem_.transposed_full[v_at_.stage], softmax.after_weights(v_at_.parity));
        wgmma_wait<0>();
        hold(o);
        hold(weights);
        release(smem_.transposed_empty[v_stage]);
        pack(weights, s);
        if (++summed == Config::kPromote) {
          summed = 0;
#pragma unroll
          for (int i = 0; i < kHeadDim / 2; ++i) sum[i] += o[i];
        }
        if (moved) {
#pragma unroll
          for (int i = 0; i < kHeadDim / 2; ++i) {
            o[i] *= rescale[i / 2 % 2];
            sum[i] *= rescale[i / 2 % 2];
          }
        }
      }
      if constexpr (!Config::kQInRegisters) release_queries();
      if constexpr (!kBatch) q_at_.advance();

      start_output(o, weights, summed > 0);
      wgmma_wait<0>();
      hold(o);
      release(smem_.transposed_empty[v_at_.stage]);
      v_at_.advance();
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] += sum[i];
    } else if constexpr (kBatch) {
      release_queries();
    }
    store(o, softmax, work, v_scale_of(kv_head));
  }

  // ---- a call, or a request of a batch ----

  // The query tile at hand, until q_at_ moves on.
  FI_DEVICE_INLINE const BatchTile& batch_tile() const { return smem_.tiles[q_at_.parity]; }

  // qo_len, kv_len, first_key, last_key.
  FI_DEVICE_INLINE const auto& shape() const {
    if constexpr (kBatch) {
      return batch_tile();
    } else {
      return args_.shape;
    }
  }
  FI_DEVICE_INLINE const AttentionParams& call() const {
    if constexpr (kBatch) {
      return args_.batch.p;
    } else {
      return args_.p.call;
    }
  }

  FI_DEVICE_INLINE int kv_head_of(const PrefillWork& work) const {
    if constexpr (kBatch) {
      return batch_tile().kv_head;
    } else {
      return work.head / args_.shape.group_size;
    }
  }
  // A score times this is a logit in base 2.
  FI_DEVICE_INLINE float scale_of(const PrefillWork& work, int kv_head) const {
    if constexpr (kBatch) {
      const float scale = args_.batch.scale_log2 * batch_tile().k_scale;
      return args_.q_scale ? scale * args_.q_scale.at(work.head) : scale;
    } else {
      const Fp8AttentionParams& p = args_.p;
      float scale = args_.scale_log2;
      if (p.q_scale) scale *= p.q_scale.at(work.head);
      if (p.k_scale) scale *= p.k_scale.at(kv_head);
      return scale;
    }
  }
  FI_DEVICE_INLINE float v_scale_of(int kv_head) const {
    if constexpr (kBatch) {
      return batch_tile().v_scale;
    } else {
      return args_.p.v_scale ? args_.p.v_scale.at(kv_head) : 1.0f;
    }
  }

  // The query that this thread's row r is of, and its head.
  FI_DEVICE_INLINE int query(const PrefillWork& work, int r) const {
    if constexpr (kBatch) {
      if (batch_tile().packed) {
        const Divisor& by_group_size = args_.batch.shape.by_group_size;
        return work.q_start + static_cast<int>(by_group_size.divide(static_cast<unsigned>(place(r))));
      }
    }
    return work.q_start + warp_row_ + lane_ / 4 + 8 * r;
  }
  FI_DEVICE_INLINE int head(const PrefillWork& work, int r) const {
    if constexpr (kBatch) {
      if (batch_tile().packed)
        return work.head + place(r) - (query(work, r) - work.q_start) * args_.batch.shape.group_size;
    }
    return work.head;
  }
  // Where it is in the tile.
  FI_DEVICE_INLINE int place(int r) const { return warp_row_ + lane_ / 4 + 8 * r; }

  // ---- the products ----

  // This warp's 16 rows of q, as operands in registers.
  FI_DEVICE_INLINE void load_q() {
    load_operand<kHeadDim / 32>(q_, smem_.q, Smem::kQPanelBytes, warp_row_ + lane_ % 16, lane_);
  }

  // The same where they stay in shared memory: a warpgroup's rows are its own.
  FI_DEVICE_INLINE void negate_q() {
    const int thread = threadIdx.x % kWarpgroupThreads;
#pragma unroll 1
    for (int panel = 0; panel < Config::kPanels; ++panel) {
      auto* words = reinterpret_cast<uint32_t*>(smem_.q + panel * Smem::kQPanelBytes + group_row_ * 128);
#pragma unroll 1
      for (int i = thread; i < 64 * 32; i += kWarpgroupThreads) words[i] ^= 0x80808080u;
    }
    fence_for_products();
    warpgroup_barrier(1 + group_row_ / 64);
  }

  // s = q k^T
  FI_DEVICE_INLINE void start_scores(float (&s)[kBlockN / 2]) {
    const uint64_t q = k_major(smem_address(smem_.q) + group_row_ * 128);
    const uint64_t k = k_major(smem_address(smem_.k[k_at_.stage]));
    hold(s);
    if constexpr (Config::kQInRegisters) hold(q_);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 32; ++step) {
      const int panel = step / 4, inside = step % 4 * 32;
      const uint64_t k_step = at(k, panel * Smem::kKvPanelBytes + inside);
      if constexpr (Config::kQInRegisters) {
        Fp8Wgmma<kBlockN>::template registers_by_k<Config::kFormat>(s, q_ + 4 * step, k_step, step > 0);
      } else {
        Fp8Wgmma<kBlockN>::template k_by_k<Config::kFormat>(s, at(q, panel * Smem::kQPanelBytes + inside),
                                                            k_step, step > 0);
      }
    }
    wgmma_commit();
  }

  // o (+)= weights v
  FI_DEVICE_INLINE void start_output(float (&o)[kHeadDim / 2], uint32_t (&weights)[kBlockN / 8],
                                     bool accumulate) {
    const uint64_t v = k_major(smem_address(smem_.transposed[v_at_.stage]));
    hold(o);
    hold(weights);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kBlockN / 32; ++step)
      Fp8Wgmma<kHeadDim>::template weights_by_k<Config::kFormat>(
          o, weights + 4 * step, at(v, step / 4 * Smem::kTransposedPanelBytes + step % 4 * 32),
          step > 0 || accumulate);
    wgmma_commit();
  }

  // One arrival a warp: every warp has seen its own part of the products finished.
  FI_DEVICE_INLINE void release(Barrier& empty) {
    if (lane_ == 0) barrier_arrive(empty);
  }
  // Over a batch: what the warp read of the query tile before, lane by lane, is read too.
  FI_DEVICE_INLINE void release_queries() {
    if constexpr (kBatch) __syncwarp();
    release(smem_.q_empty);
  }

  // ---- between the products ----

  FI_DEVICE_INLINE void mask(float (&s)[kBlockN / 2], const PrefillWork& work, int tile) const {
    const auto& shape = this->shape();
    const int row = query(work, 0), key = tile * kBlockN + lane_ % 4 * 2;
    const auto other = [&] { return kBatch ? query(work, 1) : row + 8; };
    if (tile >= work.whole.end) {
      const int last[2] = {min(row + shape.last_key, shape.kv_len - 1),
                           min(other() + shape.last_key, shape.kv_len - 1)};
      mask_after(s, key, last);
    }
    if (tile < work.whole.begin) {
      const int first[2] = {row + shape.first_key, other() + shape.first_key};
      mask_before(s, key, first);
    }
  }

  // In the order of keys that the values have (fp8_values.h).
  FI_DEVICE_INLINE static void pack(uint32_t (&weights)[kBlockN / 8], const float (&s)[kBlockN / 2]) {
#pragma unroll
    for (int i = 0; i < kBlockN / 8; ++i) {
      const float* x = s + i / 2 * 8 + i % 2 * 2;
      weights[i] = pack4_e4m3(x[0], x[1], x[4], x[5]);
    }
  }

  // ---- the output ----

  FI_DEVICE_INLINE void store(const float (&o)[kHeadDim / 2], const OnlineSoftmax& softmax,
                              const PrefillWork& work, float v_scale) const {
    const AttentionParams& p = call();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = query(work, r), head = this->head(work, r);
      const float sum = softmax.sum(r);
      const auto [factor, lse] = finish_row(p, head, softmax.base(r, sum), sum);
      if (row >= query_end()) continue;
      const int64_t out = out_row(work.b, head, row) + lane_ % 4 * 4;
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        const float *even = o + 8 * i + 2 * r, *odd = even + 4;  // of these columns
        store_four(p, out + 16 * i, factor * v_scale, even[0], odd[0], even[1], odd[1]);
      }
      if (p.lse != nullptr && lane_ % 4 == 0) p.lse[lse_index(work.b, head, row)] = lse;
    }
  }

  // Where the tile's rows end, of those that there are.
  FI_DEVICE_INLINE int query_end() const {
    if constexpr (kBatch) {
      return batch_tile().q_end;
    } else {
      return args_.shape.qo_len;
    }
  }
  FI_DEVICE_INLINE int64_t out_row(int b, int head, int row) const {
    const AttentionParams& p = call();
    if constexpr (kBatch) {
      return head * p.o_stride_h + (batch_tile().q_begin + row) * p.o_stride_n;
    } else {
      return b * p.o_stride_b + head * p.o_stride_h + row * p.o_stride_n;
    }
  }
  FI_DEVICE_INLINE int64_t lse_index(int b, int head, int row) const {
    if constexpr (kBatch) {
      return (batch_tile().q_begin + row) * call().num_qo_heads + head;
    } else {
      return (static_cast<int64_t>(b) * args_.shape.num_qo_heads + head) * args_.shape.qo_len + row;
    }
  }

  FI_DEVICE_INLINE static void store_four(const AttentionParams& p, int64_t at, float factor, float a,
                                          float b, float c, float d) {
    a *= factor, b *= factor, c *= factor, d *= factor;
    if (p.dtype == DType::f32) {
      *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = {a, b, c, d};
    } else {
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + at) =
          p.dtype == DType::bf16 ? uint2{pack2<bf16>(a, b), pack2<bf16>(c, d)}
                                 : uint2{pack2<f16>(a, b), pack2<f16>(c, d)};
    }
  }

  Smem& smem_;
  const Args& args_;
  int lane_, group_row_, warp_row_;  // the warpgroup's and the warp's first row in the query tile
  uint32_t q_[Config::kQInRegisters ? kHeadDim / 8 : 1];
  RingPosition<1> q_at_;
  RingPosition<Config::kStages> k_at_, v_at_;
};

// By one thread.
template <class Config>
FI_DEVICE_INLINE void init_fp8_barriers(Fp8Smem<Config>& smem, uint32_t readers_of_q) {
  constexpr int kReaders = 4 * Config::kConsumers;  // warps
  barrier_init(smem.q_full, 1);
  barrier_init(smem.q_empty, readers_of_q);
  for (int stage = 0; stage < Config::kStages; ++stage) {
    barrier_init(smem.k_full[stage], 1);
    barrier_init(smem.k_empty[stage], kReaders);
    barrier_init(smem.v_full[stage], 1);
    barrier_init(smem.v_empty[stage], Config::kTransposers);
    barrier_init(smem.transposed_full[stage], Config::kTransposers);
    barrier_init(smem.transposed_empty[stage], kReaders);
  }
  barrier_init_fence();
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    fp8_prefill_kernel(const __grid_constant__ Fp8Args args, const __grid_constant__ CUtensorMap q_map,
                       const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
  auto& smem = *reinterpret_cast<Fp8Smem<Config>*>(dynamic_smem());
  if (threadIdx.x == 0) {
    prefetch_tensor_map(q_map);
    prefetch_tensor_map(k_map);
    prefetch_tensor_map(v_map);
    init_fp8_barriers<Config>(smem, 4 * Config::kConsumers);
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();

  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  if (warp < 4) {
    lower_registers<Config::kProducerRegisters>();
    if (warp == 0) {
      if (threadIdx.x == 0) PrefillProducer<Config>::run(smem, args.shape, q_map, k_map, v_map);
    } else if (warp <= Config::kTransposers) {
      Fp8Transposer<Config>::run(smem, args.shape, warp - 1);
    }
  } else {
    raise_registers<Config::kConsumerRegisters>();
    Fp8Consumer<Config>(smem, args, warp / 4 - 1).run();
  }
}

}  // namespace fi::cuda::sm90
