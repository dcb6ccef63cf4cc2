// The scan of a boolean mask for the Hopper kernel. See fi/cuda/sm90/mask_bits.h.
#include "fi/cuda/sm90/mask_bits.h"

#include "fi/cuda/launch.h"

namespace fi::cuda::sm90 {
namespace {

constexpr int kWarps = 8;

struct ScanArgs {
  AttentionParams p;
  int64_t list_heads, list_q_tiles;
  int kv_tiles, block_m, block_n;
  const uint8_t* mask_end;  // past the last of its bytes
  uint8_t* classes;
  uint32_t* bits;
};

// How sixteen keys of a row are read.
enum class Access {
  kAligned,  // at once
  kWords,    // contiguous, anywhere: as the aligned words that they lie in
  kAnywhere
};

// Each byte 1 where it was not 0.
FI_DEVICE_INLINE uint32_t as_ones(uint32_t bytes) {
  return (((bytes & 0x7f7f7f7f) + 0x7f7f7f7f) | bytes) >> 7 & 0x01010101;
}

// Keys j .. j + 15 of a row, a byte each; past the row's end anything.
template <Access kAccess>
FI_DEVICE_INLINE void load_keys(uint32_t (&keys)[4], const uint8_t* row, int64_t j, const ScanArgs& args) {
  const unsigned start = reinterpret_cast<uintptr_t>(row + j) % 4;
  if (kAccess == Access::kAligned) {
    const uint4 x = *reinterpret_cast<const uint4*>(row + j);
    keys[0] = x.x, keys[1] = x.y, keys[2] = x.z, keys[3] = x.w;
  } else if (kAccess == Access::kWords && row + j - start + 20 <= args.mask_end) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(row + j - start);
    uint32_t x[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) x[i] = words[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) keys[i] = __funnelshift_r(x[i], x[i + 1], 8 * start);
  } else {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      keys[w] = 0;
      // With kWords the mask's last few keys alone come this way, and registers are blocks that run at a
      // time.
#pragma unroll(kAccess == Access::kWords ? 1 : 4)
      for (int i = 0; i < 4; ++i, ++j)
        if (j < args.p.kv_len && row[j * args.p.mask_stride_k]) keys[w] |= 1u << 8 * i;
    }
  }
}

// The bytes of a word, whose first is key `first`, that lie in [begin, end).
FI_DEVICE_INLINE uint32_t bytes_between(int first, int begin, int end) {
  const int from = min(max(begin - first, 0), 4), to = min(max(end - first, 0), 4);
  const auto below = [](int n) { return n == 4 ? 0xffffffff : (1u << 8 * n) - 1; };
  return below(to) & ~below(from);
}

// A thread block a (query tile, KV tile), a warp an eighth of its rows, eight lanes a row, a lane sixteen
// keys.
template <Access kAccess>
__global__ void __launch_bounds__(32 * kWarps, 2) scan_kernel(const __grid_constant__ ScanArgs args) {
  constexpr unsigned kOnes = 0x01010101;
  __shared__ uint32_t seen_by_any[4];
  wait_for_previous_kernel();
  allow_next_kernel();
  const AttentionParams& p = args.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % 8, block_n = args.block_n;
  const int64_t list = blockIdx.x / args.kv_tiles, tile = blockIdx.x % args.kv_tiles;
  const int64_t q_tile = list % args.list_q_tiles, heads = list / args.list_q_tiles;
  const int64_t head = heads % args.list_heads, b = heads / args.list_heads;
  const int warp_rows = args.block_m / kWarps;  // at most 32: a lane knows one row's keys
  const int64_t first_row = q_tile * args.block_m + warp * warp_rows;
  const int first_key = static_cast<int>(tile) * block_n;
  if (threadIdx.x < 4) seen_by_any[threadIdx.x] = 0;

  KeyRange mine{0, 0};  // of the tile's keys
  if (lane < warp_rows && first_row + lane < p.qo_len) {
    const KeyRange keys = keys_of_position(p, query_position(p, b, first_row + lane));
    mine = {max(keys.begin - first_key, 0), min(keys.end - first_key, block_n)};
  }
  uint8_t& tile_class = args.classes[list * args.kv_tiles + tile];
  if (!__syncthreads_or(mine.begin < mine.end)) {
    if (threadIdx.x == 0) tile_class = 0;
    return;
  }

  const uint8_t* mask = static_cast<const uint8_t*>(p.mask) + b * p.mask_stride_b + head * p.mask_stride_h;
  uint32_t* bits = args.bits + ((list * args.kv_tiles + tile) * (args.block_m + 1) + warp * warp_rows) * 4;
  // Of the lane's keys, in every row: bits 0, 1 and 2, 3 of `even` and `odd` together are two keys of two
  // words.
  uint32_t even_seen = 0, odd_seen = 0;
  bool cut = false;
#pragma unroll 4
  for (int i = 0; i < warp_rows; i += 4) {
    const int r = i + lane / 8;
    const int begin = __shfl_sync(kAllLanes, mine.begin, r), end = __shfl_sync(kAllLanes, mine.end, r);
    uint32_t keys[4] = {0, 0, 0, 0};
    if (begin < end && 16 * part < end) {
      load_keys<kAccess>(keys, mask + (first_row + r) * p.mask_stride_q, first_key + 16 * part, args);
#pragma unroll
      for (int w = 0; w < 4; ++w) keys[w] = as_ones(keys[w]);
      if (begin > 0 || end < block_n) {
#pragma unroll
        for (int w = 0; w < 4; ++w) keys[w] &= bytes_between(16 * part + 4 * w, begin, end);
      }
    }
    cut = cut || (first_row + r < p.qo_len && 16 * part < block_n &&
                  (keys[0] & keys[1] & keys[2] & keys[3]) != kOnes);
    // Of a lane's two groups of eight keys word t wants keys 2t and 2t + 1 each, as bits 4 * part on.
    const uint32_t even = keys[0] | keys[2] << 2, odd = keys[1] | keys[3] << 2;
    even_seen |= even;
    odd_seen |= odd;
    const auto pair = [&](uint32_t x) { return (x | x >> 7) & 15; };
    const int shift = 4 * part;
    // The row's lanes join their bits, half of the words at a time: lane 4a + 2b + c ends with word 2a + b.
    const bool upper = part & 4, second = part & 2;
    const uint32_t low[2] = {pair(even) << shift, pair(even >> 16) << shift};
    const uint32_t high[2] = {pair(odd) << shift, pair(odd >> 16) << shift};
    uint32_t words[2];
#pragma unroll
    for (int w = 0; w < 2; ++w)
      words[w] = (upper ? high[w] : low[w]) | __shfl_xor_sync(kAllLanes, upper ? low[w] : high[w], 4);
    uint32_t word = second ? words[1] : words[0];
    word |= __shfl_xor_sync(kAllLanes, second ? words[0] : words[1], 2);
    word |= __shfl_xor_sync(kAllLanes, word, 1);
    if (part % 2 == 0) bits[4 * r + part / 2] = word;
  }
  // Keys 4g .. 4g + 3 of the lane's sixteen, the lowest byte's first.
  const auto column_bits = [](uint32_t bytes) { return (bytes & kOnes) * 0x10204080 >> 28; };
  uint32_t columns = column_bits(even_seen) | column_bits(odd_seen) << 4 | column_bits(even_seen >> 2) << 8 |
                     column_bits(odd_seen >> 2) << 12;
  if (columns != 0) atomicOr(&seen_by_any[part / 2], columns << 16 * (part % 2));
  const bool any = __syncthreads_or(columns != 0);
  cut = __syncthreads_or(cut);
  if (threadIdx.x != 0) return;
  uint32_t* last = args.bits + ((list * args.kv_tiles + tile) * (args.block_m + 1) + args.block_m) * 4;
  bool unseen = false;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    last[w] = seen_by_any[w];
    unseen = unseen || __popc(seen_by_any[w]) != min(max(block_n - 32 * w, 0), 32);
  }
  tile_class = any ? kSeen | (cut ? kCut : 0) | (unseen ? kHasUnseen : 0) : 0;
}

// The query tiles that are told apart.
struct Lists {
  int64_t batches, heads, q_tiles;

  Lists(const AttentionParams& p, int block_m)
      : batches(p.mask_stride_b == 0 && !keys_differ_by_batch(p) ? 1 : p.batch),
        heads(p.mask_stride_h == 0 ? 1 : p.num_qo_heads),
        q_tiles(alike(p) ? 1 : (p.qo_len + block_m - 1) / block_m) {}
  int64_t count() const { return batches * heads * q_tiles; }
  // All rows see the same.
  static bool alike(const AttentionParams& p) {
    return p.mask_stride_q == 0 && !p.causal && p.window_left < 0;
  }
};

}  // namespace

int64_t mask_scratch_bytes(const AttentionParams& p) {
  constexpr int kBlockM = 128, kBlockN = 64;  // the tile with the most bytes a key
  return Lists(p, kBlockM).count() * (p.kv_len / kBlockN + 1) * (16 * (kBlockM + 1) + 1);
}

MaskBits scan_mask(const AttentionParams& p, const Gpu& gpu, int block_m, int block_n) {
  auto allocate = [&](int64_t bytes) { return p.scratch.allocate(p.scratch.context, bytes); };
  const Lists lists(p, block_m);
  ScanArgs args{};
  args.p = p;
  args.list_heads = lists.heads;
  args.list_q_tiles = lists.q_tiles;
  args.kv_tiles = static_cast<int>((p.kv_len + block_n - 1) / block_n);
  args.block_m = block_m;
  args.block_n = block_n;
  args.mask_end = static_cast<const uint8_t*>(p.mask) + (p.batch - 1) * p.mask_stride_b +
                  (p.num_qo_heads - 1) * p.mask_stride_h + (p.qo_len - 1) * p.mask_stride_q +
                  (p.kv_len - 1) * p.mask_stride_k + 1;
  const int64_t tiles = lists.count() * args.kv_tiles;
  args.classes = static_cast<uint8_t*>(allocate(tiles));
  args.bits = static_cast<uint32_t*>(allocate(tiles * (block_m + 1) * 16));
  const bool aligned = p.mask_stride_k == 1 && reinterpret_cast<uintptr_t>(p.mask) % 16 == 0 &&
                       p.kv_len % 16 == 0 && p.mask_stride_b % 16 == 0 && p.mask_stride_h % 16 == 0 &&
                       p.mask_stride_q % 16 == 0;
  const auto kernel = aligned                ? scan_kernel<Access::kAligned>
                      : p.mask_stride_k == 1 ? scan_kernel<Access::kWords>
                                             : scan_kernel<Access::kAnywhere>;
  launch(gpu, kernel, dim3(static_cast<unsigned>(tiles)), dim3(32 * kWarps), 0, /*overlap=*/true, args);

  MaskBits result;
  result.classes = args.classes;
  result.bits = args.bits;
  result.kv_tiles = args.kv_tiles;
  result.stride_q = Lists::alike(p) ? 0 : args.kv_tiles;
  result.stride_h = lists.heads == 1 ? 0 : static_cast<int>(lists.q_tiles) * args.kv_tiles;
  result.stride_b = lists.batches == 1 ? 0 : static_cast<int>(lists.heads * lists.q_tiles) * args.kv_tiles;
  return result;
}

}  // namespace fi::cuda::sm90
