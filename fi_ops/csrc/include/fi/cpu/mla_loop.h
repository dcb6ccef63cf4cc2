// Latent attention: one KV head whose rows are keys and values of all query heads, which are the rows of a
// block, so that a row of the cache is read once for all of them.
//
// A call is cut into tasks (some rows x some tiles of keys). A worker goes from tile to tile, and from the
// last one of a task to the first one of its next: the rows of the tile to come are fetched while one is
// worked on.
#pragma once

#include "fi/cpu/batch_attention_loop.h"
#include "fi/cpu/mla_engine.h"
#include "fi/cpu/mla_source.h"

namespace fi::FI_ISA {

// A task's partial result takes as long to write and to join as some keys to attend to.
inline constexpr int64_t kMlaTargetTasks = 32, kMlaMinTaskTiles = 4;

template <class T, class Engine>
class MlaCall {
 public:
  using Query = typename Engine::Query;

  MlaCall(const MlaParams& params, const Parallel& parallel)
      : c(params.batch.call), parallel(parallel), source(params) {
    add_requests<T>(params.batch, [&](const Request& r) { source.add(r); });
    source.sort();
    const int64_t most = round_up(c.num_qo_heads * source.max_qo_len(), Engine::kStepRows);
    block_rows = most < Engine::kTaskRows ? most : Engine::kTaskRows;
    ckv = c.head_dim_vo;
    size = ckv + params.head_dim_kpe;
    depth = round_up(size, Engine::kStepDepth);
    // Off powers of two: no cache set conflicts.
    q_stride = depth + 64 / int64_t(sizeof(Query));
    state_stride = round_up(ckv, 2 * kLanes) + kLanes;
  }

  void run() {
    plan();
    run_phases(c.scratch, parallel,
               Phase(num_tasks, carve(nullptr).bytes, [&](char* memory, const auto& take) {
                 Worker w = carve(memory);
                 Engine::begin();
                 work(w, take);
                 Engine::end();
               }));
    merge();
  }

 private:
  using TileRows = typename MlaSource<T>::TileRows;
  static constexpr int64_t kTile = Engine::kTile;
  static constexpr int64_t kScoreStride = kTile + kLanes;
  static constexpr int64_t kWeightStride = kScoreStride * int64_t(sizeof(float) / sizeof(Query));

  struct Task {
    int64_t b, row_begin, row_end;  // its rows, of the request's queries x heads
    int64_t begin, end;             // its keys
    int64_t chunk, num_chunks;
    float* states;  // of all chunks, [num_chunks][padded rows][state_stride]; null: there is one

    int64_t num_rows() const { return row_end - row_begin; }
    int64_t padded_rows() const { return round_up(num_rows(), Engine::kStepRows); }
  };

  // A tile of a task.
  struct Step {
    const Task* task = nullptr;
    int64_t begin = 0;

    bool first() const { return begin == task->begin; }
    bool last() const { return begin + kTile >= task->end; }
  };

  struct Worker {
    Query* q;                  // [block_rows][q_stride]
    T* keys;                   // [kTile][size]: of a tile that is not read in place
    const char* zeros;         // [ckv] of T
    float* s;                  // [block_rows][kScoreStride]: logits, then weights
    float* whole;              // [block_rows][state_stride]: the states of a task that is a block's only one
    float* acc;                // of this task
    float *row_max, *row_sum;  // [block_rows]
    int64_t* sees;             // [block_rows]: the keys from the first one on that a row may see
    Range* seen;               // [block_rows]: the columns of s that hold such keys
    TileRows rows[2];          // of this tile, and of the next one
    typename Engine::Buffers buffers;
    int64_t bytes;
  };

  Worker carve(char* memory) const {
    Carver carver{memory};
    Worker w;
    w.q = carver.take<Query>(block_rows * q_stride);
    w.keys = carver.take<T>(source.in_place() ? 0 : kTile * size);
    T* zeros = carver.take<T>(ckv);
    for (int64_t d = 0; memory && d < ckv; ++d) zeros[d] = T{};
    w.zeros = reinterpret_cast<const char*>(zeros);
    w.s = carver.take<float>(block_rows * kScoreStride);
    w.whole = carver.take<float>(block_rows * state_stride);
    w.row_max = carver.take<float>(block_rows);
    w.row_sum = carver.take<float>(block_rows);
    w.sees = carver.take<int64_t>(block_rows);
    w.seen = carver.take<Range>(block_rows);
    for (TileRows& rows : w.rows) rows.carve(carver, kTile);
    w.buffers.carve(carver, depth, ckv);
    w.bytes = carver.used;
    return w;
  }

  // ---- what to do ----

  int64_t keys_of(int64_t b, int64_t row) const { return source.allowed(b, row / c.num_qo_heads).end; }

  // f(request, first row, end of the rows, keys) for each block of rows; the late ones, which see most,
  // first.
  template <class F>
  void for_each_block_of_rows(const F& f) const {
    for (int64_t b = 0; b < source.count(); ++b) {
      const int64_t rows = c.num_qo_heads * source.qo_len(b);
      for (int64_t begin = (rows - 1) / block_rows * block_rows; begin >= 0; begin -= block_rows) {
        const int64_t end = begin + block_rows < rows ? begin + block_rows : rows;
        f(b, begin, end, keys_of(b, end - 1));
      }
    }
  }

  // Cuts blocks into tasks, by lengths alone: results don't depend on threads.
  void plan() {
    int64_t total = 0;
    for_each_block_of_rows([&](int64_t, int64_t, int64_t, int64_t keys) { total += ceil_div(keys, kTile); });
    int64_t task_tiles = ceil_div(total, kMlaTargetTasks);
    if (task_tiles < kMlaMinTaskTiles) task_tiles = kMlaMinTaskTiles;
    const auto chunks_of = [&](int64_t keys) { return keys ? ceil_div(keys, task_tiles * kTile) : 1; };
    int64_t floats = 0;
    for_each_block_of_rows([&](int64_t, int64_t begin, int64_t end, int64_t keys) {
      const int64_t chunks = chunks_of(keys);
      num_tasks += chunks;
      if (chunks > 1) floats += chunks * round_up(end - begin, Engine::kStepRows) * state_stride;
    });
    tasks = allocate<Task>(c.scratch, num_tasks);
    float* states = floats ? allocate<float>(c.scratch, floats) : nullptr;
    int64_t t = 0;
    for_each_block_of_rows([&](int64_t b, int64_t begin, int64_t end, int64_t keys) {
      const int64_t chunks = chunks_of(keys), tiles = ceil_div(keys, kTile);
      for (int64_t n = 0; n < chunks; ++n) {
        const int64_t last = tiles * (n + 1) / chunks * kTile;
        tasks[t++] = {b,
                      begin,
                      end,
                      tiles * n / chunks * kTile,
                      last < keys ? last : keys,
                      n,
                      chunks,
                      chunks > 1 ? states : nullptr};
      }
      if (chunks > 1) states += chunks * round_up(end - begin, Engine::kStepRows) * state_stride;
    });
  }

  // ---- a worker ----

  template <class Take>
  void work(Worker& w, const Take& take) {
    const auto step_of = [&](int64_t task) {
      return task < 0 ? Step{} : Step{&tasks[task], tasks[task].begin};
    };
    Step now = step_of(take());
    if (now.task) locate(now, w.rows[0]);
    for (int64_t i = 0; now.task; i ^= 1) {
      // The next task is taken at the last tile of this one, not before: others may be idle.
      const Step next = now.last() ? step_of(take()) : Step{now.task, now.begin + kTile};
      if (next.task) locate(next, w.rows[i ^ 1]);
      if (now.first()) begin_task(*now.task, w);
      attend(now, w.rows[i], next.task ? &w.rows[i ^ 1] : nullptr, w);
      if (now.last()) end_task(*now.task, w);
      now = next;
    }
  }

  void locate(const Step& step, TileRows& rows) const {
    const int64_t left = step.task->end - step.begin;
    source.locate(rows, step.task->b, step.begin, left < kTile ? left : kTile);
  }

  void begin_task(const Task& task, Worker& w) const {
    for (int64_t r = 0; r < task.num_rows(); ++r) {
      const int64_t row = task.row_begin + r, i = row / c.num_qo_heads;
      source.load_query(w.q + r * q_stride, depth, task.b, row - i * c.num_qo_heads, i);
      w.row_max[r] = -kInf;
      w.row_sum[r] = 0.0f;
      w.sees[r] = keys_of(task.b, row);
    }
    w.acc = task.states ? state_of(task, task.chunk, 0) : w.whole;
  }

  void attend(const Step& step, TileRows& rows, const TileRows* next, Worker& w) const {
    const int64_t m = step.task->num_rows(), n = rows.count;
    auto prefetch = source.prefetch(next, Engine::calls(m, n, ckv));
    source.join(rows, w.keys);
    const PointerRows<T> keys{rows.ckv};
    Engine::scores(w.s, kScoreStride, w.q, q_stride, m, keys, n, size, depth, w.buffers, prefetch);
    weigh(step.begin, n, m, w);
    rows.ckv[n] = w.zeros;
    Engine::template values<kWeightStride>(w.acc, state_stride, reinterpret_cast<const Query*>(w.s), m, keys,
                                           n, ckv, !step.first(), w.buffers, prefetch);
  }

  // Products to weights: raises the rows' maxima, adds to their sums, rescales what they have accumulated.
  // All maxima first: the exponentials of a row wait for its maximum.
  void weigh(int64_t begin, int64_t n, int64_t m, Worker& w) const {
    const int64_t cols = round_up(n, Engine::kStepKeys), columns = round_up(ckv, Engine::kStepColumns);
    const float scale = c.scale * source.k_scale(0) * kLog2e;
    const float factor = scale > 0.0f ? scale : 1.0f;  // of what raise_max and weigh_row get
    for (int64_t r = 0; r < m; ++r) {
      float* s = w.s + r * kScoreStride;
      if (!(scale > 0.0f)) {
        for (int64_t j = 0; j < n; j += kLanes) store(s + j, load(s + j) * scale);
      }
      const int64_t end = w.sees[r] - begin;
      const Range seen = visible_columns(s, cols, 0, end < n ? end : n);
      w.seen[r] = seen;
      const float keep = raise_max(s, seen.end, factor, w.row_max[r]);
      if (keep == 1.0f || w.row_sum[r] == 0.0f) continue;
      w.row_sum[r] *= keep;
      float* acc = w.acc + r * state_stride;
      for (int64_t d = 0; d < columns; d += kLanes) store(acc + d, load(acc + d) * keep);
    }
    constexpr bool kMayRound = __is_same(Query, bf16);
    for (int64_t r = 0; r < m; ++r) {
      float* s = w.s + r * kScoreStride;
      Query* weights = reinterpret_cast<Query*>(s);
      const int64_t end = w.seen[r].end;
      w.row_sum[r] += kMayRound && !c.lse ? weigh_row<kMayRound>(s, weights, end, factor, w.row_max[r])
                                          : weigh_row<false>(s, weights, end, factor, w.row_max[r]);
      for (int64_t j = end; j < cols; ++j) weights[j] = Query{};
    }
  }

  // ---- results ----

  void end_task(const Task& task, Worker& w) const {
    for (int64_t r = 0; r < task.num_rows(); ++r) {
      float* state = w.acc + r * state_stride;
      Engine::order(state, ckv);
      if (task.states) {
        state[state_stride - kLanes] = w.row_max[r];
        state[state_stride - kLanes + 1] = w.row_sum[r];
      } else {
        write_row(task, r, state, w.row_max[r], w.row_sum[r]);
      }
    }
  }

  float* state_of(const Task& task, int64_t chunk, int64_t r) const {
    return task.states + (chunk * task.padded_rows() + r) * state_stride;
  }

  void write_row(const Task& task, int64_t r, const float* acc, float row_max, float row_sum) const {
    const int64_t row = task.row_begin + r, i = row / c.num_qo_heads, h = row - i * c.num_qo_heads;
    const float lse =
        finish_row(source.out(task.b, h, i), acc, ckv, row_max, row_sum, nullptr, source.v_scale(0));
    if (c.lse) *source.lse(task.b, h, i) = lse;
  }

  // Joins the chunks of rows that several tasks shared, in chunk order. A task does its share of the rows.
  void merge() const {
    for_each_task(parallel, num_tasks, [&](int64_t t) {
      const Task& task = tasks[t];
      if (!task.states) return;
      const int64_t end = task.num_rows() * (task.chunk + 1) / task.num_chunks;
      for (int64_t r = task.num_rows() * task.chunk / task.num_chunks; r < end; ++r) join_row(task, r);
    });
  }

  void join_row(const Task& task, int64_t r) const {
    float* state = state_of(task, 0, r);
    const int64_t step = state_of(task, 1, r) - state, at = state_stride - kLanes;
    float top = -kInf, sum = 0.0f, keep[kMlaTargetTasks];
    for (int64_t n = 0; n < task.num_chunks; ++n) {
      const float x = state[n * step + at];
      top = x > top ? x : top;
    }
    for (int64_t n = 0; n < task.num_chunks; ++n) {
      keep[n] = exp2(set1(state[n * step + at] - usable_max(top)))[0];
      sum += state[n * step + at + 1] * keep[n];
    }
    for (int64_t d = 0; d < ckv; d += kLanes) {
      Vec x = load(state + d) * keep[0];
      for (int64_t n = 1; n < task.num_chunks; ++n) x = fma(load(state + n * step + d), set1(keep[n]), x);
      store(state + d, x);
    }
    write_row(task, r, state, top, sum);
  }

  const AttentionParams& c;
  const Parallel& parallel;
  MlaSource<T> source;
  int64_t block_rows, ckv, size, depth;  // size: of a key; depth: padded
  int64_t q_stride, state_stride;        // a state: what was accumulated, padded; maximum, sum
  Task* tasks = nullptr;                 // [num_tasks]
  int64_t num_tasks = 0;
};

template <class T, class Unit>
void run_mla(const MlaParams& p, const Parallel& parallel) {
  if (p.batch.call.qo_len == 0 || p.batch.call.num_qo_heads == 0) return;
  MlaCall<T, typename MlaEngineOf<T, Unit>::type>(p, parallel).run();
}

}  // namespace fi::FI_ISA
