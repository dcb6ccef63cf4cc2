// Bindings of top-k and log-probabilities: check, params, dispatch.
#include "fi/top_k.h"

#include <tuple>

#include "binding/row_filters.h"

namespace fi::binding {
namespace {

std::tuple<Tensor, Tensor> top_k_op(const Tensor& input, int64_t k, bool sorted) {
  const char* op = "top_k";
  check_no_grads(op, input);
  check_dtype(op, "input", input, floats);
  check_rows(op, "input", input);
  const int64_t rows = input.size(0), vocab_size = input.size(1);
  FI_CHECK(op, k >= 1 && k <= vocab_size, "k must be in [1, ", vocab_size, "], got ", k,
           "; pass at most vocab_size");
  Tensor values = empty({rows, k}, input.scalar_type(), input);
  Tensor indices = empty({rows, k}, ScalarType::Long, input);
  TopKParams p{};
  p.input = input.const_data_ptr();
  p.values = values.mutable_data_ptr();
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  p.rows = rows;
  p.vocab_size = vocab_size;
  p.row_stride = input.stride(0);
  p.k = k;
  p.dtype = dtype_of(input);
  p.sorted = sorted;
  run(FI_KERNEL_OF(top_k), input, p);
  return {values, indices};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_logprobs_op(const Tensor& logits, const Tensor& token_ids,
                                                              int64_t num_top) {
  const char* op = "gather_logprobs";
  check_no_grads(op, logits);
  check_dtype(op, "logits", logits, floats);
  check_rows(op, "logits", logits);
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  check_per_row(op, "token_ids", token_ids, index_types, "logits", logits, rows);
  FI_CHECK(op, num_top >= 0 && num_top <= vocab_size, "num_top must be in [0, ", vocab_size, "], got ",
           num_top, "; pass at most vocab_size");
  if (const auto host = values_to_check(token_ids)) {
    const IntegerPerDraw ids = integers_of(*host);
    for (int64_t i = 0; i < rows; ++i)
      FI_CHECK(op, ids.at(i) >= 0 && ids.at(i) < vocab_size, "token_ids must be in [0, ", vocab_size,
               "), got ", ids.at(i), " at ", i, "; pass tokens of the vocabulary");
  }
  const ScalarType id_type = token_ids.scalar_type();
  Tensor logprobs = empty({rows}, ScalarType::Float, logits), ranks = empty({rows}, id_type, logits);
  Tensor top_logprobs = empty({rows, num_top}, ScalarType::Float, logits),
         top_ids = empty({rows, num_top}, id_type, logits);
  LogprobsParams p{};
  p.logits = logits.const_data_ptr();
  p.token_ids = integers_of(token_ids);
  p.logprobs = static_cast<float*>(logprobs.mutable_data_ptr());
  p.ranks = ranks.mutable_data_ptr();
  p.top_logprobs = static_cast<float*>(top_logprobs.mutable_data_ptr());
  p.top_ids = top_ids.mutable_data_ptr();
  p.rows = rows;
  p.vocab_size = vocab_size;
  p.row_stride = logits.stride(0);
  p.num_top = num_top;
  p.dtype = dtype_of(logits);
  run(FI_KERNEL_OF(gather_logprobs), logits, p);
  return {logprobs, ranks, top_logprobs, top_ids};
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("top_k", TORCH_BOX(&fi::binding::top_k_op));
  m.impl("gather_logprobs", TORCH_BOX(&fi::binding::gather_logprobs_op));
}
