// Attention of few query rows over a batch: what a block does with its runs.
//
// Per run: query rows to shared memory, each warp attends to its slices, the warps' results are joined over
// shared memory. A pair (segment, KV head) that one block has alone is written out; else its blocks leave
// partial results in scratch memory and the last one to arrive joins them, in their order, so that the result
// does not depend on which one that was. With a fixed split every unit is such a part.
#pragma once

#include <climits>

#include "fi/cuda/batch/few.h"
#include "fi/cuda/batch/few_warp.h"
#include "fi/cuda/decode/finish.h"
#include "fi/cuda/decode/kernel.h"
#include "fi/cuda/pack.h"

namespace fi::cuda::batch {

using decode::Part;

struct FewShared {
  RowTable rows;
  decode::WarpResults results;
  RunTable table;
  float query_scale[decode::kMaxRows];
  int is_last;
};

// The query rows of a run, on their way into shared memory through registers. Rows of bf16 that go against
// fp8 are scaled to f16 by powers of two: the largest element has the exponent 14, and what is lost of one
// that is 2^28 times smaller is nothing beside the rounding of the sum.
template <class T, class Engine>
class FewQuery {
  static constexpr int kDim = Engine::kHeadDim, kRows = decode::kMaxRows, kChunks = kDim / 8;
  static constexpr int kThreads = Engine::kSmWarps / Engine::kBlocksAnSm * 32;
  // Chunks a thread fetches ahead; with the accumulators of wide heads there are no registers for it.
  static constexpr int kHeld = kDim <= 128 ? kRows * kChunks / kThreads : 0;

 public:
  FI_DEVICE_INLINE void fetch(const FewArgs& args, const Run& run) {
#pragma unroll
    for (int n = 0; n < kHeld; ++n) items_[n] = load(args, run, threadIdx.x + n * blockDim.x);
  }
  // `scales`: what products are to be multiplied by, a row.
  FI_DEVICE_INLINE void store(const FewArgs& args, const Run& run, unsigned char* query,
                              float* scales) const {
#pragma unroll
    for (int n = 0; n < kHeld; ++n) put(threadIdx.x + n * blockDim.x, items_[n], query, scales);
    // And where shared memory has room for fewer warps.
#pragma unroll 1
    for (int item = threadIdx.x + kHeld * blockDim.x; item < kRows * kChunks; item += blockDim.x)
      put(item, load(args, run, item), query, scales);
  }

 private:
  FI_DEVICE_INLINE static uint4 load(const FewArgs& args, const Run& run, int item) {
    const AttentionParams& c = args.p.call;
    const int row = item / kChunks, column = item % kChunks * 8;
    if (row >= run.num_rows || column >= c.head_dim_qk) return {0, 0, 0, 0};
    const int i = (run.row_begin + row) / args.group, head = (run.row_begin + row) - i * args.group;
    const T* src = static_cast<const T*>(c.query) + (int64_t{run.q_begin} + i) * c.q_stride_n +
                   (int64_t{run.kv_head} * args.group + head) * c.q_stride_h;
    const uint4 chunk = load_16(src + column);
    if constexpr (Engine::kRope) {
      if (column < c.rope.rotary_dim) {
        decode::RopeChunk<T> rope;
        rope.fetch(c.rope, 0, clamp_index(i + run.kv_len - run.qo_len, 0, args.p.rope_len - 1), src, column);
        return rope.rotate(c.rope, chunk, column);
      }
    }
    return chunk;
  }
  // kChunks neighbouring lanes have a row.
  FI_DEVICE_INLINE static void put(int item, uint4 chunk, unsigned char* query, float* scales) {
    if constexpr (Engine::kScalesQuery) {
      float x[8];
      unpack_16<T>(x, chunk);
      uint32_t largest = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) largest = max(largest, __float_as_uint(x[e]) & 0x7f800000u);
#pragma unroll
      for (int other = 1; other < kChunks; other *= 2)
        largest = max(largest, __shfl_xor_sync(~0u, largest, other));
      const uint32_t exponent = min(max(largest >> 23, 15u), 253u);
      const float factor = __uint_as_float((268 - exponent) << 23);
      chunk = {pack2<f16>(x[0] * factor, x[1] * factor), pack2<f16>(x[2] * factor, x[3] * factor),
               pack2<f16>(x[4] * factor, x[5] * factor), pack2<f16>(x[6] * factor, x[7] * factor)};
      if (item % kChunks == 0) scales[item / kChunks] = __uint_as_float((exponent - 14) << 23);
    }
    *reinterpret_cast<uint4*>(query + decode::row_chunk_offset<kDim>(item / kChunks, item % kChunks)) = chunk;
  }

  uint4 items_[kHeld > 0 ? kHeld : 1];
};

// For the threads of one warp. Rows of the tile past the run's see all keys: their results are not used.
FI_DEVICE_INLINE void fill_row_table(const FewArgs& args, const Run& run, RowTable& table) {
  const AttentionParams& c = args.p.call;
  const int lane = threadIdx.x % 32, row = run.row_begin + lane, i = row / args.group;
  KeySpan keys{0, run.kv_len};
  float position = 0.0f, slope = 0.0f;
  const bool has = lane < run.num_rows;
  if (has) {
    Request r{};
    r.qo_len = run.qo_len, r.kv_len = run.kv_len;
    keys = keys_of_query(args.p, r, i);
    if (c.alibi_slopes) {
      position = static_cast<float>(i + run.kv_len - run.qo_len);
      slope = c.alibi_slopes.at(int64_t{run.kv_head} * args.group + row - i * args.group) * kLog2e;
    }
  }
  int begin = static_cast<int>(keys.begin), end = static_cast<int>(keys.end);
  if (lane < decode::kMaxRows) {
    table.begin[lane] = begin, table.end[lane] = end;
    table.position[lane] = position, table.slope[lane] = slope;
    table.mask[lane] = run.mask_begin * 8 + (has ? int64_t{i} * run.kv_len : 0);
  }
#pragma unroll
  for (int other = 8; other > 0; other /= 2) {
    begin = max(begin, __shfl_xor_sync(~0u, begin, other));
    end = min(end, __shfl_xor_sync(~0u, end, other));
  }
  if (lane == 0) table.common_begin = begin, table.common_end = end;
}

// all, then the part x: with exactly these roundings wherever it is done.
FI_DEVICE_INLINE void fold(Part& all, float row_max, float row_sum, const float4& acc) {
  const float top = fmaxf(all.max, row_max), shift = usable_max(top);
  const float keep = exp2_approx(all.max - shift), factor = exp2_approx(row_max - shift);
  all.max = top;
  all.sum = fmaf(row_sum, factor, all.sum * keep);
#pragma unroll
  for (int e = 0; e < 4; ++e) all.acc[e] *= keep;
  all.add_scaled(acc, factor);
}

// Four columns of a result, and with the first of them the LSE.
template <class T>
FI_DEVICE_INLINE void write_columns(const FewArgs& args, int q_begin, int kv_head, int row, int chunk,
                                    Part part) {
  const BatchAttentionParams& p = args.p;
  const AttentionParams& c = p.call;
  const int i = row / args.group;
  const int64_t n = int64_t{q_begin} + i, head = int64_t{kv_head} * args.group + row - i * args.group;
  const RowResult result = finish_row(c, head, part.max, part.sum);
  const float factor = p.v_scale ? result.factor * p.v_scale.at(kv_head) : result.factor;
#pragma unroll
  for (int e = 0; e < 4; ++e) part.acc[e] *= factor;
  T* out = static_cast<T*>(c.out) + n * c.o_stride_n + head * c.o_stride_h;
  decode::store_columns<T, true>(out + chunk * 4, part.acc, 4);
  if (c.lse && chunk == 0) c.lse[n * c.num_qo_heads + head] = result.lse;
}

// Segments with no unit, which belong to no block, and the tokens of no request. By thread `me` of `threads`
// of each block.
template <class T, int kRowChunks>
FI_DEVICE_NOINLINE void write_empty(const FewArgs& args, int me, int threads) {
  const AttentionParams& c = args.p.call;
  const int num_segments = args.plan.num_segments();
#pragma unroll 1
  for (int n = blockIdx.x; n < num_segments; n += gridDim.x) {
    if (args.plan.segments[n].num_units > 0) continue;
    const RowsOfRequest rows = segment_rows(args.p, args.plan, n, args.group);
    if (rows.request < 0) continue;
    const int q_begin = static_cast<int>(request_of(args.p, rows.request).q_begin);
    const int num_rows = static_cast<int>(rows.end - rows.begin);
#pragma unroll 1
    for (int item = me; item < num_rows * static_cast<int>(c.num_kv_heads) * kRowChunks; item += threads) {
      const int row = item / kRowChunks, chunk = item % kRowChunks, head = row / num_rows;
      if (chunk * 4 < c.head_dim_vo)
        write_columns<T>(args, q_begin, head, static_cast<int>(rows.begin) + row - head * num_rows, chunk,
                         Part{});
    }
  }
  if (has_padding(args.p))
    write_padding<T>(args.p, int64_t{blockIdx.x} * threads + me, int64_t{gridDim.x} * threads);
}

// f(row, chunk, item) for each four columns of a run's rows that this thread has.
template <int kRowChunks, class F>
FI_DEVICE_INLINE void for_each_item(const FewArgs& args, int num_rows, const F& f) {
  for (int item = threadIdx.x; item < num_rows * kRowChunks; item += blockDim.x) {
    const int row = item / kRowChunks, chunk = item % kRowChunks;
    if (chunk * 4 < args.p.call.head_dim_vo) f(row, chunk, item);
  }
}

// Of part n of a pair: a block's, or with a fixed split a unit's.
template <bool kFixed>
FI_DEVICE_INLINE float* slot_of(const FewArgs& args, const Run& run, int n) {
  const int64_t slot = kFixed ? int64_t{run.first_unit} + n : int64_t{n} * 2 + (n == run.part);
  return args.partials + clamp_index(slot, 0, args.num_slots - 1) * args.partial_floats();
}

// The partial results of a pair in their order: all blocks', or with a fixed split all units', one after the
// other, whoever worked on them.
template <class T, int kRowChunks, bool kFixed>
FI_DEVICE_NOINLINE void join_parts(const FewArgs& args, const Run& run) {
  constexpr int kAtOnce = 8;  // loads in flight: two or three round trips to L2 do
  const int state = args.part_rows * args.acc_width;
  for_each_item<kRowChunks>(args, run.num_rows, [&](int row, int chunk, int) {
    Part all;
#pragma unroll 1
    for (int first = kFixed ? 0 : run.part; first <= run.last_part; first += kAtOnce) {
      float tops[kAtOnce], sums[kAtOnce];
      float4 accs[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        tops[n] = -kInf, sums[n] = 0.0f, accs[n] = float4{0.0f, 0.0f, 0.0f, 0.0f};
        if (first + n > run.last_part) continue;
        const float* part = slot_of<kFixed>(args, run, first + n);
        tops[n] = __ldcg(part + state + row);
        sums[n] = __ldcg(part + state + args.part_rows + row);
        accs[n] = __ldcg(reinterpret_cast<const float4*>(part + row * args.acc_width + chunk * 4));
      }
      if constexpr (kFixed) {
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          if (first + n <= run.last_part) fold(all, tops[n], sums[n], accs[n]);
        }
      } else {
        float top = all.max;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) top = fmaxf(top, tops[n]);
        const float shift = usable_max(top), keep = exp2_approx(all.max - shift);
        all.max = top;
        all.sum *= keep;
#pragma unroll
        for (int e = 0; e < 4; ++e) all.acc[e] *= keep;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const float factor = exp2_approx(tops[n] - shift);
          all.sum = fmaf(sums[n], factor, all.sum);
          all.add_scaled(accs[n], factor);
        }
      }
    }
    write_columns<T>(args, run.q_begin, run.kv_head, run.row_begin + row, chunk, all);
  });
}

template <class T, class Engine, bool kFixed>
class FewBlock {
 public:
  FI_DEVICE_INLINE FewBlock(const FewArgs& args, unsigned char* query, FewShared& shared)
      : args(args), p(args.p), c(args.p.call), query(query), shared(shared) {}

  FI_DEVICE_INLINE void run(unsigned char* warp_memory) {
    wait_for_previous_kernel();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (args.plan.num_segments() == 0 && !has_padding(p)) return;
    RunTable& table = shared.table;
    if (warp == 1) prefetch_indices(lane);
    // While the first warp finds the block's runs.
    if (warps == 1) write_empty<T, Engine::kRowChunks>(args, threadIdx.x, 32);
    if (warp > 0) write_empty<T, Engine::kRowChunks>(args, threadIdx.x - 32, blockDim.x - 32);
    Engine engine(args, table, query, warp_memory);
    FewQuery<T, Engine> rows;
    for (bool is_first = true, more = true; more; is_first = false) {
      if (warp == 0) RunFinder<kFixed>(args, table).fill(is_first);
      __syncthreads();
      const int count = table.count;
      more = table.more;
      if (count > 0) rows.fetch(args, table.runs[0]);
      engine.start();
#pragma unroll 1
      for (int n = 0; n < count; ++n) {
        const Run& run = table.runs[n];
        rows.store(args, run, query, shared.query_scale);
        if (warp == warps - 1) fill_row_table(args, run, shared.rows);
        __syncthreads();
        engine.begin_segment();
        if (n + 1 < count) rows.fetch(args, table.runs[n + 1]);
        float scale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          scale[half] = p.k_scale ? p.k_scale.at(run.kv_head) : 1.0f;
          if constexpr (Engine::kScalesQuery) scale[half] *= shared.query_scale[lane / 4 + 8 * half];
        }
        const int slices = Engine::slices_of(run);
#pragma unroll 1
        for (int slice = 0; slice < slices; ++slice) engine.attend(shared.rows, run, scale);
        engine.publish(shared.results.max[warp], shared.results.sum[warp], &shared.results.acc[warp],
                       run.num_rows, slices > 0);
        __syncthreads();
        finish(run, engine);
        __syncthreads();
      }
    }
  }

 private:
  // What the finding of runs will read, one load after the other, into L2 at once.
  FI_DEVICE_INLINE void prefetch_indices(int lane) const {
    const int64_t at = int64_t{lane} * 32;
    prefetch_line_l2(reinterpret_cast<const int32_t*>(args.plan.header) +
                     (at < args.plan.max_segments * 5 ? at : 0));
    if (at > c.batch) return;
    for (const Indices* indices : {&p.qo_indptr, &p.table.kv_indptr, &p.kv_last_page_len}) {
      if (*indices && at < c.batch)
        prefetch_line_l2(static_cast<const char*>(indices->data) +
                         at * indices->stride * (indices->wide ? 8 : 4));
    }
  }

  template <class F>
  FI_DEVICE_INLINE void for_each_item(int num_rows, const F& f) const {
    batch::for_each_item<Engine::kRowChunks>(args, num_rows, f);
  }
  FI_DEVICE_INLINE void write(const Run& run, int row, int chunk, const Part& part) const {
    write_columns<T>(args, run.q_begin, run.kv_head, run.row_begin + row, chunk, part);
  }

  // Joins the warps' results of a run; the pair's, where this was the last part of it.
  FI_DEVICE_INLINE void finish(const Run& run, const Engine& engine) {
    const auto joined = [&](int row, int chunk) { return join_warps(shared.results, engine, row, chunk); };
    if (run.whole) {
      if (kFixed && run.last_part > 0) return fold_unit(run, joined);
      return for_each_item(run.num_rows,
                           [&](int row, int chunk, int) { write(run, row, chunk, joined(row, chunk)); });
    }
    leave(run, kFixed ? run.part : static_cast<int>(blockIdx.x), joined);
    const int others = run.last_part - (kFixed ? 0 : run.part);
    if (threadIdx.x == 0) shared.is_last = atomic_add_acq_rel(&args.arrivals[run.pair], 1) == others;
    __syncthreads();
    if (shared.is_last) join_parts<T, Engine::kRowChunks, kFixed>(args, run);
  }

  // A part of a pair that other blocks work on as well.
  template <class Joined>
  FI_DEVICE_INLINE void leave(const Run& run, int part, const Joined& joined) {
    float* left = slot_of<kFixed>(args, run, part);
    for_each_item(run.num_rows, [&](int row, int chunk, int) {
      const Part own = joined(row, chunk);
      *reinterpret_cast<float4*>(left + row * args.acc_width + chunk * 4) =
          float4{own.acc[0], own.acc[1], own.acc[2], own.acc[3]};
      if (chunk == 0) {
        float* state = left + args.part_rows * args.acc_width;
        state[row] = own.max;
        state[args.part_rows + row] = own.sum;
      }
    });
    __syncthreads();
  }

  // A unit of a pair that this block has alone: onto what a thread has of the units before.
  template <class Joined>
  FI_DEVICE_INLINE void fold_unit(const Run& run, const Joined& joined) {
    float* mine = args.folded + int64_t{blockIdx.x} * args.part_rows * args.acc_width / 4 * 6;
    for_each_item(run.num_rows, [&](int row, int chunk, int item) {
      float* state = mine + item * 6;
      Part all;
      if (run.part > 0) {
        all.max = state[0], all.sum = state[1];
        for (int e = 0; e < 4; ++e) all.acc[e] = state[2 + e];
      }
      const Part own = joined(row, chunk);
      fold(all, own.max, own.sum, float4{own.acc[0], own.acc[1], own.acc[2], own.acc[3]});
      if (run.part == run.last_part) return write(run, row, chunk, all);
      state[0] = all.max, state[1] = all.sum;
      for (int e = 0; e < 4; ++e) state[2 + e] = all.acc[e];
    });
  }

  const FewArgs& args;
  const BatchAttentionParams& p;
  const AttentionParams& c;
  unsigned char* query;
  FewShared& shared;
};

// What a block does. Dynamic shared memory: the warps' parts, the query rows, FewShared.
template <class T, class Engine, bool kFixed>
FI_DEVICE_INLINE void few_block(const FewArgs& args, int warp_bytes, int query_bytes) {
  unsigned char* smem = dynamic_smem();
  unsigned char* query = smem + static_cast<int>(blockDim.x / 32) * warp_bytes;
  FewBlock<T, Engine, kFixed> block(args, query, *reinterpret_cast<FewShared*>(query + query_bytes));
  block.run(smem + static_cast<int>(threadIdx.x / 32) * warp_bytes);
}

template <class T, class Engine, bool kFixed>
__global__ void __launch_bounds__(Engine::kSmWarps / Engine::kBlocksAnSm * 32, Engine::kBlocksAnSm)
    few_kernel(const __grid_constant__ FewArgs args, int warp_bytes, int query_bytes) {
  allow_next_kernel();
  few_block<T, Engine, kFixed>(args, warp_bytes, query_bytes);
}

// Fills in what follows from sizes alone, and allocates; the number of blocks, of which `room` run at once.
template <class Engine, bool kFixed>
int64_t prepare_few(FewArgs& args, int64_t room) {
  const AttentionParams& c = args.p.call;
  args.room = static_cast<int>(room);
  args.min_units = Engine::kMinUnits;
  args.acc_width = Engine::kHeadDim;
  const int64_t rows = c.qo_len * args.group, most_rows = rows < kFewRows ? rows : kFewRows;
  args.part_rows = static_cast<int>(most_rows < kSegmentRows ? most_rows : kSegmentRows);
  // Units that there may be: all keys once for each segment of their request, and what is not whole at both
  // ends.
  const int64_t unit_keys = unit_keys_of(args.p.fixed_split_size);
  const int64_t most_units = c.num_kv_heads * ((most_rows + kSegmentRows - 1) / kSegmentRows *
                                                   ((c.kv_len + unit_keys - 1) / unit_keys) +
                                               2 * int64_t{args.plan.max_segments});
  const int64_t wanted = (most_units + args.min_units - 1) / args.min_units;
  const int64_t most = most_units >= int64_t{kLongShare} * room ? 2 * room : room;
  const int64_t grid = clamp_index(wanted, 1, most);
  args.most_units = static_cast<int>(clamp_index(most_units, 0, INT_MAX));
  auto allocate = [&](int64_t floats) {
    return static_cast<float*>(c.scratch.allocate(c.scratch.context, floats * int64_t(sizeof(float))));
  };
  args.num_slots = 2 * grid;
  if constexpr (kFixed) {
    constexpr int64_t kMostBytes = int64_t{256} << 20;
    args.whole_pairs = most_units * args.partial_floats() * int64_t(sizeof(float)) > kMostBytes;
    args.num_slots = args.whole_pairs ? 1 : most_units;
    args.folded = allocate(grid * args.part_rows * args.acc_width / 4 * 6);
  }
  args.partials = allocate(args.num_slots * args.partial_floats());
  return grid;
}

template <class T, class Engine, bool kFixed>
void run_few(FewArgs args, const Gpu& gpu) {
  const decode::BlockShape shape =
      decode::shape_of_block<Engine>(args.p.call, gpu, sizeof(FewShared), /*wide=*/false);
  const int64_t grid = prepare_few<Engine, kFixed>(args, int64_t{gpu.num_sms} * Engine::kBlocksAnSm);
  launch(gpu, few_kernel<T, Engine, kFixed>, dim3(static_cast<unsigned>(grid)), dim3(shape.warps * 32),
         shape.all_bytes, /*overlap=*/true, args, static_cast<int>(shape.warp_bytes),
         static_cast<int>(shape.query_bytes));
}

// Logits that are scaled products have a kernel of their own, with less code; so has a fixed split.
template <class T, int kDim, Fp8 kFormat, FewCall kCall>
void run_few_call(const FewArgs& args, const Gpu& gpu) {
  using Engine = FewWarp<T, kDim, kFormat, kCall>;
  args.p.fixed_split_size ? run_few<T, Engine, true>(args, gpu) : run_few<T, Engine, false>(args, gpu);
}

template <class T, int kDim, Fp8 kFormat>
void run_few_format(const FewArgs& args, const Gpu& gpu) {
  const BatchAttentionParams& p = args.p;
  const bool is_plain = !p.custom_mask && p.call.logits_soft_cap == 0.0f && !p.call.alibi_slopes;
  if (is_plain && !p.fixed_split_size)
    return run_few<T, FewWarp<T, kDim, kFormat, FewCall::kPlain>, false>(args, gpu);
  run_few_call<T, kDim, kFormat, FewCall::kGeneral>(args, gpu);
}

template <class T, int kDim>
void run_few(const FewArgs& args, const Gpu& gpu) {
  if constexpr (kDim <= kMostRopeDim) {
    if (args.p.call.rope.cos && args.p.rope_len > 0)
      return run_few_call<T, kDim, Fp8::none, FewCall::kRope>(args, gpu);
  }
  args.p.kv_dtype == Fp8::none   ? run_few_format<T, kDim, Fp8::none>(args, gpu)
  : args.p.kv_dtype == Fp8::e4m3 ? run_few_format<T, kDim, Fp8::e4m3>(args, gpu)
                                 : run_few_format<T, kDim, Fp8::e5m2>(args, gpu);
}

}  // namespace fi::cuda::batch
