// Binding of the samplers: check, one SamplingDraw for each draw, dispatch.
#include "fi/sampling.h"

#include <tuple>
#include <vector>

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

// A 1-d tensor of numbers, read one at a time.
class Values {
 public:
  explicit Values(const Tensor& t)
      : data_(t.const_data_ptr()), stride_(t.dim() > 0 ? t.stride(t.dim() - 1) : 0), type_(t.scalar_type()) {}
  float number(int64_t i) const { return static_cast<const float*>(data_)[i * stride_]; }
  int64_t integer(int64_t i) const {
    return type_ == ScalarType::Int ? static_cast<const int32_t*>(data_)[i * stride_]
                                    : static_cast<const int64_t*>(data_)[i * stride_];
  }

 private:
  const void* data_;
  int64_t stride_;
  ScalarType type_;
};

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

  auto values = [](const std::optional<Tensor>& t) { return t ? std::optional(Values(*t)) : std::nullopt; };
  const Values uniforms(uniform);
  const auto row_of = values(indices), top_ks = values(top_k_arr), top_ps = values(top_p_arr),
             min_ps = values(min_p_arr), temperatures = values(temperature_arr);
  std::vector<SamplingDraw> draws(static_cast<size_t>(batch));
  for (int64_t i = 0; i < batch; ++i) {
    SamplingDraw& d = draws[static_cast<size_t>(i)];
    d = {row_of ? row_of->integer(i) : i,
         top_ks ? top_ks->integer(i) : top_k,
         top_ps ? double(top_ps->number(i)) : top_p,
         min_ps ? double(min_ps->number(i)) : min_p,
         temperatures ? temperatures->number(i) : static_cast<float>(temperature),
         uniforms.number(i)};
    FI_CHECK(kOp, d.row >= 0 && d.row < rows, "indices must be in [0, ", rows, "), got ", d.row, " at ", i,
             "; pass rows of logits");
    FI_CHECK(kOp, d.uniform >= 0 && d.uniform < 1, "uniform must be in [0, 1), got ", Number{d.uniform},
             " at ", i, "; draw it with torch.rand");
    FI_CHECK(kOp, d.top_p >= 0, "top_p_arr must be numbers >= 0, got ", Number{d.top_p}, " at ", i,
             "; pass 1 to keep all tokens");
    FI_CHECK(kOp, d.min_p >= 0 && d.min_p <= 1, "min_p_arr must be in [0, 1], got ", Number{d.min_p}, " at ",
             i, "; pass 0 to keep all tokens");
    FI_CHECK(kOp, d.temperature >= 0, "temperature_arr must be numbers >= 0, got ", Number{d.temperature},
             " at ", i, "; pass 0 for argmax");
  }

  Tensor samples = empty({batch}, indices ? indices->scalar_type() : ScalarType::Int, logits);
  Tensor valid = empty({batch}, ScalarType::Bool, logits);
  SamplingParams p{};
  p.logits = logits.const_data_ptr();
  p.draws = draws.data();
  p.samples = samples.mutable_data_ptr();
  p.valid = static_cast<bool*>(valid.mutable_data_ptr());
  p.batch = batch;
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
