// Latent attention on CUDA cores: any dtype, widths, strides and page size. A block takes 64 rows (query
// heads x queries) of a request and 256 columns of their output. Keys are not split, so a request's result
// never depends on the rest of the batch.
#pragma once

#include "fi/cuda/batch/plan.h"
#include "fi/cuda/generic_tile.h"
#include "fi/cuda/launch.h"
#include "fi/cuda/mla/generic.h"

namespace fi::cuda::mla {

template <class T>
FI_DEVICE_INLINE float load_cache(const void* data, int64_t at, Fp8 format) {
  return format == Fp8::none   ? to_float(static_cast<const T*>(data)[at])
         : format == Fp8::e4m3 ? from_e4m3(static_cast<const uint8_t*>(data)[at])
                               : from_e5m2(static_cast<const uint8_t*>(data)[at]);
}

template <class T>
class GenericBlock {
  static constexpr int kParts = 4;  // 64 columns of the output each
  using Tile = GenericTile<kParts>;
  static constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys, kColumns = 64 * kParts;

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

  static int64_t slices_of(const AttentionParams& c) {
    return c.head_dim_vo > kColumns ? (c.head_dim_vo + kColumns - 1) / kColumns : 1;
  }

  FI_DEVICE_INLINE GenericBlock(const MlaParams& params, int64_t slices, Smem& smem)
      : mla(params), p(params.batch), c(params.batch.call), slices(slices), smem(smem), tile(smem.tile) {}

  // The requests' blocks of rows, times slices of columns, are numbered through; this block takes every
  // gridDim.x-th.
  FI_DEVICE_INLINE void run() {
    int64_t item = blockIdx.x, first = 0;
    for (int64_t b = 0; b < c.batch; ++b) {
      request = request_of(p, b);
      const int64_t rows = request.qo_len * c.num_qo_heads;
      const int64_t count = (rows + kRows - 1) / kRows * slices;
      for (; item < first + count; item += gridDim.x) {
        const int64_t block = (item - first) / slices;
        row_begin = block * kRows;
        row_end = row_begin + kRows < rows ? row_begin + kRows : rows;
        first_column = (item - first - block * slices) * kColumns;
        attend();
      }
      first += count;
    }
    batch::write_padding<T>(p, int64_t{blockIdx.x} * blockDim.x + threadIdx.x,
                            int64_t{gridDim.x} * blockDim.x);
  }

 private:
  FI_DEVICE_INLINE void attend() {
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
    for (int64_t first = 0; first < end; first += kKeys) attend_keys(first);
    write();
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
          return d < ckv ? load_cache<T>(c.key, smem.ckv[j] + d, p.kv_dtype)
                         : load_cache<T>(mla.kpe, smem.kpe[j] + d - ckv, p.kv_dtype);
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
          return smem.ckv[j] < 0 || d >= ckv ? 0.0f : load_cache<T>(c.key, smem.ckv[j] + d, p.kv_dtype);
        });
  }

  FI_DEVICE_INLINE void write() {
    tile.join_sums();
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

  const MlaParams& mla;
  const BatchAttentionParams& p;
  const AttentionParams& c;
  const int64_t slices;
  Smem& smem;
  Tile tile;
  Request request;
  int64_t row_begin, row_end, first_column, end;
  float kv_scale;
};

template <class T>
__global__ void __launch_bounds__(256, 1)
    generic_mla_kernel(const __grid_constant__ MlaParams p, int64_t slices) {
  allow_next_kernel();
  wait_for_previous_kernel();
  GenericBlock<T>(p, slices, *reinterpret_cast<typename GenericBlock<T>::Smem*>(dynamic_smem())).run();
}

template <class T>
void run_generic(const MlaParams& p, const Gpu& gpu) {
  const AttentionParams& c = p.batch.call;
  const int64_t slices = GenericBlock<T>::slices_of(c);
  const int64_t most = (c.qo_len * c.num_qo_heads / 64 + c.batch + 1) * slices;
  const int64_t room = int64_t{gpu.num_sms} * 4;
  launch(gpu, generic_mla_kernel<T>, dim3(static_cast<unsigned>(most < room ? most : room)), dim3(256),
         sizeof(typename GenericBlock<T>::Smem), /*overlap=*/true, p, slices);
}

}  // namespace fi::cuda::mla
