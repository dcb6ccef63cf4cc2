// Attention over a batch on CUDA cores: any dtype, head dim, strides and features, for segments and tiles of
// the plan. Keys are not split: a request's result never depends on the rest of the batch.
#pragma once

#include "fi/cuda/batch/generic.h"
#include "fi/cuda/decode/rope.h"
#include "fi/cuda/generic_tile.h"
#include "fi/cuda/launch.h"

namespace fi::cuda::batch {

// Element d of a row whose elements are load(d): rotated, rounded to T, by the table's row of `position`.
template <class T, class Load>
FI_DEVICE_INLINE float load_rotated(const BatchAttentionParams& p, int64_t position, int64_t d,
                                    const Load& load) {
  const RopeTable& table = p.call.rope;
  if (d >= table.rotary_dim || p.rope_len == 0) return load(d);
  const int at = static_cast<int>(d);
  return to_float(from_float<T>(decode::rotated(table, 0, clamp_index(position, 0, p.rope_len - 1), load(at),
                                                load(decode::rope_partner(table, at)), at)));
}

// kParts: 64 columns of the output each.
template <class T, int kParts>
class GenericBlock {
  using Tile = GenericTile<kParts>;
  static constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys;

  struct Row {
    int64_t begin, end;     // its keys
    float position, slope;  // of ALiBi, base 2
  };

 public:
  struct Smem {
    typename Tile::Smem tile;
    Row rows[kRows];
    int64_t k_offset[kKeys], v_offset[kKeys];  // of the keys at hand; -1: nowhere
    int is_seen[kKeys];                        // by some row, as far as the custom mask goes
  };

  FI_DEVICE_INLINE GenericBlock(const GenericArgs& args, Smem& smem)
      : args(args), p(args.p), c(args.p.call), smem(smem), tile(smem.tile) {}

  FI_DEVICE_INLINE void run() {
    const int num_tiles = args.tiles ? args.plan.num_tiles() : 0;
    const int num_segments = args.segments ? args.plan.num_segments() : 0;
    const int parts = 2 * static_cast<int>(args.group);  // kTileQueries queries, 64 rows each
    const int64_t shares = int64_t{args.slices} * c.num_kv_heads;
    for (int64_t item = blockIdx.x; item < (int64_t{num_tiles} * parts + num_segments) * shares;
         item += gridDim.x) {
      const int64_t work = item / shares, share = item - work * shares;
      kv_head = share / args.slices;
      first_column = (share - kv_head * args.slices) * (64 * kParts);
      const int64_t t = work / parts;
      rows =
          t < num_tiles
              ? tile_rows(p, args.plan, static_cast<int>(t), static_cast<int>(work - t * parts), args.group)
              : segment_rows(p, args.plan, static_cast<int>(work - int64_t{num_tiles} * parts), args.group);
      if (rows.request >= 0 && rows.begin < rows.end) attend();
    }
    if (args.segments)
      write_padding<T>(p, int64_t{blockIdx.x} * blockDim.x + threadIdx.x, int64_t{gridDim.x} * blockDim.x);
  }

 private:
  FI_DEVICE_INLINE bool has(int r) const { return rows.begin + r < rows.end; }
  FI_DEVICE_INLINE int64_t query_of(int r) const { return (rows.begin + r) / args.group; }
  FI_DEVICE_INLINE int64_t head_of(int r) const {
    return kv_head * args.group + (rows.begin + r) % args.group;
  }

  FI_DEVICE_INLINE void attend() {
    request = request_of(p, rows.request);
    __syncthreads();  // the rows before have been used
    for (int r = threadIdx.x; r < kRows; r += Tile::kThreads) {
      Row row{0, 0, 0.0f, 0.0f};
      if (has(r)) {
        const KeySpan keys = keys_of_query(p, request, query_of(r));
        row = {keys.begin, keys.end, static_cast<float>(query_of(r) + request.kv_len - request.qo_len), 0.0f};
        if (c.alibi_slopes) row.slope = c.alibi_slopes.at(head_of(r)) * kLog2e;
      }
      smem.rows[r] = row;
    }
    scale = p.k_scale ? c.scale * p.k_scale.at(kv_head) : c.scale;
    tile.begin();
    const int64_t begin = keys_of_query(p, request, query_of(0)).begin;
    end = keys_of_query(p, request, (rows.end - 1) / args.group).end;
    for (int64_t first = begin; first < end; first += kKeys) attend_keys(first);
    write();
  }

  FI_DEVICE_INLINE void attend_keys(int64_t first) {
    __syncthreads();  // the keys before have been used
    for (int j = threadIdx.x; j < kKeys; j += Tile::kThreads) {
      PageEntry at;
      if (first + j < end) at = key_entry(p, request, first + j);
      const bool there = at.page >= 0;
      smem.is_seen[j] = p.custom_mask == nullptr;
      smem.k_offset[j] =
          there ? at.page * p.k_stride_page + at.entry * c.k_stride_n + kv_head * c.k_stride_h : -1;
      smem.v_offset[j] =
          there ? at.page * p.v_stride_page + at.entry * c.v_stride_n + kv_head * c.v_stride_h : -1;
    }
    __syncthreads();
    const bool rotates = c.rope.cos != nullptr;
    tile.attend(
        c.head_dim_qk,
        [&](int r, int64_t d) {
          if (!has(r)) return 0.0f;
          const int64_t i = query_of(r);
          const T* x = static_cast<const T*>(c.query) + (request.q_begin + i) * c.q_stride_n +
                       head_of(r) * c.q_stride_h;
          const auto load = [&](int64_t n) { return to_float(x[n]); };
          return rotates ? load_rotated<T>(p, i + request.kv_len - request.qo_len, d, load) : load(d);
        },
        [&](int j, int64_t d) {
          const int64_t at = smem.k_offset[j];
          if (at < 0) return 0.0f;
          const auto load = [&](int64_t n) { return load_kv<T>(c.key, at + n, p.kv_dtype); };
          return rotates ? load_rotated<T>(p, first + j, d, load) : load(d);
        },
        [&](float (&s)[4][4]) { to_logits(s, first); },
        [&](int j, int column) {
          // A weight of 0 times what lies there must not be NaN.
          const int64_t at = smem.is_seen[j] ? smem.v_offset[j] : -1, d = first_column + column;
          return at < 0 || d >= c.head_dim_vo ? 0.0f : load_kv<T>(c.value, at + d, p.kv_dtype);
        });
  }

  // Products to logits, base 2.
  FI_DEVICE_INLINE void to_logits(float (&s)[4][4], int64_t first) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Row row = smem.rows[tile.y4 + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = tile.x4 + j;
        const int64_t key = first + n;
        bool sees = key >= row.begin && key < row.end && smem.k_offset[n] >= 0;
        if (sees && p.custom_mask) {
          sees = custom_mask_bit(p, request, query_of(tile.y4 + i), key);
          if (sees) atomicOr(&smem.is_seen[n], 1);
        }
        float x = s[i][j] * scale;
        if (c.logits_soft_cap > 0.0f) x = tanhf(x / c.logits_soft_cap) * c.logits_soft_cap;
        x = x * kLog2e + (static_cast<float>(key) - row.position) * row.slope;
        s[i][j] = sees ? x : -kInf;
      }
    }
  }

  FI_DEVICE_INLINE void write() {
    tile.join_sums();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = tile.y4 + i;
      if (!has(r)) continue;
      const int64_t h = head_of(r), n = request.q_begin + query_of(r);
      const RowResult result = finish_row(c, h, tile.row_max[i], tile.row_sum[i]);
      const float factor = p.v_scale ? result.factor * p.v_scale.at(kv_head) : result.factor;
      T* out = static_cast<T*>(c.out) + n * c.o_stride_n + h * c.o_stride_h;
      tile.for_columns(i, first_column, c.head_dim_vo,
                       [&](int64_t column, float x) { out[column] = from_float<T>(x * factor); });
      if (c.lse && tile.x4 == 0 && first_column == 0) c.lse[n * c.num_qo_heads + h] = result.lse;
    }
  }

  const GenericArgs& args;
  const BatchAttentionParams& p;
  const AttentionParams& c;
  Smem& smem;
  Tile tile;
  RowsOfRequest rows;
  Request request;
  int64_t kv_head, first_column, end;
  float scale;
};

// Two blocks an SM is what 128 registers a thread would allow; they spill.
template <class T, int kParts>
__global__ void __launch_bounds__(256, 1) generic_batch_kernel(const __grid_constant__ GenericArgs args) {
  using Block = GenericBlock<T, kParts>;
  allow_next_kernel();
  wait_for_previous_kernel();
  Block(args, *reinterpret_cast<typename Block::Smem*>(dynamic_smem())).run();
}

template <class T, int kParts>
void launch_generic(GenericArgs args, const Gpu& gpu) {
  const AttentionParams& c = args.p.call;
  const int64_t columns = 64 * kParts, slices = (c.head_dim_vo + columns - 1) / columns;
  args.slices = static_cast<unsigned>(slices > 1 ? slices : 1);
  int64_t most = 0;
  if (args.tiles) most += args.plan.max_tiles * int64_t{2} * args.group;
  if (args.segments) most += args.plan.max_segments;
  most *= args.slices * c.num_kv_heads;
  if (most < 1) most = 1;  // padding
  const int64_t room = int64_t{gpu.num_sms} * 4;
  launch_with<generic_batch_kernel<T, kParts>, sizeof(typename GenericBlock<T, kParts>::Smem)>(
      gpu, dim3(static_cast<unsigned>(most < room ? most : room)), dim3(256), /*overlap=*/true, args);
}

template <class T>
void run_generic(const GenericArgs& args, const Gpu& gpu) {
  if (args.p.call.head_dim_vo <= 64) return launch_generic<T, 1>(args, gpu);
  if (args.p.call.head_dim_vo <= 128) return launch_generic<T, 2>(args, gpu);
  launch_generic<T, 4>(args, gpu);
}

}  // namespace fi::cuda::batch
