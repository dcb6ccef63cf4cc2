// Bindings of the norms: check, params, dispatch.
#include "fi/norm.h"

#include "binding/device.h"

namespace fi::binding {
namespace {

void check_input(const char* op, const Tensor& input, const char* name = "input") {
  check_dtype(op, name, input, floats);
  FI_CHECK(op, input.dim() >= 1, name, " must be [..., hidden_size], got a 0-d tensor; add a dimension");
  check_last_dim_contiguous(op, name, input);
}

void check_weight(const char* op, const Tensor& input, const Tensor& weight, const char* name = "weight") {
  check_same_device(op, name, weight, "input", input);
  if (input.scalar_type() == ScalarType::Float) {
    check_dtype(op, name, weight, std::array{ScalarType::Float});
  } else {
    check_dtype(op, name, weight, std::array{input.scalar_type(), ScalarType::Float});
  }
  check_shape(op, name, weight, {input.size(input.dim() - 1)}, "[hidden_size]");
  check_last_dim_contiguous(op, name, weight);
}

NormParams common_params(const char* op, const Tensor& input, const Tensor& weight, double eps) {
  FI_CHECK(op, eps >= 0, "eps must be 0 or more, got ", eps, "; pass the model's epsilon");
  NormParams p{};
  p.input = input.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.input_rows = rows_of(op, "input", input);
  p.hidden_size = input.size(input.dim() - 1);
  p.dtype = dtype_of(input);
  p.weight_dtype = dtype_of(weight);
  p.eps = static_cast<float>(eps);
  return p;
}

Tensor empty_output(const char* op, const Tensor& input, NormParams& p) {
  Tensor output = torch::stable::empty(input.sizes(), input.scalar_type(), std::nullopt, input.device());
  p.output = output.mutable_data_ptr();
  p.output_rows = rows_of(op, "output", output);
  return output;
}

Tensor rmsnorm_with(const char* op, const Tensor& input, const Tensor& weight, double eps,
                    float weight_offset) {
  check_no_grads(op, input, weight);
  check_input(op, input);
  check_weight(op, input, weight);
  NormParams p = common_params(op, input, weight, eps);
  p.weight_offset = weight_offset;
  Tensor output = empty_output(op, input, p);
  run(FI_KERNEL_OF(rmsnorm), input, p);
  return output;
}

void fused_add_rmsnorm_with(const char* op, Tensor& input, Tensor& residual, const Tensor& weight, double eps,
                            float weight_offset) {
  check_no_grads(op, input, residual, weight);
  check_input(op, input);
  check_same_device(op, "residual", residual, "input", input);
  check_same_dtype(op, "residual", residual, "input", input);
  check_shape_of(op, "residual", residual, input.sizes(), "input's shape");
  check_last_dim_contiguous(op, "residual", residual);
  check_weight(op, input, weight);
  check_writable(op, "input", input);
  check_writable(op, "residual", residual);
  NormParams p = common_params(op, input, weight, eps);
  p.weight_offset = weight_offset;
  p.output = input.mutable_data_ptr();
  p.output_rows = p.input_rows;
  p.residual = p.residual_output = residual.mutable_data_ptr();
  p.residual_rows = rows_of(op, "residual", residual);
  run(FI_KERNEL_OF(rmsnorm), input, p);
}

Tensor rmsnorm_op(const Tensor& input, const Tensor& weight, double eps) {
  return rmsnorm_with("rmsnorm", input, weight, eps, 0.0f);
}

Tensor gemma_rmsnorm_op(const Tensor& input, const Tensor& weight, double eps) {
  return rmsnorm_with("gemma_rmsnorm", input, weight, eps, 1.0f);
}

void fused_add_rmsnorm_op(Tensor input, Tensor residual, const Tensor& weight, double eps) {
  fused_add_rmsnorm_with("fused_add_rmsnorm", input, residual, weight, eps, 0.0f);
}

void gemma_fused_add_rmsnorm_op(Tensor input, Tensor residual, const Tensor& weight, double eps) {
  fused_add_rmsnorm_with("gemma_fused_add_rmsnorm", input, residual, weight, eps, 1.0f);
}

Tensor layernorm_op(const Tensor& input, const Tensor& weight, const Tensor& bias, double eps) {
  const char* op = "layernorm";
  check_no_grads(op, input, weight, bias);
  check_input(op, input);
  check_weight(op, input, weight);
  check_weight(op, input, bias, "bias");
  NormParams p = common_params(op, input, weight, eps);
  p.bias = bias.const_data_ptr();
  p.bias_dtype = dtype_of(bias);
  Tensor output = empty_output(op, input, p);
  run(FI_KERNEL_OF(layernorm), input, p);
  return output;
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("rmsnorm", TORCH_BOX(&fi::binding::rmsnorm_op));
  m.impl("gemma_rmsnorm", TORCH_BOX(&fi::binding::gemma_rmsnorm_op));
  m.impl("fused_add_rmsnorm", TORCH_BOX(&fi::binding::fused_add_rmsnorm_op));
  m.impl("gemma_fused_add_rmsnorm", TORCH_BOX(&fi::binding::gemma_fused_add_rmsnorm_op));
  m.impl("layernorm", TORCH_BOX(&fi::binding::layernorm_op));
}
