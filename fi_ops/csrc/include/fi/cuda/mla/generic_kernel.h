// Latent attention on CUDA cores: any dtype, widths, strides and page size. A block takes 64 rows (query
// heads x queries) of a request, a part of their keys and 256 columns of their output; where there are
// several parts, a second kernel joins them in their order. The cut follows from the lengths and the card.
#pragma once

#include "fi/cuda/batch/plan.h"
#include "fi/cuda/generic_tile.h"
#include "fi/cuda/launch.h"
#include "fi/cuda/mla/generic.h"

namespace fi::cuda::mla {

// The entry of `first` (ascending, [count + 1]) whose items `n` is one of; those without items are passed
// over.
FI_DEVICE_INLINE int64_t owner_of(const int64_t* first, int64_t count, int64_t n) {
  int64_t low = 0, high = count;  // first[low] <= n < first[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first[middle] <= n ? low : high) = middle;
  }
  return low;
}

template <class T>
class GenericBlock {
  using Tile = GenericTile<kTileParts>;
  static constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys;
  static_assert(kRows == kTileRows && kKeys == kTileKeys);

  struct Row {
    int64_t q_nope, q_pe;  // offsets; -1: no such row
    int64_t num_keys;      // that it sees
  };

 public:
  struct Smem {
    typename Tile::Smem tile;
    Row rows[kRows];
    int64_t ckv[kKeys], kpe[kKeys];  // offsets of the keys at hand; -1: nowhere
  };

  FI_DEVICE_INLINE GenericBlock(const GenericArgs& args, Smem& smem)
      : args(args), mla(args.p), p(args.p.batch), c(args.p.batch.call), smem(smem), tile(smem.tile) {}

  // Items, times slices of columns, are numbered through; this block takes every gridDim.x-th.
  FI_DEVICE_INLINE void run() {
    const int64_t part_tiles = *args.part_tiles, count = args.first_item[c.batch] * args.slices;
    for (int64_t at = blockIdx.x; at < count; at += gridDim.x) {
      const int64_t item = at / args.slices, b = owner_of(args.first_item, c.batch, item);
      request = request_of(p, b);
      const Cut cut = Cut::of(request, c.num_qo_heads, part_tiles);
      const int64_t nth = item - args.first_item[b], block = nth / cut.parts, part = nth - block * cut.parts;
      const int64_t rows = request.qo_len * c.num_qo_heads;
      row_begin = block * kRows;
      row_end = row_begin + kRows < rows ? row_begin + kRows : rows;
      first_column = (at - item * args.slices) * kTileColumns;
      slot = cut.parts > 1 ? args.first_slot[b] + nth : -1;
      attend(part * part_tiles * kKeys, (part + 1) * part_tiles * kKeys);
    }
    batch::write_padding<T>(p, int64_t{blockIdx.x} * blockDim.x + threadIdx.x,
                            int64_t{gridDim.x} * blockDim.x);
  }

 private:
  // Keys [first, most), as far as a row sees them.
  FI_DEVICE_INLINE void attend(int64_t first, int64_t most) {
    __syncthreads();  // the rows before have been used
    for (int r = threadIdx.x; r < kRows; r += Tile::kThreads) {
      Row row{-1, -1, 0};
      if (row_begin + r < row_end) {
        const int64_t i = (row_begin + r) / c.num_qo_heads, h = row_begin + r - i * c.num_qo_heads;
        const int64_t n = request.q_begin + i;
        row = {n * c.q_stride_n + h * c.q_stride_h, n * mla.q_pe_stride_n + h * mla.q_pe_stride_h,
               batch::keys_of_query(p, request, i).end};
      }
      smem.rows[r] = row;
    }
    kv_scale = p.k_scale ? p.k_scale.at(0) : 1.0f;
    tile.begin();
    end = batch::keys_of_query(p, request, (row_end - 1) / c.num_qo_heads).end;
    if (end > most) end = most;
    for (; first < end; first += kKeys) attend_keys(first);
    tile.join_sums();
    slot < 0 ? write() : save();
  }

  FI_DEVICE_INLINE void attend_keys(int64_t first) {
    __syncthreads();  // the keys before have been used
    for (int j = threadIdx.x; j < kKeys; j += Tile::kThreads) {
      PageEntry at;
      if (first + j < end) at = key_entry(p, request, first + j);
      const bool there = at.page >= 0;
      smem.ckv[j] = there ? at.page * p.k_stride_page + at.entry * c.k_stride_n : -1;
      smem.kpe[j] = there ? at.page * mla.kpe_stride_page + at.entry * mla.kpe_stride_n : -1;
    }
    __syncthreads();
    const int64_t ckv = c.head_dim_qk;
    tile.attend(
        ckv + mla.head_dim_kpe,
        [&](int r, int64_t d) {
          const Row& row = smem.rows[r];
          if (row.q_nope < 0) return 0.0f;
          return to_float(d < ckv ? static_cast<const T*>(c.query)[row.q_nope + d]
                                  : static_cast<const T*>(mla.q_pe)[row.q_pe + d - ckv]);
        },
        [&](int j, int64_t d) {
          if (smem.ckv[j] < 0) return 0.0f;
          return d < ckv ? load_kv<T>(c.key, smem.ckv[j] + d, p.kv_dtype)
                         : load_kv<T>(mla.kpe, smem.kpe[j] + d - ckv, p.kv_dtype);
        },
        [&](float (&s)[4][4]) {
          const float scale = c.scale * kv_scale;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int64_t num_keys = smem.rows[tile.y4 + i].num_keys;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const bool sees = first + tile.x4 + j < num_keys && smem.ckv[tile.x4 + j] >= 0;
              s[i][j] = sees ? s[i][j] * scale * kLog2e : -kInf;
            }
          }
        },
        [&](int j, int column) {
          const int64_t d = first_column + column;
          return smem.ckv[j] < 0 || d >= ckv ? 0.0f : load_kv<T>(c.key, smem.ckv[j] + d, p.kv_dtype);
        });
  }

  FI_DEVICE_INLINE void write() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = row_begin + tile.y4 + i;
      if (row >= row_end) continue;
      const int64_t n = request.q_begin + row / c.num_qo_heads, h = row % c.num_qo_heads;
      const RowResult result = finish_row(c, h, tile.row_max[i], tile.row_sum[i]);
      T* out = static_cast<T*>(c.out) + n * c.o_stride_n + h * c.o_stride_h;
      tile.for_columns(i, first_column, c.head_dim_vo, [&](int64_t column, float x) {
        out[column] = from_float<T>(x * (result.factor * kv_scale));
      });
      if (c.lse && tile.x4 == 0 && first_column == 0) c.lse[n * c.num_qo_heads + h] = result.lse;
    }
  }

  // As they are, into the slot.
  FI_DEVICE_INLINE void save() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = slot * kRows + tile.y4 + i;
      float* out = args.out + row * args.width;
      tile.for_columns(i, first_column, c.head_dim_vo, [&](int64_t column, float x) { out[column] = x; });
      if (tile.x4 == 0 && first_column == 0) {
        args.state[2 * row] = tile.row_max[i];
        args.state[2 * row + 1] = tile.row_sum[i];
      }
    }
  }

  const GenericArgs& args;
  const MlaParams& mla;
  const BatchAttentionParams& p;
  const AttentionParams& c;
  Smem& smem;
  Tile tile;
  Request request;
  int64_t row_begin, row_end, first_column, end;  // end: of the keys
  int64_t slot;                                   // -1: the rows' only part
  float kv_scale;
};

template <class T>
__global__ void __launch_bounds__(256, 1) generic_mla_kernel(const __grid_constant__ GenericArgs args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  GenericBlock<T>(args, *reinterpret_cast<typename GenericBlock<T>::Smem*>(dynamic_smem())).run();
}

// Joins the parts of each row in their order, a warp a row. A part's block takes every `parts`-th row.
template <class T>
__global__ void __launch_bounds__(256) generic_mla_join_kernel(const __grid_constant__ GenericArgs args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const BatchAttentionParams& p = args.p.batch;
  const AttentionParams& c = p.call;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const float kv_scale = p.v_scale ? p.v_scale.at(0) : 1.0f;
  for (int64_t slot = blockIdx.x; slot < args.first_slot[c.batch]; slot += gridDim.x) {
    const int64_t b = owner_of(args.first_slot, c.batch, slot), nth = slot - args.first_slot[b];
    const Request request = request_of(p, b);
    const Cut cut = Cut::of(request, c.num_qo_heads, *args.part_tiles);
    const int64_t block = nth / cut.parts, part = nth - block * cut.parts, row_begin = block * kTileRows;
    const int64_t left = request.qo_len * c.num_qo_heads - row_begin,
                  rows = left < kTileRows ? left : kTileRows;
    for (int64_t r = part + warp * cut.parts; r < rows; r += warps * cut.parts) {
      // Of part i.
      const auto row_of = [&](int64_t i) { return (slot - part + i) * kTileRows + r; };
      float top = -kInf;
      for (int64_t i = lane; i < cut.parts; i += 32) top = fmaxf(top, args.state[2 * row_of(i)]);
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
      const float shift = usable_max(top);
      float sum = 0.0f;
      for (int64_t i = 0; i < cut.parts; ++i)
        sum += args.state[2 * row_of(i) + 1] * exp2f(args.state[2 * row_of(i)] - shift);
      const int64_t n = request.q_begin + (row_begin + r) / c.num_qo_heads,
                    h = (row_begin + r) % c.num_qo_heads;
      const RowResult result = finish_row(c, h, top, sum);
      T* out = static_cast<T*>(c.out) + n * c.o_stride_n + h * c.o_stride_h;
      for (int64_t d = lane; d < c.head_dim_vo; d += 32) {
        float x = 0.0f;
        for (int64_t i = 0; i < cut.parts; ++i)
          x = fmaf(args.out[row_of(i) * args.width + d], exp2f(args.state[2 * row_of(i)] - shift), x);
        out[d] = from_float<T>(x * (result.factor * kv_scale));
      }
      if (c.lse && lane == 0) c.lse[n * c.num_qo_heads + h] = result.lse;
    }
  }
}

template <class T>
void run_generic(const GenericArgs& args, const Gpu& gpu) {
  const AttentionParams& c = args.p.batch.call;
  const int64_t blocks = c.qo_len * c.num_qo_heads / kTileRows + c.batch;
  const int64_t most = blocks * args.slices + args.room;  // items, times slices
  const int64_t room = int64_t{gpu.num_sms} * 4;
  launch_with<generic_mla_kernel<T>, sizeof(typename GenericBlock<T>::Smem)>(
      gpu, dim3(static_cast<unsigned>(most < room ? most : room)), dim3(256), /*overlap=*/true, args);
  launch(gpu, generic_mla_join_kernel<T>, dim3(static_cast<unsigned>(gpu.num_sms)), dim3(256), 0,
         /*overlap=*/true, args);
}

}  // namespace fi::cuda::mla
