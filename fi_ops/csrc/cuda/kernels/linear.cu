#include "fi/cuda/linear/linear.h"

#include "fi/cuda/linear/generic_kernel.h"

namespace fi::cuda {

void linear(const LinearParams& p, const Gpu& gpu) {
  if (linear_streams(p))
    return p.dtype == DType::bf16 ? linear_stream<bf16>(p, gpu) : linear_stream<f16>(p, gpu);
  const bool packs = p.in_features % (16 / size_of(p.dtype)) == 0 &&
                     packs_fit(p.weight, p.dtype, {p.weight_stride}) &&
                     packs_fit(p.input, p.dtype, p.input_rows);
  dispatch_pack(p.dtype, packs, [&](auto t, auto pack) {
    launch_linear_generic<decltype(t), decltype(pack)::value>(p, gpu);
  });
}

}  // namespace fi::cuda
