// Up to 16 bytes of elements a memory instruction, as fp32 in registers.
//
// N is 16 bytes' worth of the storage type, with pointers aligned to 16 bytes, or 1 with no demand. A pack
// of another type than the one that N was chosen for (fp32 weights of a bf16 row) takes two instructions.
#pragma once

#include "fi/cuda/ptx.h"
#include "fi/scalar.h"

namespace fi::cuda {

// Elements of 16 bytes.
template <class T>
inline constexpr int kPackSize = 16 / sizeof(T);

// 16 bytes of T's as fp32.
template <class T>
FI_DEVICE_INLINE void unpack_16(float* x, const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 2) {
      const float2 two = unpack2<T>(words[w]);
      x[2 * w] = two.x;
      x[2 * w + 1] = two.y;
    } else {
      x[w] = __uint_as_float(words[w]);
    }
  }
}

template <int N, class T>
FI_DEVICE_INLINE void load_pack(float (&x)[N], const T* p) {
  if constexpr (N == 1) {
    x[0] = to_float(*p);
  } else {
#pragma unroll
    for (int first = 0; first < N; first += kPackSize<T>) unpack_16<T>(x + first, load_16(p + first));
  }
}

// N elements from element i of an array of float, bf16 or f16; not of a narrower type than N was chosen for.
template <int N>
FI_DEVICE_INLINE void load_pack_as(float (&x)[N], const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f32) {
    load_pack(x, static_cast<const float*>(p) + i);
  } else if constexpr (N == 1 || N == 8) {
    if (dtype == DType::bf16) {
      load_pack(x, static_cast<const bf16*>(p) + i);
    } else {
      load_pack(x, static_cast<const f16*>(p) + i);
    }
  }
}

template <int N, class T>
FI_DEVICE_INLINE void store_pack(T* p, const float (&x)[N]) {
  if constexpr (N == 1) {
    *p = from_float<T>(x[0]);
  } else {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (sizeof(T) == 2) {
        words[w] = pack2<T>(x[2 * w], x[2 * w + 1]);
      } else {
        words[w] = __float_as_uint(x[w]);
      }
    }
    store_16(p, uint4{words[0], words[1], words[2], words[3]});
  }
}

// Bit for bit.
template <int N, class T>
FI_DEVICE_INLINE void copy_pack(T* y, const T* x) {
  if constexpr (N == 1) {
    *y = *x;
  } else {
    store_16(y, load_16(x));
  }
}

}  // namespace fi::cuda
