// From AttentionParams to a launch of the Hopper kernel: shapes, tile sizes, tensor maps.
#pragma once

#include <algorithm>
#include <cmath>

#include "fi/cuda/sm90/attention.h"
#include "fi/cuda/sm90/prefill.h"

namespace fi::cuda::sm90 {

// Whether only the device knows which keys a row sees.
inline bool keys_on_device(const AttentionParams& p) {
  return (p.mask && p.mask_dtype == DType::boolean) ||
         (p.query_positions && (p.causal || p.window_left >= 0));
}

// Where keys_on_device, the last and the first key are what a prompt at the start of its cache would have:
// good enough to choose tile sizes by.
inline PrefillShape prefill_shape(const AttentionParams& p, int num_sms) {
  const auto bounded = [&](int64_t key) { return static_cast<int>(std::clamp(key, -p.qo_len, p.kv_len)); };
  PrefillShape shape;
  shape.batch = static_cast<int>(p.batch);
  shape.num_qo_heads = static_cast<int>(p.num_qo_heads);
  shape.group_size = static_cast<int>(p.num_qo_heads / p.num_kv_heads);
  shape.qo_len = static_cast<int>(p.qo_len);
  shape.kv_len = static_cast<int>(p.kv_len);
  shape.section_heads = static_cast<int>(
      std::min(p.batch * p.num_qo_heads,
               section_kv_heads(p.kv_len, p.head_dim_qk, p.head_dim_vo, num_sms) * shape.group_size));
  const bool guess = keys_on_device(p);
  const bool causal = p.causal || (guess && p.mask && p.mask_stride_q != 0);
  const int64_t q_offset = guess ? 0 : p.q_offset;
  shape.last_key = causal ? bounded(q_offset) : shape.kv_len;
  int64_t first_key = INT64_MIN;
  if (p.window_left >= 0 && __builtin_sub_overflow(q_offset, p.window_left, &first_key))
    first_key = INT64_MIN;
  shape.first_key = bounded(first_key);
  return shape;
}

// The time of a call in rows times keys of one multiprocessor, roughly: what decides between tile sizes.
template <class Config>
double prefill_cost(const PrefillShape& shape, int num_sms) {
  constexpr double kStartKeys = 128;  // what starting and storing a tile costs
  const int q_tiles = shape.q_tiles(Config::kBlockM);
  const auto keys = [&](int q_tile) {
    const SeenKeys seen(shape, q_tile * Config::kBlockM, Config::kBlockM);
    return seen.needed(Config::kBlockN).size() * Config::kBlockN + kStartKeys;
  };
  const double first = keys(0), last = keys(q_tiles - 1);
  // Tiles of one length leave the last round as empty as it is, tiles of many lengths fill it.
  const double alike = std::min(first, last) / std::max(first, last);
  const double rounds = static_cast<double>(shape.batch) * shape.num_qo_heads * q_tiles / num_sms;
  return (alike * std::ceil(rounds) + (1 - alike) * std::max(rounds, 1.0)) * (first + last) / 2 *
         Config::kBlockM;
}

template <class Config>
void launch_prefill(const AttentionParams& p, const PrefillShape& shape, const Gpu& gpu) {
  PrefillArgs args{};
  args.shape = shape;
  const float scale_log2 = kLog2e * p.scale;
  if constexpr (Config::kVariant == PrefillVariant::kPlain) {
    args.scale_log2 = scale_log2;
  } else if constexpr (Config::kVariant == PrefillVariant::kSoftCap) {
    args.scale_log2 = kLog2e * p.logits_soft_cap;
    args.to_variant = 2.0f * scale_log2 / p.logits_soft_cap;
  } else {
    args.scale_log2 = 1.0f;
    args.to_variant = scale_log2;
  }
  args.out = p.out;
  args.o_stride_b = p.o_stride_b;
  args.o_stride_h = p.o_stride_h;
  args.o_stride_n = p.o_stride_n;
  args.lse = p.lse;
  args.p = p;
  if constexpr (Config::kDeviceKeys) {
    if (p.mask) args.mask = scan_mask(p, gpu, Config::kBlockM, Config::kBlockN);
  }
  const int64_t tiles = p.batch * p.num_qo_heads * shape.q_tiles(Config::kBlockM);
  launch_with<prefill_kernel<Config>, sizeof(typename PrefillConsumer<Config>::Smem)>(
      gpu, static_cast<unsigned>(std::min<int64_t>(tiles, gpu.num_sms)), Config::kThreads, /*overlap=*/true,
      args, make_tensor_map(p.dtype, query_rows(p), Config::kBlockM),
      make_tensor_map(p.dtype, key_rows(p), Config::kBlockN),
      make_tensor_map(p.dtype, value_rows(p), Config::kBlockN));
}

// The tiles of each head dim: 128 query rows, and 192 where the registers allow it. A block of 192 rows reads
// each key for more rows and has a third warpgroup to fill gaps with: kWideSpeed times as fast per row and
// key, where its coarser rounds don't cost more than that. KV tiles are as long as registers allow;
// those that a mask's values take too are missing to wide tiles.
template <class T, int kDimQK, int kDimVO, bool kDeviceKeys, PrefillVariant kVariant>
struct PrefillTiles;

template <class T, bool kDeviceKeys, PrefillVariant kVariant>
struct PrefillTiles<T, 64, 64, kDeviceKeys, kVariant> {
  using Narrow = PrefillConfig<T, 64, 64, 2, 128, 3, true, kDeviceKeys, kVariant>;
  static constexpr int kWideKeys = !kDeviceKeys ? 128 : kVariant == PrefillVariant::kSoftCap ? 80 : 112;
  using Wide = PrefillConfig<T, 64, 64, 3, kWideKeys, 2, false, kDeviceKeys, kVariant>;
  static constexpr double kWideSpeed = 1.15;
};
template <class T, bool kDeviceKeys, PrefillVariant kVariant>
struct PrefillTiles<T, 96, 96, kDeviceKeys, kVariant> {
  using Narrow = PrefillConfig<T, 96, 96, 2, 128, 3, true, kDeviceKeys, kVariant>;
  static constexpr bool kLong = !kDeviceKeys && kVariant == PrefillVariant::kPlain;
  static constexpr int kWideKeys = kLong                                                 ? 112
                                   : kDeviceKeys && kVariant == PrefillVariant::kSoftCap ? 80
                                                                                         : 96;
  using Wide = PrefillConfig<T, 96, 96, 3, kWideKeys, kLong ? 2 : 3, false, kDeviceKeys, kVariant>;
  static constexpr double kWideSpeed = 1.1;
};
template <class T, bool kDeviceKeys, PrefillVariant kVariant>
struct PrefillTiles<T, 128, 128, kDeviceKeys, kVariant> {
  static constexpr bool kShort = kDeviceKeys && kVariant == PrefillVariant::kSoftCap;
  static constexpr bool kQInRegisters = kVariant != PrefillVariant::kMask;
  using Narrow = PrefillConfig<T, 128, 128, 2, kShort ? 112 : 128, 2, kQInRegisters, kDeviceKeys, kVariant>;
  using Wide = PrefillConfig<T, 128, 128, 3, kShort ? 64 : 80, 3, false, kDeviceKeys, kVariant>;
  static constexpr double kWideSpeed = 1.06;
};
template <class T, bool kDeviceKeys, PrefillVariant kVariant>
struct PrefillTiles<T, 192, 128, kDeviceKeys, kVariant> {
  static constexpr bool kShort = kDeviceKeys && kVariant == PrefillVariant::kSoftCap;
  using Narrow = PrefillConfig<T, 192, 128, 2, kShort ? 112 : 128, 2, false, kDeviceKeys, kVariant>;
  using Wide = PrefillConfig<T, 192, 128, 3, kShort ? 64 : 80, 3, false, kDeviceKeys, kVariant>;
  static constexpr double kWideSpeed = 1.06;
};
template <class T, bool kDeviceKeys, PrefillVariant kVariant>
struct PrefillTiles<T, 256, 256, kDeviceKeys, kVariant> {
  static constexpr int kKeys = kDeviceKeys && kVariant == PrefillVariant::kSoftCap ? 64 : 80;
  using Narrow = PrefillConfig<T, 256, 256, 2, kKeys, 2, false, kDeviceKeys, kVariant>;
};

template <class T, int kDimQK, int kDimVO, bool kDeviceKeys, PrefillVariant kVariant>
void prefill_with(const AttentionParams& p, const Gpu& gpu) {
  using Tiles = PrefillTiles<T, kDimQK, kDimVO, kDeviceKeys, kVariant>;
  const PrefillShape shape = prefill_shape(p, gpu.num_sms);
  if constexpr (kVariant != PrefillVariant::kMask && requires { typename Tiles::Wide; }) {
    using Wide = typename Tiles::Wide;
    if (prefill_cost<Wide>(shape, gpu.num_sms) <
        prefill_cost<typename Tiles::Narrow>(shape, gpu.num_sms) * Tiles::kWideSpeed)
      return launch_prefill<Wide>(p, shape, gpu);
  }
  launch_prefill<typename Tiles::Narrow>(p, shape, gpu);
}

template <class T, int kDimQK, int kDimVO>
void prefill(const AttentionParams& p, const Gpu& gpu) {
  using enum PrefillVariant;
  if (p.mask && p.mask_dtype != DType::boolean) return prefill_with<T, kDimQK, kDimVO, false, kMask>(p, gpu);
  const auto with = [&]<bool kDeviceKeys>() {
    p.logits_soft_cap > 0.0f ? prefill_with<T, kDimQK, kDimVO, kDeviceKeys, kSoftCap>(p, gpu)
                             : prefill_with<T, kDimQK, kDimVO, kDeviceKeys, kPlain>(p, gpu);
  };
  keys_on_device(p) ? with.template operator()<true>() : with.template operator()<false>();
}

}  // namespace fi::cuda::sm90
