// The attention main loop, for all dtypes, engines, variants and sources.
//
// Head-query fusion: the rows of a block are the query heads of one KV group x query positions (row =
// position * group + head), so each row of K and V is read once for its whole group. A block's live tiles of
// keys are cut into chunks; what more than one task does, or more than one chunk, is merged in chunk order.
// What is cut where follows from lengths and mask alone, so results don't depend on the number of threads.
#pragma once

#include "fi/cpu/attention_buffers.h"
#include "fi/cpu/fp8_rows.h"
#include "fi/cpu/rope_table.h"

namespace fi::FI_ISA {

// Enough tasks to keep many threads busy and even out causal blocks; more would only add merging, and cold
// starts: the first tile of a chunk is not prefetched.
inline constexpr int64_t kTargetTasks = 48;

// Bytes of partial states, and of K and V packed once a call, up to which a call uses them.
inline constexpr int64_t kMaxPartialBytes = int64_t{1} << 28, kMaxPackedBytes = int64_t{1} << 32;

template <class T, class Engine, class Source>
class AttentionCall : AttentionSizes<T, Engine, Source> {
 public:
  AttentionCall(const AttentionParams& params, Source& source, const Parallel& parallel)
      : Sizes(params, source), p(params), source(source), parallel(parallel) {}

  // What there is to do: phases for run_phases(), first packing(), then attending(), then merge().
  void prepare() {
    source.prepare({group, block_rows, tile});
    members = allocate<Member>(p.scratch, source.count());
    for (int64_t b = 0; b < source.count(); ++b) {
      Member& m = members[b];
      m.rows = group * source.qo_len(b);
      m.num_blocks = ceil_div(m.rows, block_rows);
      m.num_tiles = ceil_div(source.kv_len(b), tile);
      m.packed_at = -1;
    }
    split();
    if constexpr (Engine::kPacked) plan_packing();
  }

  auto packing() {
    return phase(num_packs, [this](int64_t task, Worker& w) { pack_once(packs[task], w); });
  }

  auto attending() {
    return phase(num_tasks, [this](int64_t task, Worker& w) { attend(tasks[task], w); });
  }

  // Joins the chunks of each block that several tasks shared, row by row, in chunk order, into the first one.
  void merge() {
    if (!partials) return;
    const Parallel alone{nullptr, 1};
    const bool small = num_partials * state_floats <= kMergeAlone;
    for_each_task(small ? alone : parallel, num_tasks, [this](int64_t t) {
      const Task& task = tasks[t];
      if (task.partial < 0 || task.first_chunk != 0) return;
      float* states = partials + task.partial * state_floats;
      for_each_head(block_of(task), [&](const Block& k) {
        for (int64_t r = 0; r < k.num_rows(); ++r) {
          float* state = states + (k.at + r) * state_stride;
          for (int64_t chunk = 1; chunk < task.num_chunks; ++chunk)
            join_row(state, state + chunk * state_floats, p.head_dim_vo);
          write_row(k, r, state, state[state_stride - kLanes], state[state_stride - kLanes + 1]);
        }
      });
    });
  }

 private:
  using Sizes = AttentionSizes<T, Engine, Source>;
  using Worker = AttentionWorker<T, Engine, Source>;
  using Query = typename Engine::Query;
  using Weight = typename Engine::Weight;
  using Rows = typename Source::Rows;
  using TileRows = typename Source::TileRows;
  using Sizes::heads, Sizes::group, Sizes::block_rows, Sizes::pass_rows, Sizes::tile, Sizes::depth;
  using Sizes::q_stride, Sizes::s_stride, Sizes::o_stride, Sizes::state_stride, Sizes::state_floats;
  using Sizes::split_keys, Sizes::k_tile_size, Sizes::v_tile_size, Sizes::element, Sizes::k_staged,
      Sizes::v_staged;

  // A request of the source.
  struct Member {
    int64_t rows, num_blocks, num_tiles;
    int64_t packed_at;  // the place of its first tile among those packed once; -1: blocks pack their own
  };

  struct Task {
    int64_t b, kv_head, index;                    // its block
    int64_t first_chunk, last_chunk, num_chunks;  // its own, of the block's
    int64_t partial;  // of the block's first chunk; -1: the block is this task's alone
  };

  struct PackTask {
    int64_t b, kv_head, tile;
  };

  Block block_of(int64_t b, int64_t kv_head, int64_t index) const {
    Block k{b, kv_head, index, index * block_rows, (index + 1) * block_rows, 0, 0};
    if (k.row_end > members[b].rows) k.row_end = members[b].rows;
    k.i_begin = k.row_begin / group;
    k.i_end = (k.row_end - 1) / group + 1;
    return k;
  }

  // Calls f with the part of each KV head.
  template <class F>
  void for_each_head(Block k, const F& f) const {
    for (int64_t h = 0; h < heads; ++h, ++k.kv_head, k.at += block_rows) f(k);
  }

  Block block_of(const Task& task) const { return block_of(task.b, task.kv_head, task.index); }

  template <class F>
  auto phase(int64_t count, F f) const {
    Worker sizes;
    return Phase(count, sizes.carve(nullptr, *this), [this, f](char* memory, const auto& take) {
      Worker w;
      w.carve(memory, *this);
      Engine::begin();
      for (int64_t task = take(); task >= 0; task = take()) f(task, w);
      Engine::end();
    });
  }

  // ---- what to do ----

  // Tiles of the block's first chunk before its first live one: a fixed split cuts at multiples of its keys.
  int64_t tiles_before(const Range& range) const { return split_keys ? range.begin / tile % chunk_tiles : 0; }

  // Cuts blocks into tasks. Late blocks of a causal call are the long ones: they go first.
  void split() {
    int64_t num_blocks = 0;
    for (int64_t b = 0; b < source.count(); ++b) num_blocks += p.num_kv_heads / heads * members[b].num_blocks;
    int64_t* sizes = allocate<int64_t>(p.scratch, num_blocks);
    int64_t total = 0, n = 0;
    auto for_each_block_of_rows = [&](const auto& f) {
      for (int64_t b = 0; b < source.count(); ++b) {
        for (int64_t head = 0; head < p.num_kv_heads; head += heads) {
          for (int64_t i = members[b].num_blocks - 1; i >= 0; --i) {
            const Block k = block_of(b, head, i);
            f(k, source.allowed(b, k.i_begin, k.i_end));
          }
        }
      }
    };
    for_each_block_of_rows(
        [&](const Block& k, const Range& range) { total += sizes[n++] = source.live_tiles(k, range); });
    int64_t task_tiles = ceil_div(total, kTargetTasks);
    const int64_t least = ceil_div(Engine::kMinChunkTiles, heads), most = Engine::kMaxChunkTiles / heads;
    if (task_tiles < least) task_tiles = least;
    if (num_blocks >= kTargetTasks) {
      // Blocks of one length keep all threads busy as they are; among others a long one may be left over.
      if (!Source::kUneven) task_tiles = total + 1;
      if (task_tiles > most) task_tiles = most;
    }
    chunk_tiles = split_keys ? split_keys / tile : task_tiles;
    int64_t task_chunks = split_keys ? ceil_div(task_tiles, chunk_tiles) : 1;
    auto chunks_of = [&](int64_t tiles, const Range& range) {
      return tiles ? ceil_div(tiles + tiles_before(range), chunk_tiles) : 1;
    };

    auto count = [&] {
      num_tasks = num_partials = n = 0;
      for_each_block_of_rows([&](const Block&, const Range& range) {
        const int64_t chunks = chunks_of(sizes[n++], range);
        num_tasks += ceil_div(chunks, task_chunks);
        if (chunks > task_chunks) num_partials += chunks;
      });
    };
    count();
    if (num_partials * state_floats * int64_t(sizeof(float)) > kMaxPartialBytes && split_keys) {
      task_chunks = INT32_MAX;  // many small chunks of many rows: every block is one task's
      count();
    }
    tasks = allocate<Task>(p.scratch, num_tasks);
    int64_t t = 0, partial = 0;
    n = 0;
    for_each_block_of_rows([&](const Block& k, const Range& range) {
      const int64_t chunks = chunks_of(sizes[n++], range);
      const bool shared = chunks > task_chunks;
      for (int64_t first = 0; first < chunks; first += task_chunks) {
        const int64_t last = first + task_chunks < chunks ? first + task_chunks : chunks;
        tasks[t++] = {k.b, k.kv_head, k.index, first, last, chunks, shared ? partial : -1};
      }
      if (shared) partial += chunks;
    });
    if (num_partials) partials = allocate<float>(p.scratch, num_partials * state_floats);
  }

  // Requests of several blocks get their K and V packed once for all of them.
  void plan_packing() {
    const int64_t room = kMaxPackedBytes / ((k_tile_size + v_tile_size) * int64_t(sizeof(Query)) + 1);
    int64_t packed_tiles = 0, most = 0;
    for (int64_t b = 0; b < source.count(); ++b) {
      const int64_t tiles = p.num_kv_heads * members[b].num_tiles;
      if (members[b].num_blocks == 1 || packed_tiles + tiles > room) continue;
      members[b].packed_at = packed_tiles;
      packed_tiles += tiles;
      if (tiles > most) most = tiles;
    }
    k_packed = allocate<Query>(p.scratch, packed_tiles * k_tile_size);
    v_packed = allocate<Query>(p.scratch, packed_tiles * v_tile_size);
    packs = allocate<PackTask>(p.scratch, packed_tiles);
    uint8_t* wanted = allocate<uint8_t>(p.scratch, most);
    for (int64_t b = 0; b < source.count(); ++b) {
      const int64_t tiles = members[b].num_tiles;
      if (members[b].packed_at < 0) continue;
      __builtin_memset(wanted, 0, p.num_kv_heads * tiles);
      const bool marked = source.mark_wanted(b, wanted);
      const Range range = source.allowed(b, 0, source.qo_len(b));
      for (int64_t head = 0; head < p.num_kv_heads; ++head) {
        for (int64_t t = range.begin / tile; t * tile < range.end; ++t) {
          if (!marked || wanted[head * tiles + t]) packs[num_packs++] = {b, head, t};
        }
      }
    }
  }

  // ---- K and V ----

  // n keys of a tile from key `begin` on: as they lie, or converted and rotated into the worker's buffer.
  Rows load_keys(int64_t b, int64_t begin, Rows rows, int64_t n, Worker& w) const {
    if (!k_staged) return rows;
    const bool converted = source.kv_dtype() != Fp8::none;
    if (converted) convert_rows(w.k_buffer, bytes_of(rows), n, p.head_dim_qk, source.kv_dtype());
    if (!p.rope_keys) return w.k_rows.rows;
    for (int64_t j = 0; j < n; ++j) {
      T* dst = w.k_buffer + j * p.head_dim_qk;
      const RopeAngles angles = rope_angles(p.rope, b, begin + j, w.angles);
      rotate_row(converted ? dst : rows[j], dst, angles, p.rope.rotary_dim, p.head_dim_qk,
                 p.rope.interleaved);
    }
    return w.k_rows.rows;
  }

  Rows load_values(Rows rows, int64_t n, Worker& w) const {
    if (!v_staged) return rows;
    convert_rows(w.v_buffer, bytes_of(rows), n, p.head_dim_vo, source.kv_dtype());
    return w.v_rows.rows;
  }

  static auto bytes_of(Rows rows) {
    return [rows](int64_t j) { return reinterpret_cast<const uint8_t*>(rows[j]); };
  }

  // Packs keys and values [begin, begin + n) of a tile; the rest of the tile's V is 0, so that 0 weights meet
  // no garbage.
  void pack_tile(int64_t b, int64_t begin, const TileRows& rows, int64_t n, Query* k_pack, Query* v_pack,
                 Worker& w) const {
    if constexpr (Engine::kPacked) {
      using Unit = typename Engine::Unit;
      const Rows keys = load_keys(b, begin, rows.keys, n, w), values = load_values(rows.values, n, w);
      pack_keys<Unit>(k_pack, keys, n, p.head_dim_qk, depth, [] {});
      pack_values<Unit>(v_pack, values, n, p.head_dim_vo,
                        round_up(n, Engine::kStepCols) < tile ? round_up(n, Engine::kStepCols) : tile,
                        tile * kLanes);
    }
  }

  int64_t packed_at(const Block& k, int64_t t) const {
    return members[k.b].packed_at + k.kv_head * members[k.b].num_tiles + t;
  }

  void pack_once(const PackTask& task, Worker& w) const {
    const Range range = source.allowed(task.b, 0, source.qo_len(task.b));
    const int64_t begin = task.tile * tile, end = begin + tile < range.end ? begin + tile : range.end;
    const int64_t at = packed_at(block_of(task.b, task.kv_head, 0), task.tile);
    source.locate(w.rows[0], task.b, task.kv_head, begin, end - begin);
    pack_tile(task.b, begin, w.rows[0], end - begin, k_packed + at * k_tile_size, v_packed + at * v_tile_size,
              w);
  }

  // ---- one task ----

  void load_queries(const Block& k, Worker& w) const {
    const int64_t size = p.head_dim_qk;
    const bool rotates = p.rope.cos && source.kv_len(k.b) > 0;  // without keys there may be no angles
    int64_t angles_of = -1;
    RopeAngles angles{};
    for (int64_t r = k.row_begin; r < k.row_end; ++r) {
      const int64_t i = r / group, h = k.kv_head * group + r % group;
      const T* src = source.query(k.b, h, i);
      if (rotates) {
        if (angles_of != i) angles = rope_angles(p.rope, k.b, source.rope_row(k.b, i), w.angles);
        angles_of = i;
        rotate_row(src, w.row, angles, p.rope.rotary_dim, size, p.rope.interleaved);
        src = w.row;
      }
      Query* dst = w.q + (k.at + r - k.row_begin) * q_stride;
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
      for (int64_t d = 0; d < depth; ++d) w.q[(k.at + r) * q_stride + d] = Query{};
    }
  }

  int64_t padded_rows(const Block& k) const { return round_up(k.row_end - k.row_begin, Engine::kStepRows); }

  void attend(const Task& task, Worker& w) {
    const Block block = block_of(task);
    for_each_head(block, [&](const Block& k) {
      load_queries(k, w);
      for (int64_t r = 0; r < k.num_rows(); ++r)
        w.allowed[k.at + r] = source.allowed(k.b, (k.row_begin + r) / group);
    });
    const Range range = source.allowed(block.b, block.i_begin, block.i_end);
    for (int64_t chunk = task.first_chunk; chunk < task.last_chunk; ++chunk) {
      attend_chunk(block, range, chunk, w);
      for_each_head(block, [&](const Block& k) {
        if (task.partial >= 0) {
          save_rows(k, w, partials + (task.partial + chunk) * state_floats);
        } else if (task.num_chunks == 1) {
          for (int64_t r = 0; r < k.num_rows(); ++r)
            write_row(k, r, w.acc + (k.at + r) * o_stride, w.row_max[k.at + r], w.row_sum[k.at + r]);
        } else {
          fold_rows(k, chunk, chunk == task.num_chunks - 1, w);
        }
      });
    }
  }

  struct Step {
    int64_t tile_begin;
    Range keys;
    bool masked;
  };

  // Live tile n of the block, or the first one after it, before `last`, in which there is something to read.
  bool find_step(const Block& k, const Range& range, int64_t& n, int64_t last, Step& step) const {
    for (; n < last; ++n) {
      const int32_t entry = source.live_tile(k, range, n);
      const int64_t begin = tile_index(entry) * tile;
      Range r{begin > range.begin ? begin : range.begin, begin + tile < range.end ? begin + tile : range.end};
      bool masked = !tile_open(entry);
      r = source.narrow(k, r, !Engine::kPacked, masked);
      if (r.begin >= r.end) continue;
      r.begin = begin + (r.begin - begin) / Engine::kStart * Engine::kStart;
      step = {begin, r, masked};
      ++n;
      return true;
    }
    return false;
  }

  void attend_chunk(const Block& k, const Range& range, int64_t chunk, Worker& w) {
    for_each_head(k, [&](const Block& one) {
      for (int64_t r = one.at; r < one.at + k.num_rows(); ++r) {
        w.row_max[r] = -kInf;
        w.row_sum[r] = 0.0f;
      }
      __builtin_memset(w.acc + one.at * o_stride, 0, padded_rows(k) * o_stride * sizeof(float));
    });
    const int64_t live = source.live_tiles(k, range), before = tiles_before(range);
    int64_t n = chunk == 0 ? 0 : chunk * chunk_tiles - before, last = live;
    if (chunk_tiles - before < live - chunk * chunk_tiles) last = (chunk + 1) * chunk_tiles - before;
    Step steps[2];
    bool more = find_step(k, range, n, last, steps[0]);
    if (more) locate(k, steps[0], w.rows[0]);
    for (int64_t now = 0; more; now ^= 1) {
      more = find_step(k, range, n, last, steps[now ^ 1]);
      if (more) locate(k, steps[now ^ 1], w.rows[now ^ 1]);
      const Range& then = steps[now ^ 1].keys;
      attend_tile(k, steps[now], w.rows[now], more ? &w.rows[now ^ 1] : nullptr,
                  more ? then.end - then.begin : 0, w);
    }
    if constexpr (!Engine::kPacked) {
      for_each_head(k, [&](const Block& one) {
        for (int64_t r = one.at; r < one.at + k.num_rows(); ++r)
          order_columns<Weight>(w.acc + r * o_stride, p.head_dim_vo);
      });
    }
  }

  // The rows of K and V of a tile that is not packed: from the tile's first key on where it will be.
  void locate(const Block& k, const Step& step, TileRows& rows) const {
    if (members[k.b].packed_at >= 0) return;
    const int64_t begin = Engine::kPacked ? step.tile_begin : step.keys.begin;
    source.locate(rows, k.b, k.kv_head, begin, step.keys.end - begin);
  }

  // The keys of one tile: products, softmax, weighted values. `next`: the rows of the tile after it.
  void attend_tile(const Block& k, const Step& step, const TileRows& rows, const TileRows* next,
                   int64_t next_n, Worker& w) {
    const int64_t m = k.num_rows();
    const Range r = step.keys;
    if constexpr (Engine::kPacked) {
      const Query *k_pack = w.k_pack, *v_pack = w.v_pack;
      if (members[k.b].packed_at >= 0) {
        const int64_t at = packed_at(k, step.tile_begin / tile);
        k_pack = k_packed + at * k_tile_size;
        v_pack = v_packed + at * v_tile_size;
      } else {
        pack_tile(k.b, step.tile_begin, rows, r.end - step.tile_begin, w.k_pack, w.v_pack, w);
      }
      for (int64_t row = 0; row < m; row += pass_rows) {
        attend_pass(k, {row, row + pass_rows < m ? row + pass_rows : m}, r, step.tile_begin, step.masked,
                    k_pack, v_pack, w);
      }
    } else {
      stream_tile(k, step, rows, next, next_n, w);
    }
  }

  // How many rows before they are read they are prefetched: the last ones of a pass fetch the first ones of
  // the next.
  int64_t distance(int64_t n, int64_t bytes) const {
    const int64_t rows = Engine::kAheadBytes / (heads * bytes);
    return rows >= n ? n : rows < 4 ? 4 : rows / 4 * 4;
  }

  // The keys of one tile, read in place.
  void stream_tile(const Block& k, const Step& step, const TileRows& rows, const TileRows* next,
                   int64_t next_n, Worker& w) {
    const Range r = step.keys;
    const int64_t m = k.num_rows(), n = r.end - r.begin;
    const int64_t k_bytes = p.head_dim_qk * element, v_bytes = p.head_dim_vo * element;
    const HeadRows of{heads, m, block_rows};
    const RowsAhead<Rows> k_ahead{rows.keys, n, rows.values, n, distance(n, k_bytes), k_bytes, v_bytes};
    auto scores = [&](const auto& keys) {
      stream_scores<T>(w.s, s_stride, w.q, q_stride, of, keys, n, p.head_dim_qk, k_ahead);
    };
    if (k_staged) {
      scores([&](int64_t h, int64_t j, int64_t left, const T*(&key)[4]) {
        left = left < 4 ? left : 4;
        const Rows in_place = rows.keys.shifted(h * k_bytes).from(j);
        const Rows staged = load_keys(k.b, r.begin + j, in_place, left, w);
        for (int c = 0; c < 4; ++c) key[c] = staged[c < left ? c : left - 1];
      });
    } else {
      scores(KeysInPlace<T, Rows>{rows.keys, k_bytes});
    }
    for_each_head(k, [&](const Block& one) { softmax_rows(one, {0, m}, r, step.masked, w); });
    const RowsAhead<Rows> v_ahead{
        rows.values, n, next ? next->keys : rows.keys, next_n, distance(n, v_bytes), v_bytes, k_bytes};
    // Heads take turns with the rows that have been prefetched.
    const int64_t few = heads == 1 ? n : v_ahead.distance;
    for (int64_t j = 0; j < n; j += few) {
      const int64_t count = n - j < few ? n - j : few;
      for (int64_t h = 0; h < heads; ++h) {
        const Rows values = load_values(rows.values.shifted(h * v_bytes).from(j), count, w);
        stream_values(w.acc + h * block_rows * o_stride, o_stride,
                      reinterpret_cast<const Weight*>(w.s + h * block_rows * s_stride) + j,
                      s_stride * int64_t(sizeof(float) / sizeof(Weight)), m, values, count, p.head_dim_vo,
                      v_ahead.of(h, j, count));
      }
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
    const float scale = p.scale * source.k_scale(k.kv_head);
    // Nothing but a positive scale: it joins the exponent's FMA instead of taking a pass of its own.
    const bool plain = !masked && p.logits_soft_cap == 0.0f && !p.alibi_slopes && scale > 0.0f;
    const float scale2 = plain ? scale * kLog2e : 1.0f;
    const int64_t n = r.end - r.begin, cols = round_up(n, Engine::kStepCols);
    const int64_t width = round_up(p.head_dim_vo, 2 * kLanes);  // a unit's columns may lie in any order
    if (!plain) apply_variants(k, rows, r, scale, masked, w);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* s = w.s + (k.at + row - rows.begin) * s_stride;
      const Range allowed = w.allowed[k.at + row];
      const Range seen = visible_columns(s, cols, allowed.begin > r.begin ? allowed.begin - r.begin : 0,
                                         allowed.end < r.end ? allowed.end - r.begin : n);
      w.seen[k.at + row - rows.begin] = seen;
      const float rescale = raise_max(s + seen.begin, seen.end - seen.begin, scale2, w.row_max[k.at + row]);
      if (rescale == 1.0f || w.row_sum[k.at + row] == 0.0f) continue;
      w.row_sum[k.at + row] *= rescale;
      float* acc = w.acc + (k.at + row) * o_stride;
      for (int64_t d = 0; d < width; d += kLanes) store(acc + d, load(acc + d) * rescale);
    }
    constexpr bool kMayRound = __is_same(Weight, bf16);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* s = w.s + (k.at + row - rows.begin) * s_stride;
      Weight* weights = reinterpret_cast<Weight*>(s);
      const Range seen = w.seen[k.at + row - rows.begin];
      const int64_t width = seen.end - seen.begin;
      w.row_sum[k.at + row] +=
          kMayRound && !p.lse
              ? weigh_row<kMayRound>(s + seen.begin, weights + seen.begin, width, scale2,
                                     w.row_max[k.at + row])
              : weigh_row<false>(s + seen.begin, weights + seen.begin, width, scale2, w.row_max[k.at + row]);
      for (int64_t j = 0; j < seen.begin; ++j) weights[j] = Weight{};
      for (int64_t j = seen.end; j < cols; ++j) weights[j] = Weight{};
    }
  }

  // Products to logits, base 2, where more than a scale lies between them.
  void apply_variants(const Block& k, Range rows, Range r, float scale, bool masked, Worker& w) {
    const int64_t n = r.end - r.begin;
    int64_t staged_i = -1, staged_h = -1;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t i = (k.row_begin + row) / group, h = k.kv_head * group + (k.row_begin + row) % group;
      const int64_t mask_i = source.mask_differs_by_query() ? i : 0;
      const int64_t mask_h = source.mask_differs_by_head() ? h : 0;
      if (masked && (mask_i != staged_i || mask_h != staged_h)) {
        source.stage(w.additive, k.b, mask_h, mask_i, r.begin, n);
        staged_i = mask_i;
        staged_h = mask_h;
      }
      const RowVariant variant{scale, p.logits_soft_cap,
                               p.alibi_slopes ? p.alibi_slopes.at(h) * kLog2e : 0.0f,
                               r.begin - source.position(k.b, i), masked ? w.additive : nullptr};
      apply_variant(w.s + (k.at + row - rows.begin) * s_stride, round_up(n, kLanes), variant);
    }
  }

  // ---- results ----

  void write_row(const Block& k, int64_t r, const float* acc, float row_max, float row_sum) const {
    const int64_t i = (k.row_begin + r) / group, h = k.kv_head * group + (k.row_begin + r) % group;
    const float lse =
        finish_row(source.out(k.b, h, i), acc, p.head_dim_vo, row_max, row_sum,
                   p.sinks ? p.sinks.data + h * p.sinks.stride : nullptr, source.v_scale(k.kv_head));
    if (p.lse) *source.lse(k.b, h, i) = lse;
  }

  void save_rows(const Block& k, const Worker& w, float* states) const {
    for (int64_t r = k.at; r < k.at + k.num_rows(); ++r)
      save_row(states + r * state_stride, w.acc + r * o_stride, w.row_max[r], w.row_sum[r], p.head_dim_vo);
  }

  // One more chunk of a block that this worker does alone.
  void fold_rows(const Block& k, int64_t chunk, bool last, Worker& w) const {
    float* fresh = w.states + (chunk ? state_floats : 0);
    save_rows(k, w, fresh);
    for (int64_t r = 0; r < k.num_rows(); ++r) {
      float* state = w.states + (k.at + r) * state_stride;
      if (chunk) join_row(state, fresh + (k.at + r) * state_stride, p.head_dim_vo);
      if (last) write_row(k, r, state, state[state_stride - kLanes], state[state_stride - kLanes + 1]);
    }
  }

  const AttentionParams& p;
  Source& source;
  const Parallel& parallel;
  Member* members = nullptr;  // [source.count()]
  Task* tasks = nullptr;      // [num_tasks]
  PackTask* packs = nullptr;  // [num_packs]
  int64_t num_tasks = 0, num_packs = 0, num_partials = 0, chunk_tiles = 1;
  float* partials = nullptr;  // [num_partials][block_rows][stride], where tasks share a block
  Query* k_packed = nullptr;  // [tiles packed once][k_tile_size]
  Query* v_packed = nullptr;  // [tiles packed once][v_tile_size]
};

}  // namespace fi::FI_ISA
