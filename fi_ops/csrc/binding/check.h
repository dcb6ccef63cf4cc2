// Argument checks of the bindings, on the LibTorch stable ABI. fi_ops/library/_checks.py has the same checks
// with the same texts for fakes; the registry sweep compares the two.
//
// Message: `fi::<op>: <argument> <what was expected>, got <what came>; <what to do>`.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "fi/rows.h"

namespace fi::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
[[noreturn]] inline void fail(const char* op, const Args&... args) {
  std::ostringstream text;
  text << "fi::" << op << ": ";
  (text << ... << args);
  throw std::runtime_error(text.str());
}

// FI_CHECK(op, condition, pieces of the message...): the pieces are only put together on failure.
#define FI_CHECK(op, condition, ...)                                             \
  do {                                                                           \
    if (__builtin_expect(!(condition), 0)) ::fi::binding::fail(op, __VA_ARGS__); \
  } while (0)

template <class List>
inline std::string list_text(const List& values) {
  std::ostringstream text;
  text << "[";
  const char* separator = "";
  for (int64_t v : values) {
    text << separator << v;
    separator = ", ";
  }
  text << "]";
  return text.str();
}

inline std::string shape_of(const Tensor& t) { return list_text(t.sizes()); }

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another dtype";
  }
}

inline constexpr std::initializer_list<ScalarType> floats = {ScalarType::Float, ScalarType::BFloat16,
                                                             ScalarType::Half};
inline constexpr std::initializer_list<ScalarType> index_types = {ScalarType::Int, ScalarType::Long};

// True when gradients could flow into `t`: an alias of a tensor that requires grad has a grad_fn, so it is no
// leaf. (The stable ABI has no requires_grad; two dispatcher calls, made only in grad mode.)
inline bool requires_grad(const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::alias", "", stack.data(), TORCH_ABI_VERSION));
  stack[0] = torch::stable::detail::from(torch::stable::detail::to<Tensor>(stack[0]));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  return !torch::stable::detail::to<bool>(stack[0]);
}

inline void check_no_grad(const char* op, const Tensor& t) {
  FI_CHECK(op, !requires_grad(t),
           "has no backward, got an input that requires grad; call it under torch.no_grad()");
}
inline void check_no_grad(const char* op, const std::optional<Tensor>& t) {
  if (t) check_no_grad(op, *t);
}

// These ops have no backward: say so instead of losing gradients silently. Call it first, with every float
// tensor.
template <class... Tensors>
inline void check_no_grads(const char* op, const Tensors&... tensors) {
  if (aoti_torch_grad_mode_is_enabled()) (check_no_grad(op, tensors), ...);
}

template <class Types>
inline void check_dtype(const char* op, const char* name, const Tensor& t, const Types& allowed) {
  for (ScalarType type : allowed)
    if (t.scalar_type() == type) return;
  std::string names;
  size_t left = allowed.size();
  for (ScalarType type : allowed) {
    names += dtype_name(type);
    --left;
    if (left > 1) names += ", ";
    if (left == 1) names += " or ";
  }
  fail(op, name, " must be ", names, ", got ", dtype_name(t.scalar_type()), "; convert it with .to()");
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* ref_name,
                             const Tensor& ref) {
  FI_CHECK(op, t.scalar_type() == ref.scalar_type(), name, " must have ", ref_name, "'s dtype ",
           dtype_name(ref.scalar_type()), ", got ", dtype_name(t.scalar_type()), "; convert it with .to()");
}

// On a CPU library the reference is on the CPU (dispatch chose us), so only the device type can differ.
inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* ref_name,
                              const Tensor& ref) {
  auto text = [](const Tensor& x) {
    return x.is_cpu()    ? std::string("cpu")
           : x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index())
                         : std::string("another device");
  };
  bool same = t.is_cpu() == ref.is_cpu() && t.is_cuda() == ref.is_cuda() &&
              (t.is_cpu() || t.get_device_index() == ref.get_device_index());
  FI_CHECK(op, same, name, " must be on ", ref_name, "'s device ", text(ref), ", got ", text(t),
           "; move it with .to()");
}

inline void check_ndim(const char* op, const char* name, const Tensor& t, int64_t ndim, const char* layout) {
  FI_CHECK(op, t.dim() == ndim, name, " must be ", layout, ", got ", shape_of(t), "; reshape it to ", ndim,
           " dimensions");
}

template <class Shape>
inline void check_shape_of(const char* op, const char* name, const Tensor& t, const Shape& shape,
                           const char* layout) {
  auto have = t.sizes();
  bool ok = have.size() == shape.size();
  if (ok) {
    size_t i = 0;
    for (int64_t want : shape) ok = ok && have[i++] == want;
  }
  FI_CHECK(op, ok, name, " must be ", layout, " = ", list_text(shape), ", got ", shape_of(t),
           "; check the sizes against the other arguments");
}
inline void check_shape(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<int64_t> shape, const char* layout) {
  check_shape_of(op, name, t, shape, layout);
}

inline void check_last_dim_contiguous(const char* op, const char* name, const Tensor& t) {
  int64_t d = t.dim();
  if (d == 0) return;
  FI_CHECK(op, t.stride(d - 1) == 1 || t.size(d - 1) <= 1 || t.numel() == 0, name,
           " must have a contiguous last dimension, got strides ", list_text(t.strides()),
           "; call .contiguous() on it");
}

// An argument that the op writes must have memory of its own for every element: no expanded dimension.
inline void check_writable(const char* op, const char* name, const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d)
    FI_CHECK(op, t.stride(d) != 0 || t.size(d) <= 1, name,
             " is written and must not be expanded, got strides ", list_text(t.strides()),
             "; call .contiguous() on it");
}

// The tensor as rows over its last dimension (or, with keep_last = false, as single elements).
inline Rows rows_of(const char* op, const char* name, const Tensor& t, bool keep_last = true) {
  Rows rows;
  int64_t leading = t.dim() - (keep_last ? 1 : 0);
  for (int64_t d = 0; d < leading; ++d) {
    int64_t size = t.size(d), stride = t.stride(d);
    rows.num_rows *= size;
    if (size == 1) continue;
    int last = rows.ndim - 1;
    if (last >= 0 &&
        rows.strides[last] == stride * size) {  // evenly spaced with the dimension before: one dimension
      rows.sizes[last] *= size;
      rows.strides[last] = stride;
      continue;
    }
    FI_CHECK(op, rows.ndim < Rows::max_dims, name, " must have at most ", Rows::max_dims,
             " separately strided dimensions, got strides ", list_text(t.strides()),
             "; call .contiguous() on it");
    rows.sizes[rows.ndim] = size;
    rows.strides[rows.ndim++] = stride;
  }
  return rows;
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, const Tensor& like) {
  return torch::stable::empty({shape.begin(), shape.size()}, type, std::nullopt, like.device());
}

}  // namespace fi::binding
