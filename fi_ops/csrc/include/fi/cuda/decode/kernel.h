// Decode attention: what a block does with its units, whatever computes the slices.
//
// Per segment: query rows to shared memory, each warp attends to its slices, the warps' results are joined
// over shared memory. A segment that lies in one block is written out; else its blocks leave partial results
// in scratch memory and the last one to arrive joins them, in the order of the blocks, so that the result
// does not depend on which one that was.
#pragma once

#include "fi/cuda/decode/rows.h"
#include "fi/cuda/decode/slices.h"
#include "fi/cuda/launch.h"

namespace fi::cuda::decode {

struct Shared {
  RowTable rows;
  FindShared find;
  float warp_max[kMaxWarps][kMaxRows], warp_sum[kMaxWarps][kMaxRows];
  const float* warp_acc[kMaxWarps];
  int is_last;
};

// Writes four columns of a row.
template <class T, bool kAligned>
FI_DEVICE_INLINE void store_columns(T* out, const float (&x)[4], int columns) {
  if constexpr (kAligned) {
    *reinterpret_cast<uint2*>(out) = uint2{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3])};
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < columns) out[e] = from_float<T>(x[e]);
    }
  }
}

// acc += factor * four floats.
FI_DEVICE_INLINE void add_scaled(float (&acc)[4], const float4& x, float factor) {
  acc[0] = fmaf(x.x, factor, acc[0]);
  acc[1] = fmaf(x.y, factor, acc[1]);
  acc[2] = fmaf(x.z, factor, acc[2]);
  acc[3] = fmaf(x.w, factor, acc[3]);
}

template <class T, class Engine>
class DecodeBlock {
 public:
  FI_DEVICE_INLINE DecodeBlock(const AttentionParams& p, const Plan& plan, unsigned char* query,
                               Shared& shared)
      : p(p), plan(plan), query(query), shared(shared), chunks((static_cast<int>(p.head_dim_vo) + 3) / 4) {}

  FI_DEVICE_INLINE void run(unsigned char* warp_memory) {
    if (plan.lists.entries) wait_for_previous_kernel();
    const Work work = find_work(p, plan, shared.find);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    Engine engine(p, plan, work, query, warp_memory);
    SegmentWalk walk = work.first;
    for (int unit = work.begin; unit < work.end;) {
      const int stop = min(work.end, walk.first_unit + walk.tiles);
      const int slices = slices_of_warp(stop - unit, kTileKeys / Engine::kSliceKeys, warp, warps);
      const SegmentPlace at = place_of(p, plan, Engine::kRows, walk.index);
      const int num_rows = min(Engine::kRows, plan.rows - at.row_begin);
      Engine::load_query(p, plan, at, query);
      if (warp == warps - 1) fill_row_table(p, plan, at, shared.rows);
      __syncthreads();
      engine.begin_segment();
#pragma unroll 1
      for (int n = 0; n < slices; ++n) engine.attend(shared.rows, at, num_rows);
      engine.publish(shared.warp_max[warp], shared.warp_sum[warp], &shared.warp_acc[warp], num_rows,
                     slices > 0);
      __syncthreads();
      finish_segment(work.shares, walk, at, num_rows, engine);
      __syncthreads();
      unit = stop;
      if (unit < work.end) walk.next(p, plan, work.end);
    }
    write_empty_segments();
    // The next kernel in the stream waits for this one only, so this one waits for the one before.
    wait_for_previous_kernel();
  }

 private:
  FI_DEVICE_INLINE int query_head(const SegmentPlace& at, int row) const {
    return at.kv_head * plan.group + (at.row_begin + row) % plan.group;
  }

  // Four columns of a result, and with the first of them the LSE.
  FI_DEVICE_INLINE void write(const SegmentPlace& at, int row, int chunk, float (&acc)[4], float row_max,
                              float row_sum) const {
    const int i = (at.row_begin + row) / plan.group, h = query_head(at, row);
    const RowResult result = finish_row(p, h, row_max, row_sum);
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[e] *= result.factor;
    T* out = static_cast<T*>(p.out) + at.b * p.o_stride_b + h * p.o_stride_h + i * p.o_stride_n;
    store_columns<T, Engine::kAligned>(out + chunk * 4, acc, static_cast<int>(p.head_dim_vo) - chunk * 4);
    if (p.lse && chunk == 0) p.lse[(at.b * p.num_qo_heads + h) * p.qo_len + i] = result.lse;
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
    const int warps = blockDim.x / 32;
    for (int item = threadIdx.x; item < num_rows * chunks; item += blockDim.x) {
      const int row = item / chunks, chunk = item - row * chunks;
      float top = -kInf, sum = 0.0f, acc[4] = {};
      for (int w = 0; w < warps; ++w) top = fmaxf(top, shared.warp_max[w][row]);
      for (int w = 0; w < warps; ++w) {
        const float part = shared.warp_sum[w][row];
        if (part == 0.0f) continue;  // nothing seen; the accumulators may not even be there
        const float factor = exp2_approx(shared.warp_max[w][row] - usable_max(top));
        sum += part * factor;
        add_scaled(acc, *reinterpret_cast<const float4*>(shared.warp_acc[w] + engine.acc_offset(row, chunk)),
                   factor);
      }
      if (left == nullptr) {
        write(at, row, chunk, acc, top, sum);
      } else {
        *reinterpret_cast<float4*>(left + row * plan.acc_width + chunk * 4) =
            float4{acc[0], acc[1], acc[2], acc[3]};
        if (chunk == 0) {
          float* state = left + plan.part_rows * plan.acc_width;
          state[row] = top;
          state[plan.part_rows + row] = sum;
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
      float top = -kInf, sum = 0.0f, acc[4] = {};
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
        float new_top = top;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) new_top = fmaxf(new_top, tops[n]);
        const float shift = usable_max(new_top), keep = exp2_approx(top - shift);
        top = new_top;
        sum *= keep;
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[e] *= keep;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const float factor = exp2_approx(tops[n] - shift);
          sum = fmaf(sums[n], factor, sum);
          add_scaled(acc, accs[n], factor);
        }
      }
      write(at, row, chunk, acc, top, sum);
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
        float nothing[4] = {};
        write(at, item / chunks, item % chunks, nothing, -kInf, 0.0f);
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
__global__ void __launch_bounds__(Engine::kWarps * 32, Engine::kBlocksAnSm)
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

template <class T, class Engine>
void run_decode(const AttentionParams& p, const Gpu& gpu) {
  const size_t warp_bytes = Engine::warp_bytes(p), query_bytes = Engine::query_bytes(p);
  const size_t fixed = query_bytes + sizeof(Shared), all = size_t(gpu.max_block_smem);
  const size_t share = all / Engine::kBlocksAnSm - (Engine::kBlocksAnSm > 1 ? 1024 : 0);
  const size_t room = fixed + warp_bytes <= share ? share : all;
  const int64_t warps = room > fixed ? int64_t((room - fixed) / warp_bytes) : 0;
  if (warps == 0)
    throw std::runtime_error("fi_ops: attention on this GPU has no room for head_dim " +
                             std::to_string(p.head_dim_qk > p.head_dim_vo ? p.head_dim_qk : p.head_dim_vo));
  const int used_warps = static_cast<int>(warps < Engine::kWarps ? warps : Engine::kWarps);

  Plan plan{};
  plan.group = static_cast<int>(p.num_qo_heads / p.num_kv_heads);
  plan.rows = static_cast<int>(plan.group * p.qo_len);
  plan.row_blocks = (plan.rows + Engine::kRows - 1) / Engine::kRows;
  plan.num_segments = static_cast<int>(p.batch * p.num_kv_heads * plan.row_blocks);
  plan.min_units = Engine::kMinUnits;
  plan.part_rows = plan.rows < Engine::kRows ? plan.rows : Engine::kRows;
  plan.acc_width = Engine::acc_width(p);
  const int64_t most_tiles = (p.kv_len + kTileKeys - 1) / kTileKeys;
  const int64_t most_blocks = (plan.num_segments * most_tiles + plan.min_units - 1) / plan.min_units;
  const int64_t room_blocks = int64_t{gpu.num_sms} * Engine::kBlocksAnSm;
  const int grid = static_cast<int>(most_blocks < 1             ? 1
                                    : most_blocks < room_blocks ? most_blocks
                                                                : room_blocks);
  plan.partials = static_cast<float*>(p.scratch.allocate(
      p.scratch.context, int64_t{grid} * 2 * plan.partial_floats() * int64_t(sizeof(float))));
  const bool overlap = prepare(p, plan, gpu);
  launch(gpu, decode_kernel<T, Engine>, dim3(grid), dim3(used_warps * 32), used_warps * warp_bytes + fixed,
         overlap, p, plan, static_cast<int>(warp_bytes), static_cast<int>(query_bytes));
}

}  // namespace fi::cuda::decode
