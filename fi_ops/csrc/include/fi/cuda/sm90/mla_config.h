// What the kernel of latent attention is made of: sizes, shared memory, arguments.
#pragma once

#include "fi/cuda/divisor.h"
#include "fi/cuda/sm90/batch_rows.h"
#include "fi/cuda/sm90/mbarrier.h"
#include "fi/cuda/sm90/mla.h"
#include "fi/cuda/sm90/ring.h"
#include "fi/cuda/sm90/warpgroup.h"

namespace fi::cuda::sm90 {

// Who brings the cache into shared memory: the copy engine, for one block or for the two of a cluster, which
// take the same keys; or threads row by row; or threads that widen fp8.
enum class MlaCopies { kBoxes, kSharedBoxes, kRows, kFp8 };

inline constexpr int kCkvDim = 512, kKpeDim = 64;
inline constexpr int kMlaRows = 64;        // of a row tile: (query, head) pairs of one request
inline constexpr int kMlaKeys = 64;        // of a key tile
inline constexpr int kMlaMinBoxRows = 16;  // boxes of fewer keys cost more than copies of rows
// A tile of rows or keys is kept in panels of 64 columns: eight of ckv, the ninth of kpe.
inline constexpr int kMlaPanels = (kCkvDim + kKpeDim) / kBoxColumns, kMlaKpePanel = kMlaPanels - 1;
inline constexpr int kMlaHalfPanels = kCkvDim / kBoxColumns / 2;
inline constexpr int kMlaPanelBytes = kMlaRows * kBoxColumns * 2;
inline constexpr int kMlaTileBytes = kMlaPanels * kMlaPanelBytes;
inline constexpr int kMlaThreads = 3 * kWarpgroupThreads;
// A block starts with 168 a thread, which are shared out anew.
inline constexpr int kMlaProducerRegisters = 88, kMlaConsumerRegisters = 208;
static_assert(kMlaProducerRegisters + 2 * kMlaConsumerRegisters <= 65536 / kMlaThreads / 8 * 8 * 3);

// A row tile with the keys that this block has of it. Queries and keys count from the request's first.
struct MlaPiece {
  int q_begin;              // the request's first token
  int row_begin, num_rows;  // row r is head r % num_heads of query r / num_heads; num_rows -1: no more pieces
  int first_tile, num_tiles;  // of keys
  int kv_begin, kv_len;       // of the request, as in Request
  int q_offset;               // where its query 0 stands
  int seen_end, whole_end;    // keys that some row sees end there; keys that every row sees
  int slot;                   // where the partial result goes, of the block's two; -1: the piece is whole
};

// A request in units of the schedule (mla_schedule.h).
struct MlaUnits {
  int tiles, items;  // key tiles of each item
};

// Where a request's queries and keys begin, and how many there are.
struct MlaRequest {
  MlaUnits units;
  int q_begin, qo_len, kv_begin, kv_len;
};

struct MlaSmem {
  unsigned char q[kMlaTileBytes];  // before the first piece: what MlaSchedule counts
  unsigned char kv[2][kMlaTileBytes];
  float origins[2][kMlaRows];  // what the weights in a place's tile are relative to
  float sums[2][kMlaRows];     // of the weights of each warpgroup's tiles
  MlaPiece pieces[2];
  MlaRequest requests[32];  // among which the producers' first warp looks for pieces
  Barrier pieces_full[2], pieces_empty[2];
  // Of each place the left and the right half of ckv's columns; kpe comes with the half that is not of the
  // place's own warpgroup.
  Barrier full[2][2], empty[2][2];
  Barrier weights[2];  // a tile's weights are there, in the panel of its kpe
  unsigned long long num_tiles, num_items;
  int most_tiles;
  long long share[kMlaThreads / 32], cost[kMlaThreads / 32];
  int granule[kMlaThreads / 32];
};

// A partial result: of which rows, and the how manieth of how many parts it is. They are neighbouring
// blocks'.
struct MlaPart {
  int q_begin, row_begin, num_rows;  // as in MlaPiece
  int parts, index;                  // parts 0: there is no partial result
};

// A partial result: sums of weighted values, then of each row what they are relative to, then the weights'
// sum.
inline constexpr int kMlaPartialFloats = kMlaRows * (kCkvDim + 2);

struct MlaArgs {
  MlaParams p;
  float scale_log2;
  int num_heads;
  Divisor by_num_heads, by_page_size;
  int ranks;    // neighbouring blocks that take the same keys, of one row tile each
  bool shared;  // and of the same number of key tiles
  int box_rows;
  CacheRows ckv, kpe;  // unless the copy engine reads them
  float* partials;     // of each block two: of rows that blocks before have begun, of rows that it begins
  MlaPart* parts;      // what they are
};

}  // namespace fi::cuda::sm90
