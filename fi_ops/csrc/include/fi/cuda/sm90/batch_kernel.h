// Attention over a batch, many query rows a request, on Hopper: the kernel, its tiles, its launch. The
// consumer is that of one call (prefill.h).
#pragma once

#include <algorithm>
#include <numeric>

#include "fi/cuda/sm90/batch.h"
#include "fi/cuda/sm90/batch_masked_producer.h"
#include "fi/cuda/sm90/batch_producer.h"
#include "fi/cuda/sm90/batch_rows.h"
#include "fi/cuda/sm90/prefill_launch.h"

namespace fi::cuda::sm90 {

template <class Config, bool kValues>
using ProducerOf =
    std::conditional_t<Config::kMasked, MaskedBatchProducer<Config, kValues>, BatchProducer<Config, kValues>>;

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    batch_kernel(const __grid_constant__ BatchArgsOf<Config> args, const __grid_constant__ CUtensorMap q_map,
                 const __grid_constant__ CUtensorMap packed_q_map, const __grid_constant__ CUtensorMap k_map,
                 const __grid_constant__ CUtensorMap v_map) {
  auto& smem = *reinterpret_cast<BatchSmem<Config>*>(dynamic_smem());
  if (threadIdx.x == 0) {
    prefetch_tensor_map(q_map);
    if constexpr (!Config::kByRows) {
      prefetch_tensor_map(k_map);
      prefetch_tensor_map(v_map);
    }
    init_barriers<Config>(smem, ProducerOf<Config, false>::Loader::kArrivals);
  }
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();

  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    lower_registers<Config::kProducerRegisters>();
    if (threadIdx.x < kWarpgroupThreads / 2) {
      ProducerOf<Config, false>::run(smem, args, q_map, packed_q_map, k_map);
    } else {
      ProducerOf<Config, true>::run(smem, args, q_map, packed_q_map, v_map);
    }
  } else {
    raise_registers<Config::kConsumerRegisters>();
    PrefillConsumer<Config>(smem, args, warpgroup - 1).run();
  }
}

// Requests of fewer rows in the mean may be many to whom a larger tile is mostly empty.
inline constexpr int kMinWideRows = 1024;

// Whether the larger of two query tiles is: as for one call, if all requests were as long as their mean.
// Lengths are not known to the host; requests that are short beside the mean are a small part of the work.
template <class Wide, class Narrow>
bool wide_is_faster(const BatchAttentionParams& p, double wide_speed, const Gpu& gpu) {
  const AttentionParams& c = p.call;
  PrefillShape mean{};
  mean.batch = static_cast<int>(c.batch);
  mean.num_qo_heads = static_cast<int>(c.num_qo_heads);
  mean.qo_len = static_cast<int>((c.qo_len + c.batch - 1) / c.batch);
  mean.kv_len = static_cast<int>(std::max((c.kv_len + c.batch - 1) / c.batch, int64_t{mean.qo_len}));
  mean.last_key = c.causal ? mean.kv_len - mean.qo_len : mean.kv_len;
  mean.first_key = c.window_left < 0
                       ? -mean.qo_len
                       : clamp_int(mean.kv_len - mean.qo_len - clamp_int(c.window_left, 0, 1 << 30),
                                   -mean.qo_len, mean.kv_len);
  return mean.qo_len >= kMinWideRows &&
         prefill_cost<Wide>(mean, gpu.num_sms) < prefill_cost<Narrow>(mean, gpu.num_sms) * wide_speed;
}

template <class Config>
void launch_batch(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  const AttentionParams& c = p.call;
  BatchArgsOf<Config> args{};
  args.shape = batch_shape(p, plan, Config::kBlockM, gpu.num_sms);
  args.p = c;
  if constexpr (Config::kByRows) {
    args.keys = cache_rows_of(key_rows(p));
    args.values = cache_rows_of(value_rows(p));
  } else {
    set_boxes<Config>(args, box_rows(p, Config::kBlockN));
  }
  if constexpr (Config::kMasked) args.mask = scan_batch_mask(p, args.shape, Config::kBlockN, gpu);
  const float scale_log2 = kLog2e * c.scale;
  if constexpr (Config::kVariant == PrefillVariant::kSoftCap) {
    args.scale_log2 = kLog2e * c.logits_soft_cap;
    args.to_variant = 2.0f * scale_log2 / c.logits_soft_cap;
  } else {
    args.scale_log2 = scale_log2;
  }
  const int64_t tiles = args.shape.max_tiles * c.num_qo_heads;
  const CUtensorMap q_map = make_tensor_map(c.dtype, query_rows(p), Config::kBlockM);
  args.packed_q_bytes = static_cast<uint32_t>(args.shape.packed_queries * args.shape.group_size *
                                              Config::kPanelsQK * 2 * kBoxColumns);
  const CUtensorMap packed_q_map =
      args.shape.packed_queries > 0
          ? make_packed_tensor_map(c.dtype, query_rows(p), args.shape.group_size, args.shape.packed_queries)
          : q_map;
  // Rows need no map of keys.
  const auto keys_map = [&](const HeadRows& rows) {
    return Config::kByRows ? q_map : make_tensor_map(c.dtype, rows, args.box_rows);
  };
  launch_with<batch_kernel<Config>, sizeof(BatchSmem<Config>)>(
      gpu, static_cast<unsigned>(std::min<int64_t>(tiles, gpu.num_sms)), Config::kThreads, /*overlap=*/true,
      args, q_map, packed_q_map, keys_map(key_rows(p)), keys_map(value_rows(p)));
}

template <class Boxes, class Rows, bool kMasked = false>
void launch_boxes_or_rows(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  box_rows(p, Boxes::kBlockN) > 0 ? launch_batch<OverBatch<Boxes, false, kMasked>>(p, plan, gpu)
                                  : launch_batch<OverBatch<Rows, true, kMasked>>(p, plan, gpu);
}

// The tiles of each head dim, and when which: those of one call whose keys only the device knows
// (prefill_launch.h). Who starts boxes alone needs few registers: large tiles are then those of other calls,
// but for the soft cap.
template <class T, int kDimQK, int kDimVO, PrefillVariant kVariant>
void batch_tiles_with(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  using Tiles = PrefillTiles<T, kDimQK, kDimVO, true, kVariant>;
  using Narrow = typename Tiles::Narrow;
  if constexpr (requires { typename Tiles::Wide; }) {
    using Wide =
        typename PrefillTiles<T, kDimQK, kDimVO, kVariant == PrefillVariant::kSoftCap, kVariant>::Wide;
    // A negative scale of keys joins queries in registers.
    if (!p.k_scale && wide_is_faster<Wide, Narrow>(p, Tiles::kWideSpeed, gpu))
      return launch_boxes_or_rows<Wide, typename Tiles::Wide>(p, plan, gpu);
  }
  launch_boxes_or_rows<Narrow, Narrow>(p, plan, gpu);
}

template <class T, int kDimQK, int kDimVO>
void batch_tiles(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  using enum PrefillVariant;
  p.call.logits_soft_cap > 0.0f ? batch_tiles_with<T, kDimQK, kDimVO, kSoftCap>(p, plan, gpu)
                                : batch_tiles_with<T, kDimQK, kDimVO, kPlain>(p, plan, gpu);
}

// Under a custom mask: tiles of 128 rows alone, and the shorter KV tiles of the soft cap where registers of
// producers and consumers are short.
template <class T, int kDimQK, int kDimVO, PrefillVariant kVariant>
struct MaskedTiles : PrefillTiles<T, kDimQK, kDimVO, true, kVariant>::Narrow {};
template <class T, PrefillVariant kVariant>
struct MaskedTiles<T, 256, 256, kVariant> : PrefillConfig<T, 256, 256, 2, 64, 2, false, true, kVariant> {};

template <class T, int kDimQK, int kDimVO>
void masked_batch_tiles(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  const auto with = [&]<PrefillVariant kVariant>() {
    using Tiles = MaskedTiles<T, kDimQK, kDimVO, kVariant>;
    launch_boxes_or_rows<Tiles, Tiles, true>(p, plan, gpu);
  };
  p.call.logits_soft_cap > 0.0f ? with.template operator()<PrefillVariant::kSoftCap>()
                                : with.template operator()<PrefillVariant::kPlain>();
}

}  // namespace fi::cuda::sm90
