// Attention on CUDA cores, in fp32 throughout: for fp32 inputs, and for shapes and strides of 16-bit ones
// that the tensor-core kernels don't take.
#pragma once

#include "fi/cuda/generic_tile.h"
#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/prefill.h"

namespace fi::cuda {

// kParts: 64 columns of the output each.
template <class T, int kParts>
class GenericBlock {
  using Tile = GenericTile<kParts>;

 public:
  static constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kKeys = Tile::kKeys;

  struct Smem {
    typename Tile::Smem tile;
    Row rows[kRows];
    int partial[5 * kThreads / 32];
  };

  FI_DEVICE_INLINE GenericBlock(const GenericArgs& args, Smem& smem)
      : args(args), p(args.p), smem(smem), tile(smem.tile) {
    const unsigned kv_heads = static_cast<unsigned>(p.num_kv_heads);
    const unsigned heads = static_cast<unsigned>(p.batch) * kv_heads;
    const unsigned at = blockIdx.x / args.slices, head = at % heads;
    first_column = blockIdx.x % args.slices * (64 * kParts);
    block_index = args.num_blocks - 1 - at / heads;  // the long blocks of a causal call first
    block = {static_cast<int>(head / kv_heads), static_cast<int>(head % kv_heads), block_index * kRows,
             args.num_rows, args.group};
  }

  FI_DEVICE_INLINE void run() {
    const bool drop = can_drop_negligible(p, args.mask, block, block_index, threadIdx.x);
    range = load_rows<kRows, kThreads>(p, block, smem.rows, drop, smem.partial);
    tile.begin();
    const uint8_t* classes = nullptr;
    if (args.mask.classes)
      classes =
          args.mask.classes + args.mask.list_of(block.b, block.kv_head, block_index) * args.mask.num_tiles;
    TileWalk<true> walk(classes, range.begin / kKeys, (range.end + kKeys - 1) / kKeys, range.flag);
    bool open;
    for (int n = walk.next(open); n >= 0; n = walk.next(open)) attend_tile(n * kKeys, open);
    write();
  }

 private:
  FI_DEVICE_INLINE const T* key_row(int64_t j) const {
    return static_cast<const T*>(p.key) + block.b * p.k_stride_b + block.kv_head * p.k_stride_h +
           j * p.k_stride_n;
  }
  FI_DEVICE_INLINE const T* value_row(int64_t j) const {
    return static_cast<const T*>(p.value) + block.b * p.v_stride_b + block.kv_head * p.v_stride_h +
           j * p.v_stride_n;
  }
  FI_DEVICE_INLINE const T* query_row(int r) const {
    return static_cast<const T*>(p.query) + block.b * p.q_stride_b + block.head(r) * p.q_stride_h +
           block.query(r) * p.q_stride_n;
  }
  FI_DEVICE_INLINE bool reads(int64_t j) const { return j >= range.begin && j < range.end; }

  FI_DEVICE_INLINE void attend_tile(int first, bool open) {
    tile.attend(
        p.head_dim_qk, [&](int r, int64_t d) { return block.has(r) ? to_float(query_row(r)[d]) : 0.0f; },
        [&](int j, int64_t d) { return reads(first + j) ? to_float(key_row(first + j)[d]) : 0.0f; },
        [&](float (&s)[4][4]) { to_logits(s, first, open); },
        [&](int j, int c) {
          const int64_t column = first_column + c;
          return column < p.head_dim_vo && reads(first + j) ? to_float(value_row(first + j)[column]) : 0.0f;
        });
  }

  // Products to logits, base 2.
  FI_DEVICE_INLINE void to_logits(float (&s)[4][4], int first, bool open) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Row row = smem.rows[tile.y4 + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = first + tile.x4 + j;
        float x = s[i][j] * p.scale;
        if (p.logits_soft_cap > 0.0f) x = tanhf(x / p.logits_soft_cap) * p.logits_soft_cap;
        x = x * kLog2e + (static_cast<float>(key) - row.position) * row.slope;
        s[i][j] = key >= row.begin && key < row.end ? x : -kInf;
      }
    }
    if (!open) with_mask_type(p.mask_dtype, [&](auto* type) { apply_mask(s, first, type); });
  }

  template <class M>
  FI_DEVICE_INLINE void apply_mask(float (&s)[4][4], int first, const M*) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = tile.y4 + i;
      if (!block.has(r)) continue;
      const M* mask = static_cast<const M*>(p.mask) + block.b * p.mask_stride_b +
                      block.head(r) * p.mask_stride_h + block.query(r) * p.mask_stride_q;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (s[i][j] == -kInf) continue;
        const float addend = mask_addend(mask[(first + tile.x4 + j) * p.mask_stride_k]);
        s[i][j] = addend == -kInf ? addend : s[i][j] + addend;
      }
    }
  }

  FI_DEVICE_INLINE void write() {
    tile.join_sums();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = tile.y4 + i;
      if (!block.has(r)) continue;
      const int h = block.head(r), n = block.query(r);
      const RowResult result = finish_row(p, h, tile.row_max[i], tile.row_sum[i]);
      T* out = static_cast<T*>(p.out) + block.b * p.o_stride_b + h * p.o_stride_h + n * p.o_stride_n;
      tile.for_columns(i, first_column, p.head_dim_vo,
                       [&](int64_t column, float x) { out[column] = from_float<T>(x * result.factor); });
      if (p.lse && tile.x4 == 0 && first_column == 0)
        p.lse[(block.b * p.num_qo_heads + h) * p.qo_len + n] = result.lse;
    }
  }

  const GenericArgs& args;
  const AttentionParams& p;
  Smem& smem;
  Tile tile;
  BlockOfRows block;
  BlockRange range;
  unsigned block_index;
  int64_t first_column;
};

template <class T, int kParts>
__global__ void __launch_bounds__(256) generic_kernel(const __grid_constant__ GenericArgs args) {
  using Block = GenericBlock<T, kParts>;
  Block(args, *reinterpret_cast<typename Block::Smem*>(dynamic_smem())).run();
}

template <class T, int kParts>
void launch_generic(GenericArgs args, const Gpu& gpu) {
  const int64_t columns = 64 * kParts;
  const int64_t slices = (args.p.head_dim_vo + columns - 1) / columns;
  args.slices = static_cast<unsigned>(slices > 1 ? slices : 1);
  const unsigned heads = static_cast<unsigned>(args.p.batch * args.p.num_kv_heads);
  launch_with<generic_kernel<T, kParts>, sizeof(typename GenericBlock<T, kParts>::Smem)>(
      gpu, dim3(args.num_blocks * heads * args.slices), dim3(256), /*overlap=*/false, args);
}

template <class T>
void run_generic(const GenericArgs& args, const Gpu& gpu) {
  if (args.p.head_dim_vo <= 64) return launch_generic<T, 1>(args, gpu);
  if (args.p.head_dim_vo <= 128) return launch_generic<T, 2>(args, gpu);
  launch_generic<T, 4>(args, gpu);
}

}  // namespace fi::cuda
