// Bindings of the rope ops: check, params, dispatch.
#include "fi/rope.h"

#include <cmath>
#include <vector>

#include "binding/device.h"
#include "binding/indices.h"
#include "binding/rope.h"

namespace fi::binding {
namespace {

// Fills everything but the outputs.
RopeParams check_rope(const char* op, const Tensor& query, const Tensor& key, const Tensor& cos,
                      const Tensor& sin, const std::optional<Tensor>& positions, bool interleaved,
                      int64_t rotary_dim) {
  check_no_grads(op, query, key, cos, sin);
  check_dtype(op, "query", query, floats);
  check_ndim(op, "query", query, 4, "[batch, num_qo_heads, len, head_dim]");
  check_last_dim_contiguous(op, "query", query);
  const int64_t batch = query.size(0), len = query.size(2), head_dim = query.size(3);
  check_same_device(op, "key", key, "query", query);
  check_same_dtype(op, "key", key, "query", query);
  check_ndim(op, "key", key, 4, "[batch, num_kv_heads, len, head_dim]");
  check_last_dim_contiguous(op, "key", key);
  check_shape(op, "key", key, {batch, key.size(1), len, head_dim}, "[batch, num_kv_heads, len, head_dim]");
  if (positions) check_ndim(op, "cos", cos, 3, "[1 or batch, max_len, R or 2R]");
  const int64_t num_rows = positions ? cos.size(1) : len;

  RopeParams p{};
  p.rotary_dim = check_cos_sin(op, cos, sin, query, num_rows, rotary_dim, positions ? "max_len" : "len");
  if (positions) {
    check_same_device(op, "positions", *positions, "query", query);
    check_dtype(op, "positions", *positions, index_types);
    const bool per_batch = positions->dim() == 2;
    if (per_batch) {
      check_shape(op, "positions", *positions, {batch, len}, "[batch, len]");
    } else {
      check_shape(op, "positions", *positions, {len}, "[len] or [batch, len]");
    }
    p.positions = positions_of(*positions);
    if (const auto values = values_to_check(*positions)) {
      const Positions rows = positions_of(*values);
      for (int64_t b = 0; b < (per_batch ? batch : 1); ++b)
        for (int64_t l = 0; l < len; ++l) {
          const int64_t row = rows.at(b, l);
          FI_CHECK(op, row >= 0 && row < num_rows, "positions must be rows of cos, at least 0 and less than ",
                   num_rows, ", got ", row, "; make longer tables with rope_cos_sin");
        }
    }
  }
  p.query.input = query.const_data_ptr();
  p.query.num_heads = query.size(1);
  p.key.input = key.const_data_ptr();
  p.key.num_heads = key.size(1);
  for (int d = 0; d < 3; ++d) {
    p.query.input_strides[d] = query.stride(d);
    p.key.input_strides[d] = key.stride(d);
  }
  p.cos = cos.const_data_ptr();
  p.sin = sin.const_data_ptr();
  p.cos_strides[0] = cos.size(0) == 1 ? 0 : cos.stride(0);
  p.sin_strides[0] = sin.size(0) == 1 ? 0 : sin.stride(0);
  p.cos_strides[1] = cos.stride(1);
  p.sin_strides[1] = sin.stride(1);
  p.num_rows = num_rows;
  p.batch = batch;
  p.len = len;
  p.head_dim = head_dim;
  p.width = cos.size(2);
  p.dtype = dtype_of(query);
  p.angle_dtype = dtype_of(cos);
  p.interleaved = interleaved;
  return p;
}

Tensor output_like(const char* op, const char* name, const Tensor& t, RopeHeads& heads) {
  Tensor output = torch::stable::empty_like(t);
  FI_CHECK(op, output.stride(3) == 1 || output.size(3) <= 1, name, " must not overlap itself, got strides ",
           list_text(t.strides()), "; call .contiguous() on it");
  heads.output = output.mutable_data_ptr();
  for (int d = 0; d < 3; ++d) heads.output_strides[d] = output.stride(d);
  return output;
}

void write_to(const Tensor& t, RopeHeads& heads) {
  heads.output = t.mutable_data_ptr();
  for (int d = 0; d < 3; ++d) heads.output_strides[d] = heads.input_strides[d];
}

std::tuple<Tensor, Tensor> rope_op(const Tensor& query, const Tensor& key, const Tensor& cos,
                                   const Tensor& sin, std::optional<Tensor> positions, bool interleaved,
                                   int64_t rotary_dim) {
  RopeParams p = check_rope("rope", query, key, cos, sin, positions, interleaved, rotary_dim);
  Tensor query_out = output_like("rope", "query", query, p.query);
  Tensor key_out = output_like("rope", "key", key, p.key);
  run(FI_KERNEL_OF(rope), query, p);
  return {query_out, key_out};
}

void rope_in_place_op(Tensor query, Tensor key, const Tensor& cos, const Tensor& sin,
                      std::optional<Tensor> positions, bool interleaved, int64_t rotary_dim) {
  RopeParams p = check_rope("rope_", query, key, cos, sin, positions, interleaved, rotary_dim);
  check_writable("rope_", "query", query);
  check_writable("rope_", "key", key);
  write_to(query, p.query);
  write_to(key, p.key);
  run(FI_KERNEL_OF(rope), query, p);
}

std::tuple<Tensor, Tensor> rope_cos_sin_op(const Tensor& positions, int64_t rotary_dim, double rope_scale,
                                           double rope_theta, double low_freq_factor, double high_freq_factor,
                                           int64_t old_context_len) {
  const char* op = "rope_cos_sin";
  check_dtype(op, "positions", positions, index_types);
  FI_CHECK(op, rotary_dim > 0 && rotary_dim % 2 == 0, "rotary_dim must be positive and even, got ",
           rotary_dim, "; pass the number of rotated elements of a head");
  FI_CHECK(op, rope_scale > 0 && std::isfinite(rope_scale), "rope_scale must be positive and finite, got ",
           rope_scale, "; pass 1 for none");
  FI_CHECK(op, rope_theta > 0 && std::isfinite(rope_theta), "rope_theta must be positive and finite, got ",
           rope_theta, "; pass the model's base, such as 10000");
  FI_CHECK(op, old_context_len >= 0, "old_context_len must be 0 (plain frequencies) or more, got ",
           old_context_len, "; pass 0 for no Llama 3.1 scaling");
  FI_CHECK(op,
           old_context_len == 0 || (low_freq_factor >= 0 && high_freq_factor > low_freq_factor &&
                                    std::isfinite(high_freq_factor)),
           "low_freq_factor and high_freq_factor must be 0 <= low < high with old_context_len, got ",
           low_freq_factor, " and ", high_freq_factor, "; Llama 3.1 has 1 and 4");

  const bool wide = positions.scalar_type() == ScalarType::Long;
  RopeCosSinParams p{};
  p.position_rows = rows_of(op, "positions", positions, /*keep_last=*/false);
  p.positions = {positions.const_data_ptr(), wide};
  p.frequencies = {rotary_dim / 2,  rope_scale,       rope_theta,
                   low_freq_factor, high_freq_factor, old_context_len};
  if (const auto values = values_to_check(positions)) {
    double fastest = 0;
    for (int64_t i = 0; i < rotary_dim / 2; ++i) fastest = std::fmax(fastest, p.frequencies.at(i));
    const Rows rows = rows_of(op, "positions", *values, /*keep_last=*/false);
    const Indices host{values->const_data_ptr(), wide};
    for (int64_t row = 0; row < rows.num_rows; ++row) {
      const int64_t position = host.at(rows.offset(row));
      FI_CHECK(op, std::fabs(static_cast<double>(position)) * fastest < 2147483648.0,
               "positions must give angles of less than 2^31 radians, got position ", position,
               "; check positions, rope_scale and rope_theta");
    }
  }
  std::vector<int64_t> shape(positions.sizes().begin(), positions.sizes().end());
  shape.push_back(rotary_dim / 2);
  auto make = [&] {
    return torch::stable::empty({shape.data(), shape.size()}, ScalarType::Float, std::nullopt,
                                positions.device());
  };
  Tensor cos = make(), sin = make();
  p.cos = static_cast<float*>(cos.mutable_data_ptr());
  p.sin = static_cast<float*>(sin.mutable_data_ptr());
  run(FI_KERNEL_OF(rope_cos_sin), positions, p);
  return {cos, sin};
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("rope", TORCH_BOX(&fi::binding::rope_op));
  m.impl("rope_", TORCH_BOX(&fi::binding::rope_in_place_op));
  m.impl("rope_cos_sin", TORCH_BOX(&fi::binding::rope_cos_sin_op));
}
