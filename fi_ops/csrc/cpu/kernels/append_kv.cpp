#include "fi/cpu/rope_table.h"

namespace fi::FI_ISA {

namespace {

template <class T>
void append(const AppendParams& p, const Parallel& parallel) {
  const int64_t rows = p.batch * p.new_len;  // a task takes some positions with all their heads
  for_each_block(parallel, rows, 16, [&](int64_t begin, int64_t end) {
    float scratch[rope_angle_floats(kMaxRotaryDim)];
    RopeAngles angles{};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / p.new_len, i = row % p.new_len, slot = p.positions.at(b, i);
      if (p.rope.cos) angles = rope_angles(p.rope, b, i, scratch);
      for (int64_t h = 0; h < p.num_kv_heads; ++h) {
        const T* k = static_cast<const T*>(p.key) + b * p.k_stride_b + h * p.k_stride_h + i * p.k_stride_n;
        const T* v = static_cast<const T*>(p.value) + b * p.v_stride_b + h * p.v_stride_h + i * p.v_stride_n;
        T* k_slot = static_cast<T*>(p.k_cache) + b * p.kc_stride_b + h * p.kc_stride_h + slot * p.kc_stride_n;
        T* v_slot = static_cast<T*>(p.v_cache) + b * p.vc_stride_b + h * p.vc_stride_h + slot * p.vc_stride_n;
        if (p.rope.cos) {
          rotate_row(k, k_slot, angles, p.rope.rotary_dim, p.head_dim_qk, p.rope.interleaved);
        } else {
          __builtin_memcpy(k_slot, k, p.head_dim_qk * sizeof(T));
        }
        __builtin_memcpy(v_slot, v, p.head_dim_vo * sizeof(T));
      }
    }
  });
}

}  // namespace

void append_kv(const AppendParams& params, const Parallel& parallel) {
  switch (params.dtype) {
    case DType::f32:
      return append<float>(params, parallel);
    case DType::bf16:
      return append<bf16>(params, parallel);
    default:
      return append<f16>(params, parallel);
  }
}

void append_attention(const AppendAttentionParams& params, const Parallel& parallel) {
  append_kv(params.append, parallel);
  attention(params.attention, parallel);
}

}  // namespace fi::FI_ISA
