// Bindings of the ops that write filtered distributions out: check, params, dispatch.
#include "binding/row_filters.h"

namespace fi::binding {
namespace {

Tensor renorm(const char* op, const Tensor& x, bool from_probs, const RowFilters& filters) {
  RenormParams p = filter_params<RenormParams>(op, x, from_probs, filters);
  Tensor output = empty({p.batch, p.vocab_size}, ScalarType::Float, x);
  p.output = output.mutable_data_ptr();
  run(FI_KERNEL_OF(renorm_probs), x, p);
  return output;
}

Tensor softmax_op(const Tensor& logits, std::optional<Tensor> temperature_arr, double temperature) {
  return renorm("softmax", logits, false, {.temperature_arr = temperature_arr, .temperature = temperature});
}

Tensor top_k_top_p_softmax_op(const Tensor& logits, std::optional<Tensor> top_k_arr, int64_t top_k,
                              std::optional<Tensor> top_p_arr, double top_p, std::optional<Tensor> min_p_arr,
                              double min_p, std::optional<Tensor> temperature_arr, double temperature,
                              bool top_k_first, bool min_p_first, StringHandle top_k_ties) {
  const StringArgument ties(top_k_ties);
  return renorm("top_k_top_p_softmax", logits, false,
                {.top_k_arr = top_k_arr,
                 .top_p_arr = top_p_arr,
                 .min_p_arr = min_p_arr,
                 .temperature_arr = temperature_arr,
                 .top_k = top_k,
                 .top_p = top_p,
                 .min_p = min_p,
                 .temperature = temperature,
                 .top_k_first = top_k_first,
                 .min_p_first = min_p_first,
                 .top_k_ties = ties.text()});
}

Tensor top_p_renorm_probs_op(const Tensor& probs, std::optional<Tensor> top_p_arr, double top_p) {
  return renorm("top_p_renorm_probs", probs, true, {.top_p_arr = top_p_arr, .top_p = top_p});
}

Tensor top_k_renorm_probs_op(const Tensor& probs, std::optional<Tensor> top_k_arr, int64_t top_k,
                             StringHandle top_k_ties) {
  const StringArgument ties(top_k_ties);
  return renorm("top_k_renorm_probs", probs, true,
                {.top_k_arr = top_k_arr, .top_k = top_k, .top_k_ties = ties.text()});
}

Tensor top_k_top_p_renorm_probs_op(const Tensor& probs, std::optional<Tensor> top_k_arr, int64_t top_k,
                                   std::optional<Tensor> top_p_arr, double top_p,
                                   std::optional<Tensor> min_p_arr, double min_p, bool top_k_first,
                                   bool min_p_first, StringHandle top_k_ties) {
  const StringArgument ties(top_k_ties);
  return renorm("top_k_top_p_renorm_probs", probs, true,
                {.top_k_arr = top_k_arr,
                 .top_p_arr = top_p_arr,
                 .min_p_arr = min_p_arr,
                 .top_k = top_k,
                 .top_p = top_p,
                 .min_p = min_p,
                 .top_k_first = top_k_first,
                 .min_p_first = min_p_first,
                 .top_k_ties = ties.text()});
}

Tensor top_k_mask_logits_op(const Tensor& logits, std::optional<Tensor> top_k_arr, int64_t top_k,
                            StringHandle top_k_ties) {
  const StringArgument ties(top_k_ties);
  RenormParams p =
      filter_params<RenormParams>("top_k_mask_logits", logits, false,
                                  {.top_k_arr = top_k_arr, .top_k = top_k, .top_k_ties = ties.text()});
  Tensor output = empty({p.batch, p.vocab_size}, logits.scalar_type(), logits);
  p.output = output.mutable_data_ptr();
  run(FI_KERNEL_OF(top_k_mask_logits), logits, p);
  return output;
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("softmax", TORCH_BOX(&fi::binding::softmax_op));
  m.impl("top_k_top_p_softmax", TORCH_BOX(&fi::binding::top_k_top_p_softmax_op));
  m.impl("top_p_renorm_probs", TORCH_BOX(&fi::binding::top_p_renorm_probs_op));
  m.impl("top_k_renorm_probs", TORCH_BOX(&fi::binding::top_k_renorm_probs_op));
  m.impl("top_k_top_p_renorm_probs", TORCH_BOX(&fi::binding::top_k_top_p_renorm_probs_op));
  m.impl("top_k_mask_logits", TORCH_BOX(&fi::binding::top_k_mask_logits_op));
}
