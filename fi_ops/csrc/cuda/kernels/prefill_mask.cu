// The scan of a mask: a byte a (block of rows, tile of KV). See fi/cuda/sm80/mask_tiles.h.
#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/mask_tiles.h"

namespace fi::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxRows = 128;
constexpr int kBatch = 8;  // rows whose values are loaded together

struct ScanArgs {
  AttentionParams p;
  MaskTiles m;
  unsigned num_rows, group;
};

struct ScanSmem {
  int64_t offsets[kMaxRows];  // of the distinct rows in the mask
  KeyRange keys[kMaxRows];
  uint8_t seen[kWarps][kMaxRows];  // bits of RowFlag
};

FI_DEVICE_INLINE int round_up_to_batch(int rows) { return (rows + kBatch - 1) / kBatch * kBatch; }

// A thread block takes one chunk of tiles of one block of rows, a warp a tile at a time, a lane the keys that
// are 32 apart.
template <class M>
__global__ void __launch_bounds__(32 * kWarps) scan_kernel(const __grid_constant__ ScanArgs args) {
  const AttentionParams& p = args.p;
  const MaskTiles& m = args.m;
  ScanSmem& smem = *reinterpret_cast<ScanSmem*>(dynamic_smem());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t chunk = blockIdx.x % m.num_chunks, list = blockIdx.x / m.num_chunks;
  const int64_t block_index = list % m.num_blocks, heads = list / m.num_blocks;
  const BlockOfRows block{static_cast<int>(heads / m.list_heads), static_cast<int>(heads % m.list_heads),
                          static_cast<unsigned>(block_index * m.block_rows), args.num_rows, args.group};
  const DistinctRows rows(p, block, m.block_rows);
  for (int n = threadIdx.x; n < round_up_to_batch(rows.count()); n += 32 * kWarps) {
    smem.keys[n] = {0, 0};
    smem.offsets[n] = 0;
    if (n >= rows.count()) continue;
    const int head = block.head(rows.row(n)), query = block.query(rows.row(n));
    smem.keys[n] = keys_of_position(p, query_position(p, block.b, query));
    smem.offsets[n] = head * p.mask_stride_h + query * p.mask_stride_q;
  }
  for (int n = lane; n < m.block_rows; n += 32) smem.seen[warp][n] = 0;
  __syncthreads();

  const M* mask = static_cast<const M*>(p.mask) + block.b * p.mask_stride_b;
  const float low = negligible(p.mask_dtype);
  for (int t = warp; t < MaskTiles::kChunk; t += kWarps) {
    const int64_t tile = chunk * MaskTiles::kChunk + t;
    if (tile >= m.num_tiles) break;
    bool live = false, ordinary = false, closed = false;
    for (int first = 0; first < rows.count(); first += kBatch) {
      for (int j = static_cast<int>(tile * m.tile) + lane; j < (tile + 1) * m.tile; j += 32) {
        float values[kBatch];
        bool inside[kBatch];
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          const KeyRange keys = smem.keys[first + n];
          inside[n] = j >= keys.begin && j < keys.end;
          values[n] = 0.0f;
          if (inside[n]) {
            const M value = mask[smem.offsets[first + n] + j * p.mask_stride_k];
            if constexpr (__is_same(M, uint8_t)) {
              values[n] = value ? 0.0f : -kInf;
            } else {
              values[n] = to_float(value);
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          const float x = values[n];
          const bool any = inside[n] && x != -kInf;
          live = live || any;
          ordinary = ordinary || (any && !(x <= low));
          closed = closed || (inside[n] && x != 0.0f);
          if constexpr (!__is_same(M, uint8_t)) {
            const bool row_any = __any_sync(kAllLanes, any);
            const bool row_ordinary = __any_sync(kAllLanes, any && !(x <= 0.5f * low));
            if (lane == 0)
              smem.seen[warp][first + n] |= (row_any ? kSeesAny : 0) | (row_ordinary ? kSeesOrdinary : 0);
          }
        }
      }
    }
    live = __any_sync(kAllLanes, live);
    ordinary = __any_sync(kAllLanes, ordinary);
    closed = __any_sync(kAllLanes, closed);
    if (lane == 0)
      m.classes[list * m.num_tiles + tile] = !live       ? kDead
                                             : !ordinary ? kNegligible
                                             : closed    ? kPartial
                                                         : kOpen;
  }
  if (m.row_flags == nullptr) return;
  __syncthreads();
  for (int r = threadIdx.x; r < m.block_rows; r += 32 * kWarps) {
    uint8_t seen = 0;
    for (int w = 0; w < kWarps; ++w) seen |= smem.seen[w][r];
    m.row_flags[(list * m.num_chunks + chunk) * m.block_rows + r] = seen;
  }
}

template <class M>
void scan(const ScanArgs& args, const Gpu& gpu) {
  const MaskTiles& m = args.m;
  const int64_t blocks = m.list_batches * m.list_heads * m.num_blocks * m.num_chunks;
  launch_with<scan_kernel<M>, sizeof(ScanSmem)>(gpu, dim3(static_cast<unsigned>(blocks)), dim3(32 * kWarps),
                                                /*overlap=*/false, args);
}

}  // namespace

MaskTiles classify_mask(const AttentionParams& p, const Gpu& gpu, int block_rows, int tile) {
  auto allocate = [&](int64_t bytes) {
    return static_cast<uint8_t*>(p.scratch.allocate(p.scratch.context, bytes));
  };
  ScanArgs args{};
  args.p = p;
  args.group = static_cast<unsigned>(p.num_qo_heads / p.num_kv_heads);
  args.num_rows = args.group * static_cast<unsigned>(p.qo_len);
  MaskTiles& m = args.m;
  m.block_rows = block_rows;
  m.tile = tile;
  m.num_blocks = (int64_t(args.num_rows) + block_rows - 1) / block_rows;
  m.num_tiles = (p.kv_len + tile - 1) / tile;
  m.num_chunks = (m.num_tiles + MaskTiles::kChunk - 1) / MaskTiles::kChunk;
  m.list_batches = static_cast<int>(p.mask_stride_b == 0 && !keys_differ_by_batch(p) ? 1 : p.batch);
  m.list_heads = static_cast<int>(p.mask_stride_h == 0 ? 1 : p.num_kv_heads);
  const int64_t lists = m.list_batches * m.list_heads * m.num_blocks;
  m.classes = allocate(lists * m.num_tiles);
  switch (p.mask_dtype) {
    case DType::boolean:
      scan<uint8_t>(args, gpu);
      break;
    case DType::f32:
      m.row_flags = allocate(lists * m.num_chunks * block_rows);
      scan<float>(args, gpu);
      break;
    case DType::bf16:
      m.row_flags = allocate(lists * m.num_chunks * block_rows);
      scan<bf16>(args, gpu);
      break;
    default:
      m.row_flags = allocate(lists * m.num_chunks * block_rows);
      scan<f16>(args, gpu);
  }
  return m;
}

}  // namespace fi::cuda
