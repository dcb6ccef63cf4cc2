// New keys and values into a static cache, the keys rotated on the way where a table is given.
#include "fi/attention.h"

#include "fi/cuda/rope_row.h"
#include "fi/cuda/rowops.h"

namespace fi::cuda {
namespace {

// Two cos and sin a pair need more registers than 64.
template <class T, int N, bool interleaved, bool per_member>
__global__ void __launch_bounds__(kMaxThreads, per_member ? 3 : 4)
    append_kv_kernel(const __grid_constant__ AppendParams p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t num_tokens = p.batch * p.new_len;
  const RopeTable& rope = p.rope;
  for (int64_t token = int64_t{blockIdx.x} * blockDim.z + threadIdx.z; token < num_tokens;
       token += int64_t{gridDim.x} * blockDim.z) {
    const int64_t b = token / p.new_len, i = token - b * p.new_len, slot = p.positions.at(b, i);
    if (slot < 0 || slot >= p.max_len) continue;  // positions are not checked by default
    for (int64_t h = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; h < 2 * p.num_kv_heads;
         h += int64_t{gridDim.y} * blockDim.y) {
      if (h >= p.num_kv_heads) {
        const int64_t head = h - p.num_kv_heads;
        copy_elements<N>(
            static_cast<const T*>(p.value) + b * p.v_stride_b + head * p.v_stride_h + i * p.v_stride_n,
            static_cast<T*>(p.v_cache) + b * p.vc_stride_b + head * p.vc_stride_h + slot * p.vc_stride_n, 0,
            p.head_dim_vo);
        continue;
      }
      const T* x = static_cast<const T*>(p.key) + b * p.k_stride_b + h * p.k_stride_h + i * p.k_stride_n;
      T* y = static_cast<T*>(p.k_cache) + b * p.kc_stride_b + h * p.kc_stride_h + slot * p.kc_stride_n;
      const int64_t rotated = rope.cos ? rope.rotary_dim : 0;
      for (int64_t first = int64_t{threadIdx.x} * N; first < rotated / 2; first += int64_t{blockDim.x} * N) {
        const auto angles = load_rope_angles<N, interleaved, per_member>(
            rope.cos, b * rope.cos_stride_b + i * rope.cos_stride_row, rope.sin,
            b * rope.sin_stride_b + i * rope.sin_stride_row, rope.dtype, rotated, first);
        rotate_pairs<interleaved>(x, y, angles, rotated, first);
      }
      copy_elements<N>(x, y, rotated, p.head_dim_qk);
    }
  }
}

bool packs_fit_everywhere(const AppendParams& p) {
  const int64_t pack = 16 / size_of(p.dtype);
  const RopeTable& rope = p.rope;
  return p.head_dim_qk % pack == 0 && p.head_dim_vo % pack == 0 &&
         packs_fit(p.key, p.dtype, {p.k_stride_b, p.k_stride_h, p.k_stride_n}) &&
         packs_fit(p.value, p.dtype, {p.v_stride_b, p.v_stride_h, p.v_stride_n}) &&
         packs_fit(p.k_cache, p.dtype, {p.kc_stride_b, p.kc_stride_h, p.kc_stride_n}) &&
         packs_fit(p.v_cache, p.dtype, {p.vc_stride_b, p.vc_stride_h, p.vc_stride_n}) &&
         (rope.cos == nullptr || (rope.rotary_dim % (2 * pack) == 0 &&
                                  packs_fit(rope.cos, rope.dtype, {rope.cos_stride_b, rope.cos_stride_row}) &&
                                  packs_fit(rope.sin, rope.dtype, {rope.sin_stride_b, rope.sin_stride_row})));
}

}  // namespace

void append_kv(const AppendParams& p, const Gpu& gpu) {
  const int64_t num_tokens = p.batch * p.new_len, num_heads = 2 * p.num_kv_heads;
  if (num_tokens == 0 || num_heads == 0) return;
  dispatch_pack(p.dtype, packs_fit_everywhere(p), [&](auto t, auto size) {
    constexpr int N = decltype(size)::value;
    const int64_t elements = p.head_dim_qk > p.head_dim_vo ? p.head_dim_qk : p.head_dim_vo;
    // Half a row a turn: with RoPE a thread takes two packs of a key.
    const Shape shape = shape_over_heads(gpu, num_tokens, num_heads, ceil_div(elements, 2 * N));
    dispatch_bool(p.rope.interleaved, [&](auto interleaved) {
      dispatch_bool(p.rope.cos && p.rope.width == p.rope.rotary_dim, [&](auto per_member) {
        launch(gpu, append_kv_kernel<decltype(t), N, interleaved.value, per_member.value>, shape.grid,
               shape.block, 0, /*overlap=*/true, p);
      });
    });
  });
}

}  // namespace fi::cuda
