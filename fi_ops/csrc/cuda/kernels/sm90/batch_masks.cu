// The scan of a batch's custom mask for the Hopper kernel. See fi/cuda/sm90/batch_masks.h.
#include "fi/cuda/sm90/batch_masks.h"

#include <algorithm>

#include "fi/cuda/launch.h"

namespace fi::cuda::sm90 {
namespace {

constexpr int kWarps = 8;

struct ScanArgs {
  BatchShape shape;
  BatchMask mask;
  int block_n;
  uint8_t* classes;
  uint32_t* tail;
};

// Block (i, j) takes planned query tile i, of its KV tiles a warp each, gridDim.y blocks in turns; a lane
// reads four rows.
__global__ void __launch_bounds__(32 * kWarps) scan_kernel(const __grid_constant__ ScanArgs args) {
  constexpr int kRows = static_cast<int>(kTileQueries) / 32;
  __shared__ uint32_t tail;
  wait_for_previous_kernel();
  allow_next_kernel();
  BatchMask mask = args.mask;
  if (threadIdx.x == 0) {
    const uint32_t first = mask.first_bit / 8, count = (first + mask.num_bytes) % 4;
    const auto* bytes = reinterpret_cast<const uint8_t*>(mask.words + mask.num_words);
    uint32_t word = 0;
    for (uint32_t i = mask.num_words == 0 ? first : 0; i < count; ++i) word |= uint32_t{bytes[i]} << 8 * i;
    tail = word;
    if (blockIdx.x == 0 && blockIdx.y == 0) *args.tail = word;
  }
  __syncthreads();
  mask.tail = &tail;

  const int planned = static_cast<int>(blockIdx.x), block_n = args.block_n;
  MaskedTile tile;
  if (planned >= *args.shape.num_tiles ||
      !make_batch_tile(args.shape, args.shape.tiles[planned], 0, 0, kTileQueries, block_n, tile))
    return;
  start_masked_tile(tile, mask);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int step = static_cast<int>(gridDim.y) * kWarps;
  for (int i = tile.work.tiles.begin + static_cast<int>(blockIdx.y) * kWarps + warp; i < tile.work.tiles.end;
       i += step) {
    uint32_t columns[4] = {0, 0, 0, 0};
    bool cut = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int query = tile.work.q_start + 32 * r + lane;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t all = low_bits(block_n - 32 * w);
        const uint32_t bits = seen_keys(mask, tile, query, i * block_n + 32 * w) & all;
        columns[w] |= bits;
        cut = cut || (query < tile.q_end && bits != all);
      }
    }
    bool seen = false, has_unseen = false;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t column = __reduce_or_sync(kAllLanes, columns[w]);
      seen = seen || column != 0;
      has_unseen = has_unseen || column != low_bits(block_n - 32 * w);
    }
    cut = __any_sync(kAllLanes, cut);
    if (lane == 0)
      args.classes[planned * args.mask.kv_tiles + i] =
          seen ? kSeen | (cut ? kCut : 0) | (has_unseen ? kHasUnseen : 0) : 0;
  }
}

int64_t kv_tiles_of(const BatchAttentionParams& p, int block_n) {
  return (p.call.kv_len + block_n - 1) / block_n;
}

}  // namespace

int64_t batch_mask_scratch_bytes(const BatchAttentionParams& p) {
  constexpr int kLeastKeys = 64;
  const AttentionParams& c = p.call;
  return plan_sizes(c.batch, c.qo_len, c.num_qo_heads / c.num_kv_heads).max_tiles *
             kv_tiles_of(p, kLeastKeys) +
         sizeof(uint32_t);
}

BatchMask scan_batch_mask(const BatchAttentionParams& p, const BatchShape& shape, int block_n,
                          const Gpu& gpu) {
  const Scratch& scratch = p.call.scratch;
  const auto address = reinterpret_cast<uintptr_t>(p.custom_mask);
  ScanArgs args{};
  args.shape = shape;
  args.shape.packed_queries = 0;  // a planned tile, not what is packed
  args.block_n = block_n;
  args.mask.kv_tiles = static_cast<int>(kv_tiles_of(p, block_n));
  args.mask.words = reinterpret_cast<const uint32_t*>(address / 4 * 4);
  args.mask.first_bit = static_cast<uint32_t>(8 * (address % 4));
  args.mask.num_bytes = static_cast<uint32_t>(p.mask_bytes);
  args.mask.num_words = static_cast<uint32_t>((address % 4 + p.mask_bytes) / 4);
  args.mask.indptr = p.mask_indptr;
  const int64_t classes = int64_t{shape.max_tiles} * args.mask.kv_tiles;
  args.tail = static_cast<uint32_t*>(scratch.allocate(scratch.context, sizeof(uint32_t) + classes));
  args.classes = reinterpret_cast<uint8_t*>(args.tail + 1);
  const int64_t most = (args.mask.kv_tiles + kWarps - 1) / kWarps;
  const int64_t enough = std::max<int64_t>(16 * gpu.num_sms / shape.max_tiles, 1);
  launch(gpu, scan_kernel,
         dim3(static_cast<unsigned>(shape.max_tiles), static_cast<unsigned>(std::min(most, enough))),
         dim3(32 * kWarps), 0, /*overlap=*/true, args);
  args.mask.tail = args.tail;
  args.mask.classes = args.classes;
  return args.mask;
}

}  // namespace fi::cuda::sm90
