// How an attention call is cut, and the buffers of a worker that follow from it.
#pragma once

#include "fi/cpu/attention_engine.h"
#include "fi/cpu/attention_state.h"
#include "fi/cpu/dense_source.h"
#include "fi/cpu/rope_row.h"

namespace fi::FI_ISA {

// Bytes of a key's neighbouring heads that a task reads together: a page is then read in one go, not a head's
// pieces of it eight times.
inline constexpr int64_t kRowBytes = 2048;

template <class T, class Engine, class Source>
struct AttentionSizes {
  int64_t head_dim_qk, head_dim_vo, rotary_dim;
  int64_t heads = 1;  // KV heads of a block
  int64_t group;      // query heads of a KV head
  int64_t block_rows, pass_rows, tile, depth;
  int64_t split_keys;                    // 0: no fixed split
  int64_t q_stride, s_stride, o_stride;  // of the rows of a worker's buffers
  int64_t state_stride, state_floats;    // of a row's state, and of all of a block
  int64_t k_tile_size, v_tile_size;      // packed
  int64_t element;                       // bytes of one of key and value
  bool k_staged, v_staged;               // converted or rotated into a buffer, not read in place

  AttentionSizes(const AttentionParams& p, const Source& source)
      : head_dim_qk(p.head_dim_qk), head_dim_vo(p.head_dim_vo), rotary_dim(p.rope.rotary_dim) {
    group = p.num_qo_heads / p.num_kv_heads;
    const int64_t max_rows = group * source.max_qo_len(), max_keys = source.max_kv_len();
    block_rows = Engine::block_rows(max_rows ? max_rows : 1);
    pass_rows = block_rows < Engine::kPassRows ? block_rows : Engine::kPassRows;
    const int64_t widest = head_dim_qk > head_dim_vo ? head_dim_qk : head_dim_vo;
    element = source.kv_dtype() == Fp8::none ? sizeof(T) : 1;
    split_keys = source.split_keys();
    tile = Engine::tile(widest, split_keys ? split_keys : max_keys ? max_keys : 1);
    if (!Engine::kPacked && source.heads_together()) {
      while (p.num_kv_heads % (2 * heads) == 0 && 2 * heads * widest * element <= kRowBytes) heads *= 2;
      if constexpr (!Engine::kPacked) tile = heads > 1 ? Engine::kTogetherTile : tile;
    }
    while (split_keys % tile) tile -= Engine::kTileStep;
    depth = round_up(head_dim_qk, Engine::kStepDepth);
    // Off powers of two: no cache set conflicts.
    q_stride = depth + (Engine::kPacked ? 64 / int64_t(sizeof(typename Engine::Query)) : 0);
    s_stride = round_up(tile, Engine::kStepCols) + 16;
    o_stride = round_up(head_dim_vo, 2 * kLanes) + (Engine::kPacked ? 16 : 0);
    state_stride = round_up(head_dim_vo, kLanes) + kLanes;
    state_floats = heads * block_rows * state_stride;
    k_tile_size = round_up(tile, kLanes) * depth;
    v_tile_size = tile * round_up(head_dim_vo, kLanes);
    const bool converted = source.kv_dtype() != Fp8::none;
    k_staged = converted || p.rope_keys;
    v_staged = converted;
  }
};

// Rows are those of a block, head by head.
template <class T, class Engine, class Source>
struct AttentionWorker {
  using Query = typename Engine::Query;

  Query* q;         // [heads * block_rows][q_stride]
  float* s;         // [heads * pass_rows][s_stride]: logits, then weights
  float* acc;       // [heads * block_rows][o_stride]
  float* row_max;   // [heads * block_rows]
  float* row_sum;   // [heads * block_rows]
  Range* allowed;   // [heads * block_rows]
  Range* seen;      // [heads * pass_rows]: the columns of s that hold visible keys
  float* additive;  // [tile]: one row of the mask
  T* k_buffer;      // [tile][head_dim_qk]: keys, rotated or converted
  T* v_buffer;      // [tile][head_dim_vo]: values, converted
  T* row;           // [head_dim_qk]
  Query* k_pack;    // one packed tile, where K and V are not packed once for all blocks
  Query* v_pack;
  float* angles;                               // of one position
  float* states;                               // [2][state_floats]: of all chunks so far, and of one
  typename Source::TileRows rows[2];           // of this tile, and of the next one
  typename Source::BufferRows k_rows, v_rows;  // of the buffers

  int64_t carve(char* base, const AttentionSizes<T, Engine, Source>& z) {
    Carver carver{base};
    q = carver.take<Query>(z.heads * z.block_rows * z.q_stride);
    s = carver.take<float>(z.heads * z.pass_rows * z.s_stride);
    acc = carver.take<float>(z.heads * z.block_rows * z.o_stride);
    row_max = carver.take<float>(z.heads * z.block_rows);
    row_sum = carver.take<float>(z.heads * z.block_rows);
    allowed = carver.take<Range>(z.heads * z.block_rows);
    seen = carver.take<Range>(z.heads * z.pass_rows);
    additive = carver.take<float>(z.s_stride);
    k_buffer = carver.take<T>(z.k_staged ? z.tile * z.head_dim_qk : 0);
    v_buffer = carver.take<T>(z.v_staged ? z.tile * z.head_dim_vo : 0);
    row = carver.take<T>(z.head_dim_qk);
    k_pack = carver.take<Query>(Engine::kPacked ? z.k_tile_size : 0);
    v_pack = carver.take<Query>(Engine::kPacked ? z.v_tile_size : 0);
    angles = carver.take<float>(rope_angle_floats(z.rotary_dim));
    states = carver.take<float>(z.split_keys ? 2 * z.state_floats : 0);
    for (auto& r : rows) r.carve(carver, z.tile);
    if (z.k_staged) k_rows.carve(carver, z.tile, k_buffer, z.head_dim_qk);
    if (z.v_staged) v_rows.carve(carver, z.tile, v_buffer, z.head_dim_vo);
    return carver.used;
  }
};

}  // namespace fi::FI_ISA
