// Attention over a batch, many query rows a request, on Hopper: the kernel, its tiles, its launch. The
// consumer is that of one call (prefill.h).
#pragma once

#include <algorithm>
#include <numeric>

#include "fi/cuda/sm90/batch.h"
#include "fi/cuda/sm90/batch_producer.h"
#include "fi/cuda/sm90/batch_rows.h"
#include "fi/cuda/sm90/prefill.h"

namespace fi::cuda::sm90 {

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    batch_kernel(const __grid_constant__ BatchArgs args, const __grid_constant__ CUtensorMap q_map,
                 const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map) {
  using ByBoxes = BatchProducer<Config, BoxLoader<Config>>;
  using ByRows = BatchProducer<Config, RowLoader<Config>>;
  auto& smem = *reinterpret_cast<BatchSmem<Config>*>(dynamic_smem());
  const bool boxes = args.box_rows > 0;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(q_map);
    if (boxes) {
      prefetch_tensor_map(k_map);
      prefetch_tensor_map(v_map);
    }
    init_barriers<Config>(smem, boxes ? BoxLoader<Config>::kWarps : RowLoader<Config>::kWarps);
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();

  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    lower_registers<Config::kProducerRegisters>();
    if (!boxes) {
      ByRows::run(smem, args, q_map, k_map, v_map);
    } else if (threadIdx.x < 32 * BoxLoader<Config>::kWarps) {
      ByBoxes::run(smem, args, q_map, k_map, v_map);
    }
  } else {
    raise_registers<Config::kConsumerRegisters>();
    PrefillConsumer<Config>(smem, args, warpgroup - 1).run();
  }
}

// Boxes of fewer keys than this cost more than copies of rows.
inline constexpr int kMinBoxRows = 16;

// How many keys of a tile one box can bring: those that are neighbours wherever a tile is cut into as many.
// 0: too few.
inline int box_rows(const BatchAttentionParams& p, int block_n) {
  const int rows = p.is_paged() ? static_cast<int>(std::gcd(p.table.page_size, int64_t{block_n})) : block_n;
  return rows >= kMinBoxRows && rows % 8 == 0 ? rows : 0;
}

template <class Config>
void launch_batch(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  const AttentionParams& c = p.call;
  BatchArgs args{};
  args.shape = batch_shape(p, plan);
  args.p = c;
  args.k_stride_page = p.k_stride_page;
  args.v_stride_page = p.v_stride_page;
  args.box_rows = box_rows(p, Config::kBlockN);
  const float scale_log2 = kLog2e * c.scale;
  if constexpr (Config::kVariant == PrefillVariant::kSoftCap) {
    args.scale_log2 = kLog2e * c.logits_soft_cap;
    args.to_variant = 2.0f * scale_log2 / c.logits_soft_cap;
  } else {
    args.scale_log2 = scale_log2;
  }
  const int64_t tiles = args.shape.max_tiles * c.num_qo_heads;
  const CUtensorMap q_map = make_tensor_map(c.dtype, query_rows(p), Config::kBlockM);
  const auto keys_map = [&](const HeadRows& rows) {
    return args.box_rows > 0 ? make_tensor_map(c.dtype, rows, args.box_rows) : q_map;  // not used
  };
  launch(gpu, batch_kernel<Config>, static_cast<unsigned>(std::min<int64_t>(tiles, gpu.num_sms)),
         Config::kThreads, sizeof(BatchSmem<Config>), /*overlap=*/true, args, q_map, keys_map(key_rows(p)),
         keys_map(value_rows(p)));
}

// The tiles of each head dim: as those of one call whose keys only the device knows (prefill_launch.h).
template <class T, int kHeadDim, PrefillVariant kVariant>
struct BatchTiles;

template <class T, PrefillVariant kVariant>
struct BatchTiles<T, 64, kVariant> {
  using Narrow = BatchConfig<T, 64, 2, 128, 3, true, kVariant>;
};
template <class T, PrefillVariant kVariant>
struct BatchTiles<T, 128, kVariant> {
  using Narrow = BatchConfig<T, 128, 2, kVariant == PrefillVariant::kSoftCap ? 112 : 128, 2, true, kVariant>;
};
template <class T, PrefillVariant kVariant>
struct BatchTiles<T, 256, kVariant> {
  using Narrow = BatchConfig<T, 256, 2, kVariant == PrefillVariant::kSoftCap ? 64 : 80, 2, false, kVariant>;
};

template <class T, int kHeadDim>
void batch_tiles(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  using enum PrefillVariant;
  p.call.logits_soft_cap > 0.0f
      ? launch_batch<typename BatchTiles<T, kHeadDim, kSoftCap>::Narrow>(p, plan, gpu)
      : launch_batch<typename BatchTiles<T, kHeadDim, kPlain>::Narrow>(p, plan, gpu);
}

}  // namespace fi::cuda::sm90
