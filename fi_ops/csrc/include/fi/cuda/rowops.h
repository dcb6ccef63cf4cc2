// What the host side of kernels over rows shares: the storage type and the pack size as template arguments,
// and the shapes of grids.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "fi/cuda/launch.h"
#include "fi/cuda/pack.h"
#include "fi/dispatch.h"
#include "fi/rows.h"

namespace fi::cuda {

// Calls f(T{}, N) with N the elements of a pack: 16 bytes' worth where `packs_fit`, else 1.
template <class F>
void dispatch_pack(DType dtype, bool packs_fit, const F& f) {
  dispatch_float(dtype, [&](auto t) {
    using T = decltype(t);
    if (packs_fit) {
      f(t, std::integral_constant<int, kPackSize<T>>{});
    } else {
      f(t, std::integral_constant<int, 1>{});
    }
  });
}

template <class F>
void dispatch_bool(bool value, const F& f) {
  if (value) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

// Whether rows at `p`, these strides (in elements) apart, all start at multiples of 16 bytes.
inline bool packs_fit(const void* p, DType dtype, std::initializer_list<int64_t> strides) {
  bool fit = reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (const int64_t stride : strides) fit = fit && stride * size_of(dtype) % 16 == 0;
  return fit;
}

inline bool packs_fit(const void* p, DType dtype, const Rows& rows) {
  bool fit = packs_fit(p, dtype, {});
  for (int d = 0; d < rows.ndim; ++d) fit = fit && rows.strides[d] * size_of(dtype) % 16 == 0;
  return fit;
}

FI_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FI_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline unsigned power_of_2_at_least(int64_t n) {
  unsigned p = 1;
  while (p < n) p *= 2;
  return p;
}

inline constexpr int kMaxThreads = 256;           // of a block, where the row's size doesn't ask for more
inline constexpr int64_t kMaxGridX = 2147483647;  // grids are that large at most in x, and in y and z:
inline constexpr int64_t kMaxGridY = 65535;

struct Shape {
  dim3 grid, block;
};

// Tokens x heads x pieces of a head's row: pieces along x, heads along y, tokens along z of a block; x of the
// grid goes over tokens, y over heads, so that a thread takes several heads of one token where there is work
// enough to fill the GPU so. The kernel strides by the block over pieces and by block and grid over heads.
inline Shape shape_over_heads(const Gpu& gpu, int64_t num_tokens, int64_t num_heads, int64_t pieces) {
  const int64_t x = smaller(pieces < 1 ? 1 : pieces, 64);
  const int64_t fill = int64_t{gpu.num_sms} * 2048;  // threads that the GPU can hold
  const int64_t per_thread = num_tokens * num_heads * x >= 8 * fill ? 4 : 1;
  const int64_t y_wanted = ceil_div(num_heads, per_thread);
  const int64_t y = ceil_div(y_wanted, ceil_div(y_wanted, kMaxThreads / x));  // even shares
  // Several tokens a block only once every SM has one.
  const int64_t z = smaller(smaller(kMaxThreads / (x * y), ceil_div(num_tokens, gpu.num_sms)), 64);
  return {dim3(static_cast<unsigned>(smaller(ceil_div(num_tokens, z), kMaxGridX)),
               static_cast<unsigned>(smaller(ceil_div(num_heads, y * per_thread), kMaxGridY))),
          dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z))};
}

}  // namespace fi::cuda
