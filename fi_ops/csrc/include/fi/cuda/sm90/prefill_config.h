// What a Hopper attention kernel is made of: sizes, shared memory, arguments.
#pragma once

#include <type_traits>

#include "fi/cuda/sm90/batch_masks.h"
#include "fi/cuda/sm90/batch_rows.h"
#include "fi/cuda/sm90/batch_work.h"
#include "fi/cuda/sm90/mbarrier.h"
#include "fi/cuda/sm90/prefill_device_keys.h"
#include "fi/cuda/sm90/prefill_work.h"
#include "fi/cuda/sm90/ring.h"
#include "fi/cuda/sm90/tensor_map.h"
#include "fi/cuda/sm90/warpgroup.h"

namespace fi::cuda::sm90 {

// What is done to scores before the softmax.
enum class PrefillVariant {
  kPlain,
  kSoftCap,
  kMask,  // an additive mask is added
};

// T: bf16 or f16. Rows of queries and keys have up to kDimQK elements, of values and the output up to kDimVO:
// behind a call's head dims zeros arrive, and nothing is stored. A query tile has 64 * kConsumers rows, a KV
// tile kBlockN. With kQInRegisters the queries are read from shared memory once a tile rather than in every
// product. With kDeviceKeys positions or a mask say which keys a row sees, else a formula.
template <class T_, int kDimQK_, int kDimVO_, int kConsumers_, int kBlockN_, int kStages_,
          bool kQInRegisters_, bool kDeviceKeys_ = false, PrefillVariant kVariant_ = PrefillVariant::kPlain>
struct PrefillConfig {
  using T = T_;
  static constexpr int kDimQK = kDimQK_, kDimVO = kDimVO_;
  static constexpr int kConsumers = kConsumers_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr bool kQInRegisters = kQInRegisters_, kDeviceKeys = kDeviceKeys_;
  static constexpr bool kBatch = false, kByRows = false, kMasked = false;
  static constexpr PrefillVariant kVariant = kVariant_;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kThreads = kWarpgroupThreads * (1 + kConsumers);
  static constexpr int kPanelsQK = panels_of(kDimQK), kPanelsVO = panels_of(kDimVO);
  // What a block starts with is shared out anew: the producer needs few, one that lists tiles a few more.
  // Together they must not ask for more than there was, else the consumers wait for it for ever.
  static constexpr int kProducerRegisters = (kConsumers == 2 ? 24 : 32) + (kDeviceKeys ? 8 * kConsumers : 0);
  static constexpr int kConsumerRegisters = (kConsumers == 2 ? 240 : 160) - (kDeviceKeys ? 8 : 0);
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                65536 / kThreads / 8 * 8 * (1 + kConsumers));
  static_assert(kDimQK % 16 == 0 && kDimVO % 32 == 0 && kBlockN % 16 == 0);
  static_assert(kConsumers == 2 || kConsumers == 3);
  static_assert(kStages >= 2, "a consumer holds on to one tile of values while it waits for the next");
};

// The same for a batch. With kByRows_ keys come as copies of ordinary threads, else as boxes; with kMasked_
// there is a custom mask. Producers have the registers of a Config with kDeviceKeys, or at least 32.
template <class Config, bool kByRows_, bool kMasked_ = false>
struct OverBatch : Config {
  static constexpr bool kDeviceKeys = false, kBatch = true, kByRows = kByRows_, kMasked = kMasked_;
  static constexpr int kLoaders = 2;  // warps that bring keys, and as many values
  static_assert(Config::kProducerRegisters >= 32);
  static_assert(!kMasked || Config::kBlockM == kTileQueries, "classes are of planned tiles");
};

template <class Config>
struct PrefillSmem {
  static constexpr int kQPanelBytes = Config::kBlockM * kBoxColumns * 2;
  static constexpr int kKvPanelBytes = Config::kBlockN * kBoxColumns * 2;

  unsigned char q[Config::kPanelsQK * kQPanelBytes];
  unsigned char k[Config::kStages][Config::kPanelsQK * kKvPanelBytes];
  unsigned char v[Config::kStages][Config::kPanelsVO * kKvPanelBytes];
  Barrier q_full, q_empty;
  Barrier k_full[Config::kStages], k_empty[Config::kStages];
  Barrier v_full[Config::kStages], v_empty[Config::kStages];
};

template <class Config>
struct DeviceKeysSmem : PrefillSmem<Config> {
  int tiles[Config::kStages];        // the ListedTile after the one whose keys are in k, full as k is
  RowKeys<Config::kBlockM> rows[2];  // full as q is, by the parity of q's place; in use until the tile's end
};

template <class Config>
struct BatchSmem : PrefillSmem<Config> {
  BatchTile tiles[2];        // full as q is, by the parity of q's place; in use until the tile's end
  BatchTile prepared[4][2];  // of each producer warp, the tile it is at and the one after, in turns
};

template <class Config>
  requires(Config::kMasked)
struct BatchSmem<Config> : PrefillSmem<Config> {
  MaskedTile tiles[2], prepared[4][2];  // as above
  int after[Config::kStages];           // the ListedTile after the one whose keys are in k, full as k is
  uint32_t columns[Config::kConsumers][4][4];  // of each warp's 32 rows, the keys that one of them sees
};

struct PrefillArgs {
  PrefillShape shape;
  float scale_log2;  // what the softmax takes, times this, is a logit in base 2
  float to_variant;  // a score times this is the argument of tanh_exp2, or what a mask in base 2 is added to
  void* out;         // [batch, num_qo_heads, qo_len, head_dim]
  int64_t o_stride_b, o_stride_h, o_stride_n;
  float* lse;  // [batch, num_qo_heads, qo_len] contiguous; null: not wanted
  AttentionParams p;
  MaskBits mask;  // with kDeviceKeys
};

struct BatchArgs {
  float scale_log2, to_variant;  // as in PrefillArgs
  BatchShape shape;
  AttentionParams p;
  CacheRows keys, values;  // with kByRows
  // Else: rows of a box, a divisor of the page size, and what the boxes of each warp's share of a KV tile
  // bring: of keys, of values.
  int box_rows;
  uint32_t box_bytes[2][2];
  uint32_t packed_q_bytes;  // of the queries of a packed tile
};

struct MaskedBatchArgs : BatchArgs {
  BatchMask mask;
};
template <class Config>
using BatchArgsOf = std::conditional_t<Config::kMasked, MaskedBatchArgs, BatchArgs>;

}  // namespace fi::cuda::sm90
