// What attention over a batch reads and writes: requests of any lengths, rows of K and V in pages or ragged,
// masks of bits. The loop (attention_loop.h) asks it what it asks a dense batch (dense_source.h).
#pragma once

#include "fi/batch_attention.h"
#include "fi/cpu/dense_source.h"
#include "fi/cpu/mask_bits.h"

namespace fi::FI_ISA {

template <class T>
class BatchSource {
 public:
  using Rows = PointerRows<T>;
  static constexpr bool kUneven = true;

  // Of the batch's requests those that are added.
  BatchSource(const BatchAttentionParams& params) : p(params), c(params.call) {
    requests = allocate<Request>(c.scratch, c.batch);
  }

  void add(const Request& r) {
    requests[size++] = r;
    longest_qo = r.qo_len > longest_qo ? r.qo_len : longest_qo;
    longest_kv = r.kv_len > longest_kv ? r.kv_len : longest_kv;
  }

  // Most work first, in classes; in the order of the batch within one.
  void sort() {
    int64_t first[kTileClasses + 1] = {};
    auto place = [](const Request& r) { return kTileClasses - 1 - tile_class(r.qo_len * r.kv_len); };
    for (int64_t n = 0; n < size; ++n) ++first[place(requests[n]) + 1];
    for (int32_t n = 0; n < kTileClasses; ++n) first[n + 1] += first[n];
    Request* sorted = allocate<Request>(c.scratch, size);
    for (int64_t n = 0; n < size; ++n) sorted[first[place(requests[n])]++] = requests[n];
    requests = sorted;
  }

  int64_t count() const { return size; }
  const Request& request(int64_t b) const { return requests[b]; }
  int64_t qo_len(int64_t b) const { return requests[b].qo_len; }
  int64_t kv_len(int64_t b) const { return requests[b].kv_len; }
  int64_t max_qo_len() const { return longest_qo; }
  int64_t max_kv_len() const { return longest_kv; }
  int64_t split_keys() const { return p.fixed_split_size; }
  Fp8 kv_dtype() const { return p.kv_dtype; }
  float k_scale(int64_t kv_head) const { return p.k_scale ? p.k_scale.at(kv_head) : 1.0f; }
  float v_scale(int64_t kv_head) const { return p.v_scale ? p.v_scale.at(kv_head) : 1.0f; }

  const T* query(int64_t b, int64_t h, int64_t i) const {
    return static_cast<const T*>(c.query) + (requests[b].q_begin + i) * c.q_stride_n + h * c.q_stride_h;
  }
  T* out(int64_t b, int64_t h, int64_t i) const {
    return static_cast<T*>(c.out) + (requests[b].q_begin + i) * c.o_stride_n + h * c.o_stride_h;
  }
  float* lse(int64_t b, int64_t h, int64_t i) const {
    return c.lse + (requests[b].q_begin + i) * c.num_qo_heads + h;
  }
  int64_t position(int64_t b, int64_t i) const { return i + requests[b].kv_len - requests[b].qo_len; }
  int64_t rope_row(int64_t b, int64_t i) const { return position(b, i); }

  Range allowed(int64_t b, int64_t i) const { return allowed(b, i, i + 1); }
  // Positions ascend: the first row sees the first key, the last row the last.
  Range allowed(int64_t b, int64_t i0, int64_t i1) const {
    Range r{0, requests[b].kv_len};
    if (c.window_left >= 0 && position(b, i0) > c.window_left) r.begin = position(b, i0) - c.window_left;
    if (c.causal && position(b, i1 - 1) + 1 < r.end) r.end = position(b, i1 - 1) + 1;
    return r.begin < r.end ? r : Range{0, 0};
  }

  // ---- rows of K and V ----

  bool heads_together() const { return c.k_stride_h == c.head_dim_qk && c.v_stride_h == c.head_dim_vo; }

  struct TileRows {
    const char **key, **value;
    int64_t tile;
    Rows keys, values;

    void carve(Carver& carver, int64_t tile_size) {
      tile = tile_size + 1;  // pairs of rows are prefetched
      key = carver.take<const char*>(tile);
      value = carver.take<const char*>(tile);
      keys = {key}, values = {value};
    }
  };

  // The index tensors' values have been checked: on the CPU there is a row for every key. Rows lie anywhere:
  // their first bytes are fetched now, a tile ahead, and with those the way to the page of memory; the rest
  // when the tile is next.
  void locate(TileRows& rows, int64_t b, int64_t kv_head, int64_t begin, int64_t n) const {
    const int64_t element = p.kv_dtype == Fp8::none ? sizeof(T) : 1;
    const int64_t k_step = c.k_stride_n * element, v_step = c.v_stride_n * element;
    for (int64_t j = 0; j < n;) {
      const PageEntry at = key_entry(p, requests[b], begin + j);
      const char* k =
          static_cast<const char*>(c.key) +
          (at.page * p.k_stride_page + at.entry * c.k_stride_n + kv_head * c.k_stride_h) * element;
      const char* v =
          static_cast<const char*>(c.value) +
          (at.page * p.v_stride_page + at.entry * c.v_stride_n + kv_head * c.v_stride_h) * element;
      const int64_t left = p.is_paged() ? j + p.table.page_size - at.entry : n, end = left < n ? left : n;
      for (; j < end; ++j, k += k_step, v += v_step) {
        rows.key[j] = k;
        rows.value[j] = v;
        __builtin_prefetch(k);
        __builtin_prefetch(v);
      }
    }
    for (int64_t j = n; j < rows.tile; ++j) rows.key[j] = rows.key[n - 1], rows.value[j] = rows.value[n - 1];
  }

  struct BufferRows {
    Rows rows;

    void carve(Carver& carver, int64_t tile, const T* buffer, int64_t row_size) {
      const char** pointers = carver.take<const char*>(tile + 1);
      if (carver.base) {
        for (int64_t j = 0; j <= tile; ++j)
          pointers[j] = reinterpret_cast<const char*>(buffer + (j < tile ? j : 0) * row_size);
      }
      rows = {pointers};
    }
  };

  // ---- what to read ----

  void prepare(const Tiling& t) { tiling = t; }

  int64_t live_tiles(const Block&, const Range& range) const {
    return ceil_div(range.end, tiling.tile) - range.begin / tiling.tile;
  }

  int32_t live_tile(const Block&, const Range& range, int64_t n) const {
    return tile_entry(range.begin / tiling.tile + n, !p.custom_mask);
  }

  Range narrow(const Block& k, Range r, bool, bool& masked) const {
    if (!masked) return r;
    const BitSummary s = summarize(k.b, k.i_begin, k.i_end, r);
    masked = !s.all;
    return s.any ? r : Range{r.begin, r.begin};
  }

  bool mark_wanted(int64_t b, uint8_t* wanted) const {
    if (!p.custom_mask) return false;
    const int64_t num_tiles = ceil_div(kv_len(b), tiling.tile);
    for (int64_t t = 0; t < num_tiles; ++t) {
      const int64_t end = (t + 1) * tiling.tile;
      const Range r{t * tiling.tile, end < kv_len(b) ? end : kv_len(b)};
      bool any = false;
      for (int64_t i = 0; i < qo_len(b) && !any; ++i) any = summarize(b, i, i + 1, r).any;
      for (int64_t h = 0; h < c.num_kv_heads; ++h) wanted[h * num_tiles + t] = any;
    }
    return true;
  }

  bool mask_differs_by_head() const { return false; }
  bool mask_differs_by_query() const { return true; }

  void stage(float* dst, int64_t b, int64_t, int64_t i, int64_t begin, int64_t n) const {
    stage_bits(dst, bits(b), i * kv_len(b) + begin, n);
  }

 private:
  MaskBits bits(int64_t b) const {
    return {p.custom_mask + requests[b].mask_begin, p.mask_bytes - requests[b].mask_begin};
  }

  BitSummary summarize(int64_t b, int64_t i0, int64_t i1, const Range& r) const {
    BitSummary s{false, true};
    for (int64_t i = i0; i < i1 && (s.all || !s.any); ++i) {
      const BitSummary row = summarize_bits(bits(b), i * kv_len(b) + r.begin, r.end - r.begin);
      s.any = s.any || row.any;
      s.all = s.all && row.all;
    }
    return s;
  }

  const BatchAttentionParams& p;
  const AttentionParams& c;
  Request* requests;  // [size]
  int64_t size = 0, longest_qo = 0, longest_kv = 0;
  Tiling tiling{};
};

}  // namespace fi::FI_ISA
