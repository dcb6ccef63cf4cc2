// Bindings of the bit packing ops: check, params, dispatch.
#include "fi/bits.h"

#include "binding/device.h"
#include "binding/indices.h"
#include "binding/string_argument.h"

namespace fi::binding {
namespace {

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
  p.num_elements = x.size(0);
  p.num_bytes = (x.size(0) + 7) / 8;
  p.num_segments = 1;
  Tensor y = empty({p.num_bytes}, ScalarType::Byte, x);
  p.input = static_cast<const uint8_t*>(x.const_data_ptr());
  p.output = static_cast<uint8_t*>(y.mutable_data_ptr());
  run(FI_KERNEL_OF(packbits), x, p);
  return y;
}

void check_segments(const char* op, const Indices& in, const Indices& out, int64_t num_segments,
                    int64_t num_elements, int64_t output_len) {
  FI_CHECK(op, in.at(0) >= 0 && in.at(num_segments) <= num_elements, "input_indptr must lie in x's ",
           num_elements, " elements, got ", in.at(0), " to ", in.at(num_segments),
           "; pass the indptr of this x");
  FI_CHECK(op, out.at(0) == 0 && out.at(num_segments) == output_len,
           "output_indptr must go from 0 to output_len ", output_len, ", got ", out.at(0), " to ",
           out.at(num_segments), "; pass its last value as output_len");
  for (int64_t s = 0; s < num_segments; ++s) {
    FI_CHECK(op, in.at(s) <= in.at(s + 1), "input_indptr must not decrease, got ", in.at(s), " before ",
             in.at(s + 1), "; sort the segments");
    const int64_t packed = (in.at(s + 1) - in.at(s) + 7) / 8, given = out.at(s + 1) - out.at(s);
    FI_CHECK(op, given == packed, "output_indptr must give segment ", s, " its ", packed, " bytes, got ",
             given, "; make it from input_indptr, each length rounded up to whole bytes");
  }
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

  p.num_elements = x.size(0);
  p.num_bytes = output_len;
  p.num_segments = input_indptr.size(0) - 1;
  p.input_indptr = indices_of(input_indptr);
  p.output_indptr = indices_of(output_indptr);
  const auto in = values_to_check(input_indptr), out = values_to_check(output_indptr);
  if (in && out)
    check_segments(op, indices_of(*in), indices_of(*out), p.num_segments, p.num_elements, output_len);
  Tensor y = empty({output_len}, ScalarType::Byte, x);
  p.input = static_cast<const uint8_t*>(x.const_data_ptr());
  p.output = static_cast<uint8_t*>(y.mutable_data_ptr());
  run(FI_KERNEL_OF(packbits), x, p);
  return y;
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("packbits", TORCH_BOX(&fi::binding::packbits_op));
  m.impl("segment_packbits", TORCH_BOX(&fi::binding::segment_packbits_op));
}
