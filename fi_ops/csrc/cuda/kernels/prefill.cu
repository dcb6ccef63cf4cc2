// Attention on mma.sync: sizes of blocks, what is split, dispatch by head dim; and the join of split blocks.
#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/padded_dims.h"
#include "fi/cuda/sm80/prefill.h"

namespace fi::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* data, int64_t stride_b, int64_t stride_h, int64_t stride_n, int64_t batch,
             int64_t heads, int64_t len) {
  auto fits = [](int64_t size, int64_t stride) { return size <= 1 || stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(batch, stride_b) && fits(heads, stride_h) &&
         fits(len, stride_n);
}

// K and V of the heads that run side by side should stay in the L2 cache.
constexpr int64_t kCachedBytes = 24 << 20;

// A part of a split block has at least this many tiles.
constexpr int64_t kMinTiles = 4;
constexpr int64_t kMaxParts = 64;

template <class T>
void run(const PrefillArgs& args, const Gpu& gpu, int block_rows, PaddedDims dims) {
  with_padded_dims(dims,
                   [&]<int kDimQK, int kDimVO>() { run_prefill<T, kDimQK, kDimVO>(args, gpu, block_rows); });
}

}  // namespace

bool prefill_supports(const AttentionParams& p) {
  return (p.dtype == DType::bf16 || p.dtype == DType::f16) && can_pad(p.head_dim_qk) &&
         can_pad(p.head_dim_vo) && p.rope.cos == nullptr &&
         aligned(p.query, p.q_stride_b, p.q_stride_h, p.q_stride_n, p.batch, p.num_qo_heads, p.qo_len) &&
         aligned(p.key, p.k_stride_b, p.k_stride_h, p.k_stride_n, p.batch, p.num_kv_heads, p.kv_len) &&
         aligned(p.value, p.v_stride_b, p.v_stride_h, p.v_stride_n, p.batch, p.num_kv_heads, p.kv_len) &&
         aligned(p.out, p.o_stride_b, p.o_stride_h, p.o_stride_n, p.batch, p.num_qo_heads, p.qo_len);
}

void prefill(const AttentionParams& p, const Gpu& gpu) {
  PrefillArgs args{};
  args.p = p;
  args.group = static_cast<unsigned>(p.num_qo_heads / p.num_kv_heads);
  args.num_rows = args.group * static_cast<unsigned>(p.qo_len);
  args.heads = static_cast<unsigned>(p.batch * p.num_kv_heads);
  const PaddedDims dims = padded_dims(p.head_dim_qk, p.head_dim_vo);
  // Where blocks of 128 rows are too few for the SMs, the tiles are split, or if those are few too, the rows.
  const bool few = args.heads * ceil_div(args.num_rows, 128) < gpu.num_sms;
  const bool small = args.num_rows <= 64 || (few && p.kv_len < kLongKeys);
  const int block_rows = dims.vo > 128 || small ? 64 : 128;
  const int keys = prefill_keys(dims.qk, block_rows, needs_variants(p));
  args.num_blocks = static_cast<unsigned>(ceil_div(args.num_rows, block_rows));
  const int64_t head_bytes = p.kv_len * (p.head_dim_qk + p.head_dim_vo) * size_of(p.dtype);
  const int64_t cached = kCachedBytes / (head_bytes > 0 ? head_bytes : 1);
  args.section = static_cast<unsigned>(cached < 1 ? 1 : cached < args.heads ? cached : args.heads);
  if (p.mask) args.mask = classify_mask(p, gpu, block_rows, keys);

  // Two thread blocks run on an SM; where there are not even enough for one each, the tiles are split.
  const int64_t total = int64_t(args.num_blocks) * args.heads, tiles = ceil_div(p.kv_len, keys);
  if (total < gpu.num_sms && tiles >= 2 * kMinTiles) {
    int64_t parts = 2 * gpu.num_sms / total;
    if (parts > tiles / kMinTiles) parts = tiles / kMinTiles;
    if (parts > kMaxParts) parts = kMaxParts;
    if (parts > 1) {
      Partials& s = args.partials;
      s.parts = static_cast<int>(parts);
      s.width = dims.vo;
      s.heads = args.heads;
      s.num_rows = args.num_rows;
      const int64_t rows = parts * s.heads * s.num_rows;
      s.out = static_cast<float*>(p.scratch.allocate(p.scratch.context, rows * s.width * sizeof(float)));
      s.state = static_cast<float*>(p.scratch.allocate(p.scratch.context, rows * 2 * sizeof(float)));
    }
  }
  p.dtype == DType::bf16 ? run<bf16>(args, gpu, block_rows, dims) : run<f16>(args, gpu, block_rows, dims);
  if (args.partials.parts > 1) combine(p, args.partials, gpu);
}

}  // namespace fi::cuda
