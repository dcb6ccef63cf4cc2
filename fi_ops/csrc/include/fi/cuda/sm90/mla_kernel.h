// Latent attention over a paged compressed cache on Hopper: the kernel and its launch.
//
// Blocks stay, one a multiprocessor. Each finds its share of the requests (mla_schedule.h); one warp or four
// bring keys (mla_producer.h), two warpgroups compute 64 rows (mla_consumer.h). Where a request has more than
// 64 rows in the mean two neighbouring blocks take the same keys, of one row tile each, and find them in L2.
// What is cut between blocks is joined by a second kernel (mla_join.h).
#pragma once

#include <numeric>

#include "fi/cuda/sm90/mla_consumer.h"
#include "fi/cuda/sm90/mla_join.h"
#include "fi/cuda/sm90/mla_producer.h"

namespace fi::cuda::sm90 {

template <class T, MlaCopies kCopies>
__global__ void __launch_bounds__(kMlaThreads, 1)
    mla_kernel(const __grid_constant__ MlaArgs args, const __grid_constant__ CUtensorMap ckv_map,
               const __grid_constant__ CUtensorMap kpe_map) {
  using Producer = MlaProducer<T, kCopies>;
  constexpr bool kShared = kCopies == MlaCopies::kSharedBoxes,
                 kBoxes = kShared || kCopies == MlaCopies::kBoxes;
  auto& smem = *reinterpret_cast<MlaSmem*>(dynamic_smem());
  if (threadIdx.x == 0) {
    if constexpr (kBoxes) {
      prefetch_tensor_map(ckv_map);
      prefetch_tensor_map(kpe_map);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(smem.pieces_full[i], 1);
      barrier_init(smem.pieces_empty[i], 8 + Producer::Loader::kWarps - 1);
      barrier_init(smem.weights[i], 4);
      for (int half = 0; half < 2; ++half) {
        barrier_init(smem.full[i][half], Producer::Loader::kArrivals);
        barrier_init(smem.empty[i][half], kShared ? 8 : 4);
      }
    }
    barrier_init_fence();
    smem.num_tiles = smem.num_items = 0;
    smem.most_tiles = 0;
  }
  if constexpr (kShared) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  wait_for_previous_kernel();
  allow_next_kernel();
  const MlaShare share = MlaSchedule::find(smem, args);
  const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroupThreads, 0);
  if (warpgroup == 0) {
    lower_registers<kMlaProducerRegisters>();
    if (threadIdx.x < 32 * Producer::Loader::kWarps) Producer::run(smem, args, share, ckv_map, kpe_map);
  } else {
    raise_registers<kMlaConsumerRegisters>();
    MlaConsumer<T, kCopies>(smem, args, warpgroup - 1).run();
  }
  if constexpr (kShared) {  // the other block still copies into this one's shared memory, or arrives there
    cluster_arrive();
    cluster_wait();
  }
}

inline HeadRows mla_ckv_rows(const MlaParams& p) {
  const BatchAttentionParams& b = p.batch;
  return {b.call.key, b.table.num_pages, 1, b.table.page_size,
          kCkvDim,    b.k_stride_page,   0, b.call.k_stride_n};
}
inline HeadRows mla_kpe_rows(const MlaParams& p) {
  const PageTable& table = p.batch.table;
  return {p.kpe, table.num_pages, 1, table.page_size, kKpeDim, p.kpe_stride_page, 0, p.kpe_stride_n};
}

// Two blocks share keys where a request has more rows than a tile in the mean.
inline int mla_ranks(const MlaParams& p) {
  const AttentionParams& c = p.batch.call;
  return c.qo_len * c.num_qo_heads > c.batch * kMlaRows ? 2 : 1;
}

template <class T, MlaCopies kCopies>
void launch_mla(const MlaParams& p, const Gpu& gpu) {
  const BatchAttentionParams& b = p.batch;
  const AttentionParams& c = b.call;
  MlaArgs args{};
  args.p = p;
  args.scale_log2 = c.scale * kLog2e;
  args.num_heads = static_cast<int>(c.num_qo_heads);
  args.by_num_heads = Divisor(static_cast<uint32_t>(c.num_qo_heads));
  args.by_page_size = Divisor(static_cast<uint32_t>(b.table.page_size));
  args.ranks = mla_ranks(p);
  args.shared = kCopies == MlaCopies::kSharedBoxes;
  const unsigned blocks = static_cast<unsigned>(gpu.num_sms / args.ranks * args.ranks);
  args.partials =
      static_cast<float*>(c.scratch.allocate(c.scratch.context, int64_t{8} * kMlaPartialFloats * blocks));
  args.parts = static_cast<MlaPart*>(
      c.scratch.allocate(c.scratch.context, static_cast<int64_t>(2 * sizeof(MlaPart)) * blocks));
  CUtensorMap ckv_map{}, kpe_map{};
  if constexpr (kCopies == MlaCopies::kBoxes || kCopies == MlaCopies::kSharedBoxes) {
    args.box_rows = static_cast<int>(std::gcd(b.table.page_size, int64_t{kMlaKeys}));
    ckv_map = make_tensor_map(c.dtype, mla_ckv_rows(p), args.box_rows);
    kpe_map = make_tensor_map(c.dtype, mla_kpe_rows(p), args.box_rows);
  } else {
    args.ckv = cache_rows_of(mla_ckv_rows(p));
    args.kpe = cache_rows_of(mla_kpe_rows(p));
    if constexpr (kCopies == MlaCopies::kFp8) {  // steps of 16 bytes
      for (CacheRows* rows : {&args.ckv, &args.kpe}) rows->page_step /= 2, rows->row_step /= 2;
    }
  }
  launch_clusters_with<mla_kernel<T, kCopies>, sizeof(MlaSmem)>(
      gpu, dim3(blocks), args.shared ? 2 : 1, dim3(kMlaThreads), /*overlap=*/true, args, ckv_map, kpe_map);
  launch(gpu, mla_join_kernel<T>, dim3(blocks, kMlaJoinBlocks), dim3(32 * kMlaJoinWarps), 0,
         /*overlap=*/true, args);
}

template <class T>
void mla(const MlaParams& p, const Gpu& gpu) {
  if (p.batch.kv_dtype != Fp8::none) return launch_mla<T, MlaCopies::kFp8>(p, gpu);
  const int64_t box_rows = std::gcd(p.batch.table.page_size, int64_t{kMlaKeys});
  if (box_rows < kMlaMinBoxRows) return launch_mla<T, MlaCopies::kRows>(p, gpu);
  // Waiting for each other costs two blocks more than one read of L2 saves, unless boxes are many and small.
  mla_ranks(p) > 1 && box_rows < kMlaKeys ? launch_mla<T, MlaCopies::kSharedBoxes>(p, gpu)
                                          : launch_mla<T, MlaCopies::kBoxes>(p, gpu);
}

}  // namespace fi::cuda::sm90
