// Binding of bias, penalties and allowed-token masks: check, params, dispatch.
#include "fi/logits_processors.h"

#include <cmath>

#include "binding/row_filters.h"

namespace fi::binding {
namespace {

constexpr const char* kOp = "apply_logits_processors";

void check_table(const char* name, const std::optional<Tensor>& t, ScalarType type, const Tensor& logits,
                 std::initializer_list<int64_t> shape, const char* layout) {
  if (!t) return;
  check_same_device(kOp, name, *t, "logits", logits);
  check_dtype(kOp, name, *t, std::array{type});
  check_shape(kOp, name, *t, shape, layout);
  check_last_dim_contiguous(kOp, name, *t);
}

void check_numbers(const char* name, const std::optional<Tensor>& t, bool positive) {
  const auto host = t ? values_to_check(*t) : std::nullopt;
  if (!host) return;
  const NumberPerDraw numbers = numbers_of(*host);
  for (int64_t i = 0; i < t->size(0); ++i) {
    const double x = numbers.at(i);
    FI_CHECK(kOp, std::isfinite(x) && (!positive || x > 0), name, " must be numbers", positive ? " > 0" : "",
             ", got ", Number{x}, " at ", i, "; pass ", positive ? 1 : 0, " for none");
  }
}

Tensor apply_logits_processors_op(const Tensor& logits, std::optional<Tensor> output_counts,
                                  std::optional<Tensor> prompt_mask,
                                  std::optional<Tensor> repetition_penalty_arr, double repetition_penalty,
                                  std::optional<Tensor> presence_penalty_arr, double presence_penalty,
                                  std::optional<Tensor> frequency_penalty_arr, double frequency_penalty,
                                  std::optional<Tensor> logit_bias, std::optional<Tensor> bitmask) {
  check_no_grads(kOp, logits, repetition_penalty_arr, presence_penalty_arr, frequency_penalty_arr,
                 logit_bias);
  check_dtype(kOp, "logits", logits, floats);
  check_rows(kOp, "logits", logits);
  const int64_t batch = logits.size(0), vocab_size = logits.size(1);
  check_table("output_counts", output_counts, ScalarType::Int, logits, {batch, vocab_size},
              "[batch, vocab_size]");
  check_table("prompt_mask", prompt_mask, ScalarType::Bool, logits, {batch, vocab_size},
              "[batch, vocab_size]");
  check_per_row(kOp, "repetition_penalty_arr", repetition_penalty_arr, {ScalarType::Float}, "logits", logits,
                batch);
  check_per_row(kOp, "presence_penalty_arr", presence_penalty_arr, {ScalarType::Float}, "logits", logits,
                batch);
  check_per_row(kOp, "frequency_penalty_arr", frequency_penalty_arr, {ScalarType::Float}, "logits", logits,
                batch);
  FI_CHECK(kOp, repetition_penalty > 0 && std::isfinite(repetition_penalty),
           "repetition_penalty must be a number > 0, got ", Number{repetition_penalty}, "; pass 1 for none");
  auto check_penalty = [&](const char* name, const std::optional<Tensor>& array, double number) {
    FI_CHECK(kOp, std::isfinite(number), name, " must be a number, got ", Number{number},
             "; pass 0 for none");
    FI_CHECK(kOp, output_counts || (!array && number == 0), "output_counts must come with ", name,
             ", got none; pass how often each token was generated");
  };
  check_penalty("presence_penalty", presence_penalty_arr, presence_penalty);
  check_penalty("frequency_penalty", frequency_penalty_arr, frequency_penalty);
  FI_CHECK(kOp, output_counts || prompt_mask || (!repetition_penalty_arr && repetition_penalty == 1),
           "output_counts or prompt_mask must come with repetition_penalty, got neither; pass one or both");
  const char* layout = "[vocab_size] or [batch, vocab_size]";
  const bool shared_bias = logit_bias && logit_bias->dim() == 1;
  if (shared_bias) {
    check_table("logit_bias", logit_bias, ScalarType::Float, logits, {vocab_size}, layout);
  } else {
    check_table("logit_bias", logit_bias, ScalarType::Float, logits, {batch, vocab_size}, layout);
  }
  check_table("bitmask", bitmask, ScalarType::Int, logits, {batch, (vocab_size + 31) / 32},
              "[batch, ceil(vocab_size / 32)]");
  check_numbers("repetition_penalty_arr", repetition_penalty_arr, true);
  check_numbers("presence_penalty_arr", presence_penalty_arr, false);
  check_numbers("frequency_penalty_arr", frequency_penalty_arr, false);

  Tensor output = empty({batch, vocab_size}, logits.scalar_type(), logits);
  auto data = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; };
  auto stride = [](const std::optional<Tensor>& t) { return t ? t->stride(0) : 0; };
  LogitsProcessorsParams p{};
  p.logits = logits.const_data_ptr();
  p.output_counts = static_cast<const int32_t*>(data(output_counts));
  p.prompt_mask = static_cast<const bool*>(data(prompt_mask));
  p.logit_bias = static_cast<const float*>(data(logit_bias));
  p.bitmask = static_cast<const uint32_t*>(data(bitmask));
  p.output = output.mutable_data_ptr();
  p.repetition_penalty = numbers_or(repetition_penalty_arr, repetition_penalty);
  p.presence_penalty = numbers_or(presence_penalty_arr, presence_penalty);
  p.frequency_penalty = numbers_or(frequency_penalty_arr, frequency_penalty);
  p.batch = batch;
  p.vocab_size = vocab_size;
  p.logits_stride = logits.stride(0);
  p.counts_stride = stride(output_counts);
  p.prompt_stride = stride(prompt_mask);
  p.bias_stride = shared_bias ? 0 : stride(logit_bias);
  p.bitmask_stride = stride(bitmask);
  p.dtype = dtype_of(logits);
  run(FI_KERNEL_OF(apply_logits_processors), logits, p);
  return output;
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("apply_logits_processors", TORCH_BOX(&fi::binding::apply_logits_processors_op));
}
