// Binding of chain speculative sampling: check, params, dispatch.
#include "fi/speculative.h"

#include <tuple>

#include "binding/row_filters.h"

namespace fi::binding {
namespace {

constexpr const char* kOp = "chain_speculative_sampling";

void put_strides(int64_t (&to)[2], const Tensor& t) {
  to[0] = t.stride(0);
  to[1] = t.stride(1);
}

void check_values(const SpeculativeParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < p.num_speculative_tokens; ++i)
      FI_CHECK(kOp, p.draft_id(b, i) >= 0 && p.draft_id(b, i) < p.vocab_size,
               "draft_token_ids must be in [0, ", p.vocab_size, "), got ", p.draft_id(b, i), " at [", b, ", ",
               i, "]; pass tokens of the vocabulary");
    for (int64_t i = 0; i <= p.num_speculative_tokens; ++i)
      FI_CHECK(kOp, p.uniform_at(b, i) >= 0 && p.uniform_at(b, i) < 1, "uniform must be in [0, 1), got ",
               Number{p.uniform_at(b, i)}, " at [", b, ", ", i, "]; draw it with torch.rand");
  }
}

std::tuple<Tensor, Tensor, Tensor> chain_speculative_sampling_op(const Tensor& draft_probs,
                                                                 const Tensor& draft_token_ids,
                                                                 const Tensor& uniform,
                                                                 const Tensor& target_probs) {
  check_no_grads(kOp, draft_probs, uniform, target_probs);
  check_dtype(kOp, "draft_probs", draft_probs, std::array{ScalarType::Float});
  check_ndim(kOp, "draft_probs", draft_probs, 3, "[batch, num_speculative_tokens, vocab_size]");
  check_last_dim_contiguous(kOp, "draft_probs", draft_probs);
  const int64_t batch = draft_probs.size(0), num = draft_probs.size(1), vocab_size = draft_probs.size(2);
  FI_CHECK(kOp, vocab_size > 0,
           "draft_probs must have at least one column, got vocab_size 0; pass probabilities");
  check_same_device(kOp, "draft_token_ids", draft_token_ids, "draft_probs", draft_probs);
  check_dtype(kOp, "draft_token_ids", draft_token_ids, index_types);
  check_shape(kOp, "draft_token_ids", draft_token_ids, {batch, num}, "[batch, num_speculative_tokens]");
  check_same_device(kOp, "uniform", uniform, "draft_probs", draft_probs);
  check_dtype(kOp, "uniform", uniform, std::array{ScalarType::Float});
  check_shape(kOp, "uniform", uniform, {batch, num + 1}, "[batch, num_speculative_tokens + 1]");
  check_same_device(kOp, "target_probs", target_probs, "draft_probs", draft_probs);
  check_dtype(kOp, "target_probs", target_probs, std::array{ScalarType::Float});
  check_shape(kOp, "target_probs", target_probs, {batch, num + 1, vocab_size},
              "[batch, num_speculative_tokens + 1, vocab_size]");
  check_last_dim_contiguous(kOp, "target_probs", target_probs);

  SpeculativeParams p{};
  p.batch = batch;
  p.num_speculative_tokens = num;
  p.vocab_size = vocab_size;
  p.wide = draft_token_ids.scalar_type() == ScalarType::Long;
  put_strides(p.draft_strides, draft_probs);
  put_strides(p.target_strides, target_probs);
  const auto host_ids = values_to_check(draft_token_ids), host_uniform = values_to_check(uniform);
  if (host_ids && host_uniform) {
    p.draft_token_ids = host_ids->const_data_ptr();
    p.uniform = static_cast<const float*>(host_uniform->const_data_ptr());
    put_strides(p.id_strides, *host_ids);
    put_strides(p.uniform_strides, *host_uniform);
    check_values(p);
  }
  p.draft_token_ids = draft_token_ids.const_data_ptr();
  p.uniform = static_cast<const float*>(uniform.const_data_ptr());
  put_strides(p.id_strides, draft_token_ids);
  put_strides(p.uniform_strides, uniform);

  Tensor output = empty({batch, num + 1}, draft_token_ids.scalar_type(), draft_probs);
  Tensor accepted = empty({batch}, ScalarType::Int, draft_probs),
         emitted = empty({batch}, ScalarType::Int, draft_probs);
  p.draft_probs = static_cast<const float*>(draft_probs.const_data_ptr());
  p.target_probs = static_cast<const float*>(target_probs.const_data_ptr());
  p.output_token_ids = output.mutable_data_ptr();
  p.accepted = static_cast<int32_t*>(accepted.mutable_data_ptr());
  p.emitted = static_cast<int32_t*>(emitted.mutable_data_ptr());
  run(FI_KERNEL_OF(chain_speculative_sample), draft_probs, p);
  return {output, accepted, emitted};
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("chain_speculative_sampling", TORCH_BOX(&fi::binding::chain_speculative_sampling_op));
}
