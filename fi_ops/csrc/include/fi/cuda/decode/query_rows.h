// The query rows of a segment, and the rows that it brings for the cache, on their way into shared memory.
#pragma once

#include "fi/cuda/decode/rope.h"
#include "fi/cuda/decode/rows.h"

namespace fi::cuda::decode {

// Rows of kDim 16-bit elements in 16-byte chunks; the exclusive or spreads a column of chunks over all banks.
template <int kDim>
FI_DEVICE_INLINE int row_chunk_offset(int row, int chunk) {
  return row * kDim * 2 + ((chunk ^ (row & 7)) << 4);
}

// The row, behind the query's, that a new row has there.
FI_DEVICE_INLINE int added_row(const Plan& plan, int i, bool is_value) {
  return kMaxRows + (is_value ? plan.added.count : 0) + i;
}

// The rows of a segment on their way into shared memory through registers: the query's, new keys, new
// values. fetch(), then finish() when other copies are on their way, then store(). Fetched early: behind
// the ring's copies they would wait for all of these.
//
// kFewestThreads: of a block, where shared memory doesn't ask for less. kPlain: as in TensorCores.
template <class T, int kDim, int kFewestThreads, bool kPlain>
class QueryRows {
  static constexpr int kRows = kMaxRows, kChunks = kDim / 8;

 public:
  // By all threads of the block. Waits for nothing, unless single elements are to be rotated.
  FI_DEVICE_INLINE void fetch(const AttentionParams& p, const Plan& plan, const SegmentPlace& at) {
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      items_[n] = {};  // nothing of the segment before is kept in registers
      if (is_used(plan, at, n)) fetch(p, plan, at, threadIdx.x + n * blockDim.x, items_[n]);
    }
  }
  FI_DEVICE_INLINE void finish(const AttentionParams& p, const Plan& plan, const SegmentPlace& at) {
    if (!plan.rope_chunks) return;
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      if (is_used(plan, at, n)) finish(p, plan, at, threadIdx.x + n * blockDim.x, items_[n]);
    }
  }
  // New rows only where there is a table, which gets their slots; `appends`: they go into the cache as
  // well.
  FI_DEVICE_INLINE void store(const AttentionParams& p, const Plan& plan, const SegmentPlace& at,
                              unsigned char* query, RowTable* table = nullptr, bool appends = false) const {
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      if (is_used(plan, at, n))
        put(p, plan, at, threadIdx.x + n * blockDim.x, items_[n], query, table, appends);
    }
    if constexpr (!kPlain) {
      // Where shared memory has room for fewer warps.
#pragma unroll 1
      for (int item = threadIdx.x + kHeld * blockDim.x; item < num_items(plan, at); item += blockDim.x) {
        Item late;
        fetch(p, plan, at, item, late);
        if (plan.rope_chunks) finish(p, plan, at, item, late);
        put(p, plan, at, item, late, query, table, appends);
      }
    }
#pragma unroll 1
    for (int n = num_rows(plan, at) * kChunks + threadIdx.x; n < kRows * kChunks; n += blockDim.x)
      *reinterpret_cast<uint4*>(query + row_chunk_offset<kDim>(n / kChunks, n % kChunks)) = uint4{0, 0, 0, 0};
  }
  // Whether `threads` hold all that there is: asked for new rows and where kPlain.
  static bool holds_all(const Plan& plan, int threads) {
    return (min_rows(plan.rows) + 2 * plan.added.count) * kChunks <= kHeld * threads;
  }

 private:
  // Chunks a thread; where kPlain no more than few rows need: each is a copy of the code.
  static constexpr int kMost = kRows * kChunks / kFewestThreads, kHeld = kPlain && kMost > 2 ? 2 : kMost;

  struct Item {
    uint4 chunk = {0, 0, 0, 0};
    RopeChunk<T> rope;  // from fetch() to finish()
    int slot = -1;      // in the cache, of a new row
  };

  FI_HD static int min_rows(int rows) { return rows < kRows ? rows : kRows; }
  FI_DEVICE_INLINE static int num_rows(const Plan& plan, const SegmentPlace& at) {
    return min_rows(plan.rows - at.row_begin);
  }
  FI_DEVICE_INLINE static int num_items(const Plan& plan, const SegmentPlace& at) {
    return (num_rows(plan, at) + 2 * plan.added.count) * kChunks;
  }
  // The same for all threads, so that code without use is not even fetched.
  FI_DEVICE_INLINE static bool is_used(const Plan& plan, const SegmentPlace& at, int n) {
    return n == 0 || n * static_cast<int>(blockDim.x) < num_items(plan, at);
  }

  // A chunk of a row: of a query row, or of new row `added`, a key or a value.
  struct Place {
    int row, column, added;
    bool is_value;
  };
  FI_DEVICE_INLINE static Place place_of(const Plan& plan, const SegmentPlace& at, int item) {
    const int row = item / kChunks, added = row - num_rows(plan, at);
    const bool is_value = added >= plan.added.count;
    return {row, item % kChunks * 8, is_value ? added - plan.added.count : added, is_value};
  }
  FI_DEVICE_INLINE static bool rotates(const AttentionParams& p, const Place& place) {
    return place.column < p.rope.rotary_dim && !place.is_value;
  }

  FI_DEVICE_INLINE static void fetch(const AttentionParams& p, const Plan& plan, const SegmentPlace& at,
                                     int number, Item& item) {
    if (number >= num_items(plan, at)) return;
    const Place place = place_of(plan, at, number);
    int64_t begin, table_row = place.added;
    const void* rows;
    if (place.added < 0) {
      const QueryRow q = query_row(plan, at, place.row);
      rows = p.query, begin = at.b * p.q_stride_b + q.head * p.q_stride_h + q.i * p.q_stride_n;
      table_row = q.i + p.rope_q_offset;
    } else if (place.is_value) {
      const NewRows& v = plan.added;
      rows = v.value, begin = at.b * v.v_stride_b + at.kv_head * v.v_stride_h + place.added * v.v_stride_n;
    } else {
      const NewRows& k = plan.added;
      rows = k.key, begin = at.b * k.k_stride_b + at.kv_head * k.k_stride_h + place.added * k.k_stride_n;
    }
    if (place.added >= 0) {
      const int64_t slot = plan.added.slots.at(at.b, place.added);
      if (slot >= 0 && slot < p.kv_len) item.slot = static_cast<int>(slot);  // not checked by default
    }
    if (place.column >= (place.is_value ? p.head_dim_vo : p.head_dim_qk)) return;
    const T* src = static_cast<const T*>(rows) + begin;
    if (!kPlain && p.rope.cos && !plan.rope_chunks) {
      item.chunk = load_rotated(p, at.b, table_row, src, place.column);
      return;
    }
    item.chunk = load_16(src + place.column);
    if (plan.rope_chunks && rotates(p, place)) item.rope.fetch(p.rope, at.b, table_row, src, place.column);
  }
  FI_DEVICE_INLINE static void finish(const AttentionParams& p, const Plan& plan, const SegmentPlace& at,
                                      int number, Item& item) {
    const Place place = place_of(plan, at, number);
    if (number < num_items(plan, at) && rotates(p, place))
      item.chunk = item.rope.rotate(p.rope, item.chunk, place.column);
  }
  FI_DEVICE_INLINE static void put(const AttentionParams& p, const Plan& plan, const SegmentPlace& at,
                                   int number, const Item& item, unsigned char* query, RowTable* table,
                                   bool appends) {
    if (number >= num_items(plan, at)) return;
    const Place place = place_of(plan, at, number);
    const int row = place.added < 0 ? place.row : added_row(plan, place.added, place.is_value);
    *reinterpret_cast<uint4*>(query + row_chunk_offset<kDim>(row, place.column / 8)) = item.chunk;
    if (place.added < 0 || table == nullptr) return;
    if (place.column == 0 && !place.is_value) table->slot[place.added] = item.slot;
    if (!appends || item.slot < 0) return;
    // const only for all other code: this is where the call's cache is written.
    const auto write = [&](const void* cache, int64_t begin, int64_t dim) {
      if (place.column < dim)
        store_16(static_cast<T*>(const_cast<void*>(cache)) + begin + place.column, item.chunk);
    };
    if (place.is_value) {
      write(p.value, at.b * p.v_stride_b + at.kv_head * p.v_stride_h + item.slot * p.v_stride_n,
            p.head_dim_vo);
    } else {
      write(p.key, at.b * p.k_stride_b + at.kv_head * p.k_stride_h + item.slot * p.k_stride_n, p.head_dim_qk);
    }
  }
  FI_DEVICE_NOINLINE static uint4 load_rotated(const AttentionParams& p, int b, int64_t row, const T* src,
                                               int column) {
    uint32_t words[4] = {};
#pragma unroll 1
    for (int e = 0; e < 8; ++e) {
      const uint32_t next = rotated(p.rope, b, row, src, column + e).bits;
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = words[w] >> 16 | (w < 3 ? words[w < 3 ? w + 1 : w] : next) << 16;
    }
    return uint4{words[0], words[1], words[2], words[3]};
  }

  Item items_[kHeld];
};

}  // namespace fi::cuda::decode
