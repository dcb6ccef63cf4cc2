// The kernel for whatever the others don't take: its arguments and its instantiations
// (cuda/kernels/batch_generic*.cu).
#pragma once

#include "fi/cuda/batch/plan.h"

namespace fi::cuda::batch {

struct GenericArgs {
  BatchAttentionParams p;
  PlanView plan;
  bool segments, tiles;  // what of the plan it runs; with segments, the tokens of no request
  unsigned group;        // query heads of a KV head
  unsigned slices;       // of the output's columns
};

// One a dtype (host).
template <class T>
void run_generic(const GenericArgs& args, const Gpu& gpu);

// The entry (host).
void on_cuda_cores(const BatchAttentionParams& p, const PlanView& plan, bool segments, bool tiles,
                   const Gpu& gpu);

}  // namespace fi::cuda::batch
