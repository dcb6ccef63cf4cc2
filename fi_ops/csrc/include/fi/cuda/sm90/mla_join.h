// Joins the partial results of row tiles whose keys several blocks had.
//
// The blocks of a row tile's parts share its rows. With few parts the warps of a block have a quarter of a
// row's columns each; one long request has as many parts as there are blocks, and then they have the same
// columns of a quarter of the parts each.
#pragma once

#include "fi/cuda/batch/plan.h"
#include "fi/cuda/sm90/mla_config.h"

namespace fi::cuda::sm90 {

inline constexpr int kMlaJoinWarps = 4, kMlaJoinColumns = kCkvDim / kMlaJoinWarps;  // four columns a lane
inline constexpr int kMlaJoinBlocks = 16;                                           // of each partial result
inline constexpr int kMlaFewParts = 8;  // that a warp reads at a time

// A row of the parts that a row tile has, of which `part` is one of block `block`.
class MlaRowParts {
 public:
  FI_DEVICE_INLINE MlaRowParts(const MlaArgs& args, const MlaPart& part, int block, int row)
      : partials_(args.partials),
        first_block_(block - part.index * args.ranks),
        ranks_(args.ranks),
        row_(row) {}

  // What part i's weights are relative to, in base 2, their sum, and that of the values they weigh.
  FI_DEVICE_INLINE float base(int i) const { return partial(i)[kMlaRows * kCkvDim + row_]; }
  FI_DEVICE_INLINE float weights(int i) const { return partial(i)[kMlaRows * (kCkvDim + 1) + row_]; }
  FI_DEVICE_INLINE float4 values(int i, int column) const {
    return *reinterpret_cast<const float4*>(partial(i) + row_ * kCkvDim + column);
  }

 private:
  // The first one is in its block's second place, the others in their blocks' first.
  FI_DEVICE_INLINE const float* partial(int i) const {
    return partials_ + (2 * (int64_t{first_block_} + int64_t{i} * ranks_) + (i == 0)) * kMlaPartialFloats;
  }

  const float* partials_;
  int first_block_, ranks_, row_;
};

// A lane's four columns of parts first, first + step ..., and the sum of their weights.
struct MlaJoined {
  float4 values{0.0f, 0.0f, 0.0f, 0.0f};
  float weights = 0.0f;

  FI_DEVICE_INLINE void add(const float4& x, float weight) {
    values.x += weight * x.x, values.y += weight * x.y, values.z += weight * x.z, values.w += weight * x.w;
  }
  FI_DEVICE_INLINE void add(const MlaRowParts& row, int first, int step, int num_parts, int column,
                            float top) {
#pragma unroll kMlaFewParts
    for (int i = first; i < num_parts; i += step) {
      const float weight = exp2_approx(row.base(i) - top);
      weights += weight * row.weights(i);
      add(row.values(i, column), weight);
    }
  }
};

// grid: (blocks of the kernel before, kMlaJoinBlocks).
template <class T>
__global__ void __launch_bounds__(32 * kMlaJoinWarps) mla_join_kernel(const __grid_constant__ MlaArgs args) {
  __shared__ MlaJoined quarters[kMlaJoinWarps][32];
  allow_next_kernel();
  wait_for_previous_kernel();
  const BatchAttentionParams& p = args.p.batch;
  const AttentionParams& c = p.call;
  if (batch::has_padding(p))
    batch::write_padding<T>(p, (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x,
                            int64_t{gridDim.x} * gridDim.y * blockDim.x);
  const float kv_scale = p.k_scale ? p.k_scale.at(0) : 1.0f;
  const int block = static_cast<int>(blockIdx.x), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int place = 0; place < 2; ++place) {
    const MlaPart part = args.parts[2 * block + place];
    const bool few = part.parts <= kMlaFewParts;
    const int units = part.parts == 0 ? 0 : part.num_rows * (few ? 1 : kMlaJoinWarps);
#pragma unroll 1
    for (int unit = part.index * kMlaJoinBlocks + static_cast<int>(blockIdx.y); unit < units;
         unit += part.parts * kMlaJoinBlocks) {
      const int r = few ? unit : unit / kMlaJoinWarps, columns = few ? warp : unit % kMlaJoinWarps;
      const int column = columns * kMlaJoinColumns + 4 * lane;
      const MlaRowParts row(args, part, block, r);
      float top = -kInf;
      for (int i = lane; i < part.parts; i += 32) top = fmaxf(top, row.base(i));
#pragma unroll
      for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
      const float finite = usable_max(top);
      MlaJoined sum;
      sum.add(row, few ? 0 : warp, few ? 1 : kMlaJoinWarps, part.parts, column, finite);
      if (!few) {
        quarters[warp][lane] = sum;
        __syncthreads();
        sum = {};
#pragma unroll
        for (int i = 0; i < kMlaJoinWarps; ++i) {
          sum.add(quarters[i][lane].values, 1.0f);
          sum.weights += quarters[i][lane].weights;
        }
        __syncthreads();
        if (warp != 0) continue;
      }
      const float factor = sum.weights == 0.0f ? 0.0f : kv_scale / sum.weights;
      const int packed = part.row_begin + r, query = packed / args.num_heads,
                head = packed - query * args.num_heads;
      const int64_t n = part.q_begin + query;
      T* const out = static_cast<T*>(c.out) + n * c.o_stride_n + head * c.o_stride_h + column;
      *reinterpret_cast<uint2*>(out) = {pack2<T>(sum.values.x * factor, sum.values.y * factor),
                                        pack2<T>(sum.values.z * factor, sum.values.w * factor)};
      if (columns == 0 && lane == 0 && c.lse != nullptr)
        c.lse[n * args.num_heads + head] = sum.weights == 0.0f ? -kInf : finite + log2f(sum.weights);
    }
  }
}

}  // namespace fi::cuda::sm90
