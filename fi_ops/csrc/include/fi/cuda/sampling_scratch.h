// What the selection of a row's tokens keeps in shared memory.
//
// Peers write into `inbox`, `of_blocks` (or `of_few_blocks`), `maxima`, `totals`, `all` and what follows it.
// What shares room with those is only used when a barrier of the team lies between.
#pragma once

#include "fi/cuda/sampling_slice.h"
#include "fi/cuda/team.h"

namespace fi::cuda {

inline constexpr int kSampleThreads = 512, kSampleWarps = kSampleThreads / 32;
inline constexpr int kBins = 1024, kFineBits = 9, kFineBins = 1 << kFineBits;
inline constexpr uint32_t kListed = 2048;   // tokens that the list can hold, an equal part for each block
inline constexpr uint32_t kShort = 512;     // so few are compared each with each
inline constexpr uint32_t kGuessed = 1536;  // so many, blocks' parts being uneven, are likely to fit

struct FineHistogram {
  uint64_t values[kFineBins];  // counts or weights
  uint32_t counts[kFineBins];
};

// A few tokens, sorted.
struct ShortList {
  uint64_t tokens[kShort];  // places, in no order
  uint64_t sorted[kShort];
  uint32_t id_rank[kShort];  // of sorted[i]: how many of the list have a lower id
  uint32_t ranks[kShort];    // of tokens[i]: lower half by place, upper half by id
};

// A weight for each warp of the team.
struct WarpSums {
  uint64_t values[kMaxTeam * kSampleWarps];

  // Makes this warp's sum known to all blocks; a sync of the team ends it.
  __device__ void tell(const Team<kSampleThreads>& team, uint64_t of_thread) {
    const uint64_t of_warp = team.sum_of_warp(of_thread);
    team.tell_all(&values[team.rank * kSampleWarps + threadIdx.x / 32], of_warp);
  }
  __device__ uint64_t total(const Team<kSampleThreads>& team) const {
    uint64_t sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < kMaxTeam * kSampleWarps; i += 32)
      if (i < team.size * kSampleWarps)
        sum += i + threadIdx.x % 32 < team.size * kSampleWarps ? values[i + threadIdx.x % 32] : 0;
    return team.sum_of_warp(sum);
  }
};

struct SelectScratch {
  union {
    struct {
      uint32_t counts[kBins];  // this block's tokens by bin
      uint32_t inbox[kBins];
    } wide_bins;
    struct {
      uint32_t counts[kBins];
      union {
        uint16_t of_blocks[kMaxTeam][kBins];
        uint32_t of_few_blocks[kMaxTeam / 2][kBins];
      };
    } bins;
    struct {
      FineHistogram fine;  // of this block
      uint64_t inbox[kFineBins];
    } narrow;
    uint64_t found[kListed];  // this block's tokens of the list
    struct {
      uint64_t parts[kFineBins];
      uint64_t places[kShort], values[kShort];
    } end;
    uint32_t maxima[kMaxTeam][kSampleThreads / 2];  // order keys of the largest logits of pairs of threads
    ShortList brief;
  } own;
  uint32_t totals[kBins];  // the row's tokens by bin (without the last one)
  union {
    FineHistogram fine;      // of the row
    uint64_t list[kListed];  // places; each block's part in no order
  } all;
  uint32_t list_sizes[kMaxTeam];  // of the parts; more than there is room for: it has overflown
  WarpSums of_row;                // of all tokens, or of those that top-k left
  WarpSums kept;                  // of what is kept
  uint64_t mass;                  // of the row
  uint64_t answer[4];
  uint32_t num_found;  // by this block; 0 between lists
};

}  // namespace fi::cuda
