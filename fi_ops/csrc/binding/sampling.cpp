// Binding of the samplers: check, params, dispatch.
#include "fi/sampling.h"

#include <tuple>

#include "binding/device.h"

namespace fi::binding {
namespace {

constexpr const char* kOp = "top_k_top_p_sampling_from_logits";

void check_array(const char* name, const std::optional<Tensor>& t, std::initializer_list<ScalarType> types,
                 const Tensor& logits, int64_t batch) {
  if (!t) return;
  check_same_device(kOp, name, *t, "logits", logits);
  check_dtype(kOp, name, *t, types);
  check_shape(kOp, name, *t, {batch}, "[batch]");
}

// A NaN prints as "nan", whatever its sign, as in Python.
struct Number {
  double value;
  friend std::ostream& operator<<(std::ostream& out, Number x) {
    return x.value != x.value ? out << "nan" : out << x.value;
  }
};

// What is given for each draw.
struct Arrays {
  std::optional<Tensor> indices, top_k, top_p, min_p, temperature, uniform;

  void put_into(SamplingParams& p) const {
    auto put_integers = [](IntegerPerDraw& to, const std::optional<Tensor>& t) {
      if (t)
        to.data = t->const_data_ptr(), to.wide = t->scalar_type() == ScalarType::Long,
        to.stride = t->stride(0);
    };
    auto put_numbers = [](NumberPerDraw& to, const std::optional<Tensor>& t) {
      if (t) to.data = static_cast<const float*>(t->const_data_ptr()), to.stride = t->stride(t->dim() - 1);
    };
    put_integers(p.indices, indices);
    put_integers(p.top_k, top_k);
    put_numbers(p.top_p, top_p);
    put_numbers(p.min_p, min_p);
    put_numbers(p.temperature, temperature);
    put_numbers(p.uniform, uniform);
  }
};

// Checks the values of every draw; the arrays of `p` are on the host.
void check_draws(const SamplingParams& p) {
  for (int64_t i = 0; i < p.batch; ++i) {
    const SamplingDraw d = p.draw(i);
    FI_CHECK(kOp, d.row >= 0 && d.row < p.rows, "indices must be in [0, ", p.rows, "), got ", d.row, " at ",
             i, "; pass rows of logits");
    FI_CHECK(kOp, d.uniform >= 0 && d.uniform < 1, "uniform must be in [0, 1), got ", Number{d.uniform},
             " at ", i, "; draw it with torch.rand");
    FI_CHECK(kOp, d.top_p >= 0, "top_p_arr must be numbers >= 0, got ", Number{d.top_p}, " at ", i,
             "; pass 1 to keep all tokens");
    FI_CHECK(kOp, d.min_p >= 0 && d.min_p <= 1, "min_p_arr must be in [0, 1], got ", Number{d.min_p}, " at ",
             i, "; pass 0 to keep all tokens");
    FI_CHECK(kOp, d.temperature >= 0, "temperature_arr must be numbers >= 0, got ", Number{d.temperature},
             " at ", i, "; pass 0 for argmax");
  }
}

std::tuple<Tensor, Tensor> top_k_top_p_sampling_from_logits(const Tensor& logits, const Tensor& uniform,
                                                            std::optional<Tensor> top_k_arr, int64_t top_k,
                                                            std::optional<Tensor> top_p_arr, double top_p,
                                                            std::optional<Tensor> min_p_arr, double min_p,
                                                            std::optional<Tensor> temperature_arr,
                                                            double temperature, std::optional<Tensor> indices,
                                                            bool top_k_first, std::string top_k_ties) {
  check_no_grads(kOp, logits, uniform, top_p_arr, min_p_arr, temperature_arr);
  check_dtype(kOp, "logits", logits, floats);
  check_ndim(kOp, "logits", logits, 2, "[rows, vocab_size]");
  check_last_dim_contiguous(kOp, "logits", logits);
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  FI_CHECK(kOp, vocab_size > 0,
           "logits must have at least one column, got vocab_size 0; pass a row of logits");
  if (indices) {
    check_same_device(kOp, "indices", *indices, "logits", logits);
    check_dtype(kOp, "indices", *indices, index_types);
    check_ndim(kOp, "indices", *indices, 1, "[batch]");
  }
  const int64_t batch = indices ? indices->size(0) : rows;
  check_same_device(kOp, "uniform", uniform, "logits", logits);
  check_dtype(kOp, "uniform", uniform, std::array{ScalarType::Float});
  if (uniform.dim() == 2) {
    check_shape(kOp, "uniform", uniform, {1, batch}, "[batch] or [1, batch]");
  } else {
    check_shape(kOp, "uniform", uniform, {batch}, "[batch] or [1, batch]");
  }
  check_array("top_k_arr", top_k_arr, index_types, logits, batch);
  check_array("top_p_arr", top_p_arr, {ScalarType::Float}, logits, batch);
  check_array("min_p_arr", min_p_arr, {ScalarType::Float}, logits, batch);
  check_array("temperature_arr", temperature_arr, {ScalarType::Float}, logits, batch);
  FI_CHECK(kOp, top_p >= 0, "top_p must be a number >= 0, got ", Number{top_p},
           "; pass 1 to keep all tokens");
  FI_CHECK(kOp, min_p >= 0 && min_p <= 1, "min_p must be in [0, 1], got ", Number{min_p},
           "; pass 0 to keep all tokens");
  FI_CHECK(kOp, temperature >= 0, "temperature must be a number >= 0, got ", Number{temperature},
           "; pass 0 for argmax");
  FI_CHECK(kOp, top_k_ties == "exact" || top_k_ties == "threshold",
           "top_k_ties must be 'exact' or 'threshold', got '", top_k_ties, "'; pass one of the two");

  SamplingParams p{};
  p.batch = batch;
  p.rows = rows;
  p.top_k.value = top_k;
  p.top_p.value = top_p;
  p.min_p.value = min_p;
  p.temperature.value = temperature;
  if (const auto host_uniform = values_to_check(uniform)) {
    auto on_host = [](const std::optional<Tensor>& t) { return t ? values_to_check(*t) : std::nullopt; };
    const Arrays host{on_host(indices),   on_host(top_k_arr),       on_host(top_p_arr),
                      on_host(min_p_arr), on_host(temperature_arr), host_uniform};
    host.put_into(p);
    check_draws(p);
  }
  Arrays{indices, top_k_arr, top_p_arr, min_p_arr, temperature_arr, uniform}.put_into(p);

  Tensor samples = empty({batch}, indices ? indices->scalar_type() : ScalarType::Int, logits);
  Tensor valid = empty({batch}, ScalarType::Bool, logits);
  p.logits = logits.const_data_ptr();
  p.samples = samples.mutable_data_ptr();
  p.valid = static_cast<bool*>(valid.mutable_data_ptr());
  p.vocab_size = vocab_size;
  p.row_stride = logits.stride(0);
  p.dtype = dtype_of(logits);
  p.sample_dtype = dtype_of(samples);
  p.top_k_first = top_k_first;
  p.exact_ties = top_k_ties == "exact";
  run(FI_KERNEL_OF(top_k_top_p_sample), logits, p);
  return {samples, valid};
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("top_k_top_p_sampling_from_logits", TORCH_BOX(&fi::binding::top_k_top_p_sampling_from_logits));
}
