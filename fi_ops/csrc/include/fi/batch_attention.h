// Attention of a ragged batch of queries over paged or ragged keys and values: the params, where a request's
// rows and keys lie, and the plan.
//
// Index tensors are device data that nobody may have looked at: `request_of` clamps whatever they say to the
// tensors' sizes, so that kernels which ask it read nothing outside.
#pragma once

#include "fi/attention.h"
#include "fi/fp8.h"
#include "fi/pages.h"

namespace fi {

// `call` says what the requests have in common. There, query and out are [nnz_qo, num_qo_heads, head_dim] (no
// stride_b; qo_len is nnz_qo), lse is [nnz_qo, num_qo_heads], key and value are the cache or the ragged rows
// (stride_n: of the tokens of a page; stride_b: unused), kv_len is the keys of all requests
// together, last pages taken whole: what scratch memory is sized by. q_offset, query_positions and mask are
// not used: query i of a request stands at i + kv_len - qo_len.
struct BatchAttentionParams {
  AttentionParams call;
  Indices qo_indptr;  // [batch + 1]
  PageTable table;    // ragged: no kv_indices, kv_indptr counts rows, nnz_pages rows in all, page_size 1
  Indices kv_last_page_len;  // [batch]; ragged: none
  int64_t k_stride_page = 0, v_stride_page = 0;
  Fp8 kv_dtype = Fp8::none;  // of key and value; none: call.dtype
  PerHead k_scale, v_scale;  // of KV heads (stride 0: one for all); none: 1

  // Bits, the lowest first: of request b, [qo_len, kv_len] row by row from byte mask_indptr.at(b) on.
  const uint8_t* custom_mask = nullptr;  // null: none
  Indices mask_indptr;                   // [batch + 1]
  int64_t mask_bytes = 0;

  int64_t rope_len = 0;          // rows of call.rope; the token at position j takes row j
  int64_t fixed_split_size = 0;  // keys; 0: cut as the device likes
  const int32_t* plan = nullptr;

  FI_HD bool is_paged() const { return table.kv_indices || table.num_pages > 0; }
};

struct Request {
  int64_t q_begin, qo_len;   // its rows of query and out
  int64_t kv_begin, kv_len;  // paged: its first entry of kv_indices; ragged: its first row
  int64_t mask_begin;        // its first byte of the custom mask
};

FI_INLINE int64_t clamp_index(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

FI_INLINE int64_t request_kv_len(const PageTable& table, const Indices& kv_last_page_len, int64_t b,
                                 int64_t begin) {
  const int64_t count = clamp_index(table.kv_indptr.at(b + 1), begin, table.nnz_pages) - begin;
  if (!kv_last_page_len || count == 0) return count * table.page_size;
  return (count - 1) * table.page_size + clamp_index(kv_last_page_len.at(b), 0, table.page_size);
}

FI_INLINE Request request_of(const BatchAttentionParams& p, int64_t b) {
  Request r;
  r.q_begin = clamp_index(p.qo_indptr.at(b), 0, p.call.qo_len);
  r.qo_len = clamp_index(p.qo_indptr.at(b + 1), r.q_begin, p.call.qo_len) - r.q_begin;
  r.kv_begin = clamp_index(p.table.kv_indptr.at(b), 0, p.table.nnz_pages);
  r.kv_len = request_kv_len(p.table, p.kv_last_page_len, b, r.kv_begin);
  r.mask_begin = p.custom_mask ? clamp_index(p.mask_indptr.at(b), 0, p.mask_bytes) : 0;
  return r;
}

// Where key `position` of a request lies: the row's offset in key is page * k_stride_page + entry *
// call.k_stride_n (ragged: page 0). page -1: nowhere, the table names a page that is not there.
FI_INLINE PageEntry key_entry(const BatchAttentionParams& p, const Request& r, int64_t position) {
  if (!p.is_paged()) return {0, r.kv_begin + position};
  const int64_t nth = position / p.table.page_size;
  const int64_t page = p.table.kv_indices.at(r.kv_begin + nth);
  if (page < 0 || page >= p.table.num_pages) return {};
  return {page, position - nth * p.table.page_size};
}

FI_INLINE bool custom_mask_bit(const BatchAttentionParams& p, const Request& r, int64_t i, int64_t j) {
  const int64_t bit = i * r.kv_len + j, byte = r.mask_begin + bit / 8;
  return byte < p.mask_bytes && (p.custom_mask[byte] >> bit % 8 & 1);
}

// ---- the plan ----
//
// An int32 tensor: PlanHeader, then max_segments PlanSegments, then max_tiles PlanTiles. A request with few
// rows (query heads of a KV head's group x queries) is cut into segments of kSegmentRows of them, whose keys
// are counted in units of unit_keys: kernels share the units of all segments out evenly. One with more is cut
// into tiles of kTileQueries queries, the ones with most keys first. Both are of every KV head alike.
//
// With a fixed_split_size that is a unit, and every unit is a partial result of its own, joined in order:
// then a request's result does not depend on what else is in the batch.
inline constexpr int64_t kFewRows = 64, kSegmentRows = 16, kUnitKeys = 64, kTileQueries = 128;

struct PlanHeader {
  int32_t num_segments, num_units, num_tiles;
  int32_t unit_keys;                                                  // fixed_split_size or kUnitKeys
  int32_t batch, nnz_qo, group_size, page_size, causal, window_left;  // as planned for
};

struct PlanSegment {
  int32_t request, row_begin;
  int32_t first_unit;             // of all segments' units
  int32_t unit_begin, num_units;  // of its own keys: unit u is keys [u * unit_keys, (u + 1) * unit_keys)
};

struct PlanTile {
  int32_t request, q_begin;  // its first query, of the request's
};

struct PlanSizes {
  int64_t max_segments, max_tiles;
};

FI_INLINE int64_t unit_keys_of(int64_t fixed_split_size) {
  return fixed_split_size ? fixed_split_size : kUnitKeys;
}

// Bounds that don't depend on data.
FI_INLINE PlanSizes plan_sizes(int64_t batch, int64_t nnz_qo, int64_t group_size) {
  const int64_t rows = nnz_qo * group_size;
  return {rows / kSegmentRows + (batch < rows ? batch : rows),
          nnz_qo / kTileQueries + (batch < nnz_qo ? batch : nnz_qo)};
}

inline constexpr int32_t kTileClasses = 256;

// Where the parts of a plan begin; all of it has size() int32s.
struct PlanParts {
  PlanHeader* header;
  PlanSegment* segments;
  PlanTile* tiles;
  PlanSizes sizes;

  FI_INLINE PlanParts of(int32_t* plan, int64_t batch, int64_t nnz_qo, int64_t group_size) {
    const PlanSizes sizes = plan_sizes(batch, nnz_qo, group_size);
    auto* header = reinterpret_cast<PlanHeader*>(plan);
    auto* segments = reinterpret_cast<PlanSegment*>(header + 1);
    return {header, segments, reinterpret_cast<PlanTile*>(segments + sizes.max_segments), sizes};
  }
  FI_INLINE int64_t size(int64_t batch, int64_t nnz_qo, int64_t group_size) {
    const PlanSizes sizes = plan_sizes(batch, nnz_qo, group_size);
    return (static_cast<int64_t>(sizeof(PlanHeader)) +
            sizes.max_segments * static_cast<int64_t>(sizeof(PlanSegment)) +
            sizes.max_tiles * static_cast<int64_t>(sizeof(PlanTile))) /
           4;
  }
};

// Tiles are ordered by this class of the number of keys that they see, largest first: three binary digits of
// the count of kUnitKeys. Within one class they are in the order of requests, and of a request the last
// queries, which see the most if causal, come first.
FI_INLINE int32_t tile_class(int64_t num_keys) {
  int64_t units = (num_keys + kUnitKeys - 1) / kUnitKeys;
  int32_t octave = 0;
  while (units >= 8) units >>= 1, ++octave;
  const int32_t tile_class = 8 * octave + static_cast<int32_t>(units);
  return tile_class < kTileClasses ? tile_class : kTileClasses - 1;
}

struct BatchPlanParams {
  Indices qo_indptr;         // [batch + 1]
  PageTable table;           // as in BatchAttentionParams (kv_indices and num_pages are not used)
  Indices kv_last_page_len;  // ragged: none
  int64_t batch, nnz_qo, group_size;
  bool causal;
  int64_t window_left, fixed_split_size;
  int32_t* plan;
};

// Lengths of request b; no more than its share of the plan's bounds, whatever the index tensors say.
struct PlanRequest {
  int64_t qo_len, kv_len;
};

FI_INLINE PlanRequest plan_request(const BatchPlanParams& p, int64_t b) {
  const int64_t q = clamp_index(p.qo_indptr.at(b), 0, p.nnz_qo);
  const int64_t kv = clamp_index(p.table.kv_indptr.at(b), 0, p.table.nnz_pages);
  return {clamp_index(p.qo_indptr.at(b + 1), q, p.nnz_qo) - q,
          request_kv_len(p.table, p.kv_last_page_len, b, kv)};
}

struct PlanKeys {
  int64_t begin, end;  // none: 0, 0
};

// The keys that some of the queries first .. last of a request see.
FI_INLINE PlanKeys keys_seen(const BatchPlanParams& p, const PlanRequest& r, int64_t first, int64_t last) {
  const int64_t offset = r.kv_len - r.qo_len;
  PlanKeys keys{0, r.kv_len};
  if (p.window_left >= 0 && first + offset > p.window_left) keys.begin = first + offset - p.window_left;
  if (p.causal && last + offset + 1 < keys.end) keys.end = last + offset + 1;
  return keys.begin < keys.end ? keys : PlanKeys{0, 0};
}

struct UnitRange {
  int32_t begin, count;
};

FI_INLINE UnitRange segment_units(const BatchPlanParams& p, const PlanRequest& r, int64_t row,
                                  int64_t unit_keys) {
  const int64_t rows = r.qo_len * p.group_size, end = row + kSegmentRows < rows ? row + kSegmentRows : rows;
  const PlanKeys keys = keys_seen(p, r, row / p.group_size, (end - 1) / p.group_size);
  const int64_t begin = keys.begin / unit_keys;
  return {static_cast<int32_t>(begin), static_cast<int32_t>((keys.end + unit_keys - 1) / unit_keys - begin)};
}

FI_INLINE int32_t tile_class_of(const BatchPlanParams& p, const PlanRequest& r, int64_t q_begin) {
  const int64_t end = q_begin + kTileQueries < r.qo_len ? q_begin + kTileQueries : r.qo_len;
  const PlanKeys keys = keys_seen(p, r, q_begin, end - 1);
  return tile_class(keys.end - keys.begin);
}

FI_INLINE PlanHeader plan_header(const BatchPlanParams& p, int32_t num_segments, int32_t num_units,
                                 int32_t num_tiles) {
  return {num_segments,
          num_units,
          num_tiles,
          static_cast<int32_t>(unit_keys_of(p.fixed_split_size)),
          static_cast<int32_t>(p.batch),
          static_cast<int32_t>(p.nnz_qo),
          static_cast<int32_t>(p.group_size),
          static_cast<int32_t>(p.table.page_size),
          static_cast<int32_t>(p.causal),
          static_cast<int32_t>(p.window_left)};
}

}  // namespace fi

FI_KERNEL(batch_attention, fi::BatchAttentionParams)
FI_KERNEL(batch_attention_plan, fi::BatchPlanParams)
