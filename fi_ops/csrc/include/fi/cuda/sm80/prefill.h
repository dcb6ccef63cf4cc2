// Attention on sm_80 and later, for any number of query rows: what it takes, and what its kernels are told.
#pragma once

#include "fi/cuda/sm80/mask_tiles.h"
#include "fi/cuda/sm80/partials.h"

namespace fi::cuda {

// The grid: blocks of rows of all heads, each in `partials.parts` parts.
struct PrefillArgs {
  AttentionParams p;
  MaskTiles mask;
  Partials partials;
  unsigned num_rows;    // of one KV head: group * qo_len
  unsigned group;       // query heads of a KV head
  unsigned num_blocks;  // of rows, of one KV head
  unsigned heads;       // batch * num_kv_heads
  unsigned section;     // heads whose blocks run side by side: their K and V share the L2 cache

  struct Place {
    unsigned head, block, part;
  };

  unsigned num_thread_blocks() const { return num_blocks * heads * static_cast<unsigned>(partials.parts); }

  // Late blocks, the long ones of a causal call, go first.
  FI_HD Place place(unsigned index) const {
    const unsigned parts = static_cast<unsigned>(partials.parts);
    const unsigned part = index % parts, at = index / parts;
    const unsigned begin = at / (section * num_blocks) * section;
    const unsigned width = heads - begin < section ? heads - begin : section;
    const unsigned inside = at - begin * num_blocks;
    return {begin + inside % width, num_blocks - 1 - inside / width, part};
  }

  FI_HD BlockOfRows rows_of(const Place& place, unsigned block_rows) const {
    const unsigned kv_heads = static_cast<unsigned>(p.num_kv_heads);
    return {static_cast<int>(place.head / kv_heads), static_cast<int>(place.head % kv_heads),
            place.block * block_rows, num_rows, group};
  }
};

// Whether more than a positive scale lies between a product and its logit.
inline bool needs_variants(const AttentionParams& p) {
  return p.mask != nullptr || p.logits_soft_cap > 0.0f || p.alibi_slopes || !(p.scale > 0.0f);
}

// Keys a tile: what two stages of K and V leave room for in the 99 KB of sm_86, and a warp's logits in its
// registers.
constexpr int prefill_keys(int dim_qk, int block_rows, bool variants) {
  return dim_qk > 128 || (dim_qk > 64 && block_rows > 64 && variants) ? 32 : 64;
}

// Launches the kernel for head dims padded to kDimQK and kDimVO; block_rows: 64 or, up to kDimQK 192, 128.
template <class T, int kDimQK, int kDimVO>
void run_prefill(const PrefillArgs& args, const Gpu& gpu, int block_rows);

// Keys from which prefill() rather splits them than leaves multiprocessors idle.
inline constexpr int64_t kLongKeys = 1024;

// fp16 and bf16, head dims in multiples of 8 up to 256, rows at 16-byte boundaries, RoPE applied already.
bool prefill_supports(const AttentionParams& p);
void prefill(const AttentionParams& p, const Gpu& gpu);

struct GenericArgs {
  AttentionParams p;
  MaskTiles mask;
  unsigned num_rows, num_blocks, group;
  unsigned slices;  // of head_dim_vo, a thread block each
};

// Launches the kernel on CUDA cores.
template <class T>
void run_generic(const GenericArgs& args, const Gpu& gpu);

// Everything, on CUDA cores; but RoPE applied already.
void generic_attention(const AttentionParams& p, const Gpu& gpu);

// The params of the same call on queries (and keys, where rope_keys) that are rotated already: into scratch.
AttentionParams rotate_first(const AttentionParams& p, const Gpu& gpu);

}  // namespace fi::cuda
