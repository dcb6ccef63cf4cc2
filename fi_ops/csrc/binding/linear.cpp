// Binding of the linear layer: check, params, dispatch.
#include "fi/linear.h"

#include <vector>

#include "binding/device.h"

namespace fi::binding {
namespace {

Tensor linear_op(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "linear";
  check_no_grads(op, input, weight, bias);
  check_dtype(op, "input", input, floats);
  FI_CHECK(op, input.dim() >= 1, "input must be [..., in_features], got a 0-d tensor; add a dimension");
  check_last_dim_contiguous(op, "input", input);
  const int64_t in_features = input.size(input.dim() - 1);
  check_same_device(op, "weight", weight, "input", input);
  check_same_dtype(op, "weight", weight, "input", input);
  check_ndim(op, "weight", weight, 2, "[out_features, in_features]");
  const int64_t out_features = weight.size(0);
  check_shape(op, "weight", weight, {out_features, in_features}, "[out_features, in_features]");
  check_last_dim_contiguous(op, "weight", weight);
  if (bias) {
    check_same_device(op, "bias", *bias, "input", input);
    check_same_dtype(op, "bias", *bias, "input", input);
    check_shape(op, "bias", *bias, {out_features}, "[out_features]");
    check_last_dim_contiguous(op, "bias", *bias);
  }
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = out_features;
  Tensor output = torch::stable::empty(shape, input.scalar_type(), std::nullopt, input.device());
  LinearParams p{};
  p.input = input.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  p.input_rows = rows_of(op, "input", input);
  p.output_rows = rows_of(op, "output", output);
  p.in_features = in_features;
  p.out_features = out_features;
  p.weight_stride = weight.stride(0);
  p.dtype = dtype_of(input);
  run(FI_KERNEL_OF(linear), input, p);
  return output;
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) { m.impl("linear", TORCH_BOX(&fi::binding::linear_op)); }
