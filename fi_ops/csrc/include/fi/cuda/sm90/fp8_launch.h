// From Fp8AttentionParams to a launch of the Hopper kernel.
#pragma once

#include "fi/cuda/sm90/fp8_attention.h"
#include "fi/cuda/sm90/fp8_prefill.h"
#include "fi/cuda/sm90/prefill_launch.h"

namespace fi::cuda::sm90 {

template <class Config>
void launch_fp8_prefill(const Fp8AttentionParams& p, const Gpu& gpu) {
  const AttentionParams& c = p.call;
  const Fp8Args args{prefill_shape(c, gpu.num_sms), kLog2e * c.scale, p};
  const int64_t tiles = c.batch * c.num_qo_heads * args.shape.q_tiles(Config::kBlockM);
  const auto map = [](const HeadRows& rows, int box_rows) {
    return make_tensor_map(DType::bf16, as_pairs(rows), box_rows);
  };
  launch_with<fp8_prefill_kernel<Config>, sizeof(Fp8Smem<Config>)>(
      gpu, static_cast<unsigned>(std::min<int64_t>(tiles, gpu.num_sms)), Config::kThreads, /*overlap=*/true,
      args, map(query_rows(c), Config::kBlockM), map(key_rows(c), Config::kBlockN),
      map(value_rows(c), Config::kBlockN));
}

template <Fp8 kFormat, int kHeadDim>
void fp8_prefill(const Fp8AttentionParams& p, const Gpu& gpu) {
  // Tiles of 64 columns leave registers for the queries.
  launch_fp8_prefill<Fp8Config<kFormat, kHeadDim, 2, 128, 3, /*kQInRegisters=*/kHeadDim == 64>>(p, gpu);
}

}  // namespace fi::cuda::sm90
