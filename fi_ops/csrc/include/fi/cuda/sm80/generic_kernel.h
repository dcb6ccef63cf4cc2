// Attention on CUDA cores, in fp32 throughout: for fp32 inputs, and for shapes and strides of 16-bit ones
// that the tensor-core kernels don't take.
//
// 256 threads, 64 rows x 64 keys: thread (y, x) of a 16 x 16 grid has rows 4y .. and keys 4x .. of the
// products, the same rows and columns 4x .. of each 64 columns of the output. Operands pass through shared
// memory 64 elements of depth at a time, transposed where the product sums over them.
#pragma once

#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/prefill.h"

namespace fi::cuda {

// kParts: 64 columns of the output each.
template <class T, int kParts>
class GenericBlock {
 public:
  static constexpr int kThreads = 256, kRows = 64, kKeys = 64, kDepth = 64;
  static constexpr int kPitch = 64 + 4;  // floats; rows of float4, off the power of two

  struct Smem {
    float q[kDepth * kPitch];       // [depth][row]
    float k[kDepth * kPitch];       // [depth][key]; then V, [key][column]
    float weights[kKeys * kPitch];  // [key][row]
    Row rows[kRows];
    int partial[5 * kThreads / 32];
  };

  FI_DEVICE_INLINE GenericBlock(const GenericArgs& args, Smem& smem) : args(args), p(args.p), smem(smem) {
    const unsigned kv_heads = static_cast<unsigned>(p.num_kv_heads);
    const unsigned heads = static_cast<unsigned>(p.batch) * kv_heads;
    const unsigned at = blockIdx.x / args.slices, head = at % heads;
    first_column = blockIdx.x % args.slices * (64 * kParts);
    block_index = args.num_blocks - 1 - at / heads;  // the long blocks of a causal call first
    block = {static_cast<int>(head / kv_heads), static_cast<int>(head % kv_heads), block_index * kRows,
             args.num_rows, args.group};
    x4 = threadIdx.x % 16 * 4;
    y4 = threadIdx.x / 16 * 4;
  }

  FI_DEVICE_INLINE void run() {
    const bool drop = can_drop_negligible(p, args.mask, block, block_index, threadIdx.x);
    range = load_rows<kRows, kThreads>(p, block, smem.rows, drop, smem.partial);
    for (int r = 0; r < 4; ++r) {
      row_max[r] = -kInf;
      row_sum[r] = 0.0f;
      for (int part = 0; part < kParts; ++part) {
        for (int c = 0; c < 4; ++c) o[part][r][c] = 0.0f;
      }
    }
    const uint8_t* classes = nullptr;
    if (args.mask.classes)
      classes =
          args.mask.classes + args.mask.list_of(block.b, block.kv_head, block_index) * args.mask.num_tiles;
    TileWalk<true> walk(classes, range.begin / kKeys, (range.end + kKeys - 1) / kKeys, range.flag);
    bool open;
    for (int tile = walk.next(open); tile >= 0; tile = walk.next(open)) attend_tile(tile * kKeys, open);
    write();
  }

 private:
  FI_DEVICE_INLINE const T* key_row(int64_t j) const {
    return static_cast<const T*>(p.key) + block.b * p.k_stride_b + block.kv_head * p.k_stride_h +
           j * p.k_stride_n;
  }
  FI_DEVICE_INLINE const T* value_row(int64_t j) const {
    return static_cast<const T*>(p.value) + block.b * p.v_stride_b + block.kv_head * p.v_stride_h +
           j * p.v_stride_n;
  }
  FI_DEVICE_INLINE const T* query_row(int r) const {
    return static_cast<const T*>(p.query) + block.b * p.q_stride_b + block.head(r) * p.q_stride_h +
           block.query(r) * p.q_stride_n;
  }
  FI_DEVICE_INLINE bool reads(int64_t j) const { return j >= range.begin && j < range.end; }

  FI_DEVICE_INLINE void attend_tile(int first, bool open) {
    float s[4][4] = {};
    for (int64_t depth = 0; depth < p.head_dim_qk; depth += kDepth) {
      __syncthreads();
      for (int at = threadIdx.x; at < kDepth * 64; at += kThreads) {
        const int d = at % kDepth, r = at / kDepth;
        const bool inside = depth + d < p.head_dim_qk;
        smem.q[d * kPitch + r] = inside && block.has(r) ? to_float(query_row(r)[depth + d]) : 0.0f;
        smem.k[d * kPitch + r] = inside && reads(first + r) ? to_float(key_row(first + r)[depth + d]) : 0.0f;
      }
      __syncthreads();
      add_products(s, smem.q + y4, smem.k + x4);
    }
    to_logits(s, first, open);
    softmax(s);
    for (int part = 0; part < kParts; ++part) add_values(part, first);
  }

  // c += the sum over 64 rows of a's 4 floats by b's 4. Sixteen are summed by themselves first: one chain of
  // additions over everything would lose the last bits of fp32.
  static FI_DEVICE_INLINE void add_products(float (&c)[4][4], const float* a, const float* b) {
    for (int first = 0; first < 64; first += 16) {
      float sum[4][4] = {};
#pragma unroll 4
      for (int n = first; n < first + 16; ++n) multiply_add(sum, a + n * kPitch, b + n * kPitch);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) c[i][j] += sum[i][j];
      }
    }
  }

  static FI_DEVICE_INLINE void multiply_add(float (&c)[4][4], const float* a, const float* b) {
    const float4 u = *reinterpret_cast<const float4*>(a), v = *reinterpret_cast<const float4*>(b);
    const float us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) c[i][j] = fmaf(us[i], vs[j], c[i][j]);
    }
  }

  // Products to logits, base 2.
  FI_DEVICE_INLINE void to_logits(float (&s)[4][4], int first, bool open) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Row row = smem.rows[y4 + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = first + x4 + j;
        float x = s[i][j] * p.scale;
        if (p.logits_soft_cap > 0.0f) x = tanhf(x / p.logits_soft_cap) * p.logits_soft_cap;
        x = x * kLog2e + (static_cast<float>(key) - row.position) * row.slope;
        s[i][j] = key >= row.begin && key < row.end ? x : -kInf;
      }
    }
    if (!open) with_mask_type(p.mask_dtype, [&](auto* type) { apply_mask(s, first, type); });
  }

  template <class M>
  FI_DEVICE_INLINE void apply_mask(float (&s)[4][4], int first, const M*) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = y4 + i;
      if (!block.has(r)) continue;
      const M* mask = static_cast<const M*>(p.mask) + block.b * p.mask_stride_b +
                      block.head(r) * p.mask_stride_h + block.query(r) * p.mask_stride_q;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (s[i][j] == -kInf) continue;
        const float addend = mask_addend(mask[(first + x4 + j) * p.mask_stride_k]);
        s[i][j] = addend == -kInf ? addend : s[i][j] + addend;
      }
    }
  }

  // Logits to weights, in shared memory too; rescales what has been accumulated.
  FI_DEVICE_INLINE void softmax(float (&s)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float top = fmaxf(fmaxf(s[i][0], s[i][1]), fmaxf(s[i][2], s[i][3]));
#pragma unroll
      for (int lanes = 8; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
      top = fmaxf(top, row_max[i]);
      const float shift = usable_max(top), rescale = exp2f(row_max[i] - shift);
      row_max[i] = top;
      row_sum[i] *= rescale;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[part][i][c] *= rescale;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float w = exp2f(s[i][j] - shift);
        row_sum[i] += w;
        smem.weights[(x4 + j) * kPitch + y4 + i] = w;
      }
    }
  }

  FI_DEVICE_INLINE void add_values(int part, int first) {
    __syncthreads();
    for (int at = threadIdx.x; at < kKeys * 64; at += kThreads) {
      const int c = at % 64, j = at / 64;
      const int64_t column = first_column + 64 * part + c;
      smem.k[j * kPitch + c] =
          column < p.head_dim_vo && reads(first + j) ? to_float(value_row(first + j)[column]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kParts; ++n) {  // a constant index keeps o in registers
      if (n == part) add_products(o[n], smem.weights + y4, smem.k + x4);
    }
  }

  FI_DEVICE_INLINE void write() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int lanes = 8; lanes > 0; lanes /= 2) row_sum[i] += __shfl_xor_sync(kAllLanes, row_sum[i], lanes);
      const int r = y4 + i;
      if (!block.has(r)) continue;
      const int h = block.head(r), n = block.query(r);
      const RowResult result = finish_row(p, h, row_max[i], row_sum[i]);
      T* out = static_cast<T*>(p.out) + block.b * p.o_stride_b + h * p.o_stride_h + n * p.o_stride_n;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int64_t column = first_column + 64 * part + x4 + c;
          if (column < p.head_dim_vo) out[column] = from_float<T>(o[part][i][c] * result.factor);
        }
      }
      if (p.lse && x4 == 0 && first_column == 0)
        p.lse[(block.b * p.num_qo_heads + h) * p.qo_len + n] = result.lse;
    }
  }

  const GenericArgs& args;
  const AttentionParams& p;
  Smem& smem;
  BlockOfRows block;
  BlockRange range;
  unsigned block_index;
  int64_t first_column;
  int x4, y4;
  float o[kParts][4][4], row_max[4], row_sum[4];
};

template <class T, int kParts>
__global__ void __launch_bounds__(256) generic_kernel(const __grid_constant__ GenericArgs args) {
  using Block = GenericBlock<T, kParts>;
  Block(args, *reinterpret_cast<typename Block::Smem*>(dynamic_smem())).run();
}

template <class T, int kParts>
void launch_generic(GenericArgs args, const Gpu& gpu) {
  const int64_t columns = 64 * kParts;
  const int64_t slices = (args.p.head_dim_vo + columns - 1) / columns;
  args.slices = static_cast<unsigned>(slices > 1 ? slices : 1);
  const unsigned heads = static_cast<unsigned>(args.p.batch * args.p.num_kv_heads);
  launch(gpu, generic_kernel<T, kParts>, dim3(args.num_blocks * heads * args.slices), dim3(256),
         sizeof(typename GenericBlock<T, kParts>::Smem), args);
}

template <class T>
void run_generic(const GenericArgs& args, const Gpu& gpu) {
  if (args.p.head_dim_vo <= 64) return launch_generic<T, 1>(args, gpu);
  if (args.p.head_dim_vo <= 128) return launch_generic<T, 2>(args, gpu);
  launch_generic<T, 4>(args, gpu);
}

}  // namespace fi::cuda
