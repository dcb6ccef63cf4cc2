// Decode attention's entry: what runs it, and the kernel that looks at the mask first.
#include "fi/cuda/decode.h"

#include "fi/cuda/decode/dtypes.h"
#include "fi/cuda/decode/kernel.h"

namespace fi::cuda {
namespace decode {
namespace {

// Block n scans list n; all of them zero the counters. Without a mask nothing here is waited for until the
// first partial result is there.
__global__ void __launch_bounds__(kScanThreads, 1)
    prepare_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Plan plan) {
  allow_next_kernel();
  for (int n = blockIdx.x * blockDim.x + threadIdx.x; n < plan.num_segments; n += gridDim.x * blockDim.x)
    plan.arrivals[n] = 0;
  if (plan.lists.entries == nullptr) return;
  __shared__ ScanShared shared;
  const int list = blockIdx.x, b = list / plan.lists.heads, kv_head = list % plan.lists.heads;
  int32_t* entries = plan.lists.entries + int64_t{list} * plan.lists.num_tiles;
  int count = 0;
  with_mask_type(p.mask_dtype, [&]<class M>(const M*) {
    count = scan_list<M>(p, plan.group, b, kv_head, entries, shared);
  });
  if (threadIdx.x == 0) plan.lists.counts[list] = count;
}

template <class E>
E* allocate(const AttentionParams& p, int64_t count) {
  return static_cast<E*>(p.scratch.allocate(p.scratch.context, count * int64_t(sizeof(E))));
}

// cp.async takes 16 bytes at 16-byte addresses; a stride that is never used may be anything.
bool tensor_cores_take(const AttentionParams& p) {
  auto aligned = [&](const void* data, int64_t heads, int64_t len, int64_t b, int64_t h, int64_t n) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (p.batch == 1 || b % 8 == 0) &&
           (heads == 1 || h % 8 == 0) && (len == 1 || n % 8 == 0);
  };
  auto takes = [](int64_t dim) { return dim > 0 && dim <= 256 && dim % 8 == 0; };
  return p.dtype != DType::f32 && takes(p.head_dim_qk) && takes(p.head_dim_vo) &&
         aligned(p.query, p.num_qo_heads, p.qo_len, p.q_stride_b, p.q_stride_h, p.q_stride_n) &&
         aligned(p.key, p.num_kv_heads, p.kv_len, p.k_stride_b, p.k_stride_h, p.k_stride_n) &&
         aligned(p.value, p.num_kv_heads, p.kv_len, p.v_stride_b, p.v_stride_h, p.v_stride_n) &&
         aligned(p.out, p.num_qo_heads, p.qo_len, p.o_stride_b, p.o_stride_h, p.o_stride_n);
}

}  // namespace

bool prepare(const AttentionParams& p, Plan& plan, const Gpu& gpu) {
  const bool per_head = p.mask && p.mask_stride_h != 0 && p.num_kv_heads > 1;
  plan.num_groups = static_cast<int>(p.batch * (per_head ? p.num_kv_heads : 1));
  plan.group_segments = plan.num_segments / plan.num_groups;
  plan.uniform_tiles = p.mask || range_is_data(p) ? -1 : tiles_of(plan.range);
  plan.arrivals = allocate<int32_t>(p, plan.num_segments);
  int num_lists = 1;
  if (p.mask) {
    plan.lists.batches = p.mask_stride_b == 0 && !keys_differ_by_batch(p) ? 1 : static_cast<int>(p.batch);
    plan.lists.heads = per_head ? static_cast<int>(p.num_kv_heads) : 1;
    plan.lists.num_tiles = static_cast<int>((p.kv_len + kTileKeys - 1) / kTileKeys);
    num_lists = plan.lists.batches * plan.lists.heads;
    plan.lists.entries = allocate<int32_t>(p, int64_t{num_lists} * plan.lists.num_tiles);
    plan.lists.counts = allocate<int32_t>(p, num_lists);
  }
  // One tile a segment is never split: nobody counts.
  if (!p.mask && p.kv_len <= kTileKeys) return false;
  launch(gpu, prepare_kernel, dim3(num_lists), dim3(p.mask ? kScanThreads : 256), 0, p, plan);
  return true;
}

}  // namespace decode

void attention_decode(const AttentionParams& p, const AppendParams* append, const Gpu& gpu) {
  const bool is_empty = p.batch == 0 || p.num_qo_heads == 0 || p.qo_len == 0 || p.head_dim_vo == 0;
  if (is_empty || !decode::tensor_cores_take(p)) {
    if (append) append_kv(*append, gpu);
    if (!is_empty) decode::on_cuda_cores(p, gpu);
    return;
  }
  const int64_t widest = p.head_dim_qk > p.head_dim_vo ? p.head_dim_qk : p.head_dim_vo;
  const bool is_bf16 = p.dtype == DType::bf16;
  const auto run = widest <= 64    ? (is_bf16 ? decode::bf16_64 : decode::f16_64)
                   : widest <= 128 ? (is_bf16 ? decode::bf16_128 : decode::f16_128)
                   : p.head_dim_qk <= 192 && p.head_dim_vo <= 128
                       ? (is_bf16 ? decode::bf16_192_128 : decode::f16_192_128)
                       : (is_bf16 ? decode::bf16_256 : decode::f16_256);
  run(p, append, gpu);
}

}  // namespace fi::cuda
