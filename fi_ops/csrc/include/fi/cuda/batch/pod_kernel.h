// Prefill and decode in one launch: of every three blocks one does what few_kernel's do, and two what
// batch_tiles_kernel's do.
//
// Two blocks run on a multiprocessor: at first one of each kind, which is what this is for. As the decode's
// blocks end, those of the prefill that wait take their places.
#pragma once

#include <algorithm>

#include "fi/cuda/batch/few_kernel.h"
#include "fi/cuda/batch/pod.h"
#include "fi/cuda/sm80/batch_kernel.h"

namespace fi::cuda::batch {

struct PodArgs {
  FewArgs decode;
  BatchTilesArgs prefill;
  int warp_bytes, query_bytes;  // of a decoding block
};

template <class T, class Decode, class Prefill>
__global__ void __launch_bounds__(Prefill::kThreads, 2) pod_kernel(const __grid_constant__ PodArgs args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  if (blockIdx.y == 0) {
    few_block<T, Decode, /*kFixed=*/false>(args.decode, args.warp_bytes, args.query_bytes);
  } else {
    BatchTilesBlock<Prefill> block(args.prefill, *reinterpret_cast<typename Prefill::Smem*>(dynamic_smem()));
    block.run((blockIdx.y - 1) * gridDim.x + blockIdx.x, 2 * gridDim.x);
  }
}

// False: nothing is launched, since the two don't fit side by side on this GPU.
template <class T, int kDim>
bool run_pod(const FewArgs& decode, const BatchTilesArgs& prefill, const Gpu& gpu) {
  using Decode = FewWarp<T, kDim, Fp8::none, FewCall::kPlain>;
  using Prefill = BatchTilesConfig<T, kDim, kDim, /*kFp8=*/false, BatchFeatures::none>;
  const decode::BlockShape shape =
      decode::shape_of_block<Decode>(decode.p.call, gpu, sizeof(FewShared), /*wide=*/false);
  const size_t bytes = std::max(shape.all_bytes, sizeof(typename Prefill::Smem));
  if (shape.warps * 32 != Prefill::kThreads || 2 * (bytes + 1024) > size_t(gpu.max_block_smem) + 1024)
    return false;
  PodArgs args{decode, prefill, static_cast<int>(shape.warp_bytes), static_cast<int>(shape.query_bytes)};
  prepare_few<Decode, /*kFixed=*/false>(args.decode, gpu.num_sms);
  launch(gpu, pod_kernel<T, Decode, Prefill>, dim3(static_cast<unsigned>(gpu.num_sms), 3),
         dim3(Prefill::kThreads), bytes, /*overlap=*/true, args);
  return true;
}

}  // namespace fi::cuda::batch
