// The product of up to 16 input rows with a weight that is read once. Memory bound, so everything here is
// about keeping reads of the weight in flight, from a kernel's first block to the next kernel's.
//
// A unit is 8 rows of the weight x 128 columns. Every warp has a ring of units in shared memory, filled by
// its own copies, so no barrier stands between a copy and its use. The warps of a block split the columns
// (of every 8 units side by side each takes one), and the block's tiles, 8 rows of the weight each, come one
// after the other through the rings, which never drain in between. The input stays in registers: a pass takes
// as many columns as fit there over up to kGroup tiles, then the next columns replace them.
//
// Sums are taken in one order whatever the number of rows: over kSumUnits units of a warp by the tensor
// cores, over the warps, over the columns' next kSumUnits * 8 units. A row's result depends on that row only.
#pragma once

#include "fi/cuda/launch.h"
#include "fi/cuda/ptx.h"
#include "fi/cuda/rowops.h"
#include "fi/linear.h"

namespace fi::cuda {

template <class T_, int Rows, int Slots, int Warps = 8, int PrefetchBytes = 128 * 1024,
          bool LateTrigger = true, int BlocksPerSm = 2, int Units = 32 / Rows>
struct LinearStream {
  using T = T_;
  static constexpr int kRows = Rows;    // of the input, a block: 8 or 16
  static constexpr int kSlots = Slots;  // units in a warp's ring
  static constexpr int kWarps = Warps;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTile = 8;    // rows of the weight
  static constexpr int kUnit = 128;  // columns of the weight
  static constexpr int kUnitBytes = kTile * kUnit * 2;
  static constexpr int kUnits = Units;  // of a warp in a pass: 64 registers of the input's fragments
  static constexpr int kSumUnits = 2;   // of a warp between two sums over the warps
  static constexpr int kSums = kUnits / kSumUnits;
  static constexpr int kPass = kUnits * kWarps * kUnit;  // columns
  static constexpr int kGroup = 16;                      // tiles
  static constexpr int kOutputs = kRows * kTile;
  static constexpr int kPrefetched = PrefetchBytes / (kPass * kTile * 2);  // passes over a tile
  static constexpr bool kLateTrigger = LateTrigger;
  static constexpr int kBlocksPerSm = BlocksPerSm;
  static_assert(kOutputs <= kThreads && kUnits % kSumUnits == 0 && sizeof(T) == 2, "");

  struct Smem {
    unsigned char ring[kWarps][kSlots][kUnitBytes];
    float warp_sums[2][kSums][kWarps][kOutputs];  // of a pass over a tile, for two tiles in turn
    float tile_sums[kGroup][kOutputs];            // of the passes before this one
  };
};

// The tiles of a block and the units of a warp, in the order in which they are read: groups of tiles, in a
// group passes over the columns, in a pass the group's tiles, in a tile the warp's units.
template <class C>
struct LinearWalk {
  int num_tiles;  // of the block; tile i is number blockIdx.x + i * gridDim.x of the weight's
  int num_units;  // of the warp, in all passes
  int tile = 0, pass = 0, unit = 0;

  FI_DEVICE_INLINE LinearWalk(int tiles, int units) : num_tiles(units > 0 ? tiles : 0), num_units(units) {}

  FI_DEVICE_INLINE bool at_end() const { return tile >= num_tiles; }
  FI_DEVICE_INLINE void next() {
    ++unit;
    if (unit < C::kUnits && pass * C::kUnits + unit < num_units) return;
    unit = 0;
    ++tile;
    if (tile % C::kGroup != 0 && tile < num_tiles) return;
    const int first = (tile - 1) / C::kGroup * C::kGroup;  // of the group that this pass is through
    ++pass;
    if (pass * C::kUnits < num_units) {
      tile = first;
    } else {
      pass = 0;
    }
  }
};

// A warp's ring.
template <class C>
struct LinearRing {
  unsigned char* slots;
  const typename C::T* weight;
  int64_t weight_stride;
  int in_features, out_features, warp, lane;
  LinearWalk<C> walk;
  int slot = 0;

  // Starts the copies of the walk's next unit into the current slot.
  FI_DEVICE_INLINE void fill() {
    if (!walk.at_end()) {
      const int row = lane / 16, chunk = lane % 16;  // 16 lanes copy 256 bytes of a row
      const int n = (static_cast<int>(blockIdx.x) + walk.tile * static_cast<int>(gridDim.x)) * C::kTile + row;
      const int k = ((walk.pass * C::kUnits + walk.unit) * C::kWarps + warp) * C::kUnit + chunk * 8;
      const auto* source = weight + n * weight_stride + k;
      unsigned char* target = slots + slot * C::kUnitBytes + row * 256 + swizzled(chunk, row) * 16;
#pragma unroll
      for (int i = 0; i < C::kTile; i += 2) {
        const bool valid = k < in_features && n + i < out_features;
        cp_async_16(target + i * 256, valid ? source : weight, valid);
        source += 2 * weight_stride;
      }
      walk.next();
    }
    cp_async_commit();
  }

  FI_DEVICE_INLINE void fill_all() {
    for (int i = 0; i < C::kSlots; ++i) {
      fill();
      step();
    }
  }

  // Waits for the oldest unit, gives each lane (g, t) = (lane / 4, lane % 4) columns 32 j + 8 t .. + 7 of the
  // unit's row g in b[j], and starts the copies of the next unit into its slot.
  FI_DEVICE_INLINE void take(uint4 (&b)[4]) {
    cp_async_wait<C::kSlots - 1>();
    __syncwarp();
    const int g = lane / 4, t = lane % 4;
    const unsigned char* row = slots + slot * C::kUnitBytes + g * 256;
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] = load_16(row + swizzled(4 * j + t, g) * 16);
    __syncwarp();
    fill();
    step();
  }

 private:
  // Eight lanes that read 4 chunks of 2 rows each meet no bank twice.
  static FI_DEVICE_INLINE int swizzled(int chunk, int row) { return chunk ^ ((row & 1) * 4); }
  FI_DEVICE_INLINE void step() { slot = slot + 1 == C::kSlots ? 0 : slot + 1; }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) linear_stream_kernel(const LinearParams p) {
  using T = typename C::T;
  auto& smem = *reinterpret_cast<typename C::Smem*>(dynamic_smem());
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int in_features = static_cast<int>(p.in_features), out_features = static_cast<int>(p.out_features);
  const auto* weight = static_cast<const T*>(p.weight);

  const int all_tiles = static_cast<int>(ceil_div(out_features, C::kTile));
  const int tiles = static_cast<int>(ceil_div(all_tiles - static_cast<int>(blockIdx.x), gridDim.x));
  const int all_units = static_cast<int>(ceil_div(in_features, C::kUnit));
  const int passes = static_cast<int>(ceil_div(all_units, C::kUnits * C::kWarps));
  const int units = (all_units - warp + C::kWarps - 1) / C::kWarps;

  if constexpr (!C::kLateTrigger) allow_next_kernel();
  // The weight's first bytes come into L2 while the kernel before this one ends. Not further: that kernel may
  // be the one that writes the weight.
  if (blockIdx.y == 0 && threadIdx.x < C::kPrefetched * C::kTile) {
    const int i = static_cast<int>(threadIdx.x) / C::kTile;
    const int in_group = static_cast<int>(smaller(tiles, C::kGroup));
    const int k = i / in_group * C::kPass;
    const int n = (static_cast<int>(blockIdx.x) + i % in_group * static_cast<int>(gridDim.x)) * C::kTile +
                  static_cast<int>(threadIdx.x) % C::kTile;
    if (n < out_features && k < in_features)
      prefetch_l2(weight + n * p.weight_stride + k,
                  static_cast<uint32_t>(smaller(in_features - k, C::kPass)) * 2);
  }
  wait_for_previous_kernel();

  const int64_t first_row = int64_t{blockIdx.y} * C::kRows;
  const int rows = static_cast<int>(smaller(p.input_rows.num_rows - first_row, C::kRows));
  uint4 x[C::kUnits][4][C::kRows / 8];  // fragments of the pass's columns, as LinearRing::take's
  const auto load_input = [&](int pass) {
#pragma unroll
    for (int h = 0; h < C::kRows / 8; ++h) {
      const int row = g + 8 * h;
      const T* input = static_cast<const T*>(p.input) + p.input_rows.offset(first_row + row);
#pragma unroll
      for (int u = 0; u < C::kUnits; ++u) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int k = ((pass * C::kUnits + u) * C::kWarps + warp) * C::kUnit + 32 * j + 8 * t;
          x[u][j][h] = row < rows && k < in_features ? load_16(input + k) : uint4{0, 0, 0, 0};
        }
      }
    }
  };

  // This thread's outputs: a row of the input and a row of every tile.
  const int out_row = static_cast<int>(threadIdx.x) / C::kTile,
            out_column = static_cast<int>(threadIdx.x) % C::kTile;

  load_input(0);  // before the ring's copies, which would keep it waiting
  LinearRing<C> ring{
      smem.ring[warp][0],         weight, p.weight_stride, in_features, out_features, warp, lane,
      LinearWalk<C>(tiles, units)};
  ring.fill_all();

  bool triggered = false;
  int turn = 0;  // of the two tiles' worth of warp_sums
  for (int group = 0; group < tiles; group += C::kGroup) {
    const int group_end = static_cast<int>(smaller(group + C::kGroup, tiles));
    for (int pass = 0; pass < passes; ++pass) {
      if (pass + group > 0 && passes > 1) load_input(pass);
      for (int tile = group; tile < group_end; ++tile) {
#pragma unroll
        for (int s = 0; s < C::kSums; ++s) {
          float even[4] = {},
                odd[4] = {};  // two chains: the tensor cores' latency is longer than the copies'
#pragma unroll
          for (int u = s * C::kSumUnits; u < (s + 1) * C::kSumUnits; ++u) {
            if (pass * C::kUnits + u >= units) continue;
            uint4 b[4];
            ring.take(b);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const uint4 lo = x[u][j][0];
              const uint4 hi = C::kRows > 8 ? x[u][j][C::kRows / 8 - 1] : uint4{0, 0, 0, 0};
              mma_m16n8k16<T>(even, {lo.x, hi.x, lo.y, hi.y}, b[j].x, b[j].y);
              mma_m16n8k16<T>(odd, {lo.z, hi.z, lo.w, hi.w}, b[j].z, b[j].w);
            }
          }
          float* sums = smem.warp_sums[turn][s][warp];
          *reinterpret_cast<float2*>(sums + g * C::kTile + 2 * t) = {even[0] + odd[0], even[1] + odd[1]};
          if constexpr (C::kRows > 8)
            *reinterpret_cast<float2*>(sums + (g + 8) * C::kTile + 2 * t) = {even[2] + odd[2],
                                                                             even[3] + odd[3]};
        }
        if (C::kLateTrigger && !triggered && ring.walk.at_end()) {
          allow_next_kernel();
          triggered = true;
        }
        __syncthreads();
        if (out_row < rows) {
          float sum = pass > 0 ? smem.tile_sums[tile - group][threadIdx.x] : 0.0f;
#pragma unroll
          for (int s = 0; s < C::kSums; ++s) {
            float over_warps = 0.0f;
#pragma unroll
            for (int w = 0; w < C::kWarps; ++w) over_warps += smem.warp_sums[turn][s][w][threadIdx.x];
            sum += over_warps;
          }
          const int n =
              (static_cast<int>(blockIdx.x) + tile * static_cast<int>(gridDim.x)) * C::kTile + out_column;
          if (pass + 1 < passes) {
            smem.tile_sums[tile - group][threadIdx.x] = sum;
          } else if (n < out_features) {
            if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[n]);
            static_cast<T*>(p.output)[p.output_rows.offset(first_row + out_row) + n] = from_float<T>(sum);
          }
        }
        turn ^= 1;
      }
    }
  }
}

// What the kernel asks for: rows at 16-byte boundaries, and counts that fit in an int.
template <class C>
void launch_linear_stream(const LinearParams& p, const Gpu& gpu) {
  const int64_t tiles = ceil_div(p.out_features, C::kTile);
  const dim3 grid(static_cast<unsigned>(smaller(tiles, gpu.num_sms)),
                  static_cast<unsigned>(ceil_div(p.input_rows.num_rows, C::kRows)));
  launch(gpu, linear_stream_kernel<C>, grid, C::kThreads, sizeof(typename C::Smem), /*overlap=*/true, p);
}

}  // namespace fi::cuda
