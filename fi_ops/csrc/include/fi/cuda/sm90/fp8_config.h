// What a Hopper attention kernel of 8-bit tensors is made of: sizes, shared memory, arguments.
//
// To the copies, two 8-bit elements are one of 16 bits: panels, boxes and swizzle are those of
// fi/cuda/sm90/prefill_config.h.
#pragma once

#include "fi/cuda/sm90/prefill_config.h"
#include "fi/fp8_attention.h"

namespace fi::cuda::sm90 {

// A query tile has 64 * kConsumers rows, a KV tile kBlockN.
template <Fp8 kFormat_, int kHeadDim_, int kConsumers_, int kBlockN_, int kStages_, bool kQInRegisters_>
struct Fp8Config {
  static constexpr Fp8 kFormat = kFormat_;
  static constexpr int kHeadDim = kHeadDim_, kConsumers = kConsumers_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr bool kQInRegisters = kQInRegisters_, kBatch = false;
  // Accumulators of 8-bit products keep some 14 bits of a sum: outputs are summed there over this many KV
  // tiles, and those sums in fp32. That takes twice the registers, so head_dim is at most 128.
  static constexpr int kPromote = 4;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers);
  static constexpr int kPanels = (kHeadDim + 127) / 128, kPanelsQK = kPanels, kPanelsVO = kPanels;
  static constexpr int kTransposers = 2;  // warps
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                65536 / kThreads / 8 * 8 * (1 + kConsumers));
  static_assert(kHeadDim == 64 || kHeadDim == 128);
  static_assert(kBlockN % 32 == 0 && (kConsumers == 2 || kConsumers == 3) && kStages >= 2);
};

template <class Config>
struct Fp8Smem : PrefillSmem<Config> {
  // Values with a row a column of theirs, a byte a key, in panels of 128 keys.
  static constexpr int kTransposedPanelBytes = Config::kHeadDim * 128;

  alignas(
      1024) unsigned char transposed[Config::kStages][(Config::kBlockN + 127) / 128 * kTransposedPanelBytes];
  Barrier transposed_full[Config::kStages], transposed_empty[Config::kStages];
};

struct Fp8Args {
  PrefillShape shape;
  float scale_log2;  // a score times this and the scales of query and key is a logit in base 2
  Fp8AttentionParams p;
};

// The same for a batch, whose keys come as boxes: one warp brings keys, one values, beside the transposers.
template <class Config>
struct Fp8OverBatch : Config {
  static constexpr bool kBatch = true, kByRows = false;
  static constexpr int kLoaders = 1;
};

template <class Config>
struct Fp8BatchSmem : Fp8Smem<Config> {
  BatchTile tiles[2], prepared[4][2];  // as in BatchSmem
};

struct Fp8BatchArgs {
  BatchArgs batch;
  PerHead q_scale;  // of query heads; none: 1
};

}  // namespace fi::cuda::sm90
