// Latent attention on CUDA cores: how the work is cut, and the choice of a dtype.
#include "fi/cuda/launch.h"
#include "fi/cuda/mla/generic.h"
#include "fi/cuda/ptx.h"

namespace fi::cuda::mla {
namespace {

constexpr int kThreads = 256;

// The sum of x over the threads before this one, and over all of them.
struct Sums {
  int64_t before, all;
};

FI_DEVICE_INLINE Sums scan(int64_t x) {
  __shared__ int64_t warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t y = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += y;
  }
  __syncthreads();  // the sums of a call before this have been read
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  Sums sums{sum - x, 0};
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) sums.before += warps[w];
    sums.all += warps[w];
  }
  return sums;
}

// One block. Parts are as long as gives all blocks of the attention kernel about the same.
__global__ void __launch_bounds__(kThreads) cut_kernel(const __grid_constant__ GenericArgs args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const BatchAttentionParams& p = args.p.batch;
  const int64_t batch = p.call.batch, heads = p.call.num_qo_heads;
  int64_t tiles = 0;
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) {
    tiles += Cut::of(request_of(p, b), heads, 1).items();
  }
  const int64_t share = (scan(tiles).all * args.slices + args.room - 1) / args.room;
  const int64_t part_tiles = share > kMinPartTiles ? share : kMinPartTiles;
  int64_t items = 0, slots = 0;
  for (int64_t first = 0; first < batch; first += kThreads) {
    const int64_t b = first + threadIdx.x;
    const Cut cut = b < batch ? Cut::of(request_of(p, b), heads, part_tiles) : Cut{0, 1};
    const Sums items_here = scan(cut.items()), slots_here = scan(cut.slots());
    if (b < batch) {
      args.first_item[b] = items + items_here.before;
      args.first_slot[b] = slots + slots_here.before;
    }
    items += items_here.all;
    slots += slots_here.all;
  }
  if (threadIdx.x == 0) {
    args.first_item[batch] = items;
    args.first_slot[batch] = slots;
    *args.part_tiles = part_tiles;
  }
}

}  // namespace

void on_cuda_cores(const MlaParams& p, const Gpu& gpu) {
  const AttentionParams& c = p.batch.call;
  GenericArgs args{};
  args.p = p;
  args.slices = c.head_dim_vo > kTileColumns ? (c.head_dim_vo + kTileColumns - 1) / kTileColumns : 1;
  args.room = int64_t{gpu.num_sms} * 2;
  args.width = (c.head_dim_vo + 3) / 4 * 4;
  const auto allocate = [&](int64_t bytes) { return c.scratch.allocate(c.scratch.context, bytes); };
  auto* counts = static_cast<int64_t*>(allocate((2 * c.batch + 3) * int64_t(sizeof(int64_t))));
  args.part_tiles = counts;
  args.first_item = counts + 1;
  args.first_slot = args.first_item + c.batch + 1;
  // Whatever the index tensors say. A request of several parts has fewer than two for each part_tiles of its
  // tiles, and all requests' tiles are room / slices times part_tiles at most.
  const int64_t by_room = 2 * ((args.room + args.slices - 1) / args.slices);
  const int64_t by_keys =
      c.batch * (c.qo_len * c.num_qo_heads / kTileRows + 1) * (c.kv_len / (kMinPartTiles * kTileKeys) + 1);
  const int64_t slots = by_room < by_keys ? by_room : by_keys;
  args.out = static_cast<float*>(allocate(slots * kTileRows * args.width * int64_t(sizeof(float))));
  args.state = static_cast<float*>(allocate(slots * kTileRows * 2 * int64_t(sizeof(float))));
  launch(gpu, cut_kernel, dim3(1), dim3(kThreads), 0, /*overlap=*/true, args);
  c.dtype == DType::f32    ? run_generic<float>(args, gpu)
  : c.dtype == DType::bf16 ? run_generic<bf16>(args, gpu)
                           : run_generic<f16>(args, gpu);
}

}  // namespace fi::cuda::mla
