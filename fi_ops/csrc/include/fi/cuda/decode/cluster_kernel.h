// Decode attention where segments have about the same keys: a cluster of blocks takes one segment.
//
// Each block attends to a run of the segment's slices; the blocks join over distributed shared memory. So
// there is no scratch memory, no counter and no other kernel, and no block has a second segment to go on to.
#pragma once

#include <algorithm>

#include "fi/cuda/cluster.h"
#include "fi/cuda/decode/finish.h"
#include "fi/cuda/decode/kernel.h"
#include "fi/cuda/decode/row_scan.h"
#include "fi/cuda/decode/tensor_cores.h"

namespace fi::cuda::decode {

inline constexpr int kMaxCluster = 8;
inline constexpr int kLongShare = 512;  // slices of a block

// A warp's slices of its block's run.
template <int kSliceKeys, int kRows>
class RunCursor {
 public:
  static constexpr bool kOneMaskRow = true;

  // Slices [at, end) of the segment, every warps-th of them: of the live tiles, where the call has a mask,
  // else of `keys`, from the slice on that holds the first one.
  FI_DEVICE_INLINE RunCursor(const SegmentPlace& place, int at, int end, bool masked, const LiveTiles& tiles,
                             KeyRange keys)
      : place_(place), at_(at), end_(end), keys_(keys), masked_(masked), tiles_(tiles) {}

  FI_DEVICE_INLINE bool done() const { return at_ >= end_; }
  FI_DEVICE_INLINE const SegmentPlace& place() const { return place_; }
  FI_DEVICE_INLINE int key_begin() const { return keys_.begin; }
  FI_DEVICE_INLINE int key_end() const { return keys_.end; }
  FI_DEVICE_INLINE bool entered() const { return entered_; }
  FI_DEVICE_INLINE Slice slice() const {
    if (!masked_) return {(keys_.begin / kSliceKeys + at_) * kSliceKeys, true};
    constexpr int kSlicesATile = kTileKeys / kSliceKeys;
    const int32_t entry = tiles_.entry(at_ / kSlicesATile);
    return {tile_index(entry) * kTileKeys + at_ % kSlicesATile * kSliceKeys, tile_open(entry)};
  }
  FI_DEVICE_INLINE void step() {
    entered_ = false;
    at_ += blockDim.x / 32;
  }

 private:
  SegmentPlace place_;
  int at_, end_;
  KeyRange keys_;
  bool masked_;
  LiveTiles tiles_;
  bool entered_ = true;
};

struct alignas(16) ClusterShared {
  RowTable rows;
  WarpResults results;
  RowScanShared scan;
};

// Of a row, in one block of the cluster.
struct alignas(8) PartState {
  float max, sum;
};

template <class T, class Engine>
class ClusterBlock {
 public:
  FI_DEVICE_INLINE ClusterBlock(const AttentionParams& p, const Plan& plan, unsigned char* query,
                                ClusterShared& shared)
      : p(p), plan(plan), query(query), shared(shared), rank(blockIdx.x), parts(gridDim.x) {}

  // Where there is more than one block, shared memory after ClusterShared: what the others send.
  static constexpr size_t kReceivedBytes =
      size_t{Engine::kRows} * Engine::kRowChunks * (sizeof(float4) + sizeof(PartState));

  FI_DEVICE_INLINE void run(unsigned char* warp_memory) {
    wait_for_previous_kernel();
    if (parts > 1) cluster_arrive_relaxed();  // waited for where others' shared memory is written to
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int head = plan.row_blocks == 1 ? blockIdx.y : blockIdx.y / plan.row_blocks;
    const SegmentPlace at{static_cast<int>(blockIdx.z), head,
                          (static_cast<int>(blockIdx.y) - head * plan.row_blocks) * Engine::kRows};
    const int num_rows = min(Engine::kRows, plan.rows - at.row_begin);
    const KeyRange keys = keys_of(at.b);
    LiveTiles tiles;
    int slices = (keys.end + Engine::kSliceKeys - 1) / Engine::kSliceKeys - keys.begin / Engine::kSliceKeys;
    if (p.mask && slices > 0) {
      tiles.find<Engine::kPlain>(p, at.b, keys, shared.scan);
      slices = tiles.count() * (kTileKeys / Engine::kSliceKeys);
    }
    // Not before the scan: its first load would wait for these (registers that its loop may have in flight).
    typename Engine::Query rows;
    rows.fetch(p, plan, at);
    const int share = slices >> log2_parts(), extra = slices & (parts - 1);
    const int begin = rank * share + min(rank, extra), end = begin + share + int(rank < extra);
    // Not worth it for a long call, which the next one's blocks get in the way of: large clusters that come
    // to lie between this call's took 59 us instead of 48 for 32768 keys, single blocks of 16384 keys 1%
    // longer.
    if (share <= (parts <= 2 ? kLongShare : 2 * Engine::kRingSlices * warps)) allow_next_kernel();
    Engine engine(p, plan, typename Engine::Cursor(at, begin + warp, end, p.mask, tiles, keys), query,
                  warp_memory);
    rows.finish(p, plan, at);
    rows.store(p, plan, at, query, &shared.rows, /*appends=*/rank == 0 && at.row_begin == 0);
    if (!Engine::kPlain && warp == warps - 1) fill_row_table(p, plan, at, shared.rows);
    __syncthreads();
    engine.begin_segment();
#pragma unroll 1
    for (int n = begin + warp; n < end; n += warps) engine.attend(shared.rows, at, num_rows);
    engine.publish(shared.results.max[warp], shared.results.sum[warp], &shared.results.acc[warp], num_rows,
                   begin + warp < end);
    __syncthreads();
    if (parts > 1) cluster_wait();
#pragma unroll 1
    for (int item = threadIdx.x; item < num_rows * kChunks; item += blockDim.x) {  // four columns each
      const int row = item / kChunks, chunk = item % kChunks;
      if (chunk * 4 >= p.head_dim_vo) continue;
      const Part part = join_warps(shared.results, engine, row, chunk);
      if (parts > 1) {
        send(num_rows, row, chunk, part);
      } else {
        write_columns<T, Engine::kAligned, Engine::kPlain>(p, plan, at, row, chunk, part);
      }
    }
    if (parts == 1) return;
    cluster_arrive();
    cluster_wait();
    join_parts(at, num_rows);
  }

 private:
  static constexpr int kChunks = Engine::kRowChunks;

  FI_DEVICE_INLINE KeyRange keys_of(int b) const {
    if constexpr (!Engine::kPlain) return range_of(p, plan, b);
    // The rows have the same keys: no loop over them.
    return range_is_data(p) ? keys_of_position(p, p.query_positions.at(b, 0)) : plan.range;
  }

  // Block n of the cluster joins and writes the n-th part of each row; both numbers are powers of two.
  FI_DEVICE_INLINE int log2_parts() const { return 31 - __clz(parts); }
  FI_DEVICE_INLINE int log2_own_chunks() const { return 31 - __clz(kChunks) - log2_parts(); }
  FI_DEVICE_INLINE int slot_of(int num_rows, int part, int row, int own_chunk) const {
    return ((part * num_rows + row) << log2_own_chunks()) + own_chunk;
  }
  FI_DEVICE_INLINE float4* received() const { return reinterpret_cast<float4*>(&shared + 1); }
  FI_DEVICE_INLINE PartState* received_states() const {
    return reinterpret_cast<PartState*>(received() + Engine::kRows * kChunks);
  }

  // Stores to another block's shared memory are not waited for, as loads from there would be.
  FI_DEVICE_INLINE void send(int num_rows, int row, int chunk, const Part& part) const {
    const int owner = chunk >> log2_own_chunks();
    const int slot = slot_of(num_rows, rank, row, chunk - (owner << log2_own_chunks()));
    *peer_smem(received() + slot, owner) = float4{part.acc[0], part.acc[1], part.acc[2], part.acc[3]};
    *peer_smem(received_states() + slot, owner) = PartState{part.max, part.sum};
  }

  // A lane for each part, sums in the order of a tree.
  FI_DEVICE_INLINE void join_parts(const SegmentPlace& at, int num_rows) const {
    const int own_chunks = 1 << log2_own_chunks(), items = num_rows * own_chunks;
    const int part = static_cast<int>(threadIdx.x) & (parts - 1);
#pragma unroll 1
    for (int start = 0; start < items; start += static_cast<int>(blockDim.x) >> log2_parts()) {
      const int item = start + (static_cast<int>(threadIdx.x) >> log2_parts());
      const int row = item >> log2_own_chunks(), own_chunk = item & (own_chunks - 1);
      const int chunk = rank * own_chunks + own_chunk;
      const bool inside = item < items && chunk * 4 < p.head_dim_vo;
      PartState state{-kInf, 0.0f};
      float4 acc{0.0f, 0.0f, 0.0f, 0.0f};
      if (inside) {
        const int slot = slot_of(num_rows, part, row, own_chunk);
        state = received_states()[slot];
        acc = received()[slot];
      }
      Part all;
      all.max = state.max;
#pragma unroll
      for (int other = 1; other < kMaxCluster; other *= 2) {
        if (other < parts) all.max = fmaxf(all.max, __shfl_xor_sync(~0u, all.max, other));
      }
      const float factor = exp2_approx(state.max - usable_max(all.max));
      all.sum = state.sum * factor;
      all.add_scaled(acc, factor);
#pragma unroll
      for (int other = 1; other < kMaxCluster; other *= 2) {
        if (other >= parts) break;
        all.sum += __shfl_xor_sync(~0u, all.sum, other);
#pragma unroll
        for (int e = 0; e < 4; ++e) all.acc[e] += __shfl_xor_sync(~0u, all.acc[e], other);
      }
      if (inside && part == 0)
        write_columns<T, Engine::kAligned, Engine::kPlain>(p, plan, at, row, chunk, all);
    }
  }

  const AttentionParams& p;
  const Plan& plan;
  unsigned char* query;
  ClusterShared& shared;
  int rank, parts;
};

// Dynamic shared memory: the warps' parts, the query rows, ClusterShared, what is received.
template <class T, class Engine>
__global__ void __launch_bounds__(Engine::kSmWarps * 32, 1)
    cluster_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Plan plan,
                   int warp_bytes, int query_bytes) {
  unsigned char* smem = dynamic_smem();
  unsigned char* query = smem + static_cast<int>(blockDim.x / 32) * warp_bytes;
  ClusterBlock<T, Engine> block(p, plan, query, *reinterpret_cast<ClusterShared*>(query + query_bytes));
  block.run(smem + static_cast<int>(threadIdx.x / 32) * warp_bytes);
}

// How segments become blocks.
struct ClusterPlan {
  int blocks;  // of a segment; 0: other kernels share the work out better
  bool wide;   // blocks of kSmWarps warps, one an SM; else half of that, two an SM
};

// The unit of time is a tile's, at one of 2 x num_sms equal shares of the bandwidth. A block that the others
// leave more gets up to four shares. What decode_kernel adds to its tiles is its other kernel, scratch
// memory, counters, and second segments of blocks; here a block's start and end, most of which the other
// block of the SM hides, and the cluster's join.
//
// With a mask, or a position, for each batch entry nobody knows here how many tiles live. All clusters must
// run at once, so that none begins late, and with as many blocks as can: the longest segment then ends
// soonest. Where the clusters can't take all of the bandwidth at their most shares, even shares of the tiles
// end sooner.
inline ClusterPlan plan_clusters(const AttentionParams& p, const Plan& plan, const Gpu& gpu) {
  constexpr int64_t kMostBlocks = 65535;  // of grid.y and grid.z
  constexpr double kMostShares = 4.0, kOther = 7.0, kRound = 0.25, kJoin = 0.5;
  const bool takes = p.mask == nullptr || row_scan_takes(p);
  if (!takes || p.batch > kMostBlocks || plan.num_segments / p.batch > kMostBlocks) return {0, false};
  const int64_t slots = int64_t{gpu.num_sms} * 2, segments = plan.num_segments;
  const double tiles = double(range_is_data(p) ? p.kv_len : plan.range.end - plan.range.begin) / kTileKeys;
  const bool ragged = p.batch > 1 && ((p.mask && p.mask_stride_b != 0) || keys_differ_by_batch(p));
  double best = segments * tiles / slots + kOther;
  int blocks = 0;
  for (int n = 1; n <= (has_clusters(gpu) ? kMaxCluster : 1); n *= 2) {
    if (n > 1 && tiles * 2 < n) break;  // not two slices for a block
    if (ragged) {
      if (segments * n > slots) break;
      blocks = segments * n * kMostShares < slots ? 0 : n;
      continue;
    }
    const int64_t full = segments * n / slots, rest = segments * n - full * slots;
    const double each = tiles / n;
    const double time = full * (each + kRound) + (n > 1 ? kJoin : 0.0) +
                        (rest > 0 ? std::max(rest * each / slots, each / kMostShares) + kRound : 0.0);
    if (time < best) best = time, blocks = n;
  }
  // SMs come in groups in which a cluster must find room; a quarter of them may be left over.
  const int64_t room = blocks > 1 ? gpu.num_sms * 3 / 4 : gpu.num_sms;
  return {blocks, segments * blocks <= room};
}

// Whether a call's new rows can be read 16 bytes at a time, as its cache can. A stride that is never used may
// be anything.
inline bool appends_fit(const AppendParams& append) {
  auto aligned = [&](const void* data, int64_t b, int64_t h, int64_t n) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (append.batch == 1 || b % 8 == 0) &&
           (append.num_kv_heads == 1 || h % 8 == 0) && (append.new_len == 1 || n % 8 == 0);
  };
  return aligned(append.key, append.k_stride_b, append.k_stride_h, append.k_stride_n) &&
         aligned(append.value, append.v_stride_b, append.v_stride_h, append.v_stride_n);
}

inline NewRows new_rows(const AppendParams& append) {
  return {append.key,        append.value,
          append.k_stride_b, append.k_stride_h,
          append.k_stride_n, append.v_stride_b,
          append.v_stride_h, append.v_stride_n,
          append.positions,  static_cast<int>(append.new_len)};
}

template <class T, class Engine>
void launch_cluster_kernel(const AttentionParams& p, const Plan& plan, int blocks, const BlockShape& shape,
                           const Gpu& gpu) {
  const dim3 grid(blocks, unsigned(plan.num_segments / p.batch), unsigned(p.batch));
  launch_clusters(gpu, cluster_kernel<T, Engine>, grid, blocks, dim3(shape.warps * 32), shape.all_bytes,
                  /*overlap=*/true, p, plan, static_cast<int>(shape.warp_bytes),
                  static_cast<int>(shape.query_bytes));
}

// `append`: what goes into the cache first; null: nothing.
template <class T, int kDimQK, int kDimVO = kDimQK>
void run_on_tensor_cores(const AttentionParams& p, const AppendParams* append, const Gpu& gpu) {
  using Cursor = RunCursor<16, 16>;
  using General = TensorCores<T, kDimQK, kDimVO, Cursor>;
  using Plain = TensorCores<T, kDimQK, kDimVO, Cursor, true>;
  Plan plan = plan_of<General>(p);
  const ClusterPlan clusters = plan_clusters(p, plan, gpu);
  const size_t received = clusters.blocks > 1 ? ClusterBlock<T, General>::kReceivedBytes : 0;
  BlockShape shape{};
  const auto shape_blocks = [&](NewRows added) {
    plan.added = added;
    const size_t bytes = General::added_bytes(plan);
    shape = shape_of_block<General>(p, gpu, sizeof(ClusterShared) + received + bytes, clusters.wide);
    shape.query_bytes += bytes;
  };
  const auto holds_all = [&] { return Plain::Query::holds_all(plan, shape.warps * 32); };
  if (clusters.blocks > 0) {
    const bool can_add = append && appends_fit(*append) && (p.rope.cos == nullptr || plan.rope_chunks);
    shape_blocks(can_add ? new_rows(*append) : NewRows{});
    if (!holds_all()) shape_blocks(NewRows{});
  }
  if (append && plan.added.count == 0) append_kv(*append, gpu);
  if (clusters.blocks == 0) {
    run_decode<T, TensorCores<T, kDimQK, kDimVO>>(p, gpu);
  } else if (is_plain(p, plan) && holds_all()) {
    launch_cluster_kernel<T, Plain>(p, plan, clusters.blocks, shape, gpu);
  } else {
    launch_cluster_kernel<T, General>(p, plan, clusters.blocks, shape, gpu);
  }
}

}  // namespace fi::cuda::decode
