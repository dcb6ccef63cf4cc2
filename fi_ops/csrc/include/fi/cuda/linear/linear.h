// The two ways to multiply, and what the faster one asks for.
#pragma once

#include "fi/cuda/rowops.h"
#include "fi/linear.h"

namespace fi::cuda {

// 16-bit elements in rows that start at 16-byte boundaries, the input's evenly spaced; counts that fit in an
// int and in a grid.
inline bool linear_streams(const LinearParams& p) {
  constexpr int64_t most = 1 << 30;
  return p.dtype != DType::f32 && p.in_features > 0 && p.in_features % 8 == 0 &&
         packs_fit(p.weight, p.dtype, {p.weight_stride}) && packs_fit(p.input, p.dtype, p.input_rows) &&
         p.input_rows.ndim <= 1 && p.in_features <= most && p.out_features <= most &&
         p.input_rows.num_rows <= 8 * kMaxGridY;
}

template <class T>
void linear_stream(const LinearParams& p, const Gpu& gpu);

}  // namespace fi::cuda
