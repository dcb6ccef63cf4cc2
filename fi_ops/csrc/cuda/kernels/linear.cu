#include "fi/cuda/linear/linear.h"

#include "fi/cuda/linear/generic_kernel.h"

namespace fi::cuda {

void linear(const LinearParams& p, const Gpu& gpu) {
  const bool aligned = p.in_features % (16 / size_of(p.dtype)) == 0 &&
                       packs_fit(p.weight, p.dtype, {p.weight_stride}) &&
                       packs_fit(p.input, p.dtype, p.input_rows);
  // The streaming kernel's counts are ints, and so are a grid's.
  const bool small =
      p.in_features <= (1 << 30) && p.out_features <= (1 << 30) && p.input_rows.num_rows <= 8 * kMaxGridY;
  if (aligned && small && p.in_features > 0 && p.dtype == DType::bf16) return linear_stream<bf16>(p, gpu);
  if (aligned && small && p.in_features > 0 && p.dtype == DType::f16) return linear_stream<f16>(p, gpu);
  dispatch_pack(p.dtype, aligned, [&](auto t, auto pack) {
    launch_linear_generic<decltype(t), decltype(pack)::value>(p, gpu);
  });
}

}  // namespace fi::cuda
