// The product of up to 16 input rows with a weight that is read once. Memory bound, so everything here is
// about keeping reads of the weight in flight, from a kernel's first block to the next kernel's.
//
// A unit is 8 rows of the weight x 128 columns. Every warp has a ring of units in shared memory, filled by
// its own copies, so no barrier stands between a copy and its use. The warps of a block split the columns (of
// kWarps units side by side each takes one), and the block's tiles, 8 rows of the weight each, come one after
// the other through the rings, which never drain in between. The input stays in registers: a pass takes as
// many columns as fit there over up to kGroup tiles, then the next columns come, also through the rings.
//
// Sums are taken in one order whatever the number of rows: over the units of a warp in a pass by the tensor
// cores, over the warps, over the passes. A row's result depends on that row only.
#pragma once

#include "fi/cuda/launch.h"
#include "fi/cuda/ptx.h"
#include "fi/cuda/rowops.h"
#include "fi/linear.h"

namespace fi::cuda {

template <class T_, int Rows, int Slots>
struct LinearStream {
  using T = T_;
  static constexpr int kRows = Rows;  // of the input, a block: 8 or 16
  static constexpr int kHalves = kRows / 8;
  static constexpr int kSlots = Slots;  // units in a warp's ring
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kTile = 8;    // rows of the weight
  static constexpr int kUnit = 128;  // columns of the weight
  static constexpr int kUnitBytes = kTile * kUnit * 2;
  static constexpr int kUnits = 4;  // of a warp in a pass: 64 or 128 registers of the input
  static constexpr int kPass = kUnits * kWarps * kUnit;  // columns
  static constexpr int kGroup = 16;                      // tiles
  static constexpr int kOutputs = kRows * kTile;
  static constexpr int kPrefetched = 2;  // passes over a tile before the kernel's turn: 128 KB a block
  static_assert(kOutputs <= kThreads && sizeof(T) == 2, "the outputs of a tile have a thread each");

  struct Smem {
    unsigned char ring[kWarps][kSlots][kUnitBytes];
    float warp_sums[2][kWarps][kOutputs];  // of a pass over a tile, for two tiles in turn
    float sums[kRows][kGroup * kTile];     // of a group's tiles, over the passes so far
  };
};

// A warp's units in the order in which they are read: groups of tiles; in a group passes over the columns; in
// a pass the input's units, where the last pass's are not those, and the group's tiles.
template <class C>
struct LinearWalk {
  int tile, end;  // of the weight
  int num_units;  // of the warp in a row of the weight
  int group;      // its first tile
  int pass = 0, unit = 0;
  int input = 0;  // units of the input that are yet to come in this pass

  FI_DEVICE_INLINE LinearWalk(int begin, int end, int num_units)
      : tile(begin), end(num_units > 0 ? end : begin), num_units(num_units), group(begin) {}

  FI_DEVICE_INLINE bool at_end() const { return tile >= end; }
  FI_DEVICE_INLINE void next() {
    if (input > 0) {
      --input;
      return;
    }
    ++unit;
    if (unit < C::kUnits && pass * C::kUnits + unit < num_units) return;
    unit = 0;
    ++tile;
    if (tile < group + C::kGroup && tile < end) return;
    ++pass;
    if (pass * C::kUnits < num_units) {
      tile = group;
    } else {
      pass = 0;
      group = tile;
    }
    if (num_units > C::kUnits) {
      const int left = num_units - pass * C::kUnits;
      input = (left < C::kUnits ? left : C::kUnits) * C::kHalves;
    }
  }
};

// A warp's ring.
template <class C>
struct LinearRing {
  const LinearParams& p;
  unsigned char* slots;
  int slice, lane;  // `slice`: which of kWarps units side by side are the warp's
  LinearWalk<C> walk;
  int slot = 0;

  // Starts the copies of the walk's next unit into the current slot.
  FI_DEVICE_INLINE void fill() {
    if (!walk.at_end()) {
      const int row = lane / 16, chunk = lane % 16;  // 16 lanes copy 256 bytes of a row
      const bool input = walk.input > 0;
      const int q = walk.input - 1;
      const int unit = walk.pass * C::kUnits + (input ? q / C::kHalves : walk.unit);
      const int k = (unit * C::kWarps + slice) * C::kUnit + chunk * 8;
      const int first =
          row + (input ? static_cast<int>(blockIdx.y) * C::kRows + q % C::kHalves * 8 : walk.tile * C::kTile);
      const int64_t stride = input ? p.input_rows.strides[0] : p.weight_stride;
      const int rows = static_cast<int>(input ? p.input_rows.num_rows : p.out_features);
      const auto* source = static_cast<const typename C::T*>(input ? p.input : p.weight) + first * stride + k;
      // The weight is read once: L2 is for what other kernels wrote and will read.
      const uint64_t policy = input || gridDim.y > 1 ? l2_evict_normal() : l2_evict_first();
      unsigned char* target = slots + slot * C::kUnitBytes + row * 256 + swizzled(chunk, row) * 16;
#pragma unroll
      for (int i = 0; i < C::kTile; i += 2) {
        const bool valid = k < p.in_features && first + i < rows;
        cp_async_16(target + i * 256, valid ? source : p.weight, valid, policy);
        source += 2 * stride;
      }
      walk.next();
    }
    cp_async_commit();
  }

  FI_DEVICE_INLINE void fill_all() {
#pragma unroll 1
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
__global__ void __launch_bounds__(C::kThreads, 1)
    linear_stream_kernel(const __grid_constant__ LinearParams p) {
  using T = typename C::T;
  auto& smem = *reinterpret_cast<typename C::Smem*>(dynamic_smem());
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int in_features = static_cast<int>(p.in_features), out_features = static_cast<int>(p.out_features);
  // Neighbouring tiles, as many as the other blocks have or one more.
  const int blocks = static_cast<int>(gridDim.x), tiles = static_cast<int>(ceil_div(out_features, C::kTile));
  const int begin = block * (tiles / blocks) + static_cast<int>(smaller(block, tiles % blocks));
  const int end = begin + tiles / blocks + (block < tiles % blocks ? 1 : 0);
  const int passes = static_cast<int>(ceil_div(in_features, C::kPass));
  // Blocks start at different slices: they all want the whole input at once.
  const int slice = (warp + block) % C::kWarps;
  const int units = static_cast<int>(ceil_div(in_features - slice * C::kUnit, C::kWarps * C::kUnit));

  // The weight's first bytes come into L2 while the kernel before this one ends. Not further: that kernel may
  // be the one that writes the weight.
  if (blockIdx.y == 0 && thread < C::kPrefetched * C::kTile) {
    const int i = thread / C::kTile, group = static_cast<int>(smaller(end - begin, C::kGroup));
    const int k = i / group * C::kPass, n = (begin + i % group) * C::kTile + thread % C::kTile;
    if (n < out_features && k < in_features)
      prefetch_l2(static_cast<const T*>(p.weight) + n * p.weight_stride + k,
                  static_cast<uint32_t>(smaller(in_features - k, C::kPass)) * 2);
  }

  const int first_row = static_cast<int>(blockIdx.y) * C::kRows;
  const int rows = static_cast<int>(smaller(p.input_rows.num_rows - first_row, C::kRows));
  LinearRing<C> ring{p, smem.ring[warp][0], slice, lane, LinearWalk<C>(begin, end, units)};
  uint4 x[C::kUnits][4][C::kHalves];  // the input's columns of the pass, as LinearRing::take gives them
  wait_for_previous_kernel();
#pragma unroll
  for (int u = 0; u < C::kUnits; ++u) {
#pragma unroll
    for (int h = 0; h < C::kHalves; ++h) {
      const T* input = static_cast<const T*>(p.input) + (first_row + g + 8 * h) * p.input_rows.strides[0];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = (u * C::kWarps + slice) * C::kUnit + 32 * j + 8 * t;
        x[u][j][h] = g + 8 * h < rows && k < in_features ? load_16(input + k) : uint4{0, 0, 0, 0};
      }
    }
  }
  ring.fill_all();

  bool triggered = false;
  int turn = 0;  // of the two tiles' worth of warp_sums
  for (int group = begin; group < end; group += C::kGroup) {
    const int group_end = static_cast<int>(smaller(group + C::kGroup, end));
    for (int pass = 0; pass < passes; ++pass) {
      if (units > C::kUnits && (pass > 0 || group > begin)) {
#pragma unroll
        for (int q = C::kUnits * C::kHalves - 1; q >= 0; --q) {
          if (pass * C::kUnits + q / C::kHalves >= units) continue;
          uint4 b[4];
          ring.take(b);
#pragma unroll
          for (int j = 0; j < 4; ++j) x[q / C::kHalves][j][q % C::kHalves] = b[j];
        }
      }
      for (int tile = group; tile < group_end; ++tile) {
        float even[4] = {}, odd[4] = {};  // two chains, since one waits longer for itself
#pragma unroll
        for (int u = 0; u < C::kUnits; ++u) {
          if (pass * C::kUnits + u >= units) continue;
          uint4 b[4];
          ring.take(b);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint4 lo = x[u][j][0];
            const uint4 hi = C::kHalves > 1 ? x[u][j][C::kHalves - 1] : uint4{0, 0, 0, 0};
            mma_m16n8k16<T>(even, {lo.x, hi.x, lo.y, hi.y}, b[j].x, b[j].y);
            mma_m16n8k16<T>(odd, {lo.z, hi.z, lo.w, hi.w}, b[j].z, b[j].w);
          }
        }
        float* mine = smem.warp_sums[turn][slice];
#pragma unroll
        for (int h = 0; h < C::kHalves; ++h)
          *reinterpret_cast<float2*>(mine + (g + 8 * h) * C::kTile + 2 * t) = {
              even[2 * h] + odd[2 * h], even[2 * h + 1] + odd[2 * h + 1]};
        if (!triggered && ring.walk.at_end()) {
          allow_next_kernel();
          triggered = true;
        }
        __syncthreads();
        const int element = (thread + tile % 4 * C::kOutputs) % C::kThreads;  // the warps take turns
        if (element < rows * C::kTile) {
          float& total = smem.sums[element / C::kTile][(tile - group) * C::kTile + element % C::kTile];
          float sum = 0.0f;
#pragma unroll
          for (int w = 0; w < C::kWarps; ++w) sum += smem.warp_sums[turn][w][element];
          total = pass > 0 ? total + sum : sum;
        }
        turn ^= 1;
      }
    }
    __syncthreads();
    // Eight columns a thread: whole sectors to memory.
    const int size = group_end - group;
    for (int i = thread; i < rows * size; i += C::kThreads) {
      const int row = i / size, n = (group + i % size) * C::kTile;
      const float* sums = smem.sums[row] + i % size * C::kTile;
      T* output = static_cast<T*>(p.output) + p.output_rows.offset(first_row + row) + n;
      float y[C::kTile];
#pragma unroll
      for (int c = 0; c < C::kTile; ++c) {
        y[c] = sums[c];
        if (p.bias != nullptr && n + c < out_features) y[c] += to_float(static_cast<const T*>(p.bias)[n + c]);
      }
      if (n + C::kTile <= out_features && reinterpret_cast<uintptr_t>(output) % 16 == 0) {
        store_pack(output, y);
      } else {
#pragma unroll
        for (int c = 0; c < C::kTile; ++c)
          if (n + c < out_features) output[c] = from_float<T>(y[c]);
      }
    }
  }
}

// Asks for rows at 16-byte boundaries, evenly spaced for the input, and for counts that fit in an int.
template <class C>
void launch_linear_stream(const LinearParams& p, const Gpu& gpu) {
  const dim3 grid(static_cast<unsigned>(smaller(ceil_div(p.out_features, C::kTile), gpu.num_sms)),
                  static_cast<unsigned>(ceil_div(p.input_rows.num_rows, C::kRows)));
  launch_with<linear_stream_kernel<C>, sizeof(typename C::Smem)>(gpu, grid, C::kThreads, /*overlap=*/true, p);
}

}  // namespace fi::cuda
