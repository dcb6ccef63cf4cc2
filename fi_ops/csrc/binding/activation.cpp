// Bindings of the gated activations: check, params, dispatch.
#include "fi/activation.h"

#include <vector>

#include "binding/device.h"

namespace fi::binding {
namespace {

template <class Kernel>
Tensor gated(const char* op, const Tensor& input, Kernel kernel) {
  check_no_grads(op, input);
  check_dtype(op, "input", input, floats);
  const int64_t last = input.dim() - 1;
  FI_CHECK(op, last >= 0 && input.size(last) % 2 == 0, "input must be [..., 2 * hidden_size], got ",
           shape_of(input), "; concatenate the gate and the other half");
  check_last_dim_contiguous(op, "input", input);
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape[last] /= 2;
  Tensor output =
      torch::stable::empty({shape.data(), shape.size()}, input.scalar_type(), std::nullopt, input.device());
  ActivationParams p{};
  p.input = input.const_data_ptr();
  p.output = output.mutable_data_ptr();
  p.input_rows = rows_of(op, "input", input);
  p.hidden_size = shape[last];
  p.dtype = dtype_of(input);
  run(kernel, input, p);
  return output;
}

Tensor silu_and_mul_op(const Tensor& input) {
  return gated("silu_and_mul", input, FI_KERNEL_OF(silu_and_mul));
}
Tensor gelu_and_mul_op(const Tensor& input) {
  return gated("gelu_and_mul", input, FI_KERNEL_OF(gelu_and_mul));
}
Tensor gelu_tanh_and_mul_op(const Tensor& input) {
  return gated("gelu_tanh_and_mul", input, FI_KERNEL_OF(gelu_tanh_and_mul));
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("silu_and_mul", TORCH_BOX(&fi::binding::silu_and_mul_op));
  m.impl("gelu_and_mul", TORCH_BOX(&fi::binding::gelu_and_mul_op));
  m.impl("gelu_tanh_and_mul", TORCH_BOX(&fi::binding::gelu_tanh_and_mul_op));
}
