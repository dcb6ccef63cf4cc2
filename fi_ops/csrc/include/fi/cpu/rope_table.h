// The angles of one position out of the table that attention's callers pass.
#pragma once

#include "fi/attention.h"
#include "fi/cpu/rope_row.h"

namespace fi::FI_ISA {

// Row `row` of batch b; `scratch` holds rope_angle_floats(rotary_dim) floats.
FI_INLINE RopeAngles rope_angles(const RopeTable& t, int64_t b, int64_t row, float* scratch) {
  const int64_t size = size_of(t.dtype);
  const char* cos = static_cast<const char*>(t.cos) + (b * t.cos_stride_b + row * t.cos_stride_row) * size;
  const char* sin = static_cast<const char*>(t.sin) + (b * t.sin_stride_b + row * t.sin_stride_row) * size;
  return load_rope_angles(cos, sin, t.dtype, t.width, t.rotary_dim, t.interleaved, scratch);
}

}  // namespace fi::FI_ISA
