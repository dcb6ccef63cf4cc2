// The arguments of ops that filter rows of logits or probabilities: checks and params.
#pragma once

#include <vector>

#include "binding/device.h"
#include "binding/string_argument.h"
#include "fi/sampling.h"

namespace fi::binding {

// A NaN prints as "nan", whatever its sign, as in Python.
struct Number {
  double value;
  friend std::ostream& operator<<(std::ostream& out, Number x) {
    return x.value != x.value ? out << "nan" : out << x.value;
  }
};

inline IntegerPerDraw integers_of(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long, t.stride(0), 0};
}
inline NumberPerDraw numbers_of(const Tensor& t) {
  return {static_cast<const float*>(t.const_data_ptr()), t.stride(t.dim() - 1), 0};
}
inline NumberPerDraw numbers_or(const std::optional<Tensor>& t, double value) {
  return t ? numbers_of(*t) : NumberPerDraw{nullptr, 0, value};
}

inline void check_rows(const char* op, const char* name, const Tensor& x) {
  check_ndim(op, name, x, 2, "[rows, vocab_size]");
  check_last_dim_contiguous(op, name, x);
  FI_CHECK(op, x.size(1) > 0, name, " must have at least one column, got vocab_size 0; pass a row of ", name);
}

inline void check_per_row(const char* op, const char* name, const std::optional<Tensor>& t,
                          std::initializer_list<ScalarType> types, const char* ref_name, const Tensor& ref,
                          int64_t batch) {
  if (!t) return;
  check_same_device(op, name, *t, ref_name, ref);
  check_dtype(op, name, *t, types);
  check_shape(op, name, *t, {batch}, "[batch]");
}

// What such an op may be given behind its first argument; an op without an argument leaves its default.
struct RowFilters {
  std::optional<Tensor> uniform, top_k_arr, top_p_arr, min_p_arr, temperature_arr, indices;
  int64_t top_k = 0;
  double top_p = 1.0, min_p = 0.0, temperature = 1.0;
  bool top_k_first = true, min_p_first = false;
  std::string top_k_ties = "exact";

  // Puts in the arrays, after `on` each.
  template <class On>
  void put_arrays(FilterParams& p, const On& on) const {
    auto put_integers = [&](IntegerPerDraw& to, const std::optional<Tensor>& t) {
      if (t) to = integers_of(on(*t));
    };
    auto put_numbers = [&](NumberPerDraw& to, const std::optional<Tensor>& t) {
      if (t) to = numbers_of(on(*t));
    };
    put_integers(p.indices, indices);
    put_integers(p.top_k, top_k_arr);
    put_numbers(p.top_p, top_p_arr);
    put_numbers(p.min_p, min_p_arr);
    put_numbers(p.temperature, temperature_arr);
    put_numbers(p.uniform, uniform);
  }
};

// Checks the values of every draw; the arrays of `p` are on the host.
inline void check_draws(const char* op, const FilterParams& p) {
  for (int64_t i = 0; i < p.batch; ++i) {
    const SamplingDraw d = p.draw(i);
    FI_CHECK(op, d.row >= 0 && d.row < p.rows, "indices must be in [0, ", p.rows, "), got ", d.row, " at ", i,
             p.from_probs ? "; pass rows of probs" : "; pass rows of logits");
    FI_CHECK(op, d.uniform >= 0 && d.uniform < 1, "uniform must be in [0, 1), got ", Number{d.uniform},
             " at ", i, "; draw it with torch.rand");
    FI_CHECK(op, d.top_p >= 0, "top_p_arr must be numbers >= 0, got ", Number{d.top_p}, " at ", i,
             "; pass 1 to keep all tokens");
    FI_CHECK(op, d.min_p >= 0 && d.min_p <= 1, "min_p_arr must be in [0, 1], got ", Number{d.min_p}, " at ",
             i, "; pass 0 to keep all tokens");
    FI_CHECK(op, d.temperature >= 0, "temperature_arr must be numbers >= 0, got ", Number{d.temperature},
             " at ", i, "; pass 0 for argmax");
  }
}

// Checks all arguments of op and fills in what FilterParams has. `from_probs`: x is probs, else logits.
template <class Params>
Params filter_params(const char* op, const Tensor& x, bool from_probs, const RowFilters& a) {
  const char* name = from_probs ? "probs" : "logits";
  check_no_grads(op, x, a.uniform, a.top_p_arr, a.min_p_arr, a.temperature_arr);
  if (from_probs) {
    check_dtype(op, name, x, std::array{ScalarType::Float});
  } else {
    check_dtype(op, name, x, floats);
  }
  check_rows(op, name, x);
  if (a.indices) {
    check_same_device(op, "indices", *a.indices, name, x);
    check_dtype(op, "indices", *a.indices, index_types);
    check_ndim(op, "indices", *a.indices, 1, "[batch]");
  }
  const int64_t batch = a.indices ? a.indices->size(0) : x.size(0);
  if (a.uniform) {
    check_same_device(op, "uniform", *a.uniform, name, x);
    check_dtype(op, "uniform", *a.uniform, std::array{ScalarType::Float});
    if (a.uniform->dim() == 2) {
      check_shape(op, "uniform", *a.uniform, {1, batch}, "[batch] or [1, batch]");
    } else {
      check_shape(op, "uniform", *a.uniform, {batch}, "[batch] or [1, batch]");
    }
  }
  check_per_row(op, "top_k_arr", a.top_k_arr, index_types, name, x, batch);
  check_per_row(op, "top_p_arr", a.top_p_arr, {ScalarType::Float}, name, x, batch);
  check_per_row(op, "min_p_arr", a.min_p_arr, {ScalarType::Float}, name, x, batch);
  check_per_row(op, "temperature_arr", a.temperature_arr, {ScalarType::Float}, name, x, batch);
  FI_CHECK(op, a.top_p >= 0, "top_p must be a number >= 0, got ", Number{a.top_p},
           "; pass 1 to keep all tokens");
  FI_CHECK(op, a.min_p >= 0 && a.min_p <= 1, "min_p must be in [0, 1], got ", Number{a.min_p},
           "; pass 0 to keep all tokens");
  FI_CHECK(op, a.temperature >= 0, "temperature must be a number >= 0, got ", Number{a.temperature},
           "; pass 0 for argmax");
  FI_CHECK(op, a.top_k_ties == "exact" || a.top_k_ties == "threshold",
           "top_k_ties must be 'exact' or 'threshold', got '", a.top_k_ties, "'; pass one of the two");

  Params p{};
  p.input = x.const_data_ptr();
  p.batch = batch;
  p.rows = x.size(0);
  p.vocab_size = x.size(1);
  p.row_stride = x.stride(0);
  p.dtype = dtype_of(x);
  p.from_probs = from_probs;
  p.top_k_first = a.top_k_first;
  p.min_p_first = a.min_p_first;
  p.exact_ties = a.top_k_ties == "exact";
  p.top_k.value = a.top_k;
  p.top_p.value = a.top_p;
  p.min_p.value = a.min_p;
  p.temperature.value = a.temperature;
  if (checks_values()) {
    std::vector<Tensor> alive;  // the copies on the host
    a.put_arrays(p, [&](const Tensor& t) { return alive.emplace_back(*values_to_check(t)); });
    check_draws(op, p);
  }
  a.put_arrays(p, [](const Tensor& t) { return t; });
  return p;
}

}  // namespace fi::binding
