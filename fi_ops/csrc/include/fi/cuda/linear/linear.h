// Which instances of the streaming kernel there are, and what they ask for.
#pragma once

#include "fi/linear.h"

namespace fi::cuda {

// Linear layers of 16-bit elements whose rows start at 16-byte boundaries (the weight's `weight_stride` and
// in_features are multiples of 8).
template <class T>
void linear_stream(const LinearParams& p, const Gpu& gpu);

}  // namespace fi::cuda
