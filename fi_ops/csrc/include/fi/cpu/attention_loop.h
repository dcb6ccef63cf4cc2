// The attention main loop, for all dtypes, engines and variants.
//
// Head-query fusion: the rows of a block are the query heads of one KV group x query positions (row =
// position * group + head), so each row of K and V is read once for its whole group. One task is one block
// against one chunk of its live KV tiles; blocks whose tiles were split into several chunks are merged in
// chunk order afterwards. What is split follows from shapes and mask alone, so results don't depend on the
// number of threads.
#pragma once

#include "fi/attention.h"
#include "fi/cpu/attention_engine.h"
#include "fi/cpu/live_tiles.h"
#include "fi/cpu/online_softmax.h"
#include "fi/cpu/rope_table.h"

namespace fi::FI_ISA {

// Enough tasks to keep many threads busy and even out causal blocks; more would only add merging, and cold
// starts: the first tile of a chunk is not prefetched.
inline constexpr int64_t kTargetTasks = 48;

// Partial states up to this many floats are merged by the calling thread: a second wake-up of all threads
// costs more.
inline constexpr int64_t kMergeAlone = 131072;

// Hands out pieces of one allocation, each 64-byte aligned; with base null it only adds up the size.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class E>
  E* take(int64_t count) {
    E* p = base ? reinterpret_cast<E*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(E)), 64);
    return p;
  }
};

template <class E>
FI_INLINE E* allocate(const AttentionParams& p, int64_t count) {
  return static_cast<E*>(
      p.scratch.allocate(p.scratch.context, round_up(count * int64_t(sizeof(E)), 64) + 64));
}

template <class T, class Engine>
class AttentionCall {
 public:
  using Query = typename Engine::Query;
  using Weight = typename Engine::Weight;

  AttentionCall(const AttentionParams& params, const Parallel& parallel) : p(params), parallel(parallel) {
    group = p.num_qo_heads / p.num_kv_heads;
    rows = group * p.qo_len;
    block_rows = Engine::block_rows(rows);
    pass_rows = block_rows < Engine::kPassRows ? block_rows : Engine::kPassRows;
    num_blocks = ceil_div(rows, block_rows);
    const int64_t widest = p.head_dim_qk > p.head_dim_vo ? p.head_dim_qk : p.head_dim_vo;
    tile = Engine::tile(widest, p.kv_len);
    num_tiles = ceil_div(p.kv_len, tile);
    depth = round_up(p.head_dim_qk, Engine::kStepDepth);
    q_stride = depth + (Engine::kPacked ? 64 / int64_t(sizeof(Query))
                                        : 0);  // off powers of two: no cache set conflicts
    s_stride = round_up(tile, Engine::kStepCols) + 16;
    o_stride = round_up(p.head_dim_vo, 2 * kLanes) + (Engine::kPacked ? 16 : 0);
    k_tile_size = round_up(tile, kLanes) * depth;
    v_tile_size = tile * round_up(p.head_dim_vo, kLanes);
    pack_once = Engine::kPacked && num_blocks > 1;
  }

  void run() {
    if (p.mask) scan_mask();
    split();
    if (pack_once) pack_all();
    for_each_task_on_workers(num_tasks, [this](int64_t task, Worker& w) { attend(task, w); });
    if (partials) merge();
  }

 private:
  struct Task {
    int64_t block;  // (b * num_kv_heads + kv_head) * num_blocks + block of rows
    int64_t chunk, num_chunks;
  };

  // Buffers of one thread.
  struct Worker {
    Query* q;         // [block_rows][q_stride]
    float* s;         // [pass_rows][s_stride]: logits, then weights
    float* acc;       // [block_rows][o_stride]
    float* row_max;   // [block_rows]
    float* row_sum;   // [block_rows]
    Range* allowed;   // [block_rows]
    Range* seen;      // [pass_rows]: the columns of s that hold visible keys
    float* additive;  // [tile]: one row of the mask
    T* k_rows;        // [tile][head_dim_qk]: rotated keys
    T* row;           // [head_dim_qk]
    Query* k_pack;    // one packed tile, where K and V are not packed once for all blocks
    Query* v_pack;
    float* angles;  // of one position

    int64_t carve(char* base, const AttentionCall& c) {
      Carver carver{base};
      q = carver.take<Query>(c.block_rows * c.q_stride);
      s = carver.take<float>(c.pass_rows * c.s_stride);
      acc = carver.take<float>(c.block_rows * c.o_stride);
      row_max = carver.take<float>(c.block_rows);
      row_sum = carver.take<float>(c.block_rows);
      allowed = carver.take<Range>(c.block_rows);
      seen = carver.take<Range>(c.pass_rows);
      additive = carver.take<float>(c.s_stride);
      k_rows = carver.take<T>(c.p.rope_keys ? c.tile * c.p.head_dim_qk : 0);
      row = carver.take<T>(c.p.head_dim_qk);
      k_pack = carver.take<Query>(Engine::kPacked ? c.k_tile_size : 0);
      v_pack = carver.take<Query>(Engine::kPacked ? c.v_tile_size : 0);
      angles = carver.take<float>(rope_angle_floats(c.p.rope.rotary_dim));
      return carver.used;
    }
  };

  // The coordinates of a block.
  struct Block {
    int64_t b, kv_head, index, row_begin, row_end, i_begin, i_end;
  };

  Block block_of(int64_t block) const {
    Block k;
    k.index = block % num_blocks;
    k.kv_head = block / num_blocks % p.num_kv_heads;
    k.b = block / num_blocks / p.num_kv_heads;
    k.row_begin = k.index * block_rows;
    k.row_end = k.row_begin + block_rows < rows ? k.row_begin + block_rows : rows;
    k.i_begin = k.row_begin / group;
    k.i_end = (k.row_end - 1) / group + 1;
    return k;
  }

  template <class F>
  void for_each_task_on_workers(int64_t count, const F& f) {
    const int64_t workers = parallel.num_threads < count ? parallel.num_threads : count;
    if (workers <= 0) return;
    Worker sizes;
    const int64_t bytes = sizes.carve(nullptr, *this);
    char* memory = allocate<char>(p, bytes * workers);
    struct Context {
      AttentionCall* call;
      const F* f;
      char* memory;
      int64_t bytes, count;
      std::atomic<int64_t> next;
    } context{this, &f, memory, bytes, count, {0}};
    auto body = [](int64_t index, void* pointer) {
      auto* c = static_cast<Context*>(pointer);
      Worker w;
      w.carve(c->memory + index * c->bytes, *c->call);
      Engine::begin();
      for (;;) {
        const int64_t task = c->next.fetch_add(1, std::memory_order_relaxed);
        if (task >= c->count) break;
        (*c->f)(task, w);
      }
      Engine::end();
    };
    if (workers == 1) {
      body(0, &context);
    } else {
      parallel.launch(workers, body, &context);
    }
  }

  // ---- what to read ----

  int64_t list_of(const Block& k) const {
    return ((mask_batches == 1 ? 0 : k.b) * mask_heads + (mask_heads == 1 ? 0 : k.kv_head)) * num_blocks +
           k.index;
  }

  void scan_mask() {
    mask_batches = p.mask_stride_b == 0 && !keys_differ_by_batch(p) ? 1 : p.batch;
    mask_heads = p.mask_stride_h == 0 ? 1 : p.num_kv_heads;
    const int64_t num_lists = mask_batches * mask_heads * num_blocks;
    lists = allocate<int32_t>(p, num_lists * num_tiles);
    list_sizes = allocate<int64_t>(p, num_lists);
    float* tops = allocate<float>(p, num_lists * num_tiles);
    for_each_task(parallel, num_lists, [&](int64_t n) {
      Block k = block_of(n % num_blocks);
      k.kv_head = n / num_blocks % mask_heads;
      k.b = n / num_blocks / mask_heads;
      list_sizes[n] = list_live_tiles(p, k.b, k.kv_head * group, (k.kv_head + 1) * group, k.i_begin, k.i_end,
                                      tile, lists + n * num_tiles, tops + n * num_tiles);
    });
  }

  int64_t live_tiles(const Block& k) const {
    if (p.mask) return list_sizes[list_of(k)];
    const Range r = allowed_keys(p, k.b, k.i_begin, k.i_end);
    return ceil_div(r.end, tile) - r.begin / tile;
  }

  // Entry n of the block's live tiles; `range` is allowed_keys of the block.
  int32_t live_tile(const Block& k, const Range& range, int64_t n) const {
    if (p.mask) return lists[list_of(k) * num_tiles + n];
    return tile_entry(range.begin / tile + n, true);
  }

  // Cuts blocks into tasks. Late blocks of a causal call are the long ones: they go first.
  void split() {
    const int64_t total_blocks = p.batch * p.num_kv_heads * num_blocks;
    int64_t* sizes = allocate<int64_t>(p, total_blocks);
    int64_t total = 0;
    for (int64_t n = 0; n < total_blocks; ++n) total += sizes[n] = live_tiles(block_of(n));
    chunk_tiles = ceil_div(total, kTargetTasks);
    if (chunk_tiles < Engine::kMinChunkTiles) chunk_tiles = Engine::kMinChunkTiles;
    if (total_blocks >= kTargetTasks) chunk_tiles = num_tiles > 0 ? num_tiles : 1;
    auto chunks = [&](int64_t n) { return sizes[n] > chunk_tiles ? ceil_div(sizes[n], chunk_tiles) : 1; };
    num_tasks = 0;
    for (int64_t n = 0; n < total_blocks; ++n) num_tasks += chunks(n);
    tasks = allocate<Task>(p, num_tasks);
    int64_t t = 0;
    for (int64_t head = 0; head < p.batch * p.num_kv_heads; ++head) {
      for (int64_t i = num_blocks - 1; i >= 0; --i) {
        const int64_t n = head * num_blocks + i;
        for (int64_t c = 0, count = chunks(n); c < count; ++c) tasks[t++] = {n, c, count};
      }
    }
    if (num_tasks > total_blocks) partials = allocate<float>(p, num_tasks * block_rows * partial_stride());
  }

  // A partial row: acc, max, sum.
  int64_t partial_stride() const { return round_up(p.head_dim_vo, kLanes) + kLanes; }

  // ---- K and V ----

  const T* key_rows(int64_t b, int64_t kv_head, int64_t row) const {
    return static_cast<const T*>(p.key) + b * p.k_stride_b + kv_head * p.k_stride_h + row * p.k_stride_n;
  }
  const T* value_rows(int64_t b, int64_t kv_head, int64_t row) const {
    return static_cast<const T*>(p.value) + b * p.v_stride_b + kv_head * p.v_stride_h + row * p.v_stride_n;
  }

  struct KeyRows {
    const T* rows;
    int64_t stride;
  };

  // n keys from `row` on, rotated into the worker's buffer where the call asks for it.
  KeyRows load_keys(int64_t b, int64_t kv_head, int64_t row, int64_t n, Worker& w) const {
    const T* rows = key_rows(b, kv_head, row);
    if (!p.rope_keys) return {rows, p.k_stride_n};
    for (int64_t j = 0; j < n; ++j) {
      const RopeAngles angles = rope_angles(p.rope, b, row + j, w.angles);
      rotate_row(rows + j * p.k_stride_n, w.k_rows + j * p.head_dim_qk, angles, p.rope.rotary_dim,
                 p.head_dim_qk, p.rope.interleaved);
    }
    return {w.k_rows, p.head_dim_qk};
  }

  // Packs keys and values [row, row + n) of a tile; the rest of the tile's V is 0, so that 0 weights meet no
  // garbage.
  void pack_tile(int64_t b, int64_t kv_head, int64_t row, int64_t n, Query* k_pack, Query* v_pack,
                 Worker& w) const {
    if constexpr (Engine::kPacked) {
      using Unit = typename Engine::Unit;
      const KeyRows keys = load_keys(b, kv_head, row, n, w);
      pack_keys<Unit>(k_pack, keys.rows, keys.stride, n, p.head_dim_qk, depth);
      pack_values<Unit>(v_pack, value_rows(b, kv_head, row), p.v_stride_n, n, p.head_dim_vo,
                        round_up(n, Engine::kStepCols) < tile ? round_up(n, Engine::kStepCols) : tile,
                        tile * kLanes);
    }
  }

  void pack_all() {
    const int64_t heads = p.batch * p.num_kv_heads;
    k_packed = allocate<Query>(p, heads * num_tiles * k_tile_size);
    v_packed = allocate<Query>(p, heads * num_tiles * v_tile_size);
    uint8_t* wanted = nullptr;  // [heads][num_tiles], where a mask decides
    if (p.mask) {
      wanted = allocate<uint8_t>(p, heads * num_tiles);
      __builtin_memset(wanted, 0, heads * num_tiles);
      for (int64_t n = 0; n < heads * num_blocks; ++n) {
        const int64_t list = list_of(block_of(n));
        for (int64_t t = 0; t < list_sizes[list]; ++t) {
          wanted[n / num_blocks * num_tiles + tile_index(lists[list * num_tiles + t])] = 1;
        }
      }
    }
    for_each_task_on_workers(heads * num_tiles, [&](int64_t task, Worker& w) {
      const int64_t head = task / num_tiles, t = task % num_tiles;
      const int64_t b = head / p.num_kv_heads, kv_head = head % p.num_kv_heads;
      const Range range = allowed_keys(p, b, 0, p.qo_len);
      const int64_t end = (t + 1) * tile < range.end ? (t + 1) * tile : range.end;
      if (wanted ? !wanted[task] : t < range.begin / tile || t * tile >= end) return;
      pack_tile(b, kv_head, t * tile, end - t * tile, k_packed + task * k_tile_size,
                v_packed + task * v_tile_size, w);
    });
  }

  // ---- one task ----

  void load_queries(const Block& k, Worker& w) const {
    const int64_t size = p.head_dim_qk;
    int64_t angles_of = -1;
    RopeAngles angles{};
    for (int64_t r = k.row_begin; r < k.row_end; ++r) {
      const int64_t i = r / group, h = k.kv_head * group + r % group;
      const T* src =
          static_cast<const T*>(p.query) + k.b * p.q_stride_b + h * p.q_stride_h + i * p.q_stride_n;
      if (p.rope.cos) {
        if (angles_of != i) angles = rope_angles(p.rope, k.b, i + p.rope_q_offset, w.angles);
        angles_of = i;
        rotate_row(src, w.row, angles, p.rope.rotary_dim, size, p.rope.interleaved);
        src = w.row;
      }
      Query* dst = w.q + (r - k.row_begin) * q_stride;
      if constexpr (__is_same(Query, T)) {
        __builtin_memcpy(dst, src, size * sizeof(T));
      } else {
        int64_t d = 0;
        for (; d + kLanes <= size; d += kLanes) store(dst + d, load(src + d));
        for (; d < size; ++d) dst[d] = to_float(src[d]);
      }
      for (int64_t d = size; d < depth; ++d) dst[d] = Query{};
    }
    for (int64_t r = k.row_end - k.row_begin; r < padded_rows(k); ++r) {
      for (int64_t d = 0; d < depth; ++d) w.q[r * q_stride + d] = Query{};
    }
  }

  int64_t padded_rows(const Block& k) const { return round_up(k.row_end - k.row_begin, Engine::kStepRows); }

  // Narrows [begin, end) to the first and last key that a bool mask shows to any row of the block: the edge
  // of a static cache's live part is not read past, whatever lies there.
  Range trim(const Block& k, Range r) const {
    auto shown = [&](int64_t j) {
      const int64_t heads = p.mask_stride_h == 0 ? 1 : group,
                    i_end = p.mask_stride_q == 0 ? k.i_begin + 1 : k.i_end;
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = k.i_begin; i < i_end; ++i) {
          if (static_cast<const uint8_t*>(
                  p.mask)[k.b * p.mask_stride_b + (k.kv_head * group + h) * p.mask_stride_h +
                          i * p.mask_stride_q + j * p.mask_stride_k]) {
            return true;
          }
        }
      }
      return false;
    };
    while (r.begin < r.end && !shown(r.begin)) ++r.begin;
    while (r.begin < r.end && !shown(r.end - 1)) --r.end;
    return r;
  }

  void attend(int64_t task_index, Worker& w) {
    const Task& task = tasks[task_index];
    const Block k = block_of(task.block);
    const int64_t m = k.row_end - k.row_begin;
    load_queries(k, w);
    for (int64_t r = 0; r < m; ++r) {
      w.row_max[r] = -kInf;
      w.row_sum[r] = 0.0f;
      w.allowed[r] = allowed_keys(p, k.b, (k.row_begin + r) / group);
    }
    const Range range = allowed_keys(p, k.b, k.i_begin, k.i_end);
    const int64_t live = live_tiles(k);
    const int64_t first = task.num_chunks == 1 ? 0 : task.chunk * chunk_tiles;
    const int64_t last = task.num_chunks == 1 || first + chunk_tiles > live ? live : first + chunk_tiles;
    __builtin_memset(w.acc, 0, padded_rows(k) * o_stride * sizeof(float));
    for (int64_t n = first; n < last; ++n) {
      const int32_t entry = live_tile(k, range, n);
      const int64_t tile_begin = tile_index(entry) * tile;
      Range r{tile_begin > range.begin ? tile_begin : range.begin,
              tile_begin + tile < range.end ? tile_begin + tile : range.end};
      const bool masked = p.mask && !tile_open(entry);
      if (!Engine::kPacked && masked && p.mask_dtype == DType::boolean) r = trim(k, r);
      r.begin = tile_begin + (r.begin - tile_begin) / Engine::kStart * Engine::kStart;
      if (r.begin >= r.end) continue;
      const int64_t next = n + 1 < last ? tile_index(live_tile(k, range, n + 1)) * tile : -1;
      attend_tile(k, r, tile_begin, masked, next, w);
    }
    task.num_chunks == 1 ? write_rows(k, w) : write_partial(task_index, m, w);
  }

  // Keys [r.begin, r.end) of one tile: products, softmax, weighted values. `next` is the first key of the
  // tile after it.
  void attend_tile(const Block& k, Range r, int64_t tile_begin, bool masked, int64_t next, Worker& w) {
    const int64_t m = k.row_end - k.row_begin;
    if constexpr (Engine::kPacked) {
      const int64_t at = (k.b * p.num_kv_heads + k.kv_head) * num_tiles + tile_begin / tile;
      const Query* k_pack = pack_once ? k_packed + at * k_tile_size : w.k_pack;
      const Query* v_pack = pack_once ? v_packed + at * v_tile_size : w.v_pack;
      if (!pack_once) pack_tile(k.b, k.kv_head, tile_begin, r.end - tile_begin, w.k_pack, w.v_pack, w);
      for (int64_t row = 0; row < m; row += pass_rows) {
        attend_pass(k, {row, row + pass_rows < m ? row + pass_rows : m}, r, tile_begin, masked, k_pack,
                    v_pack, w);
      }
    } else {
      const int64_t n = r.end - r.begin;
      const KeyRows keys = load_keys(k.b, k.kv_head, r.begin, n, w);
      const T* values = value_rows(k.b, k.kv_head, r.begin);
      stream_scores<T>(w.s, s_stride, w.q, q_stride, m, keys.rows, keys.stride, n, p.head_dim_qk, values,
                       p.v_stride_n, p.head_dim_vo);
      softmax_rows(k, {0, m}, r, masked, w);
      const T* next_keys = next >= 0 ? key_rows(k.b, k.kv_head, next) : nullptr;
      stream_values(w.acc, o_stride, reinterpret_cast<const Weight*>(w.s),
                    s_stride * int64_t(sizeof(float) / sizeof(Weight)), m, values, p.v_stride_n, n,
                    p.head_dim_vo, next_keys, p.k_stride_n, p.head_dim_qk);
    }
  }

  // Some rows of a block against a packed tile.
  void attend_pass(const Block& k, Range rows, Range r, int64_t tile_begin, bool masked, const Query* k_pack,
                   const Query* v_pack, Worker& w) {
    using Unit = typename Engine::Unit;
    Range visible{r.end, r.begin};  // the union over the rows
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const Range allowed = w.allowed[row];
      if (allowed.begin >= allowed.end) continue;
      if (allowed.begin < visible.begin) visible.begin = allowed.begin;
      if (allowed.end > visible.end) visible.end = allowed.end;
    }
    if (visible.begin > r.begin)
      r.begin = tile_begin + (visible.begin - tile_begin) / Engine::kStart * Engine::kStart;
    if (visible.end < r.end) r.end = visible.end;
    if (r.begin >= r.end) return;
    const int64_t n = r.end - r.begin, skip = r.begin - tile_begin;
    const int64_t m = round_up(rows.end - rows.begin, Engine::kStepRows);
    Unit::gemm(w.q + rows.begin * q_stride, q_stride, k_pack + skip * depth, depth * kLanes, w.s, s_stride, m,
               ceil_div(n, kLanes), depth, false);
    softmax_rows(k, rows, r, masked, w);
    Unit::gemm(reinterpret_cast<const Weight*>(w.s), s_stride * int64_t(sizeof(float) / sizeof(Weight)),
               v_pack + skip * kLanes, tile * kLanes, w.acc + rows.begin * o_stride, o_stride, m,
               ceil_div(p.head_dim_vo, kLanes), round_up(n, Unit::kStepK), true);
  }

  // Products in w.s of rows of the block and keys [r.begin, r.end) to weights; moves the running maxima and
  // sums and rescales what has been accumulated. All maxima first: the exponentials of a row wait for its
  // maximum, and would fill the processor's scheduler while they do.
  void softmax_rows(const Block& k, Range rows, Range r, bool masked, Worker& w) {
    // Nothing but a positive scale: it joins the exponent's FMA instead of taking a pass of its own.
    const bool plain = !masked && p.logits_soft_cap == 0.0f && !p.alibi_slopes && p.scale > 0.0f;
    const float scale2 = plain ? p.scale * kLog2e : 1.0f;
    const int64_t n = r.end - r.begin, cols = round_up(n, Engine::kStepCols);
    if (!plain) apply_variants(k, rows, r, masked, w);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* s = w.s + (row - rows.begin) * s_stride;
      const Range allowed = w.allowed[row];
      const Range seen = visible_columns(s, cols, allowed.begin > r.begin ? allowed.begin - r.begin : 0,
                                         allowed.end < r.end ? allowed.end - r.begin : n);
      w.seen[row - rows.begin] = seen;
      const float rescale = raise_max(s + seen.begin, seen.end - seen.begin, scale2, w.row_max[row]);
      if (rescale == 1.0f || w.row_sum[row] == 0.0f) continue;
      w.row_sum[row] *= rescale;
      float* acc = w.acc + row * o_stride;
      for (int64_t d = 0; d < p.head_dim_vo; d += kLanes) store(acc + d, load(acc + d) * rescale);
    }
    constexpr bool kMayRound = __is_same(Weight, bf16);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* s = w.s + (row - rows.begin) * s_stride;
      Weight* weights = reinterpret_cast<Weight*>(s);
      const Range seen = w.seen[row - rows.begin];
      const int64_t width = seen.end - seen.begin;
      w.row_sum[row] +=
          kMayRound && !p.lse
              ? weigh_row<kMayRound>(s + seen.begin, weights + seen.begin, width, scale2, w.row_max[row])
              : weigh_row<false>(s + seen.begin, weights + seen.begin, width, scale2, w.row_max[row]);
      for (int64_t j = 0; j < seen.begin; ++j) weights[j] = Weight{};
      for (int64_t j = seen.end; j < cols; ++j) weights[j] = Weight{};
    }
  }

  // Products to logits, base 2, where more than a scale lies between them.
  void apply_variants(const Block& k, Range rows, Range r, bool masked, Worker& w) {
    const int64_t n = r.end - r.begin;
    int64_t staged_i = -1, staged_h = -1;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t i = (k.row_begin + row) / group, h = k.kv_head * group + (k.row_begin + row) % group;
      const int64_t mask_i = p.mask_stride_q == 0 ? 0 : i, mask_h = p.mask_stride_h == 0 ? 0 : h;
      if (masked && (mask_i != staged_i || mask_h != staged_h)) {
        stage_mask(w.additive, p, k.b, mask_h, mask_i, r.begin, n);
        staged_i = mask_i;
        staged_h = mask_h;
      }
      const RowVariant variant{p.scale, p.logits_soft_cap,
                               p.alibi_slopes ? p.alibi_slopes.at(h) * kLog2e : 0.0f,
                               r.begin - query_position(p, k.b, i), masked ? w.additive : nullptr};
      apply_variant(w.s + (row - rows.begin) * s_stride, round_up(n, kLanes), variant);
    }
  }

  // ---- results ----

  void write_row(const Block& k, int64_t row, const float* acc, float row_max, float row_sum) const {
    const int64_t i = row / group, h = k.kv_head * group + row % group;
    T* out = static_cast<T*>(p.out) + k.b * p.o_stride_b + h * p.o_stride_h + i * p.o_stride_n;
    const float lse = finish_row(out, acc, p.head_dim_vo, row_max, row_sum,
                                 p.sinks ? p.sinks.data + h * p.sinks.stride : nullptr);
    if (p.lse) p.lse[(k.b * p.num_qo_heads + h) * p.qo_len + i] = lse;
  }

  void write_rows(const Block& k, const Worker& w) const {
    for (int64_t row = k.row_begin; row < k.row_end; ++row) {
      const int64_t r = row - k.row_begin;
      write_row(k, row, w.acc + r * o_stride, w.row_max[r], w.row_sum[r]);
    }
  }

  void write_partial(int64_t task, int64_t m, const Worker& w) {
    const int64_t width = round_up(p.head_dim_vo, kLanes);
    for (int64_t r = 0; r < m; ++r) {
      float* dst = partials + (task * block_rows + r) * partial_stride();
      __builtin_memcpy(dst, w.acc + r * o_stride, width * sizeof(float));
      dst[width] = w.row_max[r];
      dst[width + 1] = w.row_sum[r];
    }
  }

  // Joins the chunks of each split block, row by row, in chunk order, into the first chunk's partial.
  void merge() {
    const Parallel alone{nullptr, 1};
    const bool small = num_tasks * block_rows * partial_stride() <= kMergeAlone;
    for_each_task(small ? alone : parallel, num_tasks, [this](int64_t t) {
      if (tasks[t].num_chunks == 1 || tasks[t].chunk != 0) return;
      const Block k = block_of(tasks[t].block);
      const int64_t width = round_up(p.head_dim_vo, kLanes), stride = partial_stride();
      for (int64_t row = k.row_begin; row < k.row_end; ++row) {
        float* acc = partials + (t * block_rows + row - k.row_begin) * stride;
        for (int64_t c = 1; c < tasks[t].num_chunks; ++c) {
          const float* other = acc + c * block_rows * stride;
          const float top = acc[width] > other[width] ? acc[width] : other[width];
          const float keep = exp2(set1(acc[width] - usable_max(top)))[0];
          const float add = exp2(set1(other[width] - usable_max(top)))[0];
          for (int64_t d = 0; d < width; d += kLanes)
            store(acc + d, load(acc + d) * keep + load(other + d) * add);
          acc[width + 1] = acc[width + 1] * keep + other[width + 1] * add;
          acc[width] = top;
        }
        write_row(k, row, acc, acc[width], acc[width + 1]);
      }
    });
  }

  const AttentionParams& p;
  const Parallel& parallel;
  int64_t group, rows, block_rows, pass_rows, num_blocks, tile, num_tiles, depth;
  int64_t q_stride, s_stride, o_stride, k_tile_size, v_tile_size;
  bool pack_once;
  int64_t mask_batches = 1, mask_heads = 1;
  int32_t* lists =
      nullptr;  // [mask_batches][mask_heads][num_blocks][num_tiles]: live tiles, where there is a mask
  int64_t* list_sizes = nullptr;  // [mask_batches][mask_heads][num_blocks]
  Task* tasks = nullptr;          // [num_tasks]
  int64_t num_tasks = 0, chunk_tiles = 1;
  float* partials = nullptr;  // [num_tasks][block_rows][partial_stride], where any block is split
  Query* k_packed = nullptr;  // [batch][num_kv_heads][num_tiles][k_tile_size]
  Query* v_packed = nullptr;  // [batch][num_kv_heads][num_tiles][v_tile_size]
};

template <class T, class Unit>
void run_attention(const AttentionParams& p, const Parallel& parallel) {
  if (p.batch == 0 || p.num_qo_heads == 0 || p.qo_len == 0) return;
  if (p.num_qo_heads / p.num_kv_heads * p.qo_len <= Stream<T>::kMaxRows) {
    AttentionCall<T, Stream<T>>(p, parallel).run();
  } else {
    AttentionCall<T, Packed<T, Unit>>(p, parallel).run();
  }
}

}  // namespace fi::FI_ISA
