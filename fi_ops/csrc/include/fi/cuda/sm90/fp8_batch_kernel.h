// Attention over a batch of 8-bit tensors, many query rows a request, on Hopper: the kernel and its launch.
// The producers are those of any batch, one warp of each kind; consumers and transposers those of one call of
// 8 bits (fp8_prefill.h).
#pragma once

#include <algorithm>

#include "fi/cuda/sm90/batch_producer.h"
#include "fi/cuda/sm90/batch_rows.h"
#include "fi/cuda/sm90/fp8_attention.h"
#include "fi/cuda/sm90/fp8_batch.h"
#include "fi/cuda/sm90/fp8_prefill.h"

namespace fi::cuda::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    fp8_batch_kernel(const __grid_constant__ Fp8BatchArgs args, const __grid_constant__ CUtensorMap q_map,
                     const __grid_constant__ CUtensorMap packed_q_map,
                     const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
  using Smem = Fp8BatchSmem<Config>;
  auto& smem = *reinterpret_cast<Smem*>(dynamic_smem());
  if (threadIdx.x == 0) {
    prefetch_tensor_map(q_map);
    prefetch_tensor_map(k_map);
    prefetch_tensor_map(v_map);
    // Transposers read which tile it is, too.
    init_fp8_barriers<Config>(smem, 4 * Config::kConsumers + Config::kTransposers);
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();

  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
  if (warp < 4) {
    lower_registers<Config::kProducerRegisters>();
    if (warp == 0) {
      BatchProducer<Config, false, Smem>::run(smem, args.batch, q_map, packed_q_map, k_map);
    } else if (warp == 1) {
      BatchProducer<Config, true, Smem>::run(smem, args.batch, q_map, packed_q_map, v_map);
    } else {
      Fp8Transposer<Config>::run(smem, warp - 2);
    }
  } else {
    raise_registers<Config::kConsumerRegisters>();
    Fp8Consumer<Config>(smem, args, warp / 4 - 1).run();
  }
}

template <class Config>
void launch_fp8_batch(const Fp8BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  static_assert(Config::kTransposers == 2);
  const AttentionParams& c = p.batch.call;
  Fp8BatchArgs args{};
  args.q_scale = p.q_scale;
  BatchArgs& b = args.batch;
  b.shape = batch_shape(p.batch, plan, Config::kBlockM, gpu.num_sms);
  // A tile of several heads has one scale.
  if (p.q_scale && p.q_scale.stride != 0) b.shape.packed_queries = 0;
  b.p = c;
  b.scale_log2 = kLog2e * c.scale;
  set_boxes<Config>(b, box_rows(p.batch, Config::kBlockN));
  b.packed_q_bytes = static_cast<uint32_t>(b.shape.packed_queries * b.shape.group_size * Config::kPanelsQK *
                                           2 * kBoxColumns);
  const auto map = [](const HeadRows& rows, int box_rows) {
    return make_tensor_map(DType::bf16, as_pairs(rows), box_rows);
  };
  const HeadRows queries = query_rows(p.batch);
  const CUtensorMap q_map = map(queries, Config::kBlockM);
  const CUtensorMap packed_q_map =
      b.shape.packed_queries > 0
          ? make_packed_tensor_map(DType::bf16, as_pairs(queries), b.shape.group_size, b.shape.packed_queries)
          : q_map;
  const int64_t tiles = b.shape.max_tiles * c.num_qo_heads;
  launch_with<fp8_batch_kernel<Config>, sizeof(Fp8BatchSmem<Config>)>(
      gpu, static_cast<unsigned>(std::min<int64_t>(tiles, gpu.num_sms)), Config::kThreads, /*overlap=*/true,
      args, q_map, packed_q_map, map(key_rows(p.batch), b.box_rows), map(value_rows(p.batch), b.box_rows));
}

template <Fp8 kFormat, int kHeadDim>
void fp8_batch_tiles(const Fp8BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  // As for one call (fp8_launch.h).
  using Config = Fp8Config<kFormat, kHeadDim, 2, 128, 3, /*kQInRegisters=*/kHeadDim == 64>;
  launch_fp8_batch<Fp8OverBatch<Config>>(p, plan, gpu);
}

}  // namespace fi::cuda::sm90
