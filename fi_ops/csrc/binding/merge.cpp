// Bindings of the merges of attention states: check, params, dispatch.
#include "fi/merge.h"

#include "binding/device.h"

namespace fi::binding {
namespace {

void check_state(const char* op, const char* v_name, const Tensor& v, const char* s_name, const Tensor& s,
                 const Tensor& like, const char* like_name) {
  check_same_device(op, v_name, v, like_name, like);
  check_same_dtype(op, v_name, v, like_name, like);
  check_shape_of(op, v_name, v, like.sizes(), "[seq_len, num_heads, head_dim]");
  check_last_dim_contiguous(op, v_name, v);
  check_same_device(op, s_name, s, like_name, like);
  check_dtype(op, s_name, s, std::array{ScalarType::Float});
  check_shape(op, s_name, s, {like.size(0), like.size(1)}, "[seq_len, num_heads]");
}

void check_first_state(const char* op, const char* v_name, const Tensor& v, const char* s_name,
                       const Tensor& s) {
  check_dtype(op, v_name, v, floats);
  check_ndim(op, v_name, v, 3, "[seq_len, num_heads, head_dim]");
  check_state(op, v_name, v, s_name, s, v, v_name);
}

AttentionStates states_of(const Tensor& v, const Tensor& s) {
  return {v.const_data_ptr(),
          static_cast<const float*>(s.const_data_ptr()),
          {v.stride(0), v.stride(1)},
          {s.stride(0), s.stride(1)}};
}

void set_output(MergeParams& p, const Tensor& v, const Tensor& s) {
  p.v_out = v.mutable_data_ptr();
  p.s_out = static_cast<float*>(s.mutable_data_ptr());
  for (int d = 0; d < 2; ++d) {
    p.v_out_strides[d] = v.stride(d);
    p.s_out_strides[d] = s.stride(d);
  }
}

void set_sizes(MergeParams& p, int64_t seq_len, int64_t num_heads, int64_t head_dim, const Tensor& v) {
  p.seq_len = seq_len;
  p.num_heads = num_heads;
  p.head_dim = head_dim;
  p.dtype = dtype_of(v);
}

std::tuple<Tensor, Tensor> merge_state_op(const Tensor& v_a, const Tensor& s_a, const Tensor& v_b,
                                          const Tensor& s_b) {
  const char* op = "merge_state";
  check_no_grads(op, v_a, s_a, v_b, s_b);
  check_first_state(op, "v_a", v_a, "s_a", s_a);
  check_state(op, "v_b", v_b, "s_b", s_b, v_a, "v_a");
  Tensor v = empty({v_a.size(0), v_a.size(1), v_a.size(2)}, v_a.scalar_type(), v_a);
  Tensor s = empty({v_a.size(0), v_a.size(1)}, ScalarType::Float, v_a);
  MergeParams p{};
  p.a = states_of(v_a, s_a);
  p.b = states_of(v_b, s_b);
  set_output(p, v, s);
  set_sizes(p, v_a.size(0), v_a.size(1), v_a.size(2), v_a);
  run(FI_KERNEL_OF(merge_state), v_a, p);
  return {v, s};
}

void merge_state_in_place_op(Tensor v, Tensor s, const Tensor& v_other, const Tensor& s_other,
                             std::optional<Tensor> mask) {
  const char* op = "merge_state_in_place";
  check_no_grads(op, v, s, v_other, s_other);
  check_first_state(op, "v", v, "s", s);
  check_state(op, "v_other", v_other, "s_other", s_other, v, "v");
  check_writable(op, "v", v);
  check_writable(op, "s", s);
  MergeParams p{};
  if (mask) {
    check_same_device(op, "mask", *mask, "v", v);
    check_dtype(op, "mask", *mask, std::array{ScalarType::Bool});
    check_shape(op, "mask", *mask, {v.size(0)}, "[seq_len]");
    p.mask = static_cast<const bool*>(mask->const_data_ptr());
    p.mask_stride = mask->stride(0);
  }
  p.a = states_of(v, s);
  p.b = states_of(v_other, s_other);
  set_output(p, v, s);
  set_sizes(p, v.size(0), v.size(1), v.size(2), v);
  run(FI_KERNEL_OF(merge_state), v, p);
}

std::tuple<Tensor, Tensor> merge_states_op(const Tensor& v, const Tensor& s) {
  const char* op = "merge_states";
  check_no_grads(op, v, s);
  check_dtype(op, "v", v, floats);
  check_ndim(op, "v", v, 4, "[seq_len, num_states, num_heads, head_dim]");
  check_last_dim_contiguous(op, "v", v);
  check_same_device(op, "s", s, "v", v);
  check_dtype(op, "s", s, std::array{ScalarType::Float});
  check_shape(op, "s", s, {v.size(0), v.size(1), v.size(2)}, "[seq_len, num_states, num_heads]");
  Tensor v_out = empty({v.size(0), v.size(2), v.size(3)}, v.scalar_type(), v);
  Tensor s_out = empty({v.size(0), v.size(2)}, ScalarType::Float, v);
  MergeParams p{};
  p.a = {v.const_data_ptr(),
         static_cast<const float*>(s.const_data_ptr()),
         {v.stride(0), v.stride(2)},
         {s.stride(0), s.stride(2)}};
  p.num_states = v.size(1);
  p.v_state_stride = v.stride(1);
  p.s_state_stride = s.stride(1);
  set_output(p, v_out, s_out);
  set_sizes(p, v.size(0), v.size(2), v.size(3), v);
  run(FI_KERNEL_OF(merge_states), v, p);
  return {v_out, s_out};
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("merge_state", TORCH_BOX(&fi::binding::merge_state_op));
  m.impl("merge_state_in_place", TORCH_BOX(&fi::binding::merge_state_in_place_op));
  m.impl("merge_states", TORCH_BOX(&fi::binding::merge_states_op));
}
