// Decode attention: what a block does with its units, whatever computes the slices.
//
// Per segment: query rows to shared memory, each warp attends to its slices, the warps' results are joined
// over shared memory. A segment that lies in one block is written out; else its blocks leave partial results
// in scratch memory and the last one to arrive joins them, in the order of the blocks, so that the result
// does not depend on which one that was.
#pragma once

#include "fi/cuda/decode/finish.h"
#include "fi/cuda/decode/rope.h"
#include "fi/cuda/decode/slices.h"
#include "fi/cuda/launch.h"

namespace fi::cuda::decode {

struct Shared {
  RowTable rows;
  FindShared find;
  WarpResults results;
  int is_last;
};

template <class T, class Engine>
class DecodeBlock {
 public:
  FI_DEVICE_INLINE DecodeBlock(const AttentionParams& p, const Plan& plan, unsigned char* query,
                               Shared& shared)
      : p(p), plan(plan), query(query), shared(shared), chunks(Engine::row_chunks(p)) {}

  FI_DEVICE_INLINE void run(unsigned char* warp_memory) {
    if (plan.lists.entries) wait_for_previous_kernel();
    const Work work = find_work(p, plan, shared.find);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const auto place = [&](int segment) { return place_of(p, plan, Engine::kRows, segment); };
    typename Engine::Query rows;
    SegmentWalk walk = work.first;
    if (work.begin < work.end) rows.fetch(p, plan, place(walk.index));
    Engine engine(p, plan, typename Engine::Cursor(p, plan, work), query, warp_memory);
    if (work.begin < work.end) rows.finish(p, plan, place(walk.index));
    for (int unit = work.begin; unit < work.end;) {
      const SegmentWalk here = walk;
      const SegmentPlace at = place(here.index);
      const int stop = min(work.end, here.first_unit + here.tiles);
      const int slices = slices_of_warp(stop - unit, kTileKeys / Engine::kSliceKeys, warp, warps);
      const int num_rows = min(Engine::kRows, plan.rows - at.row_begin);
      rows.store(p, plan, at, query);
      if (warp == warps - 1) fill_row_table(p, plan, at, shared.rows);
      __syncthreads();
      engine.begin_segment();
      unit = stop;
      if (unit < work.end) {
        walk.next(p, plan, work.end);
        rows.fetch(p, plan, place(walk.index));
        rows.finish(p, plan, place(walk.index));  // here, where few registers are taken
      }
#pragma unroll 1
      for (int n = 0; n < slices; ++n) engine.attend(shared.rows, at, num_rows);
      engine.publish(shared.results.max[warp], shared.results.sum[warp], &shared.results.acc[warp], num_rows,
                     slices > 0);
      __syncthreads();
      finish_segment(work.shares, here, at, num_rows, engine);
      __syncthreads();
    }
    write_empty_segments();
    // The next kernel in the stream waits for this one only, so this one waits for the one before.
    wait_for_previous_kernel();
  }

 private:
  FI_DEVICE_INLINE void write(const SegmentPlace& at, int row, int chunk, const Part& part) const {
    write_columns<T, Engine::kAligned>(p, plan, at, row, chunk, part);
  }

  FI_DEVICE_INLINE float* partial(int block, int slot) const {
    return plan.partials + (int64_t{block} * 2 + slot) * plan.partial_floats();
  }

  // Joins the warps' results.
  FI_DEVICE_INLINE void finish_segment(const Shares& shares, const SegmentWalk& walk, const SegmentPlace& at,
                                       int num_rows, const Engine& engine) {
    const int first = shares.block_of(walk.first_unit);
    const int last = shares.block_of(walk.first_unit + walk.tiles - 1);
    float* left = first == last ? nullptr : partial(blockIdx.x, static_cast<int>(blockIdx.x) == first);
    for (int item = threadIdx.x; item < num_rows * chunks; item += blockDim.x) {
      const int row = item / chunks, chunk = item - row * chunks;
      if (chunk * 4 >= p.head_dim_vo) continue;
      const Part part = join_warps(shared.results, engine, row, chunk);
      if (left == nullptr) {
        write(at, row, chunk, part);
      } else {
        *reinterpret_cast<float4*>(left + row * plan.acc_width + chunk * 4) =
            float4{part.acc[0], part.acc[1], part.acc[2], part.acc[3]};
        if (chunk == 0) {
          float* state = left + plan.part_rows * plan.acc_width;
          state[row] = part.max;
          state[plan.part_rows + row] = part.sum;
        }
      }
    }
    if (left == nullptr) return;
    __syncthreads();
    if (threadIdx.x == 0) {
      wait_for_previous_kernel();  // which has zeroed the counters
      shared.is_last = atomic_add_acq_rel(&plan.arrivals[walk.index], 1) == last - first;
    }
    __syncthreads();
    if (shared.is_last) join_blocks(at, num_rows, first, last);
  }

  // The partial results of blocks [first, last], in that order; so many loads in flight that two or three
  // round trips to L2 do.
  FI_DEVICE_INLINE void join_blocks(const SegmentPlace& at, int num_rows, int first, int last) const {
    constexpr int kAtOnce = 12;
    const int state = plan.part_rows * plan.acc_width;
    for (int item = threadIdx.x; item < num_rows * chunks; item += blockDim.x) {
      const int row = item / chunks, chunk = item - row * chunks;
      if (chunk * 4 >= p.head_dim_vo) continue;
      Part all;
      for (int block = first; block <= last; block += kAtOnce) {
        float tops[kAtOnce], sums[kAtOnce];
        float4 accs[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          tops[n] = -kInf, sums[n] = 0.0f, accs[n] = float4{0.0f, 0.0f, 0.0f, 0.0f};
          if (block + n > last) continue;
          const float* part = partial(block + n, block + n == first);
          tops[n] = __ldcg(part + state + row);
          sums[n] = __ldcg(part + state + plan.part_rows + row);
          accs[n] = __ldcg(reinterpret_cast<const float4*>(part + row * plan.acc_width + chunk * 4));
        }
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
      write(at, row, chunk, all);
    }
  }

  // Segments with no live tile belong to no block.
  FI_DEVICE_INLINE void write_empty_segments() const {
    if (plan.uniform_tiles > 0) return;
    for (int segment = blockIdx.x; segment < plan.num_segments; segment += gridDim.x) {
      if (tiles_of_group(p, plan, segment / plan.group_segments) > 0) continue;
      const SegmentPlace at = place_of(p, plan, Engine::kRows, segment);
      const int num_rows = min(Engine::kRows, plan.rows - at.row_begin);
      for (int item = threadIdx.x; item < num_rows * chunks; item += blockDim.x) {
        if (item % chunks * 4 < p.head_dim_vo) write(at, item / chunks, item % chunks, Part{});
      }
    }
  }

  const AttentionParams& p;
  const Plan& plan;
  unsigned char* query;
  Shared& shared;
  int chunks;  // of four columns
};

// Dynamic shared memory: the warps' parts, the query rows, Shared.
template <class T, class Engine>
__global__ void __launch_bounds__(Engine::kSmWarps / Engine::kBlocksAnSm * 32, Engine::kBlocksAnSm)
    decode_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Plan plan,
                  int warp_bytes, int query_bytes) {
  unsigned char* smem = dynamic_smem();
  unsigned char* query = smem + static_cast<int>(blockDim.x / 32) * warp_bytes;
  DecodeBlock<T, Engine> block(p, plan, query, *reinterpret_cast<Shared*>(query + query_bytes));
  block.run(smem + static_cast<int>(threadIdx.x / 32) * warp_bytes);
}

// Fills the rest of the plan; runs the kernel that zeroes the counters and lists live tiles, where there is
// need of it, and says so.
bool prepare(const AttentionParams& p, Plan& plan, const Gpu& gpu);

// Warps of a block and their shared memory.
struct BlockShape {
  int warps;
  size_t warp_bytes, query_bytes, all_bytes;
};

// `wide`: one block an SM of all kSmWarps; else kBlocksAnSm, which share them.
template <class Engine>
BlockShape shape_of_block(const AttentionParams& p, const Gpu& gpu, size_t shared_bytes, bool wide) {
  const int blocks = wide ? 1 : Engine::kBlocksAnSm, most_warps = Engine::kSmWarps / blocks;
  BlockShape shape{0, Engine::warp_bytes(p), Engine::query_bytes(p), 0};
  const size_t fixed = shape.query_bytes + shared_bytes, all = size_t(gpu.max_block_smem);
  const size_t share = all / blocks - (blocks > 1 ? 1024 : 0);
  const size_t room = fixed + shape.warp_bytes <= share ? share : all;
  const int64_t warps = room > fixed ? int64_t((room - fixed) / shape.warp_bytes) : 0;
  if (warps == 0)
    throw std::runtime_error("fi_ops: attention on this GPU has no room for head_dim " +
                             std::to_string(p.head_dim_qk > p.head_dim_vo ? p.head_dim_qk : p.head_dim_vo));
  shape.warps = static_cast<int>(warps < most_warps ? warps : most_warps);
  shape.all_bytes = shape.warps * shape.warp_bytes + fixed;
  return shape;
}

template <class Engine>
Plan plan_of(const AttentionParams& p) {
  Plan plan{};
  plan.group = static_cast<int>(p.num_qo_heads / p.num_kv_heads);
  plan.rows = static_cast<int>(plan.group * p.qo_len);
  plan.row_blocks = (plan.rows + Engine::kRows - 1) / Engine::kRows;
  plan.num_segments = static_cast<int>(p.batch * p.num_kv_heads * plan.row_blocks);
  plan.rope_chunks = rope_takes_chunks(p.rope);
  plan.range = range_is_data(p) ? KeyRange{0, 0} : allowed_keys(p, 0);
  return plan;
}

template <class T, class Engine>
void run_decode(const AttentionParams& p, const Gpu& gpu) {
  const BlockShape shape = shape_of_block<Engine>(p, gpu, sizeof(Shared), /*wide=*/false);
  Plan plan = plan_of<Engine>(p);
  plan.min_units = Engine::kMinUnits;
  plan.part_rows = plan.rows < Engine::kRows ? plan.rows : Engine::kRows;
  plan.acc_width = Engine::acc_width(p);
  const int64_t most_tiles = (p.kv_len + kTileKeys - 1) / kTileKeys;
  const int64_t most_blocks = (plan.num_segments * most_tiles + plan.min_units - 1) / plan.min_units;
  // Where no segment comes into many parts, more blocks than have room at once: SMs differ in speed, and a
  // faster one takes more of them.
  int64_t room_blocks = int64_t{gpu.num_sms} * Engine::kBlocksAnSm;
  if (plan.num_segments >= room_blocks / 4) room_blocks *= 2;
  const int grid = static_cast<int>(most_blocks < 1             ? 1
                                    : most_blocks < room_blocks ? most_blocks
                                                                : room_blocks);
  plan.partials = static_cast<float*>(p.scratch.allocate(
      p.scratch.context, int64_t{grid} * 2 * plan.partial_floats() * int64_t(sizeof(float))));
  const bool overlap = prepare(p, plan, gpu);
  launch(gpu, decode_kernel<T, Engine>, dim3(grid), dim3(shape.warps * 32), shape.all_bytes, overlap, p, plan,
         static_cast<int>(shape.warp_bytes), static_cast<int>(shape.query_bytes));
}

}  // namespace fi::cuda::decode
