// Bindings of the samplers: check, params, dispatch.
#include "fi/sampling.h"

#include <tuple>

#include "binding/row_filters.h"

namespace fi::binding {
namespace {

using Draws = std::tuple<Tensor, Tensor>;

Draws sample(const char* op, const Tensor& x, bool from_probs, const RowFilters& filters) {
  SamplingParams p = filter_params<SamplingParams>(op, x, from_probs, filters);
  Tensor samples = empty({p.batch}, filters.indices ? filters.indices->scalar_type() : ScalarType::Int, x);
  Tensor valid = empty({p.batch}, ScalarType::Bool, x);
  p.samples = samples.mutable_data_ptr();
  p.valid = static_cast<bool*>(valid.mutable_data_ptr());
  p.sample_dtype = dtype_of(samples);
  run(FI_KERNEL_OF(top_k_top_p_sample), x, p);
  return {samples, valid};
}

Draws sampling_from_logits_op(const Tensor& logits, const Tensor& uniform, std::optional<Tensor> indices) {
  return sample("sampling_from_logits", logits, false, {.uniform = uniform, .indices = indices});
}

Draws top_k_top_p_sampling_from_logits_op(const Tensor& logits, const Tensor& uniform,
                                          std::optional<Tensor> top_k_arr, int64_t top_k,
                                          std::optional<Tensor> top_p_arr, double top_p,
                                          std::optional<Tensor> min_p_arr, double min_p,
                                          std::optional<Tensor> temperature_arr, double temperature,
                                          std::optional<Tensor> indices, bool top_k_first, bool min_p_first,
                                          StringHandle top_k_ties) {
  const StringArgument ties(top_k_ties);
  return sample("top_k_top_p_sampling_from_logits", logits, false,
                {.uniform = uniform,
                 .top_k_arr = top_k_arr,
                 .top_p_arr = top_p_arr,
                 .min_p_arr = min_p_arr,
                 .temperature_arr = temperature_arr,
                 .indices = indices,
                 .top_k = top_k,
                 .top_p = top_p,
                 .min_p = min_p,
                 .temperature = temperature,
                 .top_k_first = top_k_first,
                 .min_p_first = min_p_first,
                 .top_k_ties = ties.text()});
}

Draws sampling_from_probs_op(const Tensor& probs, const Tensor& uniform, std::optional<Tensor> indices) {
  return sample("sampling_from_probs", probs, true, {.uniform = uniform, .indices = indices});
}

Draws top_p_sampling_from_probs_op(const Tensor& probs, const Tensor& uniform,
                                   std::optional<Tensor> top_p_arr, double top_p,
                                   std::optional<Tensor> indices) {
  return sample("top_p_sampling_from_probs", probs, true,
                {.uniform = uniform, .top_p_arr = top_p_arr, .indices = indices, .top_p = top_p});
}

Draws top_k_sampling_from_probs_op(const Tensor& probs, const Tensor& uniform,
                                   std::optional<Tensor> top_k_arr, int64_t top_k,
                                   std::optional<Tensor> indices, StringHandle top_k_ties) {
  const StringArgument ties(top_k_ties);
  return sample("top_k_sampling_from_probs", probs, true,
                {.uniform = uniform,
                 .top_k_arr = top_k_arr,
                 .indices = indices,
                 .top_k = top_k,
                 .top_k_ties = ties.text()});
}

Draws min_p_sampling_from_probs_op(const Tensor& probs, const Tensor& uniform,
                                   std::optional<Tensor> min_p_arr, double min_p,
                                   std::optional<Tensor> indices) {
  return sample("min_p_sampling_from_probs", probs, true,
                {.uniform = uniform, .min_p_arr = min_p_arr, .indices = indices, .min_p = min_p});
}

Draws top_k_top_p_sampling_from_probs_op(const Tensor& probs, const Tensor& uniform,
                                         std::optional<Tensor> top_k_arr, int64_t top_k,
                                         std::optional<Tensor> top_p_arr, double top_p,
                                         std::optional<Tensor> min_p_arr, double min_p,
                                         std::optional<Tensor> indices, bool top_k_first, bool min_p_first,
                                         StringHandle top_k_ties) {
  const StringArgument ties(top_k_ties);
  return sample("top_k_top_p_sampling_from_probs", probs, true,
                {.uniform = uniform,
                 .top_k_arr = top_k_arr,
                 .top_p_arr = top_p_arr,
                 .min_p_arr = min_p_arr,
                 .indices = indices,
                 .top_k = top_k,
                 .top_p = top_p,
                 .min_p = min_p,
                 .top_k_first = top_k_first,
                 .min_p_first = min_p_first,
                 .top_k_ties = ties.text()});
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("sampling_from_logits", TORCH_BOX(&fi::binding::sampling_from_logits_op));
  m.impl("top_k_top_p_sampling_from_logits", TORCH_BOX(&fi::binding::top_k_top_p_sampling_from_logits_op));
  m.impl("sampling_from_probs", TORCH_BOX(&fi::binding::sampling_from_probs_op));
  m.impl("top_p_sampling_from_probs", TORCH_BOX(&fi::binding::top_p_sampling_from_probs_op));
  m.impl("top_k_sampling_from_probs", TORCH_BOX(&fi::binding::top_k_sampling_from_probs_op));
  m.impl("min_p_sampling_from_probs", TORCH_BOX(&fi::binding::min_p_sampling_from_probs_op));
  m.impl("top_k_top_p_sampling_from_probs", TORCH_BOX(&fi::binding::top_k_top_p_sampling_from_probs_op));
}
