// The two engines under the attention loop. An engine says how a tile's products are computed and what tile
// suits it; the loop (attention_loop.h) owns everything else.
//
//   Stream: few query rows; reads rows of K and V in place, limited by memory.
//   Packed: many query rows; K and V packed into panels once a call, limited by the unit's arithmetic.
#pragma once

#include "fi/cpu/attention_tasks.h"
#include "fi/cpu/pack.h"
#include "fi/cpu/stream_gemv.h"
#include "fi/cpu/tile_gemm.h"

namespace fi::FI_ISA {

// The unit for rows of bf16.
#if FI_ISA_LEVEL >= 4
using Bf16Unit = AmxUnit;
#elif FI_ISA_LEVEL == 3
using Bf16Unit = Bf16DotUnit;
#else
using Bf16Unit = FmaUnit;
#endif

template <class T>
struct Stream {
  using Query = typename StreamDot<T>::Query;
  using Weight = Query;
  static constexpr bool kPacked = false;
  static constexpr int64_t kMaxRows =
      16;  // above, converting and reducing per query row costs more than packing
  static constexpr int64_t kStepRows = 1;
  static constexpr int64_t kStepCols = kLanes;
  static constexpr int64_t kStepDepth = StreamDot<T>::kStep;
  static constexpr int64_t kStart = 1;            // a tile may be entered at any column
  static constexpr int64_t kMinChunkTiles = 4;    // a chunk's state is small against its keys
  static constexpr int64_t kMaxChunkTiles = 128;  // where requests' lengths differ: balance for many threads
  static constexpr int64_t kTileStep = 16;        // a tile is a multiple
  static constexpr int64_t kPassRows = kMaxRows;
  static constexpr int64_t kAheadBytes = 16384;  // prefetched before they are read: a third of L1
  static constexpr int64_t kTogetherTile = 64;   // keys of a tile of several heads; less: more softmax passes

  static int64_t block_rows(int64_t rows) { return rows; }
  // K and V rows of a tile, about 16 KB each, stay in L1 between the passes.
  static int64_t tile(int64_t head_dim, int64_t) {
    const int64_t t = 16384 / (head_dim * int64_t(sizeof(T)) + 1) / 16 * 16;
    return t < 16 ? 16 : t > 128 ? 128 : t;
  }
  static void begin() {}
  static void end() {}
};

template <class T, class U>
struct Packed {
  using Unit = U;
  using Query = typename Unit::Element;
  using Weight = typename Unit::Element;
  static constexpr bool kPacked = true;
  static constexpr int64_t kStepRows = Unit::kStepRows;
  static constexpr int64_t kStepCols = kLanes > Unit::kStepK ? kLanes : Unit::kStepK;
  static constexpr int64_t kStepDepth = Unit::kStepK;
  static constexpr int64_t kStart = kStepCols;
  static constexpr int64_t kMinChunkTiles = 1;
  static constexpr int64_t kMaxChunkTiles = INT64_MAX;  // states are as large as a tile of keys
  static constexpr int64_t kTileStep = 32;              // a tile is a multiple
  static constexpr int64_t kPassRows = Unit::kPassRows;

  static int64_t block_rows(int64_t rows) {
    return rows < Unit::kTaskRows ? round_up(rows, kStepRows) : Unit::kTaskRows;
  }
  // A tile's K, V, logits and the block's Q and output stay in L2: about 600 KB with AMX (whose machines have
  // 2 MB), 400 KB else.
  static int64_t tile(int64_t head_dim, int64_t kv_len) {
    int64_t t = (FI_ISA_LEVEL >= 4 ? 65536 : 32768) / (head_dim < 64 ? 64 : head_dim) / 32 * 32;
    t = t < 64 ? 64 : t;
    const int64_t all = round_up(kv_len, 32);
    return all < t ? all : t;
  }
  static void begin() { Unit::begin(); }
  static void end() { Unit::end(); }
};

}  // namespace fi::FI_ISA
