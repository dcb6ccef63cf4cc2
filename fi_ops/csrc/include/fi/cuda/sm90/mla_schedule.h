// Which keys of which rows a block takes. Nothing is known to the host: every block counts the tiles of all
// requests, comes to the same shares, and takes its own.
//
// An item is a row tile of a request (or as many as there are ranks, one for each of the neighbouring
// blocks); it takes a unit for each of its key tiles. Items lie one after the other, each rounded up to a
// multiple of `granule` units, and each block takes `share` units. With granule 1 all blocks have the same to
// do, but most items are cut, and every cut costs; with a larger one the cuts are at its multiples alone.
#pragma once

#include "fi/cuda/attention_rows.h"
#include "fi/cuda/sm90/mla_config.h"

namespace fi::cuda::sm90 {

inline constexpr int kMlaMostRequests = kMlaTileBytes / 8;

struct MlaShare {
  int64_t begin, end, share;  // in units
  int granule;
};

FI_INLINE MlaUnits mla_units(const Request& r, int num_heads, int ranks) {
  const int rows = static_cast<int>(r.qo_len) * num_heads;
  const int row_tiles = (rows + kMlaRows - 1) / kMlaRows;
  // Rows without keys have a result, too.
  const int tiles = (static_cast<int>(r.kv_len) + kMlaKeys - 1) / kMlaKeys;
  return {rows == 0 ? 0 : tiles > 0 ? tiles : 1, (row_tiles + ranks - 1) / ranks};
}

FI_DEVICE_INLINE int round_up(int x, int to) { return (x + to - 1) / to * to; }

template <class X>
FI_DEVICE_INLINE X warp_sum(X x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

class MlaSchedule {
 public:
  // What a cut costs, in units: the queries' way into shared memory, a partial result's out and in again.
  static constexpr int kCutUnits = 3;

  // By all threads of the block.
  FI_DEVICE_INLINE static MlaShare find(MlaSmem& smem, const MlaArgs& args) {
    MlaUnits* const requests = list(smem);
    const int batch = static_cast<int>(args.p.batch.call.batch);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t tiles = 0, items = 0;
    int most = 0;
    for (int b = threadIdx.x; b < batch; b += kMlaThreads) {
      const MlaUnits units = mla_units(request_of(args.p.batch, b), args.num_heads, args.ranks);
      requests[b] = units;
      tiles += int64_t{units.tiles} * units.items, items += units.items;
      most = max(most, units.tiles);
    }
    tiles = warp_sum(tiles), items = warp_sum(items);
    most = __reduce_max_sync(kAllLanes, most);
    if (lane == 0) {
      atomicAdd(&smem.num_tiles, static_cast<unsigned long long>(tiles));
      atomicAdd(&smem.num_items, static_cast<unsigned long long>(items));
      atomicMax(&smem.most_tiles, most);
    }
    __syncthreads();

    // A granule for each warp to try.
    const int blocks = gridDim.x / args.ranks;
    const int64_t even = (static_cast<int64_t>(smem.num_tiles) + blocks - 1) / blocks;
    most = max(smem.most_tiles, 1);
    int granule = 1;
    if (warp > 0 && warp < 6) granule = (most + warp - 1) / warp;
    if (warp >= 6) granule = static_cast<int>(even < most ? even : most) + warp - 6;
    granule = max(granule, 1);
    int64_t granules = 0;
    for (int b = lane; b < batch; b += 32)
      granules += int64_t{requests[b].items} * ((requests[b].tiles + granule - 1) / granule);
    const int64_t most_granules = (warp_sum(granules) + blocks - 1) / blocks;
    if (lane == 0) {
      smem.granule[warp] = granule;
      smem.share[warp] = most_granules * granule;
      smem.cost[warp] = granule == 1 ? even + (2 + static_cast<int64_t>(smem.num_items) / blocks) * kCutUnits
                                     : most_granules * (granule + kCutUnits);
    }
    __syncthreads();
    int best = 0;
#pragma unroll 1
    for (int i = 1; i < kMlaThreads / 32; ++i)
      if (smem.cost[i] < smem.cost[best]) best = i;
    MlaShare share;
    share.share = smem.share[best] > 0 ? smem.share[best] : 1;
    share.granule = smem.granule[best];
    share.begin = share.share * (blockIdx.x / args.ranks);
    share.end = share.begin + share.share;
    return share;
  }

  FI_DEVICE_INLINE static MlaUnits* list(MlaSmem& smem) { return reinterpret_cast<MlaUnits*>(smem.q); }
};

// A block's pieces, one after the other. By one warp, which looks up 32 requests at a time, one a lane, and
// keeps them in shared memory: it has no registers to spare.
class MlaPieces {
 public:
  FI_DEVICE_INLINE MlaPieces(MlaSmem& smem, const MlaArgs& args, const MlaShare& share)
      : smem_(smem), args_(args), share_(share) {
    // The 32 requests among which the share begins.
    const MlaUnits* const requests = MlaSchedule::list(smem);
    for (first_ = 0; first_ < batch(); first_ += 32) {
      const int b = first_ + lane();
      const int64_t size = warp_sum(
          b < batch() ? int64_t{requests[b].items} * round_up(requests[b].tiles, share_.granule) : 0);
      if (at_ + size > share_.begin) break;
      at_ += size;
    }
    look_up();
    if (lane() < 2) args.parts[2 * blockIdx.x + lane()] = {};
    __syncwarp();
  }

  // False: there is none. The next piece; where it is not whole lane 0 writes down which part it is.
  FI_DEVICE_INLINE bool next(MlaPiece& piece) {
    for (;;) {
      if (share_.begin >= share_.end || first_ >= batch()) return false;
      if (nth_ == 32) {
        first_ += 32;
        look_up();
        continue;
      }
      const int tiles = request().units.tiles;
      const int size = round_up(tiles, share_.granule);
      const int64_t end = at_ + int64_t{request().units.items} * size;
      const int64_t from = share_.begin > at_ ? share_.begin : at_;
      if (from >= end) {
        at_ = end;
        ++nth_;
        continue;
      }
      const int item = static_cast<int>((from - at_) / size);
      const int64_t item_begin = at_ + int64_t{item} * size;
      const int begin = static_cast<int>(from - item_begin);
      const int end_of_item =
          static_cast<int>(share_.end - item_begin < tiles ? share_.end - item_begin : int64_t{tiles});
      share_.begin = min_of(item_begin + size, share_.end);  // what is before is done
      if (begin >= end_of_item) continue;                    // what rounding up has added
      make(piece, item, begin, end_of_item, tiles);
      if (piece.slot >= 0 && lane() == 0) {
        const int block = static_cast<int>(blockIdx.x) / args_.ranks;
        const int first = static_cast<int>(item_begin / share_.share);
        const int last = static_cast<int>((item_begin + tiles - 1) / share_.share);
        args_.parts[2 * blockIdx.x + piece.slot] = {piece.q_begin, piece.row_begin, piece.num_rows,
                                                    last - first + 1, block - first};
      }
      return true;
    }
  }

 private:
  FI_DEVICE_INLINE int batch() const { return static_cast<int>(args_.p.batch.call.batch); }
  FI_DEVICE_INLINE static int lane() { return threadIdx.x % 32; }
  FI_DEVICE_INLINE static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
  FI_DEVICE_INLINE const MlaRequest& request() const { return smem_.requests[nth_]; }

  FI_DEVICE_INLINE void look_up() {
    nth_ = 0;
    const int b = first_ + lane();
    MlaRequest found{};
    if (b < batch()) {
      const Request r = request_of(args_.p.batch, b);
      found.units = mla_units(r, args_.num_heads, args_.ranks);
      found.q_begin = static_cast<int>(r.q_begin), found.qo_len = static_cast<int>(r.qo_len);
      found.kv_begin = static_cast<int>(r.kv_begin), found.kv_len = static_cast<int>(r.kv_len);
    }
    __syncwarp();  // all lanes are done with what lay there
    smem_.requests[lane()] = found;
    __syncwarp();
  }

  FI_DEVICE_INLINE static int tiles_of(int keys) { return (keys + kMlaKeys - 1) / kMlaKeys; }
  // The end of what the last of the request's rows before `row_end` sees.
  FI_DEVICE_INLINE int seen_by(int qo_len, int kv_len, int row_end) const {
    if (!args_.p.batch.call.causal) return kv_len;
    const int query = (min(row_end, qo_len * args_.num_heads) - 1) / args_.num_heads;
    return max(0, min(kv_len, kv_len - qo_len + query + 1));
  }

  FI_DEVICE_INLINE void make(MlaPiece& piece, int item, int begin, int end, int tiles) const {
    const int qo_len = request().qo_len, kv_len = request().kv_len;
    piece.q_begin = request().q_begin, piece.kv_begin = request().kv_begin, piece.kv_len = kv_len;
    piece.row_begin = (item * args_.ranks + static_cast<int>(blockIdx.x) % args_.ranks) * kMlaRows;
    piece.num_rows = max(0, min(qo_len * args_.num_heads - piece.row_begin, kMlaRows));
    piece.q_offset = kv_len - qo_len;
    piece.seen_end = piece.whole_end = kv_len;
    if (args_.p.batch.call.causal) {
      piece.whole_end = seen_by(qo_len, kv_len, piece.row_begin + 1);
      piece.seen_end = seen_by(qo_len, kv_len, piece.row_begin + kMlaRows);
    }
    int seen_tiles = piece.num_rows == 0 ? 0 : tiles_of(piece.seen_end);
    if (args_.shared) seen_tiles = tiles_of(seen_by(qo_len, kv_len, (item + 1) * args_.ranks * kMlaRows));
    piece.first_tile = begin;
    piece.num_tiles = max(0, min(end, seen_tiles) - begin);
    piece.slot = begin > 0 ? 0 : end < tiles ? 1 : -1;
  }

  MlaSmem& smem_;
  const MlaArgs& args_;
  MlaShare share_;
  int first_, nth_ = 0;  // the first of the requests looked up; which of them is at hand
  int64_t at_ = 0;       // its first unit
};

}  // namespace fi::cuda::sm90
