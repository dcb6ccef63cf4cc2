// Bindings of the bit packing ops: check, params, dispatch.
#include "fi/bits.h"

#include <string>
#include <vector>

#include "binding/device.h"

namespace fi::binding {
namespace {

// A string argument, owned. (The stable ABI's own conversion to std::string leaks one string a call in
// torch 2.13.)
class StringArgument {
 public:
  explicit StringArgument(StringHandle handle) : handle_(handle) {}
  StringArgument(const StringArgument&) = delete;
  ~StringArgument() { torch_delete_string(handle_); }
  std::string text() const {
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    return {data, length};
  }

 private:
  StringHandle handle_;
};

bool check_bits(const char* op, const Tensor& x, const std::string& bitorder) {
  check_dtype(op, "x", x, std::array{ScalarType::Bool, ScalarType::Byte});
  check_ndim(op, "x", x, 1, "[num_elements]");
  check_last_dim_contiguous(op, "x", x);
  FI_CHECK(op, bitorder == "big" || bitorder == "little", "bitorder must be big or little, got ", bitorder,
           "; pass one of them");
  return bitorder == "little";
}

Tensor packbits_op(const Tensor& x, StringHandle bitorder_handle) {
  const StringArgument bitorder(bitorder_handle);
  PackBitsParams p{};
  p.little = check_bits("packbits", x, bitorder.text());
  const int64_t input_indptr[2] = {0, x.size(0)}, output_indptr[2] = {0, (x.size(0) + 7) / 8};
  Tensor y = empty({output_indptr[1]}, ScalarType::Byte, x);
  p.input = static_cast<const uint8_t*>(x.const_data_ptr());
  p.output = static_cast<uint8_t*>(y.mutable_data_ptr());
  p.input_indptr = input_indptr;
  p.output_indptr = output_indptr;
  p.num_segments = 1;
  run(FI_KERNEL_OF(packbits), x, p);
  return y;
}

std::vector<int64_t> as_int64(const Tensor& t) {
  std::vector<int64_t> values(t.size(0));
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t offset = static_cast<int64_t>(i) * t.stride(0);
    values[i] = t.scalar_type() == ScalarType::Long ? static_cast<const int64_t*>(t.const_data_ptr())[offset]
                                                    : static_cast<const int32_t*>(t.const_data_ptr())[offset];
  }
  return values;
}

Tensor segment_packbits_op(const Tensor& x, const Tensor& input_indptr, const Tensor& output_indptr,
                           int64_t output_len, StringHandle bitorder_handle) {
  const char* op = "segment_packbits";
  const StringArgument bitorder(bitorder_handle);
  PackBitsParams p{};
  p.little = check_bits(op, x, bitorder.text());
  check_same_device(op, "input_indptr", input_indptr, "x", x);
  check_dtype(op, "input_indptr", input_indptr, index_types);
  check_ndim(op, "input_indptr", input_indptr, 1, "[num_segments + 1]");
  FI_CHECK(op, input_indptr.size(0) >= 1,
           "input_indptr must be [num_segments + 1], got [0]; start it with 0");
  check_same_device(op, "output_indptr", output_indptr, "x", x);
  check_dtype(op, "output_indptr", output_indptr, index_types);
  check_shape_of(op, "output_indptr", output_indptr, input_indptr.sizes(), "input_indptr's shape");
  FI_CHECK(op, output_len >= 0, "output_len must be 0 or more, got ", output_len,
           "; pass output_indptr's last value");

  const std::vector<int64_t> in = as_int64(input_indptr), out = as_int64(output_indptr);
  const size_t num_segments = in.size() - 1;
  FI_CHECK(op, in[0] >= 0 && in[num_segments] <= x.size(0), "input_indptr must lie in x's ", x.size(0),
           " elements, got ", in[0], " to ", in[num_segments], "; pass the indptr of this x");
  FI_CHECK(op, out[0] == 0 && out[num_segments] == output_len, "output_indptr must go from 0 to output_len ",
           output_len, ", got ", out[0], " to ", out[num_segments], "; pass its last value as output_len");
  for (size_t s = 0; s < num_segments; ++s) {
    FI_CHECK(op, in[s] <= in[s + 1], "input_indptr must not decrease, got ", in[s], " before ", in[s + 1],
             "; sort the segments");
    const int64_t packed = (in[s + 1] - in[s] + 7) / 8;
    FI_CHECK(op, out[s + 1] - out[s] == packed, "output_indptr must give segment ", s, " its ", packed,
             " bytes, got ", out[s + 1] - out[s],
             "; make it from input_indptr, each length rounded up to whole bytes");
  }
  Tensor y = empty({output_len}, ScalarType::Byte, x);
  p.input = static_cast<const uint8_t*>(x.const_data_ptr());
  p.output = static_cast<uint8_t*>(y.mutable_data_ptr());
  p.input_indptr = in.data();
  p.output_indptr = out.data();
  p.num_segments = static_cast<int64_t>(num_segments);
  run(FI_KERNEL_OF(packbits), x, p);
  return y;
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("packbits", TORCH_BOX(&fi::binding::packbits_op));
  m.impl("segment_packbits", TORCH_BOX(&fi::binding::segment_packbits_op));
}
