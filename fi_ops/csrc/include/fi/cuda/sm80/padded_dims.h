// The head dims that the kernels for many rows are compiled for; others are padded with zeros.
#pragma once

#include <cstdint>

namespace fi::cuda {

struct PaddedDims {
  int qk, vo;
};

inline bool can_pad(int64_t head_dim) { return head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0; }

inline PaddedDims padded_dims(int64_t qk, int64_t vo) {
  if (qk <= 64 && vo <= 64) return {64, 64};
  if (qk <= 128 && vo <= 128) return {128, 128};
  if (qk <= 192 && vo <= 128) return {192, 128};
  return {256, 256};
}

// Calls f.operator()<qk, vo>().
template <class F>
void with_padded_dims(PaddedDims dims, const F& f) {
  switch (dims.qk) {
    case 64:
      return f.template operator()<64, 64>();
    case 128:
      return f.template operator()<128, 128>();
    case 192:
      return f.template operator()<192, 128>();
    default:
      return f.template operator()<256, 256>();
  }
}

}  // namespace fi::cuda
